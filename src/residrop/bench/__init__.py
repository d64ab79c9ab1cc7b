"""Measurements against peers and limits, side by side in one process: what `residrop bench` runs."""

from residrop.bench.networks import network as network
from residrop.bench.skip import MODELS as MODELS
from residrop.bench.skip import Comparison as Comparison
from residrop.bench.skip import Settings as Settings
from residrop.bench.skip import bench_skip as bench_skip
from residrop.bench.verify import verify as verify
