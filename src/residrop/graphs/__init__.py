"""Training passes as CUDA graphs: Python tosses the coins, the GPU gets its work in a few launches."""

from residrop.graphs.blocks import record_blocks
from residrop.graphs.passes import record_pass

__all__ = ["record_blocks", "record_pass"]
