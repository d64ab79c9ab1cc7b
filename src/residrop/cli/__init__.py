"""The command line. Each command is a module of its name here, with its options and `run(arguments, prog)`.

This file needs neither torch nor any optional package, so that help and mistyped commands are answered at once.
"""

import io
import os
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from residrop.cli.dispatch import dispatch
from residrop.common.errors import ConfigError, Interrupted, SaidElsewhere, UsageError
from residrop.common.extras import extra
from residrop.common.torchrun import rank, world_size

__all__ = ["main"]

_HELP = """usage: residrop COMMAND [OPTIONS]

Train residual networks whose blocks are randomly present, and predict with them.

commands:
  train        train one network, then evaluate it both ways           residrop train
  compare      several rules, same data, seeds and schedule            residrop compare --rules constant swapout
  evaluate     errors of a trained run, in expectation, sampled        residrop evaluate runs/digits-001
  predict      class, probability, uncertainty of image files          residrop predict runs/digits-001 photo.png
  recalibrate  fit batch norm to prediction in one pass                residrop recalibrate runs/digits-001
  shrink       a smaller plain network of a run's blocks               residrop shrink runs/digits-001
  export       write a run as a file without residrop                  residrop export runs/digits-001 --to model.onnx
  analyze      what random presence does to a network                  residrop analyze survival runs/digits-001
  check        read every image of a data source once                  residrop check folder:PATH
  recipes      list the papers' protocols, networks and rules          residrop recipes
  reproduce    tables and figures of the papers, beside ours           residrop reproduce swapout/table-2
  report       what was measured, as Markdown and one HTML page        residrop report
  bench        time against peers and limits, side by side             residrop bench skip --quick

residrop COMMAND --help explains every option. Without options, train and compare use the digits that come with
scikit-learn and take about a minute or a few on two cores.
"""

_RESEARCH = ("reproduce", "report", "bench")
_ON_RUNS = ("train", "compare", "evaluate", "predict", "recalibrate", "shrink", "export", "analyze")
_COMMANDS = (*_ON_RUNS, "check", "recipes", *_RESEARCH)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 2 for bad input, 130 for Ctrl-C).

    Of several processes that torchrun started, one prints, and one ends with the code of what happened to all.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    command = arguments[0] if arguments else ""
    try:
        if command in _COMMANDS and command != "train" and (size := world_size()) > 1:
            raise ConfigError(f"{command} runs in one process, but torchrun started {size}; leave torchrun out")
        with extra("research" if command in _RESEARCH else "train"), _limits_of_the_machine():
            return dispatch(__name__, "command", _COMMANDS, _HELP, arguments, "residrop")
    except SystemExit as stop:  # tyro has printed its help, or what is wrong with an option
        return int(stop.code or 0)
    except SaidElsewhere:
        return 0
    except UsageError as error:
        if rank() > 0:
            time.sleep(3.0)  # if rank 0 says the same, torchrun ends this process before it repeats it
        who = f"rank {rank()}: " if rank() > 0 else ""
        print(f"residrop: {who}error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as error:
        if rank() > 0:
            return 0
        print(f"residrop: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("residrop: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 0


@contextmanager
def _limits_of_the_machine() -> Generator[None, None, None]:
    """Turn what no check foresees into one line: files that cannot be read or written, and more than fits in memory."""
    try:
        yield
    except (UsageError, BrokenPipeError):
        raise
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        raise ConfigError(f"{where}{error.strerror or error}; name another file or folder, or make it usable") from None
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        # torch has no kind of its own for these
        signs = ("allocate memory", "out of memory", "Overflow when unpacking", "size calculation overflowed")
        if not isinstance(error, (MemoryError, OverflowError)) and not any(sign in str(error) for sign in signs):
            raise
        raise ConfigError(f"{_first_line(error)}: too large for this machine; give smaller numbers") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or "out of memory"
