"""From a trained network to what is shipped: batch-norm statistics, plain modules, files."""
