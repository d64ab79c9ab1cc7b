"""Shared set-up of the whole suite: paths, threads and seeds."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Under --import-mode=importlib nothing is importable by name; this makes `helpers`, `reference` and `conformance` so.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("helpers", "conformance")

from helpers import UNLOCKED, seed  # noqa: E402
from residrop.functional import use_compiler  # noqa: E402

settings.register_profile(
    "residrop",
    derandomize=not UNLOCKED,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("residrop")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tensors of these tests are small, and pytest-xdist runs one process per core


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    value = seed(0)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - the global generator is what must not leak between tests
    torch.manual_seed(value)


@pytest.fixture(autouse=True)
def _no_compiler() -> None:
    use_compiler(False)  # or it would be started in whichever test has the 2^30th unit
