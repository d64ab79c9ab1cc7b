import math

import pytest
import torch

from residrop.common.errors import ConfigError
from residrop.models import Vanilla, create

KEPT = [1.0, 0.0, 1.0, 1.0, 0.0]


def equation(model, x, deltas, stable):
    """Hayou & Ayed, eq. 1 and 3, as a loop over the weights."""
    state = model.state_dict()
    y = x @ state["stem.weight"].T
    for number, delta in enumerate(deltas, start=1):
        weight = state[f"blocks.block{number}.branch.linear.weight"]
        scale = 1 / math.sqrt(len(deltas)) if stable else 1.0
        y = y + delta * scale * (y.clamp(min=0) @ weight.T)
    return y @ state["tail.weight"].T


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("rule", ["constant", "stochastic-depth"])
def test_vanilla_equals_the_equation(rule, stable):
    deltas = [1.0] * 5 if rule == "constant" else KEPT
    name = "stable-vanilla-5" if stable else "vanilla-5"
    model = create(name, rule=rule, survival=deltas, width=16, in_features=6, out_features=3).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), equation(model, x, deltas, stable))


def test_vanilla_flattens_and_keeps_dtype():
    model = Vanilla(2, width=8, in_features=12, out_features=2).double()
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    y = model(x)
    assert (y.shape, y.dtype) == ((5, 2), torch.float64)
    assert torch.equal(y, model(x.flatten(1)))


def test_vanilla_has_no_bias_and_the_papers_variances():
    torch.manual_seed(0)
    state = Vanilla(2, width=512, in_features=128, out_features=64).state_dict()
    assert all(key.endswith("weight") for key in state)
    variances = {key: value.var().item() for key, value in state.items()}
    assert variances == pytest.approx(
        {
            "stem.weight": 1 / 128,
            "blocks.block1.branch.linear.weight": 2 / 512,
            "blocks.block2.branch.linear.weight": 2 / 512,
            "tail.weight": 1 / 512,
        },
        rel=0.04,
    )


@pytest.mark.parametrize(("depth", "factor"), [(50, 0.141421), (100, 0.1)])
def test_stable_factor(depth, factor):
    with torch.device("meta"):
        model = Vanilla(depth, width=8, stable=True)
    factors = [block.branch.scale.factor for block in model.blocks]
    assert factors == pytest.approx([factor] * depth, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"width": -1}, "width is -1"),
        ({"in_features": 1.5}, "in_features is 1.5"),
        ({"rules": []}, "0 rules were given for 3 residual blocks"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        Vanilla(**{"depth": 3, **options})


@pytest.mark.parametrize("shape", [(4, 7), (6,), (4, 2, 4)])
def test_forward_refuses(shape):
    with pytest.raises(ConfigError, match=r"reads \[n, \.\.\.\] with 6 numbers a row"):
        Vanilla(1, width=4, in_features=6)(torch.randn(shape))
