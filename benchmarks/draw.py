"""Microseconds that the plan of a step costs, for 54 blocks at most 50: python benchmarks/draw.py [--json FILE]."""

import argparse
import time
from pathlib import Path
from statistics import median

from residrop.research import ledger
from residrop.schedule.sampler import DepthSampler, Site
from residrop.schedule.survival import linear_decay

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--blocks", type=int, default=54)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()

rows = []
for granularity in ("block", "row", "unit"):
    for timing in ("constant", "warmup(1000000)"):
        sites = [Site((rate,), granularity) for rate in linear_decay(arguments.blocks, 0.5)]
        sampler = DepthSampler(sites, timing=timing)
        times = []
        for batch in range(30):
            started = time.perf_counter()
            for step in range(200):
                sampler.plan(200 * batch + step)
            times.append((time.perf_counter() - started) / 200)
        row = {
            "granularity": granularity,
            "timing": timing,
            "blocks": arguments.blocks,
            "microseconds": 1e6 * median(times),
        }
        rows.append(row)
        print(f"{granularity:<6} {timing:<16} {row['microseconds']:6.1f} us a plan of {arguments.blocks} blocks")
if arguments.json:
    command = f"python benchmarks/draw.py --blocks {arguments.blocks}"
    ledger.save(arguments.json, "Time to plan one step", command, rows)
