"""Skipping against its peers and against the ideal: `residrop bench skip` from a checkout.

python benchmarks/skip.py --quick
python benchmarks/skip.py --json results/skip.json
"""

import sys

from residrop.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "skip", *sys.argv[1:]]))
