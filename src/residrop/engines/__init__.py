"""Training engines: compilers, CUDA graphs, data parallelism, and trainers of other libraries."""
