"""Forwards without branches, or whose branches cannot be told apart, and models that change afterwards."""

import copy
import functools
import pickle
import re
from typing import Any

import pytest
import torch
from read_blocks import Attention, InChild, InMethods, Layers, LocalFunctions, OnAttributes, Output, PreNorm, Weighing
from torch import Tensor, nn

import residrop
from residrop.common.errors import ConfigError, PlanError
from residrop.schedule.sampler import Plan
from residrop.surgery.blocks import AppliedBlock
from residrop.surgery.reading.read import read

# What is no branch


class Dense(Layers):
    """DenseNet's: features are joined, not added."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.b(self.a(x).relu())], -1)


class Positions(Layers):
    def __init__(self) -> None:
        super().__init__("", table=nn.Embedding(4, 6), start=nn.Parameter(torch.zeros(4, 6)))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.start
        x = x + self.table(torch.arange(x.shape[1]))
        return self.norm(x)


class Gated(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.a(x).sigmoid()


class OwnAttention(Layers):
    """Sums of values that are computed side by side, as those inside of an attention."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.a(x), self.b(x), self.c(x)
        weights = q @ k.transpose(-1, -2)
        if bias is not None:
            weights = weights + bias
        return weights.softmax(-1) @ v


class Snake(Layers):
    """An activation x + sin(ax)^2 / a."""

    def __init__(self) -> None:
        super().__init__("", alpha=nn.Parameter(torch.ones(6)))
        self.unused = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin() ** 2 / self.alpha


class Plain(Layers):
    """As VGG's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).relu()


class TwoInputs(Layers):
    """Neither summand is a function of the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)


class Bottleneck(Layers):
    """Its projection has more weights than its two layers; neither may be taken for the other."""

    def __init__(self) -> None:
        super().__init__("", layer=nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 6)), shortcut=nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.layer(x)
        residual = self.shortcut(residual)
        x += residual
        return x


class OfDict(Layers):
    """As LR-ASPP's head: the summands are of different values."""

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        low, high = given["low"], given["high"]
        high = self.a(high).reshape(low.shape)
        return self.b(high) + self.c(low)


NONE = {
    "cat": (lambda: Dense("a b"), "no sum of a value and a function of it"),
    "positions": (Positions, "no sum of a value and a function of it"),
    "gate": (lambda: Gated("a"), "no sum of a value and a function of it"),
    "attention": (lambda: OwnAttention("a b c"), "no sum of a value and a function of it"),
    "snake": (Snake, "no sum of a value and a function of it"),
    "vgg": (lambda: Plain("a b"), "no sum of a value and a function of it"),
    "dict": (lambda: OfDict("a b", c=nn.Linear(6, 6, bias=False)), "no sum of a value and a function of it"),
    "bottleneck": (Bottleneck, "no sum of a value and a function of it"),
    "two inputs": (lambda: TwoInputs("a b"), "no sum of a value and a function of it"),
}


@pytest.mark.parametrize(("make", "why"), NONE.values(), ids=NONE)
def test_what_is_no_branch(make, why):
    found = read(make())
    assert found.branches == ()
    assert why in found.why
    with pytest.raises(ConfigError, match="has no residual blocks: in the source of none of its modules"):
        residrop.apply(nn.Sequential(nn.ModuleList([make(), make()])), survival=0.5)


# What cannot be read


