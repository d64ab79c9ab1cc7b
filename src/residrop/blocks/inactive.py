"""Warnings about rules that are in place but change nothing: silent no-ops are as common as crashes."""

import warnings

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from residrop.common.errors import InactiveWarning
from residrop.schedule.sampler import DepthSampler

__all__ = ["EvalWatch", "warn_if_certain"]

UPDATES = 8  # a model tuned in eval mode on purpose for a step or two is nobody's mistake


def warn_if_certain(sampler: DepthSampler, what: str, stacklevel: int = 2) -> None:
    """Warn if no coin of a sampler can leave anything out: there are rates, and all of them are 1.

    Args:
        sampler: as made for the rules of a model.
        what: the call that put them in place.
        stacklevel: as in `warnings.warn`, seen from the caller.
    """
    rates = [rate for site in sampler.sites for rate in site.rates]
    if rates and min(rates) == 1.0:
        message = f"{what} leaves nothing out: all {len(rates)} survival rates are 1; give survival below 1, or no rule"
        warnings.warn(message, InactiveWarning, stacklevel=stacklevel + 1)


class EvalWatch:
    """Notices that a model is trained in eval mode, where the coins of its rules are replaced by their means.

    What tells training from the gradients of, say, a saliency map is that parameters change between one backward pass
    and the next. After 8 such passes, if no training forward has drawn until then, it warns, once.
    """

    def __init__(self, sampler: DepthSampler) -> None:
        self._sampler = sampler
        self._updates, self._version = 0, -1
        self._draws = any(site.rates for site in sampler.sites)

    def after_forward(self, module: nn.Module, output: object) -> None:
        """Look at the outputs of a forward of the root outside of any plan."""
        if not self._draws or module.training or self._sampler.step > 0 or self._updates >= UPDATES:
            return
        leaf = next(
            (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None), None
        )
        if leaf is not None and leaf.grad_fn is not None and torch.is_grad_enabled():
            leaf.grad_fn.register_prehook(lambda grads: self._backward(module))

    def _backward(self, module: nn.Module) -> None:
        version = sum(parameter._version for parameter in module.parameters() if parameter.requires_grad)
        if version == self._version or self._sampler.step > 0 or self._updates >= UPDATES:
            return
        self._version = version
        self._updates += 1
        if self._updates == UPDATES:
            warnings.warn(
                f"{type(module).__name__} is being trained in eval mode: parameters changed over {UPDATES} backward "
                "passes and no coin was ever tossed, so its rules leave nothing out; call model.train() first",
                InactiveWarning,
                stacklevel=2,
            )
