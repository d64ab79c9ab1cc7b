"""The residual block, and how a model of such blocks is connected to its draws."""
