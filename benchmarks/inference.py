"""Sampled inference against passes made one by one: `residrop bench inference` from a checkout.

python benchmarks/inference.py --quick
python benchmarks/inference.py --json results/inference.json
"""

import sys

from residrop.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "inference", *sys.argv[1:]]))
