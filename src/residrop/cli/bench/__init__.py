"""`residrop bench`: each benchmark is a module of its name here, with its options and `run(arguments, prog)`."""

from collections.abc import Sequence

from residrop.cli.dispatch import dispatch

__all__ = ["run"]

_HELP = """usage: residrop bench NAME [OPTIONS]

benchmarks:
  skip       time and memory of skipping, against masks and the ideal     residrop bench skip --quick
  swapout    cost of swapout, against the addition it replaces            residrop bench swapout --quick
  inference  cost of sampled inference, against passes one by one         residrop bench inference --quick
  throughput images/s of training, against a plain loop and convolutions  residrop bench throughput --quick

residrop bench NAME --help explains every option.
"""


def run(arguments: Sequence[str], prog: str) -> int:
    """Run the benchmark that the first argument names."""
    return dispatch(__name__, "benchmark", ("skip", "swapout", "inference", "throughput"), _HELP, arguments, prog)
