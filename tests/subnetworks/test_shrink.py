"""`shrink` and `frontier` as their users meet them."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import residrop
from residrop.common.errors import ConfigError, SpreadError
from residrop.subnetworks import choosing
from residrop.subnetworks.blocks import Whole, pairs_of
from residrop.subnetworks.plain import plain
from residrop.subnetworks.timing import seconds_of
from residrop.theory.costs import Costs


def model_and_batches(rule="stochastic-depth", rows=8, **options):
    torch.manual_seed(0)
    model = residrop.create("resnet-14", rule=rule, **options)
    return model, [(torch.randn(rows, 3, 16, 16), torch.randint(0, 10, (rows,))) for _ in range(3)]


def test_result_is_what_the_parts_give():
    model, batches = model_and_batches(survival=0.7)
    state = copy.deepcopy(model.state_dict())
    found = residrop.shrink(model, "0.6 of flops", batches=batches, by="greedy", repeats=1)
    assert (len(found.kept) + len(found.removed), found.unit, found.by) == (6, "flops", "greedy")
    assert found.predicted <= 0.6
    assert found.recalibrated
    assert not found.model.training
    whole = Whole(model, *pairs_of(batches, None))
    by_hand = plain(whole, [block.name in found.kept for block in whole.blocks]).eval()
    before = [float(F.cross_entropy(by_hand(x), y).detach()) for x, y in batches]
    residrop.recalibrate(by_hand, [x for x, _ in batches])
    after = [float(F.cross_entropy(by_hand(x), y).detach()) for x, y in batches]
    assert found.loss[1:] == pytest.approx([sum(before) / 3, sum(after) / 3])
    assert all(torch.equal(one, by_hand.state_dict()[name]) for name, one in found.model.state_dict().items())
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    record = json.loads(json.dumps(found.to_dict()))
    assert record["kept"] == list(found.kept)
    assert f"{len(found.kept)} of 6 blocks" in str(found)


def test_without_recalibration_statistics_stay():
    model, batches = model_and_batches()
    found = residrop.shrink(model, "3 of blocks", batches=batches, recalibrate=False, repeats=1)
    own = model.state_dict()
    assert len(found.kept) == 3
    assert all(torch.equal(one, own[name]) for name, one in found.model.state_dict().items())
    assert found.loss[1] == found.loss[2]


def test_folded_it_computes_the_same():
    model, batches = model_and_batches()
    plain_one, folded = (
        residrop.shrink(model, 0.5, batches=batches, fold=fold, repeats=1).model for fold in (False, True)
    )
    x = batches[0][0]
    torch.testing.assert_close(folded(x), plain_one(x), rtol=1e-4, atol=1e-5)
    assert not [one for one in folded.modules() if isinstance(one, nn.BatchNorm2d)]


def test_budget_of_time_is_spent_by_measured_costs(monkeypatch):
    model, batches = model_and_batches()
    costs = Costs((3.0, 1.0, 1.0, 1.0, 1.0, 1.0), 2.0, "time")
    monkeypatch.setattr(choosing, "costs_of", lambda *a, **o: costs)
    found = residrop.shrink(model, "0.7 of time", batches=batches, by="first", repeats=1)
    assert found.kept == ("blocks.block1", "blocks.block2", "blocks.block3")
    assert (found.unit, found.predicted) == ("time", 0.7)
    found = residrop.shrink(model, "7000 ms", batches=batches, by="first", repeats=1)
    assert len(found.kept) == 3


def test_times_that_scatter_make_it_a_budget_of_flops_or_an_error(monkeypatch):
    model, batches = model_and_batches()
    own = choosing.costs_of

    def scattered(model, unit, x, **options):
        if unit == "time":
            raise SpreadError("a block takes 1 ± 9 ms")
        return own(model, unit, x, **options)

    monkeypatch.setattr(choosing, "costs_of", scattered)
    with pytest.warns(UserWarning, match="the budget is 0.7 of flops now"):
        found = residrop.shrink(model, "0.7 of time", batches=batches, repeats=1)
    assert found.unit == "flops"
    with pytest.raises(ConfigError, match="a block takes 1 ± 9 ms"):
        residrop.shrink(model, "9 ms", batches=batches, repeats=1)


def test_progress_says_what_greedy_choice_takes():
    model, batches = model_and_batches()
    said = []
    residrop.shrink(model, 0.5, batches=batches, by="greedy", repeats=1, on_progress=lambda *told: said.append(told))
    assert said[0][0] == "greedy, 15 losses of 3 batches at most"
    assert [share for _, share in said] == sorted(share for _, share in said)
    assert said[-1][1] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "no batch was given"),
        ({"batches": None}, "batches is a NoneType"),
        ({"batches": [torch.ones(2)]}, "a batch is a Tensor"),
        ({"batches": [(torch.ones(2, 3, 16, 16), torch.ones(2, 7))]}, "fails on the batches"),
        ({"batches": [(torch.ones(2, 5), torch.arange(2))]}, r"the input has shape \[2, 5\]"),
        ({"by": "magnitude"}, "by is 'magnitude'"),
        ({"blocks": "blocks.*"}, "has rules already"),
        ({"loss": lambda output, target: output.loss}, "fails on the batches"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(options, message):
    model, batches = model_and_batches()
    with pytest.raises(ConfigError, match=message) as caught:
        residrop.shrink(model, 0.5, **{"batches": batches, **options})
    assert "\n" not in str(caught.value)


def test_one_row_has_no_statistics():
    model, batches = model_and_batches(rows=1)
    flat = nn.Sequential(
        model.stem, nn.AdaptiveAvgPool2d(1), *[Flat() for _ in range(2)], nn.Flatten(), nn.Linear(16, 10)
    )
    with pytest.raises(ConfigError, match=r"no statistics of such batches .* recalibrate=False"):
        residrop.shrink(flat, 0.5, batches=batches, repeats=1)
    assert residrop.shrink(flat, 0.5, batches=batches, recalibrate=False, repeats=1).loss[0] > 0.0


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x):
        return x + self.norm(self.inner(x))


class Two(nn.Module):
    """A model of two arguments."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[Flat() for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(self, x, shift):
        return self.head(self.blocks(x + shift).mean((2, 3)))


