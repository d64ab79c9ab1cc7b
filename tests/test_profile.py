"""What a step launches: nothing for absent branches, and nothing that waits for the device."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from residrop import Plan, branch_flops, create, sampler_of, using

# what reads a number from the device, or finds out which elements are there
WAITING = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")


def network(device="cpu", **options):
    return create("resnet-20", channels=1, seed=0, **options).to(device)


def traced(model, x, activities):
    """Names and counts of what a training step launches, after one that is not looked at."""

    def step():
        model.zero_grad()
        model(x).logsumexp(1).mean().backward()

    step()
    with profile(activities=activities, acc_events=True) as trace:
        step()
    return Counter({event.key: event.count for event in trace.key_averages()})


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_drawing_waits_for_nothing(granularity):
    x = torch.randn(8, 1, 16, 16)
    plain = traced(network(), x, [ProfilerActivity.CPU])
    ours = network(rule="stochastic-depth", survival=0.5, granularity=granularity)
    found = traced(ours, x, [ProfilerActivity.CPU])
    assert found["aten::convolution"] > 0  # the trace saw the step
    assert {name: found[name] - plain[name] for name in WAITING} == dict.fromkeys(WAITING, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["block", "row"])
def test_drawing_does_not_wait_for_the_gpu(granularity):
    x = torch.randn(8, 1, 16, 16, device="cuda")
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    plain = traced(network("cuda"), x, activities)
    found = traced(network("cuda", rule="stochastic-depth", survival=0.5, granularity=granularity), x, activities)
    waiting = (*WAITING, "Memcpy DtoH (Device -> Pageable)", "cudaStreamSynchronize")
    assert all(found[name] <= plain[name] for name in waiting)


def flops(model, x):
    """FLOPs of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        model(x).logsumexp(1).mean().backward()
    return counter.get_total_flops()


def test_absent_branches_launch_nothing():
    """FLOPs of forward and backward fall by exactly the absent branches, and convolutions by their number."""
    x = torch.randn(4, 1, 16, 16)
    model = network(rule="stochastic-depth", survival=0.5)
    branches = branch_flops(model, x)
    coins = [True, False, False, True, True, False, True, False, True]
    with using(model, Plan.of([True] * 9)):
        whole = flops(model, x)
    with using(model, Plan.of(coins)):
        part = flops(model, x)
        launched = traced(model, x, [ProfilerActivity.CPU])
    absent = sum(cost for cost, coin in zip(branches, coins, strict=True) if not coin)
    assert whole - part == pytest.approx(3 * absent, rel=1e-9)  # one forward, two backward products
    assert launched["aten::convolution"] == 1 + 2 * sum(coins)  # stem and live branches
    assert launched["aten::convolution_backward"] == 1 + 2 * sum(coins)


def test_absent_rows_launch_nothing():
    """Every branch computes exactly its live rows."""
    x = torch.randn(10, 1, 16, 16)
    model = network(rule="stochastic-depth", survival=0.37, granularity="row")
    plan = sampler_of(model).plan(3)
    branches = branch_flops(model, x)
    with using(model, sampler_of(model).expectation()):
        whole = flops(model, x)
    with using(model, plan):
        part = flops(model, x)
    live = [draw.rows(10).live / 10 for draw in plan.draws]
    assert len(set(live)) > 1  # rounded up here, down there
    absent = sum(cost * (1 - share) for cost, share in zip(branches, live, strict=True))
    assert whole - part == pytest.approx(3 * absent, rel=1e-9)
