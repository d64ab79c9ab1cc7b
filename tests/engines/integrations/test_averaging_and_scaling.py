"""Averaged models (EMA) and automatic mixed precision with gradients that are None."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import residrop
from residrop import BackwardDepth, Residual, StochasticDepth

DEPTH = 6


def network(granularity: str = "block", rate: float = 0.5, rule: type = StochasticDepth) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Residual(nn.Linear(8, 8), rule=rule(rate, granularity)) for _ in range(DEPTH)]
    model = nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 3))
    residrop.attach(model, seed=7)
    return model


def data(number: int = 0) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(number))


def test_a_copy_has_draws_of_its_own():
    model = network()
    model(data())
    twin = copy.deepcopy(model)
    mine, its = residrop.sampler_of(model), residrop.sampler_of(twin)
    assert mine is not its
    assert its.step == 1
    for _ in range(3):
        twin(data())
    assert (mine.step, its.step) == (1, 4)
    model(data())
    assert (mine.step, its.step) == (2, 4)
    assert torch.equal(twin(data()), _at(model, 4))  # both are functions of seed and step
    with residrop.using(model, mine.plan(9)):
        assert its.in_force is not mine.in_force


def _at(model: nn.Module, step: int) -> torch.Tensor:
    with residrop.using(model, residrop.sampler_of(model).plan(step)):
        return model(data())


def test_averaged_model_follows_and_draws_nothing():
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for number in range(4):
        optimizer.zero_grad()
        model(data(number)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        if number:  # the first update copies
            expected = [0.5 * old + 0.5 * new for old, new in zip(expected, model.parameters(), strict=True)]
        else:
            expected = [parameter.detach().clone() for parameter in model.parameters()]
    for one, other in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(one, other)
    average.eval()
    before = residrop.sampler_of(average).step
    assert torch.equal(average(data()), average(data()))
    assert residrop.sampler_of(average).step == before == 0
    assert residrop.sampler_of(model).step == 4
    assert list(average.state_dict()) == ["n_averaged", *(f"module.{name}" for name in model.state_dict())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("rule", [StochasticDepth, BackwardDepth])
def test_gradient_scaler_with_absent_gradients(dtype, granularity, rule):
    """Unscaling and the search for infinities pass over parameters without gradient; an overflow skips the update."""
    model = network(granularity, rule=rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain = copy.deepcopy(model)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    dead = 0
    for number in range(6):
        for one, each in ((model, optimizer), (plain, reference)):
            each.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = one(data(number)).square().mean()
            (scaler.scale(loss) if one is model else loss).backward()
        dead += sum(parameter.grad is None for parameter in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        reference.step()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            torch.testing.assert_close(one, other, rtol=0.0, atol=2e-3)
    assert scaler.get_scale() == 64.0
    assert (dead > 0) is (granularity == "block")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(data()).sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert residrop.sampler_of(model).step == 7


def test_a_dead_branch_hides_an_overflow_that_it_does_not_compute():
    """Absent is not computed: weights that overflow cannot spoil a step in which their block is absent."""
    model = network()
    with torch.no_grad():
        model[1].branch.weight.fill_(torch.inf)
    with residrop.using(model, residrop.Plan.of([False] + [True] * (DEPTH - 1))):
        loss = model(data()).square().mean()
        loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_an_optimizer_of_one_branch_needs_its_gradient():
    """torch's scaler refuses an optimizer none of whose parameters has a gradient: give it live parameters, too."""
    model = network()
    scaler = torch.amp.GradScaler("cpu")
    alone = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with residrop.using(model, residrop.Plan.of([False] + [True] * (DEPTH - 1))):
        scaler.scale(model(data()).sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(alone)
