"""Gates: the presence delta_l of every block as a number to differentiate by, on any model with rules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from residrop.blocks.attach import rules_of, sampler_of, using
from residrop.blocks.modes import keeping_modes
from residrop.common.errors import ConfigError
from residrop.engines.distributed.gradients import without_other_ranks
from residrop.rules.base import Rule
from residrop.rules.executor import EAGER

__all__ = ["check_independent", "gated", "kept_as_is"]

Map = Callable[..., Tensor]


class _Gate(Rule):
    """shortcut(x) + delta_l branch(x), in place of what the rule itself does."""

    def forward(
        self,
        x: Tensor,
        shortcut: Map,
        branch: Map,
        *earlier: Tensor,
        post: Map | None = None,
        along: Sequence[Any] = (),
    ) -> Tensor:
        gate: Tensor = self.__dict__["_gate"]
        if gate.ndim:
            gate = gate.view(-1, *[1] * (x.ndim - 1))
        y = shortcut(x) + gate.to(x.dtype) * branch(x, *along)
        return y if post is None else post(y)

    def cuts_rows(self) -> bool:
        return False

    def extra_repr(self) -> str:
        return "gated"


def check_independent(model: nn.Module) -> None:
    """ConfigError if the model's draws are coupled, or its forwards whole: for what is derived for independent coins
    and forwards that leave branches out."""
    for rule in rules_of(model):
        if rule.runs_absent:
            raise ConfigError(
                f"forwards of {type(model).__name__} are whole ({type(rule).__name__}), and this is derived for those "
                "that leave branches out; give rates=... to have it for stochastic depth"
            )
        if rule.sampler is not None and rule.sampler.coupling != "independent":
            raise ConfigError(
                f"the draws of {type(model).__name__} are coupled ({rule.sampler.coupling}), and this is derived for "
                "independent coins; give rates=... to have it for those, or attach the model without coupling"
            )


@contextmanager
def gated(model: nn.Module, gates: Tensor) -> Iterator[None]:
    """Inside, every block of `model` computes shortcut + delta_l branch, with delta_l from `gates`.

    All branches run (delta_l = 0 makes one count for nothing), no coin is tossed and no step advances, so training goes
    on afterwards as if nothing had been. Whatever the rules are: delta = 1 is the plain network, delta = p its average.

    Args:
        model: a model with rules, of `residrop.create` or after `residrop.apply`.
        gates: Tensor[L], or Tensor[n, L] for gates of each of the n rows by itself; may require a gradient.

    Raises:
        ConfigError: another number of gates than of rules, or a model that is compiled.
    """
    rules = rules_of(model)
    if not rules or gates.shape[-1] != len(rules) or gates.ndim not in (1, 2):
        raise ConfigError(
            f"gates have shape {tuple(gates.shape)}, and {type(model).__name__} has {len(rules)} rules; "
            "give Tensor[L] or Tensor[n, L]"
        )
    if any(rule.executor is not EAGER for rule in rules) or getattr(model, "_compiled_call_impl", None) is not None:
        raise ConfigError(f"{type(model).__name__} is compiled; measure a copy of it, which is not (copy.deepcopy)")
    classes = [type(rule) for rule in rules]
    with using(model, sampler_of(model).expectation()):
        try:
            for number, rule in enumerate(rules):
                rule.__class__ = _Gate
                vars(rule)["_gate"] = gates[..., number]  # no attribute proper: it may be a parameter
            yield
        finally:
            for rule, kind in zip(rules, classes, strict=True):
                rule.__class__ = kind
                vars(rule).pop("_gate", None)


@contextmanager
def kept_as_is(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside, batch norm is in training mode or not, as asked, and dropout is off; then all is as it was before.

    Flags, buffers and gradients of parameters are put back. Other ranks of `data_parallel` are not asked for anything.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.callback(_put_back, buffers, grads)
        stack.enter_context(keeping_modes(model))
        stack.enter_context(without_other_ranks(model))
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.training = False
        yield


def _put_back(buffers: list[tuple[Tensor, Tensor]], grads: list[tuple[nn.Parameter, Tensor | None]]) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    for parameter, grad in grads:
        parameter.grad = grad
