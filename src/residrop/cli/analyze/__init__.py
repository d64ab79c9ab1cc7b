"""`residrop analyze`: the instruments of `residrop.theory` on a run, a model by name or a Vanilla network.

Each instrument is a module of its name here, with its options and `run(arguments, prog)`.
"""

from collections.abc import Sequence

from residrop.cli.dispatch import dispatch

__all__ = ["run"]

_HELP = """usage: residrop analyze INSTRUMENT [TARGET] [OPTIONS]

What random presence does to a network, and which blocks a budget should be spent on.

instruments:
  depth         live blocks and work of a step: exact laws          residrop analyze depth resnet-110
  survival      rates for a budget in every mode, and why           residrop analyze survival runs/digits-001
  gradients     growth towards the input; a run's first gradients   residrop analyze gradients vanilla-50
  discrepancy   what the absence of each block does to the loss     residrop analyze discrepancy torchvision:resnet18
  noise         is the noise of random presence Gaussian            residrop analyze noise stable-vanilla-100

TARGET is a run directory, a network of residrop (residrop recipes --networks), or torchvision:NAME or timm:NAME.
Each prints a table and draws a picture; residrop analyze INSTRUMENT --help explains its options.
"""


def run(arguments: Sequence[str], prog: str) -> int:
    """Run the instrument that the first argument names."""
    names = ("depth", "survival", "gradients", "discrepancy", "noise")
    return dispatch(__name__, "instrument", names, _HELP, arguments, prog)
