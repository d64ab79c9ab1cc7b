"""Samples of any model share the blocks before their draws first differ: a block gives its last output again.

This is the tree of samples (`residrop.inference.sampled.tree`) for models that are called as a whole: they are taken in
the order of their coins, and one output a block is remembered.
"""

from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from residrop.blocks.attach import rules_of
from residrop.blocks.skippable import Skippable
from residrop.inference.sampled.pieces import is_certain
from residrop.schedule.sampler import Plan

__all__ = ["Memo", "remembering"]

_PLAIN = (Tensor, bool, int, float, str, type(None))


def _versions(value: Any) -> list[int]:
    """How often every tensor in a value has been written."""
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _is_inference(leaf: Any) -> bool:
    """Whether it does not tell who writes into it."""
    return isinstance(leaf, Tensor) and leaf.is_inference()


class _Output:
    """What a block gave."""

    def __init__(self, forward: Any, args: Any, kwargs: Any, calls: Counter[nn.Module]) -> None:
        before, called = _versions((args, kwargs)), calls.copy()
        self.value = forward(*args, **kwargs)
        self.inner = calls - called  # blocks that it has called
        self._overwrites = _versions((args, kwargs)) != before
        self._versions = _versions(self.value)

    def fresh(self) -> bool:
        """Whether it is all that the block did, and nobody has written into it since."""
        return not self._overwrites and _versions(self.value) == self._versions


class Memo:
    """What the blocks of a model gave in the last pass. Every pass has to be announced to `begin`.

    Args:
        restless: modules that give something else in every pass (sampled dropout).
    """

    def __init__(self, restless: Set[nn.Module] = frozenset()) -> None:
        self._restless = restless
        self._outputs: dict[tuple[nn.Module, int], _Output] = {}
        self._plan: Plan | None = None
        self._before: Plan | None = None
        self._calls = Counter[nn.Module]()
        self._same = False

    def begin(self, plan: Plan) -> None:
        """A pass with these draws comes next, on the same input as the last one."""
        self._before, self._plan = self._plan, plan
        self._same = self._before is not None
        self._calls.clear()

    def forget(self) -> None:
        """From here on, this pass has nothing in common with the last one."""
        self._same = False

    def call(self, block: nn.Module, forward: Any, rules: list[int], *args: Any, **kwargs: Any) -> Any:
        """The forward of a block, or what it gave when all draws up to its own were the same."""
        place = block, self._calls[block]
        self._calls[block] += 1
        if self._same:
            assert self._before is not None
            assert self._plan is not None
            old, new = self._before.draws, self._plan.draws
            self._same = all(old[rule] == new[rule] or is_certain(new[rule]) for rule in rules)
            self._same = self._same and self._restless.isdisjoint(block.modules())
        # a block that is given a cache, say, does more than to give an output
        leaves = tree_leaves((args, kwargs))
        if not all(isinstance(leaf, _PLAIN) and not _is_inference(leaf) for leaf in leaves):
            return forward(*args, **kwargs)
        kept = self._outputs.get(place) if self._same else None
        if kept is None or not kept.fresh():
            kept = self._outputs[place] = _Output(forward, args, kwargs, self._calls)
        else:
            self._calls += kept.inner
        return kept.value


@contextmanager
def remembering(model: nn.Module, restless: Set[nn.Module] = frozenset()) -> Iterator[Memo | None]:
    """Inside, blocks with rules ask a memo first; see `Memo`.

    None where a compiler would look into them, and in inference mode, where tensors do not tell who writes into them.
    """
    if torch.is_inference_mode_enabled() or any(module._compiled_call_impl is not None for module in model.modules()):
        yield None
        return
    memo = Memo(restless)
    blocks = [module for module in model.modules() if isinstance(module, Skippable) and module is not model]
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            indexes = [rule.index for rule in rules_of(block)]
            block.__dict__["forward"] = partial(memo.call, block, block.forward, indexes)
        yield memo
    finally:
        for block, own in before:
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own
