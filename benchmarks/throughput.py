"""Images per second of training, against limits: `residrop bench throughput` from a checkout.

python benchmarks/throughput.py --quick
python benchmarks/throughput.py --json results/throughput.json
"""

import sys

from residrop.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "throughput", *sys.argv[1:]]))
