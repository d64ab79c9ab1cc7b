"""The generic rule x + b (block(x) - x), for blocks of any class whose branches are not told apart."""

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import residrop
from residrop import functional
from residrop.blocks.skippable import parameters_of
from residrop.common.errors import ConfigError, PlanError
from residrop.schedule.sampler import Draw, Plan
from residrop.surgery.blocks import AppliedBlock

D = 6


class Mlp(nn.Module):
    """A residual block of no library."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Attending(Mlp):
    """One with arguments and several outputs."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, turn: Any = None, wants: str = "tensor") -> Any:
        y = super().forward(x)
        if mask is not None:
            y = y * mask.reshape(mask.shape[0], *[1] * (y.ndim - 1)) if mask.shape[0] != 1 else y * mask
        if turn is not None:
            y = y + turn[0] - 2 * turn[1]
        forms = {
            "tensor": lambda: y,
            "tuple": lambda: (y, y.mean()),
            "with None": lambda: (y, None),
            "dict": lambda: {"attention": y.mean((-1,)), "hidden": y},
            "named": lambda: Named(y, 3),
            "nothing": lambda: None,
            "other shape": lambda: y[..., :-1],
        }
        return forms[wants]()


class Named(NamedTuple):
    hidden: Tensor
    number: int


class Model(nn.Module):
    """Blocks in a row."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, **given: Any) -> Any:
        for block in self.blocks:
            x = block(x, **given)
        return x


def model_of(*blocks: nn.Module, **options: Any) -> tuple[Model, list[nn.Module]]:
    """An applied model, and copies of its blocks as they were."""
    torch.manual_seed(0)
    plain = [copy.deepcopy(block).double().train() for block in blocks]
    model = Model(*blocks).double().train()
    residrop.apply(model, **{"survival": 0.4, "blocks": "blocks.*", "branches": False, **options})
    return model, plain


def batch(rows: int = 5, *inner: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, *(inner or (D,)), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("rescale", "scale"), [("train", 2.5), ("none", 1.0), ("test", 1.0)])
@pytest.mark.parametrize("coins", [(True, True), (True, False), (False, False)])
def test_block_level(rescale, scale, coins):
    model, plain = model_of(Mlp(), Mlp(), rescale=rescale)
    x, y = batch(), batch()
    with residrop.using(model, Plan.of(coins)):
        ours = model(x)
    theirs = y
    for block, coin in zip(plain, coins, strict=True):
        theirs = theirs + scale * coin * (block(theirs) - theirs)
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for ours_block, block, coin in zip(model.blocks, plain, coins, strict=True):
        grads = [parameter.grad for parameter in ours_block.parameters()]
        expected = [parameter.grad if coin else None for parameter in block.parameters()]
        assert [grad is None for grad in grads] == [not coin] * 4
        torch.testing.assert_close([grad for grad in grads if coin], [grad for grad in expected if coin])


def test_expectation_is_the_plain_block_or_a_share_of_its_branch():
    model, plain = model_of(Mlp())
    torch.testing.assert_close(model.eval()(batch()), plain[0](batch()), rtol=0, atol=0)
    model, plain = model_of(Mlp(), rescale="test")
    x = batch()
    torch.testing.assert_close(model.eval()(x), x + 0.4 * (plain[0](x) - x))


@pytest.mark.parametrize(("start", "live"), [(4, 2), (0, 2)])
def test_rows_with_arguments(start, live):
    model, plain = model_of(Attending(), granularity="row")
    key = next(key for key in range(1000) if Draw((0.4,), key=key).rows(5) == (start, live))
    x, mask = batch(), torch.rand(5, dtype=torch.float64)
    turn = (torch.rand(5, D, dtype=torch.float64), torch.rand(1, D, dtype=torch.float64))
    with residrop.using(model, Plan((Draw((0.4,), key=key),))):
        ours = model(x, mask=mask, turn=turn)
    whole = plain[0](x, mask=mask, turn=turn)
    alive = torch.tensor([(row - start) % 5 < live for row in range(5)]).view(5, 1)
    torch.testing.assert_close(ours, torch.where(alive, x + (whole - x) / 0.4, x))


class TestArguments:
    """Which of them are cut, where nothing is known of their meaning."""

    def out(self, given: dict[str, Any], x: Tensor | None = None, **options: Any) -> Tensor:
        model, _ = model_of(Attending(), granularity="row", **options)
        with residrop.using(model, Plan((Draw((0.4,), key=1),))):
            return model(batch() if x is None else x, **given)

    def test_of_another_size_are_refused(self):
        with pytest.raises(PlanError, match=r"shape \(3,\) as argument mask, which cannot be cut .* whole=\[...\]"):
            self.out({"mask": torch.ones(3)})

    def test_named_whole_are_shared(self):
        turn = (torch.ones(7, D).double(), torch.zeros(1, D).double())
        with pytest.raises(PlanError, match=r"argument turn\[0\]"):
            self.out({"turn": turn}, batch(5, 7, D))
        shared = self.out({"turn": turn}, batch(5, 7, D), whole=["turn"])
        torch.testing.assert_close(shared, self.out({"turn": (1.0, 0.0)}, batch(5, 7, D)))

    def test_that_may_be_meant_either_way_are_refused_until_named(self):
        x = batch(5, 5, D)
        square = torch.zeros(5, D).double(), torch.zeros(1, D).double()
        with pytest.raises(PlanError, match="may have the 5 rows of the batch first, or another dimension"):
            self.out({"turn": square}, x)
        assert self.out({"turn": square}, x, whole=["turn"]).shape == x.shape
        with pytest.raises(PlanError, match=r"argument turn that all rows share.*whole=\['turn'\]"):
            self.out({"turn": square}, x, cut=["turn"])

    def test_objects_without_rows_are_refused(self):
        with pytest.raises(PlanError, match="a object as argument turn"):
            self.out({"turn": object()})

    def test_by_position_have_names_too(self):
        model, _ = model_of(Attending(), granularity="row", whole=["mask"])
        with residrop.using(model, Plan((Draw((0.4,), key=1),))):
            out = model.blocks[0](batch(), torch.ones(1, 1).double())
        assert out.shape == (5, D)


@pytest.mark.parametrize(
    ("wants", "hidden", "other", "absent"),
    [
        ("tuple", 0, 1, None),
        ("with None", 0, 1, None),
        ("dict", "hidden", "attention", None),
        ("named", 0, 1, 3),
    ],
)
def test_structure_of_the_output_is_kept(wants, hidden, other, absent):
    model, plain = model_of(Attending(), unused=["1", "attention"] if absent is None else [])
    x = batch(5, 2, D)
    theirs = plain[0](x, wants=wants)
    with residrop.using(model, Plan.of([True])):
        alive = model(x, wants=wants)
    with residrop.using(model, Plan.of([False])):
        dead = model(x, wants=wants)
    assert type(alive) is type(dead) is type(theirs)
    torch.testing.assert_close(alive[hidden], x + 2.5 * (theirs[hidden] - x))
    torch.testing.assert_close(alive[other], theirs[other])
    assert dead[hidden] is x
    assert dead[other] == absent


class Biased(Mlp):
    """A block that hands a bias on, as those of T5: the first makes it, all others use what they are given."""

    def __init__(self, makes: bool = False) -> None:
        super().__init__()
        self.makes, self.calls = makes, 0

    def forward(self, x: Tensor, bias: Tensor | None = None, more: tuple[Any, ...] = ()) -> Any:
        self.calls += 1
        if self.makes and bias is None:
            bias = x.detach().new_full((1, D), 0.5)
        return super().forward(x) + (0 if bias is None else bias), bias, more


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_arguments_handed_on_are_handed_on_by_absent_blocks(granularity):
    model, plain = model_of(Biased(), granularity=granularity)
    x, bias = batch(), torch.rand(1, D, dtype=torch.float64)
    marks = (torch.rand(5, 1, dtype=torch.float64), "word", None)
    key = next(key for key in range(1000) if Draw((0.4,), key=key).rows(5) == (4, 2))
    draws = [Draw((), alive=False), Draw((), alive=True)]
    if granularity == "row":
        draws = [Draw((0.0,), key=1), Draw((0.4,), key=key)]
    for draw in draws:
        with residrop.using(model, Plan((draw,))):
            out, given, more = model.blocks[0](x, bias, more=marks)
        assert given is bias
        assert more[0] is marks[0]
        assert more[1:] == marks[1:]
    whole = plain[0](x, bias)[0]
    live = torch.tensor([True, False, False, False, True]) if granularity == "row" else torch.tensor(True)
    torch.testing.assert_close(out, torch.where(live.unsqueeze(-1), x + 2.5 * (whole - x), x))


@pytest.mark.parametrize("coin", [True, False])
def test_outputs_that_an_absent_block_cannot_give_are_refused(coin):
    model, _ = model_of(Biased(makes=True))
    with (
        residrop.using(model, Plan.of([coin])),
        pytest.raises(PlanError, match=r"shape \(1, 6\) at '1' that is none of its arguments.*unused=\[...\]"),
    ):
        model(batch())


def test_outputs_that_stop_being_arguments_are_refused():
    model, _ = model_of(Biased(makes=True))
    with residrop.using(model, Plan.of([True])):
        model.blocks[0](batch(), torch.ones(1, D).double())
        with pytest.raises(PlanError, match="none of its arguments"):
            model.blocks[0](batch())


def test_calls_of_another_kind_are_learnt_by_themselves():
    """What one call returned says nothing of calls with other arguments, which an absent block has to answer, too."""
    model, _ = model_of(Biased())
    block, x, bias = model.blocks[0], batch(), torch.ones(1, D).double()
    with residrop.using(model, Plan.of([False])):
        assert block(x)[1] is None
        assert block(x, bias)[1] is bias
        assert block(x, bias=bias)[1] is bias
        assert block(x, more=("a", bias))[2][1] is bias
        assert block(x)[1] is None


def test_numbers_that_change_are_refused():
    class Counting(Mlp):
        number = 0

        def forward(self, x: Tensor) -> Any:
            self.number += 1
            return super().forward(x), self.number

    model, _ = model_of(Counting())
    with residrop.using(model, Plan.of([True])):
        assert model(batch())[1] == 1
        with pytest.raises(PlanError, match="returns 2 at '1' where it returned something else before"):
            model(batch())


def test_huggingface_output_classes():
    transformers = pytest.importorskip("transformers")

    class Layer(Mlp):
        def forward(self, x: Tensor) -> Any:
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=super().forward(x))

    model, plain = model_of(Layer())
    for coin in (False, True):
        with residrop.using(model, Plan.of([coin])):
            out = model(batch())
        assert type(out).__name__ == "BaseModelOutput"
        expected = batch() + 2.5 * coin * (plain[0](batch()).last_hidden_state - batch())
        torch.testing.assert_close(out.last_hidden_state, expected)


def test_form_is_learnt_once_and_without_traces():
    class Counting(nn.BatchNorm1d):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            Counting.calls += 1
            return super().forward(x), 7

    model, _ = model_of(Counting(D))
    block = model.blocks[0]
    with residrop.using(model, Plan.of([False])):
        for _ in range(3):
            out, number = model(batch())
            assert (torch.equal(out, batch()), number) == (True, 7)
    assert Counting.calls == 1
    assert int(block.num_batches_tracked) == 0
    assert all(module.training for module in model.modules())


def test_hidden_state_by_name_wherever_it_stands():
    model, plain = model_of(Attending())
    x, mask = batch(), torch.rand(5, dtype=torch.float64)
    with residrop.using(model, Plan.of([False])):
        assert model.blocks[0](mask=mask, x=x) is x
    with residrop.using(model, Plan.of([True])):
        torch.testing.assert_close(model.blocks[0](mask=mask, x=x), x + 2.5 * (plain[0](x, mask) - x))


@pytest.mark.parametrize("coin", [True, False])
@pytest.mark.parametrize(
    ("wants", "match"),
    [("other shape", r"turns \(5, 6\) into \(5, 5\)"), ("nothing", r"turns \(5, 6\) into a NoneType")],
)
def test_blocks_of_another_shape_are_refused(wants, match, coin):
    model, _ = model_of(Attending())
    with residrop.using(model, Plan.of([coin])), pytest.raises(ConfigError, match=match):
        model(batch(), wants=wants)


def test_blocks_without_a_tensor_are_refused():
    model, _ = model_of(Attending())
    with residrop.using(model, Plan.of([True])), pytest.raises(ConfigError, match="without a tensor as its first"):
        model.blocks[0]([1, 2])


@pytest.mark.parametrize("coin", [True, False])
def test_blocks_that_overwrite_their_input_are_refused(coin):
    model, _ = model_of(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(D, D)))
    with residrop.using(model, Plan.of([coin])), pytest.raises(ConfigError, match="overwrites its input"):
        model(batch().detach())


def test_rows_of_several_tensors_are_refused():
    model, _ = model_of(Attending(), granularity="row")
    for key in (1, 2):
        with (
            residrop.using(model, Plan((Draw((0.99,), key=key),))),
            pytest.raises(PlanError, match=r"a tensor of shape \(\) at '1' that is none of its arguments"),
        ):
            model(batch(), wants="tuple")


def test_unit_rules():
    model, plain = model_of(Mlp(), rule="swapout")
    x = batch()
    with residrop.using(model, Plan((Draw((0.4, 0.4), key=5),))):
        ours = model(x)
    torch.testing.assert_close(ours, functional.swapout(x, plain[0](x) - x, 0.4, 0.4, 5))
    torch.testing.assert_close(model.eval()(x), 0.4 * plain[0](x))


def test_rule_given_as_a_function():
    model, _ = model_of(Mlp(), rule=lambda p: residrop.StochasticDepth(p / 2, rescale="none"), survival=0.8)
    rules = [module for module in model.modules() if isinstance(module, residrop.Rule)]
    assert [(rule.rates, rule.rescale) for rule in rules] == [((0.4,), "none")]
    residrop.remove(model)
    with pytest.raises(ConfigError, match="rule is a function, which does not use granularity"):
        residrop.apply(model, rule=residrop.StochasticDepth, survival=0.5, blocks="blocks.*", granularity="row")
    with pytest.raises(ConfigError, match="rule returned a float"):
        residrop.apply(model, rule=lambda p: p, survival=0.5, blocks="blocks.*")
    assert not any(isinstance(module, AppliedBlock) for module in model.modules())


# Blocks that are containers


def sequential() -> nn.Sequential:
    return nn.Sequential(OrderedDict(one=nn.Linear(D, D), two=nn.Tanh(), three=nn.Linear(D, D)))


def test_sequential_block_is_the_sequence_it_was():
    model, plain = model_of(sequential())
    block, other = model.blocks[0], plain[0]
    assert type(block).__name__ == "Sequential"
    assert [type(one) for one in block] == [type(one) for one in other]
    assert len(block) == 3
    assert block[0] is block.one
    assert block[-1] is block.three
    assert type(block[1:]) is nn.Sequential
    assert [type(one).__name__ for one in block[:]] == ["Linear", "Tanh", "Linear"]
    assert list(block.state_dict()) == list(other.state_dict())
    assert type(block + sequential()) is nn.Sequential
    x = batch()
    with residrop.using(model, Plan.of([True])):
        torch.testing.assert_close(model(x), x + 2.5 * (other(x) - x))


def test_sequential_block_can_be_changed():
    model, plain = model_of(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)))
    for one in (model.blocks[0], plain[0]):
        torch.manual_seed(2)
        one.append(nn.Linear(D, D).double())
        one.insert(0, nn.Linear(D, D).double())
        del one[2]
        one[1] = nn.Sigmoid()
        one.extend([nn.Tanh(), nn.Linear(D, D).double()])
        one.pop(-2)
    block, other = model.blocks[0], plain[0]
    assert [type(one) for one in block] == [type(one) for one in other]
    assert list(block.state_dict()) == list(other.state_dict())
    x = batch()
    with residrop.using(model, Plan.of([True])):
        torch.testing.assert_close(model(x), x + 2.5 * (other(x) - x))
    residrop.remove(model)
    assert list(block._modules) == list(other._modules)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)


# Drop modules inside


class Dropping(Mlp):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.depth = nn.Sequential(StochasticDepth(p, "batch"), StochasticDepth(p / 2, "batch"))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.depth(super().forward(x) - x)


def test_drop_modules_inside_are_taken_over():
    model = Model(Dropping(0.5), Dropping(0.0)).double().train()
    plain = copy.deepcopy(model)
    report = residrop.apply(model, blocks=Dropping, branches=False)
    assert [(entry.rates, entry.granularity) for entry in report.blocks] == [((0.5,), "block"), ((1.0,), "block")]
    drops = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    x = batch()
    free = copy.deepcopy(plain)
    for block in free.blocks:
        block.depth = nn.Identity()
    with residrop.using(model, Plan.of([True, True])):
        torch.testing.assert_close(model(x), free.blocks[1](x + 2 * (free.blocks[0](x) - x)))
    residrop.remove(model)
    assert [drop.p for drop in drops] == [0.5, 0.25, 0.0, 0.0]


def test_one_drop_module_of_many_blocks_is_put_back():
    shared = StochasticDepth(0.3, "row")
    blocks = [Dropping(0.5), Dropping(0.5)]
    for block in blocks:
        block.depth = shared
    model = Model(*blocks)
    report = residrop.apply(model, blocks="blocks.*", branches=False)
    assert [entry.rates for entry in report.blocks] == [(0.7,), (0.7,)]
    residrop.remove(model)
    assert shared.p == 0.3


def test_drop_modules_elsewhere_are_named():
    model = Model(Dropping(0.5), nn.Sequential(Dropping(0.2)))
    report = residrop.apply(model, survival=0.5, blocks="blocks.0")
    assert report.left_alone == (
        ("blocks.1.0.depth.0", "it is in no block under a rule, so it goes on masking (survival rate 0.8)"),
        ("blocks.1.0.depth.1", "it is in no block under a rule, so it goes on masking (survival rate 0.9)"),
    )


# Names and calls


class Awkward(Mlp):
    """A block whose attributes bear names that a mixin may want."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(D, D)])
        self.parts, self.drops, self.through, self.along, self.batched, self.absent = 1, 2, 3, 4, 5, 6

    def forward(self, x: Tensor) -> Tensor:
        assert (self.parts, self.drops, self.through, self.along, self.batched, self.absent) == (1, 2, 3, 4, 5, 6)
        return x + self.branches[0](x)


