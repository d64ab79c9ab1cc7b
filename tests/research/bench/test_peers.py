"""The ideals: exactly the live branches, exactly the live rows, and no work besides."""

import pytest
import torch
from torch import nn

from residrop.research.bench.networks import Chain, Unit
from residrop.research.bench.peers import live_network, narrow_network, spares_of


class Seen(nn.Module):
    """A unit that remembers what came in."""

    def __init__(self, name, log, function=None):
        super().__init__()
        self.name, self.log = name, log
        self.function = nn.Linear(3, 3) if function is None else function

    def forward(self, x):
        self.log.append((self.name, x))
        return self.function(x)


@pytest.fixture
def log():
    return []


@pytest.fixture
def chain(log):
    """Three blocks; the second has a shortcut that computes something, the last is followed by a fixed module."""
    torch.manual_seed(0)
    pool = Seen("pool", log, nn.Tanh())
    units = [
        Unit(Seen("one", log)),
        Unit(Seen("two", log), Seen("shortcut", log)),
        Unit(Seen("three", log)),
        Unit(pool, pool, droppable=False),
    ]
    return Chain(Seen("stem", log), units, Seen("head", log))


def names(log):
    return [name for name, _ in log]


@pytest.mark.parametrize(
    ("alive", "called"),
    [
        ((True, True, True), ["one", "two", "three"]),
        ((False, True, False), ["two"]),
        ((True, False, True), ["one", "shortcut", "three"]),
        ((False, False, False), ["shortcut"]),
    ],
)
def test_live_network_has_exactly_the_live_branches(chain, log, alive, called):
    x = torch.randn(4, 3)
    found = live_network(chain, alive)(x)
    assert names(log) == ["stem", *called, "pool", "head"]
    units = {"one": chain.units[0], "two": chain.units[1], "three": chain.units[2]}
    y = chain.stem(x)
    for name in called:
        y = chain.units[1].absent(y) if name == "shortcut" else units[name].present(y)
    torch.testing.assert_close(found, chain.head(torch.tanh(y)))


def narrow(chain, counts, x):
    run = narrow_network(chain, counts, spares_of(chain, x, torch.sum))
    for unit in chain.units[:3]:
        unit.present.function.zero_grad()
    return run


@pytest.mark.parametrize("counts", [(3, 2, 4), (4, 4, 4), (1, 5, 2), (2, 0, 3), (0, 0, 0), (5, 5, 5)])
def test_narrow_network_runs_every_block_on_its_rows(chain, log, counts):
    x = torch.randn(5, 3)
    run = narrow(chain, counts, x)
    log.clear()
    y = run(x)
    rows = {name: len(value) for name, value in log}
    wanted = zip(("one", "two", "three"), counts, strict=True)
    assert {name: rows[name] for name in rows if name in ("one", "two", "three")} == {n: k for n, k in wanted if k}
    # the other rows, by themselves, or all that come from the block before
    others = (counts[0] or 5) if counts[1] == 0 else 5 - counts[1]
    assert rows.get("shortcut", 0) == others
    assert (rows["stem"], rows["head"], len(y)) == (5, 5, 5)
    y.sum().backward()
    grads = [unit.present.function.weight.grad is not None for unit in chain.units[:3]]
    assert grads == [count > 0 for count in counts]


def test_narrow_network_at_equal_counts_is_a_part_of_the_batch(chain, log):
    x = torch.randn(5, 3)
    run = narrow(chain, (2, 2, 2), x)
    log.clear()
    run(x)
    part = chain.stem(x)[:2]
    for unit in chain.units:
        part = unit.present(part)
    assert len(part) == 2
    log_of = dict(log)
    torch.testing.assert_close(log_of["pool"].tanh(), part)


def test_narrow_network_cuts_without_a_copy(chain, log):
    x = torch.randn(5, 3)
    run = narrow(chain, (4, 3, 2), x)
    log.clear()
    run(x)
    inputs = dict(log)
    stem = chain.stem(x)  # the same values, elsewhere
    torch.testing.assert_close(inputs["one"], stem[:4])
    assert inputs["one"]._base is not None  # a view of what the stem gave
    assert inputs["two"]._base is not None
    assert inputs["two"]._base.shape == (4, 3)


def test_spare_rows_and_gradients_are_those_of_constant_depth(chain):
    x = torch.randn(5, 3)
    spares = spares_of(chain, x, lambda y: (y**2).sum())
    y = chain.stem(x)
    for unit in chain.units:
        y = unit.present(y)
    y.retain_grad()
    (chain.head(y) ** 2).sum().backward()
    shape = torch.Size([3])
    torch.testing.assert_close(spares.values[shape], y)
    assert spares.rows(x, 4, grads=True).shape == (4, 3)
    assert spares.rows(x, 4, grads=True) is spares.rows(x, 4, grads=True)
    assert not torch.equal(spares.rows(x, 4, grads=False), spares.rows(x, 4, grads=True))