class Calling(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Secret(Layers):
    forward = lambda self, x: x + self.a(x)  # noqa: E731


class Walrus(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return x + (y := self.a(x)) * y


class Returning(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = x + layer(x)
            if x.sum() > 1e9:
                return x
        return x


@functools.cache
def made_by_exec() -> type[nn.Module]:
    made: dict[str, Any] = {"Layers": Layers, "__name__": __name__}
    exec("class Made(Layers):\n    def forward(self, x):\n        return x + self.a(x)\n", made)
    return made["Made"]


UNREADABLE = {
    "super": (lambda: Calling("norm1 norm2 a b"), "its forward calls that of a base class"),
    "lambda": (lambda: Secret("a"), "is no plain function|is not at hand"),
    "exec": (lambda: made_by_exec()("a"), r"the source of .*Made\.forward is not at hand"),
    "walrus": (lambda: Walrus("a"), "has a NamedExpr in it"),
    "return in a loop": (lambda: Returning("a b"), "has a Return within a For"),
    "function handed on": (lambda: LocalFunctions("a b", use_checkpoint=True), "a function within the forward is"),
}
every_unreadable = pytest.mark.parametrize(("make", "why"), UNREADABLE.values(), ids=UNREADABLE)


@every_unreadable
def test_what_cannot_be_read_is_named_with_the_reason(make, why):
    found = read(make())
    assert found.branches == ()
    assert re.search(why, found.why)
    model = nn.Sequential(PreNorm("norm1 norm2 a b"), nn.Sequential(make(), make()))
    report = residrop.apply(model, survival=0.5)
    assert [entry.name for entry in report.blocks] == ["0"]
    ((name, text),) = report.left_alone
    assert name == "1.*"
    assert re.search(why, text)


@every_unreadable
@pytest.mark.parametrize("coin", [True, False])
def test_what_cannot_be_read_is_a_whole_block_by_name(make, why, coin):
    torch.manual_seed(0)
    model = nn.Sequential(make()).double().train()
    plain = copy.deepcopy(model[0])
    (entry,) = residrop.apply(model, survival=0.4, blocks="0").blocks
    assert entry.kind.endswith(", whole")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with residrop.using(model, Plan.of([coin])):
        torch.testing.assert_close(model(x), x + 2.5 * coin * (plain(x) - x))


class Halves(Layers):
    """The half that is added to is cut from the input together with the one that goes through the branch."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        first = first + self.a(torch.cat([second, second], -1))[..., :3]
        return torch.cat([first, second], -1)


class Twice(Layers):
    """A projection that is added twice."""

    def forward(self, x: Tensor) -> Tensor:
        skip = x * self.scale
        y = skip + self.b(self.a(x))
        return y + skip


@pytest.mark.parametrize("make", [lambda: Halves("a"), lambda: Twice("a b", scale=nn.Parameter(torch.ones(6)))])
def test_shortcuts_that_are_needed_elsewhere_are_left_where_they_are(make):
    torch.manual_seed(0)
    model = nn.Sequential(make()).train()
    plain = copy.deepcopy(model[0])
    residrop.apply(model, survival=0.5, blocks="0", rescale="none")
    x, coins = torch.randn(3, 6), [True] * len(list(residrop.sampler_of(model).sites))
    with residrop.using(model, Plan.of(coins)):
        torch.testing.assert_close(model(x), plain(x))


# What is refused at the first forward


def test_weights_that_an_absent_branch_cannot_give():
    """huggingface's attentions return them only if they are asked for."""
    model = nn.Sequential(Weighing("", attend=Attention("a b"))).train()
    residrop.apply(model, survival=0.5, blocks="0")
    x = torch.randn(3, 6)
    with residrop.using(model, Plan.of([False])):
        hidden, weights = model[0](x)
        assert torch.equal(hidden, x)
        assert weights is None
        with pytest.raises(PlanError, match=r"Weighing returns, besides the hidden state, a tensor of shape \(3, 6\)"):
            model[0](x, True)


class Overwriting(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(self.relu(x))


@pytest.mark.parametrize("coin", [True, False])
def test_branches_that_overwrite_their_input_are_refused(coin):
    model = nn.Sequential(Overwriting("a", relu=nn.ReLU(inplace=True))).train()
    residrop.apply(model, survival=0.5, blocks="0")
    with residrop.using(model, Plan.of([coin])), pytest.raises(ConfigError, match="overwrites the input of a branch"):
        model(torch.randn(3, 6))


class Counting(Layers):
    """A branch that gives something else each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x) * next(self.numbers)


def test_branches_that_give_something_else_than_the_block_are_refused():
    block = Counting("a")
    block.numbers = iter(range(1, 100))
    model = nn.Sequential(block).train()
    residrop.apply(model, survival=0.5, blocks="0")
    with pytest.raises(PlanError, match=r"Counting, with its branches called by themselves, gives something else.*use"):
        model(torch.randn(3, 6))
    assert residrop.sampler_of(model).step == 0


# Changes after `apply`


@pytest.mark.parametrize(("name", "value"), [("first", False), ("b", None)])
def test_attributes_that_decide_what_a_forward_does(name, value):
    torch.manual_seed(0)
    model = nn.Sequential(OnAttributes("norm a b", first=True)).train()
    residrop.apply(model, survival=0.5, blocks="0")
    x = torch.randn(3, 6)
    model(x)
    setattr(model[0], name, value)
    with pytest.raises(PlanError, match=r"attribute of a OnAttributes has changed .* call residrop\.remove\(model\)"):
        model(x)
    residrop.remove(model)
    residrop.apply(model, survival=0.5, blocks="0")
    model(x)


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_children_whose_forward_was_taken_apart(kind):
    model = nn.Sequential(InChild("b", output=Output("a norm"))).train()
    residrop.apply(model, survival=0.5, blocks="0")
    child = model[0].output
    if kind == "hook":
        handle = child.register_forward_hook(lambda module, args, out: None)
    else:
        child.forward = child.forward
    with (
        residrop.using(model, Plan.of([True])),
        pytest.raises(PlanError, match=r"InChild has a Output with hooks.*branches=False"),
    ):
        model(torch.randn(3, 6))
    if kind == "hook":
        handle.remove()
    else:
        del child.forward
    with residrop.using(model, Plan.of([True])):
        model(torch.randn(3, 6))


def test_a_child_is_replaced_by_one_of_another_kind():
    """Which steps belong to a branch was read from its class."""
    torch.manual_seed(0)
    model = nn.Sequential(PreNorm("norm1 norm2 a b")).train()
    residrop.apply(model, survival=0.5, blocks="0", rescale="none")
    model[0].b = nn.Sequential(nn.Linear(6, 6), nn.Tanh())  # as for LoRA: it is called in the same place
    x = torch.randn(3, 6)
    with residrop.using(model, Plan.of([False, True])):
        torch.testing.assert_close(model(x), x + model[0].b(model[0].norm2(x)).tanh())


# Readings are shared, pickled and made again


def test_blocks_alike_share_a_reading():
    one, other, third = (OnAttributes("norm a b", first=first) for first in (True, True, False))
    assert read(one) is read(other)
    assert read(one) is not read(third)
    assert len(read(OnAttributes("norm a", first=True, b=None)).branches) == 1


def test_a_reading_is_made_again_where_a_model_is_loaded(monkeypatch):
    model = nn.Sequential(InMethods("a b"), OnAttributes("norm a b", first=False)).train()
    residrop.apply(model, survival=0.5, blocks="*", seed=3)
    content = pickle.dumps(model)
    monkeypatch.setattr("residrop.surgery.reading.read._READ", {})  # as in another process
    monkeypatch.setattr("residrop.surgery.read_block._MIXINS", {})
    loaded, x = pickle.loads(content), torch.randn(3, 6)
    assert [type(one).__name__ for one in loaded] == ["InMethods", "OnAttributes"]
    assert all(isinstance(one, AppliedBlock) for one in loaded)
    for _ in range(4):
        assert torch.equal(loaded(x), model(x))


class Siblings(Layers):
    """Two layers of one size side by side, as in NASNet's cells: neither is the other's shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def test_two_layers_side_by_side_are_no_shortcut_and_branch():
    with pytest.raises(ConfigError, match="has no residual blocks"):
        residrop.apply(nn.Sequential(Siblings("a b")), survival=0.5)


def test_a_refusal_says_which_source_is_not_at_hand():
    made: dict[str, Any] = {"nn": nn}
    source = """
class Typed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(self.norm(x))
"""
    exec(source, made)
    model = nn.Sequential(made["Typed"](), made["Typed"]())
    with pytest.raises(ConfigError, match=r"looked at \*: 2 x Typed, 100.0% .*the source of .*forward is not at hand"):
        residrop.apply(model, survival=0.5)
