"""Memory that is kept from step to step: counted in pages that the system had to fill."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from residrop.training.memory import keep_memory

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
COUNT = """
import resource, sys, torch
from residrop.training.memory import keep_memory

done = sys.argv[1] == "keep" and keep_memory(torch.device("cpu"))
torch.set_num_threads(1)
counts = []
for step in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(done, sorted(counts)[8])
"""


def pages(word, **environment):
    """Whether memory is kept, and the median of the pages filled for one of sixteen tensors of 40 MiB.

    The first few may find their block cut by a small neighbour and ask for another one; that is not what is counted.
    """
    found = subprocess.run(
        [sys.executable, "-c", COUNT, word],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    done, count = found.stdout.split()
    return done == "True", int(count)


@GLIBC
@pytest.mark.slow
def test_kept_memory_is_not_filled_again():
    done, count = pages("keep")
    assert done
    assert count < 100
    assert pages("leave")[1] > 10 * max(1, count)


@GLIBC
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_what_the_environment_has_chosen_stays(name):
    assert pages("keep", **{name: "131072"})[0] is False


def test_other_devices_are_left_alone():
    assert keep_memory(torch.device("cuda")) is False
