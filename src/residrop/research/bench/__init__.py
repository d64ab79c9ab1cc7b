"""Measurements against peers and limits, side by side in one process: what `residrop bench` runs."""

from residrop.common.extras import extra

with extra("research"):
    from residrop.research.bench.networks import network as network
    from residrop.research.bench.skip import MODELS as MODELS
    from residrop.research.bench.skip import Comparison as Comparison
    from residrop.research.bench.skip import Settings as Settings
    from residrop.research.bench.skip import bench_skip as bench_skip
    from residrop.research.bench.verify import verify as verify
