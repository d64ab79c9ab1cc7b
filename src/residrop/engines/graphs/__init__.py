"""Training passes as CUDA graphs: Python tosses the coins, the GPU gets its work in a few launches."""

from residrop.engines.graphs.blocks import record_blocks
from residrop.engines.graphs.passes import WholePass, record_pass
from residrop.engines.graphs.segment import Capture, CudaCapture

__all__ = ["Capture", "CudaCapture", "WholePass", "record_blocks", "record_pass"]
