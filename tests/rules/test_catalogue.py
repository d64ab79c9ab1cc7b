"""Rules by name: every entry builds what its title says, and refuses what it does not take."""

import inspect

import pytest
import torch
from torch import nn

import residrop
from residrop import (
    ConstantDepth,
    DepthDropout,
    GaussianDepth,
    Residual,
    SkipForward,
    StochasticDepth,
    Swapout,
    UnitDropout,
    attach,
)
from residrop.common.errors import ConfigError
from residrop.rules.catalogue import RULES, entry_of, make_rule
from residrop.schedule.survival import parse

OPTIONS = {
    "repeat": 2,
    "earlier": 0.75,
    "granularity": "row",
    "rescale": "train",
    "rows": "window",
    "scope": "per_rank",
    "theta_2": 0.25,
    "of": "shortcut",
    "on": "sum",
}
names = pytest.mark.parametrize("name", RULES)


def rate_of(name):
    """A rate that the rule takes: a constant block takes only 1."""
    return 1.0 if name == "constant" else 0.5


def test_names_are_pinned():
    assert list(RULES) == [
        "constant",
        "stochastic-depth",
        "layer-dropout",
        "depth-dropout",
        "backward-depth",
        "gaussian-depth",
        "swapout",
        "mix",
        "skipforward",
        "dropout",
        "dropout-residual",
        "dropout-sum",
    ]


@names
@pytest.mark.parametrize("depth", [1, 2, 9])
def test_entry_builds_with_its_default_schedule(name, depth):
    rates = parse(entry_of(name).survival, depth)
    rules = [make_rule(name, rate) for rate in rates]
    assert len(rules) == depth
    model = nn.Sequential(*(Residual(nn.Linear(4, 4), rule=rule) for rule in rules))
    attach(model)
    x = torch.ones(3, 4)
    assert model(x).shape == model.eval()(x).shape == (3, 4)
    assert all(rule.rates[:1] == ((rate,) if rule.rates else ()) for rule, rate in zip(rules, rates, strict=True))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("constant", ConstantDepth()),
        ("stochastic-depth", StochasticDepth(0.5, "block", "test")),
        ("layer-dropout", StochasticDepth(0.5, "block", "test")),
        ("depth-dropout", DepthDropout(0.5)),
        ("gaussian-depth", GaussianDepth(0.5, "block", "test")),
        ("swapout", Swapout(0.5, 0.5)),
        ("skipforward", SkipForward(0.5, "branch")),
        ("dropout", UnitDropout(0.5, "branch")),
        ("dropout-residual", UnitDropout(0.5, "residual")),
        ("dropout-sum", UnitDropout(0.5, "sum")),
    ],
)
def test_entry_builds_its_rule(name, rule):
    built = make_rule(name, rate_of(name))
    assert type(built) is type(rule)
    assert repr(built) == repr(rule)
    assert built.site == rule.site


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("constant", "1"),
        ("stochastic-depth", "linear_decay(0.5)"),
        ("layer-dropout", "linear(1, 0.5)"),
        ("depth-dropout", "uniform(0.5)"),
        ("gaussian-depth", "linear_decay(0.5)"),
        ("swapout", "linear(1, 0.5)"),
        ("skipforward", "linear(1, 0.5)"),
        ("dropout", "linear(1, 0.5)"),
    ],
)
def test_default_schedules_are_the_papers(name, schedule):
    assert parse(RULES[name].survival, 9) == parse(schedule, 9)


@names
def test_every_listed_option_is_taken(name):
    for option in RULES[name].options:
        rule = make_rule(name, rate_of(name), place=2, **{option: OPTIONS[option]})
        place = {"theta_2": 1, "earlier": -1}.get(option)  # options that are rates
        attribute = getattr(rule, option) if place is None else rule.rates[place]
        assert attribute == OPTIONS[option], (name, option)


@names
def test_options_of_none_are_defaults(name):
    default = repr(make_rule(name, rate_of(name)))
    assert repr(make_rule(name, rate_of(name), **dict.fromkeys(RULES[name].options))) == default
    assert repr(make_rule(name, rate_of(name), anything=None)) == default


@names
def test_unlisted_options_refused(name):
    unlisted = [option for option in OPTIONS if option not in RULES[name].options]
    for option in [*unlisted, "p"]:
        with pytest.raises(ConfigError, match=f"rule '{name}' takes no option '{option}'; it takes "):
            make_rule(name, 0.5, **{option: OPTIONS.get(option, 0.5)})


def test_refused_option_names_the_allowed():
    with pytest.raises(ConfigError, match=r"it takes granularity, rescale, rows, scope$"):
        make_rule("stochastic-depth", 0.5, of="branch")
    with pytest.raises(ConfigError, match=r"it takes no options$"):
        make_rule("constant", 1.0, scope="shared")


@pytest.mark.parametrize("name", ["", "Swapout", "stochastic_depth", "drop-path"])
def test_unknown_names_refused(name):
    for call in (lambda: make_rule(name, 0.5), lambda: entry_of(name)):
        with pytest.raises(ConfigError, match=f"rule '{name}' is unknown; choose one of constant, stochastic-depth"):
            call()


@names
@pytest.mark.parametrize("rate", [1.5, -0.1, float("nan"), "0.5"])
def test_bad_rates_refused(name, rate):
    """By every rule: a rate outside [0, 1] is a mistake even where it plays no part."""
    with pytest.raises(ConfigError, match=r"is .*(lie in|give a number in) "):
        make_rule(name, rate)


def test_constant_takes_no_other_rate():
    with pytest.raises(ConfigError, match=r"survival is 0\.5; a constant block is always present"):
        make_rule("constant", 0.5)


def test_bad_option_values_refused():
    with pytest.raises(ConfigError, match="granularity is 'unit'"):
        make_rule("stochastic-depth", 0.5, granularity="unit")
    with pytest.raises(ConfigError, match="theta_2 is 2"):
        make_rule("swapout", 0.5, theta_2=2)


@names
def test_titles_are_lines(name):
    title = RULES[name].title
    assert title
    assert "\n" not in title
    assert not title.endswith(".")


def test_every_rule_class_is_in_the_catalogue():
    built = {type(make_rule(name, rate_of(name))) for name in RULES}
    public = [getattr(residrop, name) for name in dir(residrop)]  # names are imported when they are asked for
    rules = {rule for rule in public if inspect.isclass(rule) and issubclass(rule, residrop.Rule)}
    assert rules - built == {residrop.Rule}
