"""Which blocks stay: against loops over all that could be left out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import residrop
from residrop.common.errors import ConfigError
from residrop.schedule.sampler import Plan
from residrop.subnetworks.blocks import Whole, pairs_of
from residrop.subnetworks.choosing import Budget, block_costs, chosen, greedy, importance_of, predicted
from residrop.theory.costs import Costs


def tell(what, share):
    assert 0.0 <= share <= 1.0


@pytest.fixture
def whole():
    torch.manual_seed(0)
    model = residrop.create("resnet-14", rule="stochastic-depth", survival=0.5)
    batches = [(torch.randn(6, 3, 16, 16), torch.randint(0, 10, (6,))) for _ in range(2)]
    return Whole(model, *pairs_of(batches, None))


def loss_by_hand(whole, kept):
    """With the blocks' own draws, one batch after the other."""
    model = whole.model.eval()
    with torch.no_grad(), residrop.using(model, Plan.of(kept)):
        return sum(float(F.cross_entropy(model(x), y)) for x, y in whole.data) / len(whole.data)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("0.6 of time", (0.6, "time", False)),
        (" .5 OF flops", (0.5, "flops", False)),
        ("12 of blocks", (12.0, "blocks", True)),
        ("1 of blocks", (1.0, "blocks", True)),
        ("1.0 of blocks", (1.0, "blocks", False)),
        (1, (1.0, "blocks", False)),
        (0.25, (0.25, "blocks", False)),
        ("8.5 ms", (8.5, "time", True)),
        ("8ms", (8.0, "time", True)),
    ],
)
def test_budgets_are_read(given, wanted):
    found = Budget.read(given)
    assert (found.amount, found.unit, found.absolute) == wanted


@pytest.mark.parametrize(
    "given", ["", "half", "-1", "0.5 of ms", "1.5 of time", "2.5 of blocks", "nan", "0.5 of seconds"]
)
def test_other_budgets_are_refused(given):
    with pytest.raises(ConfigError, match="budget"):
        Budget.read(given)


COSTS = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=8)


@given(COSTS, st.floats(0.0, 5.0), st.floats(0.0, 1.0), st.randoms())
def test_what_is_chosen_costs_no_more_than_the_budget_and_nothing_more_fits(costs, fixed, share, random):
    values = [random.uniform(-1.0, 3.0) for _ in costs]
    found = Costs(tuple(costs), fixed, "flops")
    limit = fixed + share * sum(costs)
    kept = chosen(found, values, "removal", limit, "x")
    spent = fixed + sum(cost for cost, keep in zip(costs, kept, strict=True) if keep)
    assert spent <= limit or not any(kept)
    assert all(keep or spent + cost > limit for cost, keep in zip(costs, kept, strict=True))
    assert predicted(found, kept) == pytest.approx(spent / (fixed + sum(costs)))


def test_equal_costs_leave_the_most_important_blocks():
    costs = Costs((1.0,) * 5, 0.0, "blocks")
    assert chosen(costs, [3.0, -1.0, 2.0, 0.5, 4.0], "removal", 3.0, "x") == (True, False, True, False, True)


def test_what_a_block_costs_counts():
    costs = Costs((4.0, 1.0, 1.0), 0.0, "flops")
    assert chosen(costs, [2.0, 1.0, 1.0], "removal", 3.0, "x") == (False, True, True)


def test_blocks_that_cost_nothing_stay():
    costs = Costs((1.0, 0.0, 1.0), 0.0, "flops")
    assert chosen(costs, [1.0, -5.0, 2.0], "removal", 1.0, "x") == (False, True, True)


def test_one_layer_of_each_list_stays():
    costs = Costs((1.0,) * 4, 0.0, "blocks")
    lists = [frozenset({0, 1}), frozenset({2, 3})]
    assert chosen(costs, [1.0, 2.0, 3.0, 4.0], "removal", 2.0, "x", lists) == (False, True, False, True)
    with pytest.raises(ConfigError, match=r"x cannot be met: one layer of each list has to stay, which takes 0\.5 of"):
        chosen(costs, [1.0, 2.0, 3.0, 4.0], "removal", 1.0, "x", lists)


def test_losses_that_are_not_finite_choose_nothing(whole, monkeypatch):
    own = whole.losses

    def losses(kept):
        return own(kept) if kept[0] else [float("nan")]

    monkeypatch.setattr(whole, "losses", losses)
    costs = block_costs(whole, Budget.read("0.5 of flops"), tell)
    for by in ("removal", "greedy"):
        kept = (
            greedy(whole, costs, 0.5 * costs.total, "x", tell)
            if by == "greedy"
            else chosen(costs, importance_of(whole, by, 0, tell), by, 0.5 * costs.total, "x")
        )
        assert kept[0]
    with pytest.raises(ConfigError, match="is not finite on these batches"):
        Whole(whole.model, [(x * float("nan"), y) for x, y in whole.data], whole.loss)


