"""The residual blocks of a model as what a sub-network may leave out."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residrop.blocks.attach import connect, in_expectation, rules_of, using
from residrop.blocks.modes import evaluating
from residrop.blocks.residual import Residual
from residrop.blocks.skippable import Skippable
from residrop.common.errors import ConfigError
from residrop.inference.deploy.folding import without_hooks
from residrop.inference.sampled.batch import Batch
from residrop.rules.depth import ConstantDepth, StochasticDepth
from residrop.schedule.sampler import Plan
from residrop.subnetworks.shortcuts import shortcut_of
from residrop.surgery.apply import apply, remove
from residrop.surgery.blocks import AppliedBlock
from residrop.theory.gates import kept_as_is

__all__ = ["Block", "Data", "Loss", "Whole", "pairs_of", "put_rules", "without_extras"]

Loss = Callable[[Any, Any], Tensor]
Data = Sequence[tuple[Any, Any]]  # inputs as `Batch` takes them, and targets


def pairs_of(batches: Iterable[Any], loss: Loss | None) -> tuple[Data, Loss]:
    """Batches as pairs of inputs and target, and the loss of an output and a target.

    Args:
        batches: pairs, or mappings of arguments by name.
        loss: None is cross entropy for pairs, and what the model itself gives as `loss` for mappings.

    Raises:
        ConfigError: no batch, or one that is neither.
    """
    found: list[tuple[Any, Any]] = []
    if not isinstance(batches, Iterable):
        raise ConfigError(f"batches is a {type(batches).__name__}; give several batches")
    for batch in batches:
        if isinstance(batch, Mapping):
            found.append((batch, None))
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            found.append((batch[0], batch[1]))
        else:
            raise ConfigError(
                f"a batch is a {type(batch).__name__}; give pairs of inputs and target, or dicts of arguments by name"
            )
    if not found:
        raise ConfigError("no batch was given; a sub-network is chosen on at least one")
    own = any(target is None for _, target in found)
    return found, loss or (_own_loss if own else F.cross_entropy)


def _own_loss(output: Any, _: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            "the model gives no loss for these arguments; put `labels` among them, or give loss=, a function of the "
            "model's output and the target"
        )
    return loss


@dataclass(frozen=True)
class Block:
    """What is kept or left out as one: a residual block with all its branches.

    Attributes:
        name: of the block in the model.
        module: in the copy.
        rules: numbers of its rules.
    """

    name: str
    module: nn.Module
    rules: tuple[int, ...]


class Whole:
    """A copy of a model in which any blocks can be absent.

    Args:
        model: with blocks of residrop, under `residrop.apply`, or plain; it stays as it is.
        data: `pairs_of`, on the device of the model.
        loss: of its output.
        blocks: for a plain model, as in `apply`.
        batch_statistics: whether losses are measured with batch norms that take the statistics of the batch, for
            sub-networks that will get their own.

    Raises:
        ConfigError: no blocks are known, they have rules of units, or the model or the loss cannot take the batches.
    """

    def __init__(
        self, model: nn.Module, data: Data, loss: Loss, blocks: Any = None, *, batch_statistics: bool = False
    ) -> None:
        with in_expectation(model):  # a copy knows the draws in force
            self.model = copy.deepcopy(model)
        self.data, self.loss, self.batch_statistics = data, loss, batch_statistics
        put_rules(self.model.eval(), blocks, data[0][0])
        self.model.eval()  # with its rules
        numbers = {rule: number for number, rule in enumerate(rules_of(self.model))}
        self.blocks = [
            Block(name, module, tuple(numbers[rule] for rule, _ in module.residrop_branches()))
            for name, module in self.model.named_modules()
            if isinstance(module, Skippable)
        ]
        self.rules = len(numbers)
        self.full = (True,) * len(self.blocks)
        self.lists = _lists(self.model, self.blocks)
        self.loss_of_all = self._loss_of_all()

    def _loss_of_all(self) -> float:
        """The loss of the whole model; ConfigError if it or the loss cannot take the batches, or it is not finite."""
        try:
            found = self.loss_with(self.full)
        except ConfigError:
            raise
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            if self.batch_statistics and "more than 1 value" in first:
                raise ConfigError(
                    f"batch norms take no statistics of such batches ({first}); give larger ones, or recalibrate=False"
                ) from error
            raise ConfigError(
                f"{type(self.model).__name__} or its loss fails on the batches ({first}); give pairs of inputs and "
                "target that loss(model(inputs), target) takes, or dicts of arguments with labels"
            ) from error
        if not math.isfinite(found):
            raise ConfigError(
                f"the loss of {type(self.model).__name__} is not finite on these batches; no block can be chosen"
            )
        return found

    def plan(self, kept: Sequence[bool]) -> Plan:
        """The draw with just these blocks."""
        alive = [True] * self.rules
        for block, keep in zip(self.blocks, kept, strict=True):
            for number in block.rules:
                alive[number] = keep
        return Plan.of(alive)

    def output(self, kept: Sequence[bool], inputs: Any) -> Any:
        """What the model gives with just these blocks, in eval mode."""
        with torch.no_grad(), evaluating(self.model), without_extras(self.model), using(self.model, self.plan(kept)):
            return Batch(inputs).copied().called(self.model)

    def losses(self, kept: Sequence[bool]) -> list[float]:
        """The loss of every batch with just these blocks; but for batch norms in eval mode."""
        found: list[float] = []
        with kept_as_is(self.model, training=self.batch_statistics), torch.no_grad(), without_extras(self.model):
            for x, y in self.data:
                with using(self.model, self.plan(kept)):
                    output = Batch(x).copied().called(self.model)
                found.append(float(self.loss(output, y)))
        return found

    def loss_with(self, kept: Sequence[bool]) -> float:
        """Their mean; infinity where it is not finite, so that such a choice is never the better one."""
        found = self.losses(kept)
        mean = sum(found) / len(found)
        return mean if math.isfinite(mean) else math.inf


def _lists(model: nn.Module, blocks: Sequence[Block]) -> list[frozenset[int]]:
    """The numbers of the blocks of every `nn.ModuleList` in a model with a configuration: one of each has to stay."""
    if not any(hasattr(getattr(module, "config", None), "to_dict") for module in model.modules()):
        return []
    found: dict[str, set[int]] = {}
    for number, block in enumerate(blocks):
        found.setdefault(block.name.rpartition(".")[0], set()).add(number)
    sizes = {name: len(module) for name, module in model.named_modules() if type(module) is nn.ModuleList}
    return [frozenset(numbers) for name, numbers in found.items() if sizes.get(name) == len(numbers)]


def put_rules(model: nn.Module, blocks: Any, inputs: Any) -> None:
    """Give every block a coin of its own, for hand-made draws.

    With rescale="test" a present branch counts in full; an absent one is always left out of what is traced, too.
    """
    rules = rules_of(model)
    other = next((rule for rule in rules if not isinstance(rule, (ConstantDepth, StochasticDepth))), None)
    if other is not None:
        raise ConfigError(
            f"{type(model).__name__} has blocks under {type(other).__name__}, of which none is absent as a whole; "
            "sub-networks are of stochastic depth, layer dropout and constant depth (residrop.fold makes any network "
            "plain)"
        )
    if rules and blocks is not None:
        raise ConfigError("the model has rules already, so its blocks are known; leave out `blocks`")
    applied = [name for name, module in model.named_modules() if isinstance(module, AppliedBlock)]
    own = [module for module in model.modules() if isinstance(module, Residual)]
    if applied:
        remove(model)
        blocks = [model.get_submodule(name) for name in applied]
    without_hooks(model)
    if own:
        for block in own:
            block.rule = StochasticDepth(0.5, granularity="block", rescale="test")
        connect(model)
        return
    example = inputs if inputs is None or isinstance(inputs, (Mapping, Tensor)) else tuple(inputs)

    options: dict[str, Any] = {"granularity": "block", "rescale": "test", "example": example}
    apply(model, "stochastic-depth", 0.5, blocks=blocks, **options)
    if layers := _around(model):
        remove(model)
        apply(model, "stochastic-depth", 0.5, blocks=layers, branches=False, **options)
    elif any(not isinstance(shortcut_of(block), nn.Identity) for block in _listed(model)) or any(
        shortcut_of(block) is None for block in model.modules() if isinstance(block, AppliedBlock)
    ):
        # layers are left out with all that they do: those with norms behind their sums would leave these
        remove(model)
        apply(model, "stochastic-depth", 0.5, blocks=blocks, branches=False, **options)


def _around(model: nn.Module) -> list[nn.Module]:
    """The layers whose parts are blocks, each of another kind, in a list (T5's attention and feed-forward layers)."""
    lists: dict[int, Any] = {id(module): module for module in model.modules() if type(module) is nn.ModuleList}
    layers = [layer for one in lists.values() for layer in one]
    return [
        layer
        for layer in layers
        if any(
            id(inner) in lists and len({type(block) for block in inner if isinstance(block, AppliedBlock)}) > 1
            for inner in layer.children()
        )
    ]


def _listed(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that stand in an `nn.ModuleList`."""
    for module in list(model.modules()):
        if type(module) is nn.ModuleList:
            yield from (block for block in module if isinstance(block, AppliedBlock))


@contextmanager
def without_extras(model: nn.Module) -> Iterator[bool]:
    """Inside, a model of transformers makes no cache of keys and values, which absent layers would not fill, and lists
    no hidden states and attentions, which are as many as layers; gives whether it would."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    extras = ("use_cache", "output_hidden_states", "output_attentions")
    asked = [(config, name) for config in configs.values() for name in extras if getattr(config, name, None) is True]
    for config, name in asked:
        setattr(config, name, False)
    try:
        yield bool(asked)
    finally:
        for config, name in sorted(asked, key=lambda one: extras.index(one[1])):  # last what its setter may refuse
            setattr(config, name, True)
