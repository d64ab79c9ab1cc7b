"""Rules that are in place but change nothing are told of; everything legitimate is not (warnings are errors here)."""

import pytest
import torch
from torch import nn

import residrop
from residrop import ConstantDepth, InactiveWarning, Residual, StochasticDepth, Swapout, attach, create, sampling, using
from residrop.schedule.sampler import Plan

X = torch.randn(4, 3, 8, 8)


def net(**options):
    return create("resnet-8", **{"rule": "stochastic-depth", "survival": 0.5, **options})


def train_in_eval(model, steps, x=X):
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    return model


# All rates 1


@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"timing": "warmup(3)"}, {"rule": "swapout"}])
def test_create_with_rates_of_one_warns(options):
    with pytest.warns(InactiveWarning, match="all . survival rates are 1; give survival below 1"):
        net(survival=1.0, **options)


def test_attach_with_rates_of_one_warns_at_the_call():
    model = nn.Sequential(*(Residual(nn.Linear(2, 2), rule=StochasticDepth(1.0)) for _ in range(3)))
    with pytest.warns(InactiveWarning, match="attach leaves nothing out: all 3 survival rates are 1") as found:
        attach(model)
    assert found[0].filename == __file__


def test_create_warns_at_the_call():
    with pytest.warns(InactiveWarning) as found:
        net(survival="1")
    assert found[0].filename == __file__


@pytest.mark.parametrize("rule", [ConstantDepth(), StochasticDepth(0.99), StochasticDepth(0.0), Swapout(1.0, 0.5)])
def test_attach_with_anything_to_draw_does_not_warn(rule):
    model = nn.Sequential(
        Residual(nn.Linear(2, 2), rule=StochasticDepth(1.0)) if rule.rates else nn.Identity(),
        Residual(nn.Linear(2, 2), rule=rule),
    )
    assert attach(model).step == 0


def test_constant_depth_is_no_inactive_rule():
    assert create("resnet-8").training


# Training in eval mode


def test_training_in_eval_mode_warns_after_eight_updates_once():
    with pytest.warns(
        InactiveWarning, match=r"CifarResNet is being trained in eval mode.*call model\.train\(\)"
    ) as found:
        model = train_in_eval(net(), 8)
    assert len(found) == 1
    train_in_eval(model, 20)
    with pytest.warns(InactiveWarning):
        train_in_eval(net(), 8)  # once for every model


def test_training_in_eval_mode_for_fewer_steps_does_not_warn():
    model = train_in_eval(net(), 7)
    assert residrop.sampler_of(model).step == 0


def test_applied_models_are_watched_too():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=3)
    residrop.apply(model, survival=0.5)
    with pytest.warns(InactiveWarning, match="ResNet is being trained in eval mode"):
        train_in_eval(model, 8, torch.randn(2, 3, 32, 32))


def test_gradients_without_updates_do_not_warn():
    model = net().eval()
    image = X.clone().requires_grad_()
    for _ in range(30):  # saliency
        model(image).sum().backward()
    assert image.grad is not None


def test_evaluation_between_updates_does_not_warn():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(12):
        model.train()
        model(X).sum().backward()
        optimizer.step()
        model.eval()
        model(X).sum().backward()
    assert residrop.sampler_of(model).step == 12


def test_evaluation_of_changing_weights_does_not_warn():
    model = net().eval()  # an average of weights, say, that is only evaluated
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.99)
        assert model(X).requires_grad  # somebody forgot no_grad
    with torch.no_grad():
        assert not model(X).requires_grad


def test_training_on_samples_or_given_plans_does_not_warn():
    for context in (lambda model: sampling(model), lambda model: using(model, Plan.of([True, False, True]))):
        model = net()
        with context(model):
            train_in_eval(model, 12)
        assert residrop.sampler_of(model).step == 0


def test_networks_of_constant_depth_may_be_trained_in_eval_mode():
    assert not train_in_eval(create("resnet-8"), 12).training


def test_training_by_plans_of_ones_own_does_not_warn():
    model = net()
    sampler = residrop.sampler_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(12):
        with using(model, sampler.plan(step)):
            model(X).sum().backward()
        optimizer.step()
    assert sampler.step == 0
