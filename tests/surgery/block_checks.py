"""What must hold for a block of any family under rules, against its own forward with coins in the place of its drop
module."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.ops import StochasticDepth

import residrop
from residrop.blocks.skippable import parameters_of
from residrop.common.errors import ConfigError, InactiveWarning
from residrop.schedule.sampler import Draw, Plan

ROWS, RATE = 4, 0.4
EXACT = 0


@dataclass(frozen=True)
class Case:
    """A block to be checked.

    Attributes:
        make: builds the block.
        shape: of its input, without the batch dimension.
        ends: for every branch the name of the child behind which its coin is tossed: a drop module of its own, which
            is replaced, or the last child of the branch.
        given: further arguments, as functions of the number of rows.
        signed: whether its input may be negative.
        exact: whether sums are made in the block's own order (the generic rule rounds differently).
        last: for every branch the child whose output is added, if parameters come behind its end.
        digits: that agree between a batch and a part of it; fewer if the block computes in float32 inside.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ends: Sequence[str]
    given: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)
    signed: bool = True
    exact: bool = True
    last: Sequence[str] = ()
    digits: int = 9

    def block(self) -> nn.Module:
        """The block in float64 and training mode, with parameters and statistics of a trained one."""
        torch.manual_seed(3)
        block = self.make().double()
        for parameter in block.parameters():
            nn.init.normal_(parameter, 0.1, 0.4)
        for name, buffer in block.named_buffers():
            if name.endswith("running_mean"):
                nn.init.normal_(buffer, 0.0, 0.3)
            if name.endswith("running_var"):
                nn.init.uniform_(buffer, 0.5, 1.5)
        for module in block.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return block.train()

    def inputs(self, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Any]]:
        """A batch and the other arguments; the batch wants a gradient."""
        torch.manual_seed(5)
        x = torch.randn(rows, *self.shape, dtype=dtype)
        given = {name: make(rows) for name, make in self.given.items()}
        return (x if self.signed else x.relu()).requires_grad_(), given


def tossed(block: nn.Module, ends: Sequence[str], factors: Sequence[float | Tensor], backward: bool = False) -> "Root":
    """A plain block that multiplies its branches, or only their gradients (`backward`), by these factors, where their
    drop modules stand."""
    root = Root(copy.deepcopy(block)).train()
    for module in root.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    for end in dict.fromkeys(ends):
        module = root.block.get_submodule(end)
        turns = itertools.cycle([factor for name, factor in zip(ends, factors, strict=True) if name == end])
        module.register_forward_hook(lambda module, args, out, turns=turns: _scaled(out, next(turns), backward))
    return root


def _scaled(x: Tensor, factor: float | Tensor, backward: bool) -> Tensor:
    factor = factor.view(-1, *[1] * (x.ndim - 1)) if isinstance(factor, Tensor) else factor
    return x.detach() + factor * (x - x.detach()) if backward else x * factor


class Root(nn.Module):
    """A model of one block, whose output is a tensor."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        out = self.block(x, **given)
        return next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


def applied(block: nn.Module, **options: Any) -> Root:
    root = Root(copy.deepcopy(block)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InactiveWarning)
        residrop.apply(root, **options)
    return root


def step(model: nn.Module, x: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Output, gradient of the input and gradients of the parameters."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x, **given)
    (out * torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_step(model: nn.Module, reference: nn.Module, x: Tensor, given: Mapping[str, Any], digits: int) -> None:
    """Outputs and gradients agree to so many digits (0: to the last bit); no gradient counts as one of 0."""
    ours, theirs = step(model, x, given), step(reference, x, given)
    tolerance = {"rtol": 10.0**-digits if digits else 0.0, "atol": 10.0**-digits if digits else 0.0}
    torch.testing.assert_close(ours[:2], theirs[:2], **tolerance)
    for name, grad in theirs[2].items():
        own = ours[2][name]
        if grad is not None:
            torch.testing.assert_close(torch.zeros_like(grad) if own is None else own, grad, **tolerance)
        else:
            assert own is None, name
    assert list(ours[2]) == list(theirs[2])


def norms_in_eval(model: nn.Module) -> nn.Module:
    """Batch norms use their statistics, so that rows do not see each other."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def check_modes(case: Case) -> None:
    """Bit by bit the plain block: in eval mode, with all rates 1 in training, and after `remove`."""
    block = case.block()
    plain = Root(block)
    keys = list(plain.state_dict())
    x, given = case.inputs()
    for options in ({"survival": 1.0}, {"survival": 1.0, "granularity": "row"}, {"survival": 1.0, "rescale": "test"}):
        every = [1.0] * len(case.ends)
        assert_same_step(applied(block, **options), tossed(block, case.ends, every), x, given, EXACT)
    model = applied(block, survival=0.5)
    assert list(model.state_dict()) == keys
    assert type(model.block).__name__ == type(block).__name__
    assert isinstance(model.block, type(block))
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded.block) is type(model.block)
    for one in (model, loaded):
        assert_same_step(one.eval(), copy.deepcopy(plain).eval(), x, given, EXACT)
    residrop.remove(model)
    assert type(model.block) is type(block)
    assert vars(model.block).keys() == vars(block).keys()
    assert_same_step(model.eval(), copy.deepcopy(plain).eval(), x, given, EXACT)
    again = [getattr(one, "drop_prob", getattr(one, "p", None)) for one in model.modules()]
    assert again == [getattr(one, "drop_prob", getattr(one, "p", None)) for one in plain.modules()]