def test_a_budget_that_cannot_be_met_names_the_least():
    with pytest.raises(ConfigError, match=r"0.5 of flops cannot be met: without any block the network takes 0.6 of"):
        chosen(Costs((4.0,), 6.0, "flops"), [1.0], "removal", 5.0, "0.5 of flops")
    with pytest.raises(ConfigError, match=r"2 ms cannot be met: .* takes 6 ms"):
        chosen(Costs((0.004,), 0.006, "time"), [1.0], "removal", 0.002, "2 ms")
    with pytest.raises(ConfigError, match=r"7 of blocks, and the network has 6 blocks"):
        chosen(Costs((1.0,) * 6, 0.0, "blocks"), [1.0] * 6, "removal", 7.0, "7 of blocks")


def test_with_batch_statistics_losses_are_those_of_training_mode_and_statistics_stay(whole):
    own = Whole(whole.model, whole.data, whole.loss, batch_statistics=True)
    state = {name: value.clone() for name, value in own.model.state_dict().items()}
    kept = (True, False, True, True, False, True)
    with torch.no_grad(), residrop.using(whole.model.train(), Plan.of(kept)):
        wanted = [float(F.cross_entropy(whole.model(x), y)) for x, y in whole.data]
    assert own.losses(kept) == wanted
    assert all(torch.equal(value, state[name]) for name, value in own.model.state_dict().items())
    assert not any(module.training for module in own.model.modules())


def test_removal_is_the_loss_without_each_block(whole):
    full = loss_by_hand(whole, [True] * 6)
    wanted = [loss_by_hand(whole, [number != absent for number in range(6)]) - full for absent in range(6)]
    assert importance_of(whole, "removal", 0, tell) == pytest.approx(wanted, abs=1e-9)


def test_sensitivity_is_the_derivative_by_presence(whole):
    """Against differences: the branches of a block times 1 +- h."""
    found = importance_of(whole, "sensitivity", 0, tell)
    from residrop.theory.gates import gated, kept_as_is

    model, step = whole.model.double(), 1e-5
    data = [(x.double(), y) for x, y in whole.data]
    for number in range(6):
        losses = []
        for sign in (1, -1):
            gates = torch.ones(6, dtype=torch.float64)
            gates[number] += sign * step
            with torch.no_grad(), kept_as_is(model, training=False), gated(model, gates):
                losses.append(sum(float(F.cross_entropy(model(x), y)) for x, y in data) / len(data))
        assert found[number] == pytest.approx(-(losses[0] - losses[1]) / (2 * step), rel=1e-3, abs=1e-5)


def test_greedy_leaves_out_the_least_needed_block_again_and_again(whole):
    costs = block_costs(whole, Budget.read("0.5 of flops"), tell)
    kept, limit = [True] * 6, 0.5 * costs.total
    while costs.fixed + sum(cost for cost, keep in zip(costs.branches, kept, strict=True) if keep) > limit:
        loss = loss_by_hand(whole, kept)
        rises = {
            number: (loss_by_hand(whole, [keep and one != number for one, keep in enumerate(kept)]) - loss)
            / costs.branches[number]
            for number in range(6)
            if kept[number]
        }
        kept[min(rises, key=lambda one: rises[one])] = False
    assert greedy(whole, costs, limit, "x", tell) == tuple(kept)


def test_orders_to_compare_with(whole):
    costs = Costs((1.0,) * 6, 0.0, "blocks")
    assert chosen(costs, importance_of(whole, "first", 0, tell), "first", 4.0, "x") == (True,) * 4 + (False,) * 2
    every = chosen(costs, importance_of(whole, "every_other", 0, tell), "every_other", 3.0, "x")
    assert every == (True, False) * 3
    assert sum(chosen(costs, importance_of(whole, "random", 1, tell), "random", 3.0, "x")) == 3
    assert importance_of(whole, "random", 1, tell) == importance_of(whole, "random", 1, tell)


def test_costs_of_blocks_are_those_of_all_their_branches():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    whole = Whole(model, *pairs_of([(torch.randn(2, 3, 32, 32), torch.arange(2))], None))
    costs = block_costs(whole, Budget.read("0.5 of flops"), tell)
    assert len(costs.branches) == 2
    assert costs.branches[0] == costs.branches[1]
    assert costs.fixed < 0.2 * costs.total
