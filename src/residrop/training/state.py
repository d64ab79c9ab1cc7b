"""Everything that changes along a training, saved and restored."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from residrop.blocks.attach import sampler_of, set_survival
from residrop.common.errors import RunError
from residrop.engines.distributed import GradientSync
from residrop.training.checkpoint import Run
from residrop.training.distributed import ALONE, Ranks
from residrop.training.networks import load_weights
from residrop.training.update import RecordedUpdate

__all__ = ["State"]

_NUMBERS = ("update", "seconds", "epoch_seconds", "depth", "best")
_LINES = {"history": ("epoch",), "survival": ("epoch", "rates"), "instruments": ("epoch",)}


@dataclass
class State:
    """Everything that changes along a training. `sums` collects loss and errors of the epoch on the device.

    With several `ranks`, `sync` is the handle of `data_parallel`, and `sums` are those of this rank. `gradient` is
    the mean |gradient| of the first weights of block 1, the same on all ranks, over updates in which it is present.
    `recorded` makes updates of full batches as one CUDA graph, which reads and writes these tensors where they are.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ranks: Ranks = ALONE
    recorded: RecordedUpdate | None = None
    sync: GradientSync | None = None
    update: int = 0
    seconds: float = 0.0  # training time of all epochs, evaluation excluded
    epoch_seconds: float = 0.0
    depth: float = 0.0  # summed over the updates of this epoch
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    gradient: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))  # sum, and updates summed
    best: float = math.inf
    history: list[dict[str, Any]] = field(default_factory=list)
    survival: list[dict[str, Any]] = field(default_factory=list)  # rates measured so far, see `measuring`
    instruments: list[dict[str, Any]] = field(default_factory=list)
    average: list[Tensor] | None = None  # of the parameters over the updates, if the recipe has an `ema`
    notes: list[str] = field(default_factory=list)  # what a user should know of the start

    def save(self, run: Run) -> None:
        """Write everything needed to resume, on any number of ranks; called by all."""
        sums = self.ranks.total(self.sums)
        self.ranks.from_main(
            lambda: run.save_state(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "sampler": sampler_of(self.model).state_dict(),
                    **{name: getattr(self, name) for name in (*_NUMBERS, *_LINES)},
                    "sums": sums.cpu(),
                    "gradient": self.gradient.cpu(),
                    **({} if self.average is None else {"average": self.average}),
                }
            )
        )

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        """Continue from what `save` wrote to `path`; RunError if it is something else."""
        try:
            _check(saved)
            load_weights(self.model, saved["model"])
            self._restore_optimizer(saved["optimizer"])
            sampler = sampler_of(self.model)
            if saved["sampler"] != {"seed": sampler.seed, "step": saved["update"]}:
                raise ValueError(f"its draws are {saved['sampler']!r}")
            sampler.load_state_dict(saved["sampler"])
            for name in (*_NUMBERS, *_LINES):
                setattr(self, name, saved[name])
            _copy(self.sums, saved["sums"], "sums", keep=self.ranks.main)
            _copy(self.gradient, saved["gradient"], "gradient")
            if self.average is not None:
                for one, values in zip(self.average, saved["average"], strict=True):
                    _copy(one, values, "average")
            if self.survival:
                set_survival(self.model, self.survival[-1]["rates"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = " ".join(str(error).split())[:300]
            raise RunError(f"{path} is not the state of this run ({what}); delete it to start this run anew") from None

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        """Momentum stays in the tensors that a CUDA graph may know."""
        name = "momentum_buffer"
        before = {one: state[name] for one, state in self.optimizer.state.items() if name in state}
        options = [_options(group) for group in self.optimizer.param_groups]
        for group in saved["param_groups"]:
            group.setdefault("scale", 1.0)  # which earlier versions did not have
        self.optimizer.load_state_dict(saved)
        for wanted, group in zip(options, self.optimizer.param_groups, strict=True):
            found = _options(group)
            if wrong := [key for key in wanted if found.get(key, wanted[key]) != wanted[key]]:
                raise ValueError(f"{wrong[0]} of its optimizer is {found[wrong[0]]}, here {wanted[wrong[0]]}")
        for one, buffer in before.items():
            _copy(buffer, self.optimizer.state[one]["momentum_buffer"], "momentum")
            self.optimizer.state[one]["momentum_buffer"] = buffer


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What decides how a group of an optimizer's parameters moves; lr is set at every update."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


def _check(saved: dict[str, Any]) -> None:
    """Raise ValueError unless numbers are numbers, and lines are lines."""
    for name in _NUMBERS:
        value = saved[name]
        if isinstance(value, bool) or not isinstance(value, int if name == "update" else int | float) or value < 0:
            raise ValueError(f"its {name} is {value!r}")
    for name, keys in _LINES.items():
        lines = saved[name]
        if not isinstance(lines, list) or not all(isinstance(one, dict) and {*keys} <= one.keys() for one in lines):
            raise ValueError(f"its {name} holds no lines")


def _copy(target: Tensor, values: Any, what: str, keep: bool = True) -> None:
    """Copy a saved tensor of the same shape; zeros unless `keep`."""
    if not isinstance(values, Tensor) or values.shape != target.shape:
        raise ValueError(f"its {what} is not of shape {tuple(target.shape)}")
    target.copy_(values if keep else torch.zeros_like(values))
