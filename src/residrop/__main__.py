"""`python -m residrop` is the command `residrop`."""

import sys

from residrop.cli import main

if __name__ == "__main__":
    sys.exit(main())