def test_batches_of_several_arguments():
    batches = [((torch.randn(5, 16, 3, 3), torch.randn(5, 1, 1, 1)), torch.arange(5) % 4) for _ in range(2)]
    found = residrop.shrink(Two(), "2 of blocks", batches=batches, repeats=1)
    assert found.recalibrated
    assert found.model(*batches[0][0]).shape == (5, 4)


@pytest.mark.parametrize(
    ("by", "loss", "message"),
    [
        ("sensitivity", lambda output, target: output.detach().sum().item(), "cannot be differentiated"),
        ("sensitivity", lambda output, target: output.argmax(1).float().mean(), "cannot be differentiated"),
    ],
)
def test_losses_without_gradients_choose_by_removal_only(by, loss, message):
    model, batches = model_and_batches()
    with pytest.raises(ConfigError, match=message):
        residrop.shrink(model, 0.5, batches=batches, by=by, loss=loss, repeats=1)
    assert len(residrop.shrink(model, 0.5, batches=batches, by="removal", loss=loss, repeats=1).kept) == 3


def test_models_without_blocks_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ConfigError, match="has no residual blocks"):
        residrop.shrink(model, 0.5, batches=[(torch.ones(2, 3, 2, 2), torch.arange(2))])


def test_frontier_has_a_point_for_every_budget_and_model():
    first, batches = model_and_batches()
    second, _ = model_and_batches(rule="constant")
    seen = []

    def metric(model):
        seen.append(model)
        return float(len(list(model.parameters())))

    points = residrop.frontier(
        {"a": first, "b": second},
        batches,
        metric,
        budgets=(0.4, 1.0, 0.001),
        unit="flops",
        by=("removal", "greedy", "every_other"),
        repeats=1,
    )
    assert [(one.name, one.by, one.budget) for one in points] == [
        (name, by, f"{share} of flops")
        for name in "ab"
        for by in ("removal", "greedy", "every_other")
        for share in (1.0, 0.4)
    ]
    whole = [one for one in points if one.budget.startswith("1.0")]
    assert all(len(one.kept) == one.blocks == 6 and one.predicted == 1.0 for one in whole)
    small = [one for one in points if one.budget.startswith("0.4")]
    assert all(one.predicted <= 0.4 and one.flops < 0.5 * whole[0].flops for one in small)
    assert all(one.flops == pytest.approx(one.predicted * whole[0].flops) for one in points)
    distinct = {(one.name, one.kept): (one.before, one.metric, one.seconds) for one in points}
    assert len(seen) == 2 * len(distinct) < 2 * len(points)  # each sub-network once, before and after
    assert all(distinct[one.name, one.kept] == (one.before, one.metric, one.seconds) for one in points)
    assert all(not type(one).__module__.startswith("residrop") for model in seen for one in model.modules())
    json.dumps([one.to_dict() for one in points])


def test_frontier_without_a_metric_is_of_losses_and_refuses_what_no_budget_meets():
    model, batches = model_and_batches()
    (point,) = residrop.frontier(model, batches, budgets=(0.5,), unit="blocks", repeats=1, recalibrate=False)
    found = residrop.shrink(model, 0.5, batches=batches, recalibrate=False, repeats=1)
    assert point.metric == point.before == found.loss[1]
    with pytest.raises(ConfigError, match=r"no budget can be met: the smallest sub-network takes 0\.0"):
        residrop.frontier(model, batches, budgets=(0.001,), unit="flops", repeats=1)


def test_times_are_medians_of_forwards_in_turns():
    order = []

    class Noting(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            assert not self.training
            assert not torch.is_grad_enabled()
            order.append(self.name)
            return x

    models = [Noting("a").train(), Noting("b").train()]
    found = seconds_of(models, torch.ones(2), repeats=3)
    assert order == ["a", "b"] * 5
    assert len(found) == 2
    assert min(found) > 0.0
    assert all(model.training for model in models)
