"""What was tried against run directories, files and command lines: python benchmarks/faults.py [--json FILE].

Runs the fault-injection suite (tests/faults) in full and counts its cases: kills, full disks, two writers, damaged run
files and parquet files, random command lines. It takes about an hour on two cores; give --sample for the short part
that runs by default.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from residrop.research import ledger

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--sample", action="store_true", help="only what the default test run tries")
parser.add_argument("--workers", type=int, default=2, help="tests at a time")
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()

FAULTS = {  # by test file
    "test_kills": "trainings and comparisons killed, then resumed to the same weights",
    "test_disks": "full, read-only or exhausted disks",
    "test_writers": "two writers on one place",
    "test_run_files": "damaged files of run directories",
    "test_parquet": "damaged parquet files",
    "test_command_lines": "random command lines",
}
ROOT = Path(__file__).parents[1]

with tempfile.TemporaryDirectory() as folder:
    report = Path(folder) / "report.xml"
    marks = "not slow and not gpu" if arguments.sample else "not gpu"
    options = ["-q", "-n", str(arguments.workers), "-m", marks, "-p", "no:cacheprovider", f"--junitxml={report}"]
    tests = [sys.executable, "-m", "pytest", "tests/faults", *options, "--timeout", "3600"]
    print(subprocess.run(tests, cwd=ROOT, check=False, capture_output=True, text=True).stdout[-3000:])
    cases = list(ElementTree.parse(report).iter("testcase"))

tried, failed, skipped = Counter(), Counter(), Counter()
for case in cases:
    name = Path(case.get("file", "")).stem
    found = case.find(".//property[@name='tried']")
    count = 1 if found is None else int(found.get("value", "1"))
    if case.find("skipped") is not None:
        skipped[name] += 1
    else:
        tried[name] += count
        failed[name] += case.find("failure") is not None or case.find("error") is not None
rows = [
    {"fault": text, "tried": tried[name], "failed_tests": failed[name], "skipped_tests": skipped[name]}
    for name, text in FAULTS.items()
]
for row in rows:
    rest = f"{row['tried']:>6} tried, {row['failed_tests']} tests failed, {row['skipped_tests']} skipped"
    print(f"{row['fault']:<68} {rest}")
if unknown := tried.keys() - FAULTS.keys():
    sys.exit(f"test files without a name here: {', '.join(sorted(unknown))}")
if arguments.json:
    command = "python benchmarks/faults.py" + (" --sample" if arguments.sample else "")
    ledger.save(arguments.json, "What was tried against run directories, files and command lines", command, rows)
