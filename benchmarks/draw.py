"""Microseconds that the plan of a step costs, for 54 blocks at most 50: python benchmarks/draw.py [--json FILE]."""

import argparse
import time
from pathlib import Path
from statistics import median

from residrop.research import ledger
from residrop.schedule.sampler import DepthSampler, Site
from residrop.schedule.survival import linear_decay

TIMINGS, COUPLINGS = ("constant", "warmup(1000000)"), ("systematic", "balanced", "apart")
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--blocks", type=int, default=54)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()

KINDS = [
    *((granularity, timing, "independent") for granularity in ("block", "row", "unit") for timing in TIMINGS),
    *((granularity, "constant", coupling) for granularity in ("block", "row") for coupling in COUPLINGS),
]
rows = []
samplers = []
for granularity, timing, coupling in KINDS:
    sites = [Site((rate,), granularity) for rate in linear_decay(arguments.blocks, 0.5)]
    costs = [1.0 + number % 5 for number in range(arguments.blocks)] if coupling == "balanced" else ()
    samplers.append((DepthSampler(sites, timing=timing, coupling=coupling, costs=costs), list[float]()))
for batch in range(30):  # in turns, so that a change of the machine's clock favours none
    for sampler, times in samplers:
        started = time.perf_counter()
        for step in range(200):
            sampler.plan(200 * batch + step)
        times.append((time.perf_counter() - started) / 200)
for (granularity, timing, coupling), (_, times) in zip(KINDS, samplers, strict=True):
    row = {"granularity": granularity, "timing": timing, "coupling": coupling, "blocks": arguments.blocks}
    row["microseconds"] = 1e6 * median(times)
    rows.append(row)
    what = f"{granularity:<6} {timing:<16} {coupling:<12}"
    print(f"{what} {row['microseconds']:6.1f} us a plan of {arguments.blocks} blocks")
if arguments.json:
    command = f"python benchmarks/draw.py --blocks {arguments.blocks}"
    ledger.save(arguments.json, "Time to plan one step", command, rows)
