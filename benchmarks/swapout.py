"""Swapout against the addition it replaces: `residrop bench swapout` from a checkout.

python benchmarks/swapout.py --quick
python benchmarks/swapout.py --json results/swapout.json
"""

import sys

from residrop.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "swapout", *sys.argv[1:]]))