def check_coins(case: Case) -> None:
    """Block level, every combination of coins, scaled in training or at test."""
    block = case.block()
    x, given = case.inputs()
    branches = len(case.ends)
    for rescale, present in (("train", 1 / RATE), ("test", 1.0)):
        model = applied(block, survival=RATE, rescale=rescale)
        for coins in itertools.product((True, False), repeat=branches):
            reference = tossed(block, case.ends, [present * coin for coin in coins])
            with residrop.using(model, Plan.of(coins)):
                assert_same_step(model, reference, x, given, EXACT if case.exact else 9)
    model = applied(block, survival=RATE, rescale="test").eval()
    assert_same_step(model, tossed(block, case.ends, [RATE] * branches).eval(), x, given, EXACT if case.exact else 9)


def check_parts(case: Case) -> None:
    """A dead branch's parameters, and only they, get no gradient: engines are told which they are."""
    model = applied(case.block(), survival=0.5)
    x, given = case.inputs()
    for dead in range(len(case.ends)):
        model.zero_grad()
        with residrop.using(model, Plan.of([number != dead for number in range(len(case.ends))])):
            out = model(x, **given)
        out.sum().backward()
        _, parts = model.block.residrop_branches()[dead]
        told = {id(parameter) for parameter in parameters_of(parts)}
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert without == {name for name, parameter in model.named_parameters() if id(parameter) in told}


# windows of live rows out of 4, (start, live): some that wrap around, none of the rows, all of them
TRIALS = (((3, 2), (1, 2), (0, 1)), ((0, 0), (2, 3), (1, 4)), ((1, 4), (0, 0), (3, 1)), ((2, 1), (3, 2), (0, 0)))


def draw_of(start: int, live: int) -> Draw:
    """A draw that leaves this window alive."""
    rate = max(live - 0.4, 0.1) / ROWS
    draws = (Draw((rate,), key=key) for key in range(10_000))
    return next(draw for draw in draws if draw.rows(ROWS) == (start if live else draw.rows(ROWS).start, live))


def draws_of(case: Case, windows: Sequence[tuple[int, int]]) -> tuple[list[Draw], list[Tensor]]:
    """For every branch a draw that leaves a window alive, and 1 where a row is."""
    draws = [draw_of(*window) for window in windows[: len(case.ends)]]
    masks = []
    for draw in draws:
        rows, mask = draw.rows(ROWS), torch.zeros(ROWS, dtype=torch.float64)
        mask[[(rows.start + i) % ROWS for i in range(rows.live)]] = 1.0
        masks.append(mask)
    return draws, masks


def check_rows(case: Case) -> None:
    """Row level: a mask of rows, where rows are independent."""
    block = norms_in_eval(case.block())
    x, given = case.inputs()
    for rescale in ("train", "none"):
        model = norms_in_eval(applied(block, survival=RATE, granularity="row", rescale=rescale))
        for windows in TRIALS:
            draws, masks = draws_of(case, windows)
            factors = [
                mask / draw.rates[0] if rescale == "train" else mask for draw, mask in zip(draws, masks, strict=True)
            ]
            with residrop.using(model, Plan(tuple(draws))):
                assert_same_step(model, norms_in_eval(tossed(block, case.ends, factors)), x, given, case.digits)


def check_backward(case: Case) -> None:
    """Presence in backward only: outputs and statistics are those of the plain block, and absent branches, or rows of
    them, have no gradient. Batch norm is for blocks alone."""
    block = case.block()
    x, given = case.inputs()
    for rescale, present in (("train", 1 / RATE), ("none", 1.0)):
        model = applied(block, rule="backward-depth", survival=RATE, rescale=rescale)
        for coins in itertools.product((True, False), repeat=len(case.ends)):
            reference = tossed(block, case.last or case.ends, [present * coin for coin in coins], backward=True)
            model.load_state_dict(reference.state_dict())
            with residrop.using(model, Plan.of(coins)):
                assert_same_step(model, reference, x, given, 9)
                torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))
                model.load_state_dict(reference.state_dict())
                # attention has other kernels where nothing is recorded
                with torch.set_grad_enabled(any(coins)):
                    ours, theirs = model(x, **given), reference(x, **given)
                if case.exact and any(coins) == all(coins):
                    assert torch.equal(ours, theirs)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in block.modules()):
        with pytest.raises(ConfigError, match="takes statistics of the whole batch"):
            applied(block, rule="backward-depth", survival=RATE, granularity="row")
        return
    model = applied(block, rule="backward-depth", survival=RATE, granularity="row")
    for windows in TRIALS:
        draws, masks = draws_of(case, windows)
        with residrop.using(model, Plan(tuple(draws))):
            assert_same_step(model, tossed(block, case.last or case.ends, masks, backward=True), x, given, case.digits)
