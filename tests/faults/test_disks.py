"""Disks that are full, have no inodes or may not be written: one line, nothing lost, and a way on."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import seed

RECIPE = (
    *("--network", "resnet-8", "--limit", "200", "--epochs", "2", "--samples", "0", "--precision", "fp32"),
    *("--device", "cpu", "--quiet"),
)
WORKER = Path(__file__).parent / "workers" / "disks.py"
NAMESPACE = ["unshare", "-rm", "--propagation", "private"]


def namespaces():
    """Whether this machine lets one mount a tmpfs in a namespace of one's own."""
    if shutil.which("unshare") is None:
        return False
    probe = [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def cases_of(finished, disk, count):
    """Commands on disks, the same for the same seed."""
    draw = random.Random(seed(0))
    run = str(disk / "run")
    train = ["train", *RECIPE, "--out", run]
    compare = ["compare", *RECIPE, "--rules", "constant", "--out", run]
    report = ["report", run, "--html", str(disk / "report.html")]
    # (first, again, whether it starts from a finished run)
    commands = [
        (train, train, False),
        ([*train, "--resume"], train, "unfinished"),
        (["evaluate", run, "--samples", "2", "--curve"], ["evaluate", run, "--samples", "2", "--curve"], True),
        (report, report, True),
        (["recalibrate", run, "--batches", "1"], ["recalibrate", run, "--batches", "1"], True),
        (compare, compare, False),
        (["export", run, "--to", str(disk / "a.pt2")], ["export", run, "--to", str(disk / "a.pt2")], True),
    ]
    found = []
    for number in range(count):
        kind = ("size", "inodes", "read-only", "size")[number % 4]
        first, again, copied = commands[number % len(commands)]
        size = {"size": draw.choice([4096, 20_000, 60_000, 200_000, 400_000, 700_000, 1_000_000])}.get(kind, 0)
        size = draw.randrange(1, 12) if kind == "inodes" else size
        copied = {True: str(finished), False: None, "unfinished": str(finished.parent / "unfinished")}[copied]
        found.append(
            {"number": number, "kind": kind, "size": size, "first": first, "again": again, "copied": copied}
        )  # fmt: skip
    return found


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_disks(finished_plain, tmp_path, record_property, count):
    able = namespaces()
    cases = cases_of(finished_plain, tmp_path / "disk", count)
    command = [sys.executable, str(WORKER), str(tmp_path), "tmpfs" if able else "limit", json.dumps(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*NAMESPACE, *command] if able else command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights, tried, failed = (finished_plain / "model.safetensors").read_bytes(), 0, []
    for case, found in zip(cases, json.loads((tmp_path / "found.json").read_text()), strict=True):
        if found is None:
            continue
        tried += 1
        about = f"{case['kind']} {case['size']}, {case['first'][:2]}"
        (code, said), (again, said_again) = found["answers"]
        lines = [line for line in said.splitlines() if line.strip() and not line.startswith("without curves: ")]
        if code not in (0, 2) or (code == 2 and not (len(lines) == 1 and lines[0].startswith("residrop: error: "))):
            failed.append(f"{about}: {code}, {said}")
        if again != 0:
            failed.append(f"{about}: no way on: {again}, {said_again}")
        if found["left"]:
            failed.append(f"{about}: left {found['left']}")
        model = tmp_path / f"model-{case['number']}"
        if case["first"][0] == "train" and model.read_bytes() != weights:
            failed.append(f"{about}: other weights")
    record_property("tried", tried)
    assert not failed, "\n".join(failed)
    if tried < count:
        pytest.skip(f"{tried} of {count} tried, with limits on files: no tmpfs can be mounted in a namespace here")
