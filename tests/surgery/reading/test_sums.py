"""Branches that are read from a forward, against the same sums written by hand."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from read_blocks import CASES, ROWS, Case
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import residrop
from residrop.blocks.skippable import parameters_of
from residrop.schedule.sampler import Draw, Plan

RATE = 0.4
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Root(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *args: Any, **given: Any) -> Any:
        return self.block(x.clone(), *args, **given)


def plain(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make().double().train()


def applied(case: Case, **options: Any) -> Root:
    model = Root(plain(case))
    (entry,) = residrop.apply(model, survival=RATE, blocks="block", **options).blocks
    assert entry.kind == f"read_blocks {type(plain(case)).__name__}"
    assert len(entry.rates) == case.branches
    return model


def inputs(case: Case) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(1)
    x = torch.randn(ROWS, *case.shape, dtype=torch.float64, requires_grad=True)
    given = {name: make(ROWS) for name, make in case.given.items()}
    return x, tuple(given.values()) if case.by_place else (), {} if case.by_place else given


def weighted(out: Any) -> Tensor:
    first = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    return (first * torch.linspace(-1, 2, first.numel(), dtype=torch.float64).view(first.shape)).sum()


def assert_same(case: Case, model: Root, factors: list[Any], plan: Plan) -> None:
    """Output, structure and gradients are those of the reference."""
    x, args, given = inputs(case)
    model.zero_grad()
    with residrop.using(model, plan):
        found = model(x, *args, **given)
    weighted(found).backward()
    block = plain(case)
    y, args, given = inputs(case)
    expected = case.reference(block, y, factors, *args, **given)
    weighted(expected).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, y.grad)
    for (name, ours), theirs in zip(model.block.named_parameters(), block.parameters(), strict=True):
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in (ours, theirs)]
        torch.testing.assert_close(*grads, msg=lambda text, name=name: f"{name}: {text}")


@every_case
def test_every_combination_of_coins(case):
    for rescale, present in (("train", 1 / RATE), ("none", 1.0)):
        model = applied(case, rescale=rescale)
        for coins in itertools.product((True, False), repeat=case.branches):
            assert_same(case, model, [present * coin for coin in coins], Plan.of(coins))


@every_case
def test_rows(case):
    model = applied(case, granularity="row", rescale="none")
    for step in range(2):
        draws = [Draw((RATE,), key=10 * step + number) for number in range(case.branches)]
        factors = []
        for draw in draws:
            window, factor = draw.rows(ROWS), torch.zeros(ROWS, *[1] * len(case.shape), dtype=torch.float64)
            factor[[(window.start + row) % ROWS for row in range(window.live)]] = 1.0
            factors.append(factor)
        assert_same(case, model, factors, Plan(tuple(draws)))


@every_case
def test_parameters_of_absent_branches_have_no_gradient(case):
    """And the block says which they are."""
    model = applied(case)
    x, args, given = inputs(case)
    with residrop.using(model, Plan.of([False] * case.branches)):
        out = model(x, *args, **given)
    weighted(out).backward()
    told = {id(one) for _, parts in model.block.residrop_branches() for one in parameters_of(parts)}
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    only = {name for name, parameter in model.named_parameters() if id(parameter) in told}
    assert only <= without
    assert only


@every_case
def test_plain_where_nothing_is_dropped(case):
    model, block = applied(case), plain(case)
    x, args, given = inputs(case)
    keys = list(block.state_dict())
    assert list(model.block.state_dict()) == keys
    expected = block.eval()(x.clone(), *args, **given)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(one.block) is type(model.block)
        torch.testing.assert_close(one.eval()(x, *args, **given), expected, rtol=0, atol=0)
        with residrop.using(one.train(), Plan.of([True] * case.branches)):
            again = one(x, *args, **given)
        with residrop.using(model.train(), Plan.of([True] * case.branches)):
            torch.testing.assert_close(again, model(x, *args, **given), rtol=0, atol=0)
        one.zero_grad()
    residrop.remove(model)
    assert type(model.block) is type(block)
    assert vars(model.block).keys() == vars(block).keys()
    torch.testing.assert_close(
        model.train()(x, *args, **given), block.train()(x.clone(), *args, **given), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "projected", "context"])
@pytest.mark.parametrize("coins", [(True, False, True), (False, True, False)])
def test_gradcheck(name, coins):
    case = CASES[name]
    model = applied(case)
    x, args, given = inputs(case)
    model(x, *args, **given)  # the look at the first batch
    coins = coins[: case.branches]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        with residrop.using(model, Plan.of(coins)):
            return torch.func.functional_call(
                model, dict(zip(names, parameters, strict=True)), (x[:2], *args), {k: v[:2] for k, v in given.items()}
            )

    names = [name for name, _ in model.named_parameters()]
    assert torch.autograd.gradcheck(run, (x, *model.parameters()))


def test_branches_are_not_computed_where_they_are_absent():
    model = applied(CASES["pre-norm"])
    calls: list[str] = []
    for name in ("norm1", "a", "norm2", "b"):
        model.block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    x, _, _ = inputs(CASES["pre-norm"])
    for coins, expected in (((False, False), []), ((True, False), ["norm1", "a"]), ((False, True), ["norm2", "b"])):
        with residrop.using(model, Plan.of(coins)):
            model(x)
        assert calls == expected
        calls.clear()


def test_absent_in_place_sums_leave_the_input_alone():
    model = applied(CASES["in place"])
    x, _, _ = inputs(CASES["in place"])
    model(x)
    given = x.detach().clone()
    before = given.clone()
    for coins in ((False, False), (False, True), (True, False), (True, True)):
        with residrop.using(model, Plan.of(coins)), torch.no_grad():
            model.block(given)
        assert torch.equal(given, before)


def test_names_by_place_that_the_block_does_not_have():
    model = applied(CASES["context"])
    with pytest.raises(TypeError, match="conte"):
        model(torch.randn(ROWS, 6, dtype=torch.float64), contexts=None)
