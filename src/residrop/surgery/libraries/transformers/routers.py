"""Auxiliary losses over the routers of mixtures of experts, in models whose layers may be absent."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residrop.common.errors import PlanError
from residrop.surgery.blocks import AppliedBlock, Hooked, record_changes

__all__ = ["watch_routers"]

_LOSS = "load_balancing_loss_func"


def watch_routers(model: nn.Module, taken: Sequence[nn.Module]) -> None:
    """Look after the auxiliary loss of every model in `model` that computes one and has blocks under rules, until the
    first of `taken`, the blocks under rules, is given back."""
    for owner in model.modules():
        forward = inspect.unwrap(type(owner).forward)
        inner = getattr(owner, "base_model", None)
        experts = _experts(owner)
        balances = _LOSS in getattr(getattr(forward, "__code__", None), "co_names", ())
        if not balances or inner in (None, owner) or not experts:
            continue
        if any(isinstance(module, AppliedBlock) for module in owner.modules()):
            record_changes(taken[0], [Hooked(owner, _Masked(), before=True), Hooked(inner, _Absent(experts))])


def _experts(owner: Any) -> int | None:
    config: Any = getattr(owner, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = [(owner, "num_experts"), (config, "num_experts"), (config, "num_local_experts")]
    return next((found for where, name in places if isinstance(found := getattr(where, name, None), int)), None)


class _Masked:
    """Refuses what the loss cannot do: it has one mask for all layers, while rows differ from layer to layer."""

    def __call__(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(_names(type(owner)), args, strict=False)), **kwargs}
        wanted = given.get("output_router_logits")
        if wanted is None:
            wanted = getattr(owner.config, "output_router_logits", False)
        if not wanted or given.get("attention_mask") is None:
            return
        for module in owner.modules():
            if isinstance(module, AppliedBlock) and _cuts_rows(module):
                raise PlanError(
                    f"{type(owner).__name__} was given an attention mask and output_router_logits=True, but the mask "
                    "of its auxiliary loss cannot follow the live rows of each layer; use granularity='block', leave "
                    "attention_mask out where no token is padding, or use output_router_logits=False"
                )


def _names(owner: type[nn.Module]) -> list[str]:
    return list(inspect.signature(owner.forward).parameters)[1:]


def _cuts_rows(block: AppliedBlock) -> bool:
    rules: list[Any] = list(block.residrop_rules)
    return any(rule.granularity == "row" and rule.tosses() and rule.rates[0] < 1.0 for rule in rules)


class _Absent:
    """Where no router was called the loss would fail: it gets one that is balanced, and has no gradient."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def __call__(self, inner: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, dict) and output.get("router_logits") == ():
            hidden = next(one for one in output.values() if isinstance(one, Tensor))
            tokens = hidden.shape[:-1].numel()
            output["router_logits"] = (torch.zeros(tokens, self.experts, dtype=hidden.dtype, device=hidden.device),)