def test_attributes_of_any_name_stay_visible():
    model, plain = model_of(Awkward())
    x = batch()
    with residrop.using(model, Plan.of([True])):
        torch.testing.assert_close(model(x), x + 2.5 * (plain[0](x) - x))
    rule, parts = model.blocks[0].residrop_branches()[0]
    assert isinstance(rule, residrop.StochasticDepth)
    assert {id(one) for one in parameters_of(parts)} == {id(one) for one in model.parameters()}


def test_attribute_that_would_be_hidden_is_refused():
    model = Model(Mlp(), Mlp())
    model.blocks[1].residrop_rules = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="has an attribute 'residrop_rules'"):
        residrop.apply(model, survival=0.5, blocks="blocks.*")
    assert [type(block) for block in model.blocks] == [Mlp, Mlp]  # all or none


def test_block_used_twice_lives_or_dies_as_one():
    block = Mlp()
    model = nn.Sequential(block, nn.Identity(), block).double().train()
    residrop.apply(model, survival=0.5, blocks=Mlp, branches=False)
    x = batch()
    with residrop.using(model, Plan.of([False])):
        assert model(x) is x
    assert len(residrop.sampler_of(model).sites) == 1


def test_torch_transformer_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().train()
    plain = copy.deepcopy(model)
    residrop.apply(
        model,
        survival=0.6,
        blocks=model.layers,
        branches=False,
        granularity="row",
        rescale="none",
        whole=["src_mask"],
        seed=1,
    )
    x = torch.randn(5, 5, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.zeros(5, 5, dtype=torch.float64).index_fill(1, torch.tensor([4]), -torch.inf)
    plan = residrop.sampler_of(model).plan(0)
    with residrop.using(model, plan), pytest.raises(PlanError, match="src_key_padding_mask"):  # 5 tokens, too
        model(x, mask=mask, src_key_padding_mask=padding)
    residrop.remove(model)
    residrop.apply(
        model,
        survival=0.6,
        blocks=model.layers,
        branches=False,
        granularity="row",
        rescale="none",
        whole=["src_mask"],
        cut=["src_key_padding_mask"],
        seed=1,
    )
    with residrop.using(model, plan):
        ours = model(x, mask=mask, src_key_padding_mask=padding)
    y = x
    for layer, draw in zip(plain.layers, plan.draws, strict=True):
        window = draw.rows(5)
        alive = torch.tensor([(row - window.start) % 5 < window.live for row in range(5)]).view(5, 1, 1)
        y = torch.where(alive, layer(y, src_mask=mask, src_key_padding_mask=padding), y)
    torch.testing.assert_close(ours, y)
