"""What may listen to a training: the protocol of callbacks, which the loggers of `--log` are written with."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from residrop.common.errors import RunError, UsageError
from residrop.training.checkpoint import Run

if TYPE_CHECKING:
    from residrop.training.run import Outcome

__all__ = ["Callback", "listening"]

Line = Mapping[str, Any]


class Callback:
    """Base of what listens to a training: override what you need, and give instances to `train(callbacks=[...])`.

    Methods are called on rank 0, in the order of the list. An error in one of them ends the training (as a RunError
    that names the callback); the state that was saved before can be resumed.
    """

    def on_start(self, run: Run, history: Sequence[Line]) -> None:
        """Before the first update.

        Args:
            run: the run directory.
            history: lines of the epochs done before, if the run is resumed. The last one may have come to `on_epoch`
                or not: a process may have been killed between saving the state and telling of it.
        """

    def on_epoch(self, line: Line, model: nn.Module) -> None:
        """After an epoch, as soon as its state is saved.

        Args:
            line: as in metrics.jsonl: `epoch` (counted from 1), `lr`, `train_loss`, `train_error` (percent),
                `realised_depth` and `expected_depth` (blocks), `seconds`, `images_per_second`; in epochs that are
                evaluated also `test_error`, `test_nll` and the same of validation.
            model: the network as trained (not the moving average); leave it as it is.
        """

    def on_finish(self, outcome: "Outcome") -> None:
        """After the final evaluation; also where a finished run is only evaluated again."""

    def on_close(self) -> None:
        """At the end, whether the training finished, was stopped or failed; only if it came to `on_start`. An error is
        a warning, which leaves the training as it is."""


@contextmanager
def listening(callbacks: Sequence[Callback]) -> Iterator[Callable[..., None]]:
    """A function that calls the method of this name of all callbacks; those that were started are closed in the end."""
    started: list[Callback] = []

    def tell(method: str, *values: Any) -> None:
        for one in callbacks:
            if method == "on_start":
                started.append(one)
            try:
                getattr(one, method)(*values)
            except UsageError:
                raise
            except Exception as error:  # on other ranks nobody would know
                what = f"{type(one).__name__}.{method} failed ({type(error).__name__}: {error})"
                raise RunError(f"{what}; mend it, then continue the run with --resume") from error

    try:
        yield tell
    finally:
        for one in started:
            try:
                one.on_close()
            except Exception as error:
                what = f"{type(one).__name__}.on_close failed ({type(error).__name__}: {error})"
                warnings.warn(what, RuntimeWarning, stacklevel=2)
