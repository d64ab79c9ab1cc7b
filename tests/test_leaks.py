"""Calls that end leave no tensor and no module behind, also where no garbage collector would find them."""

import gc
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

import residrop
from residrop.blocks.attach import attach, detach, sampler_of
from residrop.research.bench import Settings, bench_skip
from residrop.theory import costs_of, discrepancy, gradient_growth, sensitivity


def alive():
    """The number of tensors and modules that are alive."""
    gc.collect()
    return sum(issubclass(type(one), (torch.Tensor, nn.Module)) for one in gc.get_objects())


def network(rule="stochastic-depth"):
    return residrop.create("resnet-8", rule=rule, seed=0)


def batch():
    return torch.randn(4, 3, 8, 8), torch.arange(4)


def trained(rule="stochastic-depth", **options):
    model = residrop.create("resnet-8", rule=rule, seed=0, **options)
    for _ in range(2):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    return model


def applied(tmp_path):
    model = resnet18()
    residrop.apply(model, survival=0.5)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.arange(2)).backward()
    residrop.remove(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def attached(tmp_path):
    model = network()
    attach(model, seed=1)
    model(batch()[0]).sum().backward()
    detach(model)
    attach(model, seed=2)
    model(batch()[0]).sum().backward()


def given(tmp_path):
    model = network()
    with residrop.using(model, sampler_of(model).plan(0)), residrop.observe(model):
        model(batch()[0]).sum().backward()
    model.eval()
    for _ in range(2):
        model(batch()[0]).sum().backward()  # trained in eval mode, which is watched


def predicted(tmp_path):
    model = network("swapout").eval()
    residrop.predict(model, batch()[0], 3)
    residrop.predict_adaptive(model, batch()[0], max_samples=4)
    residrop.evaluate(model, [batch()], 3)
    residrop.recalibrate(model, [batch()] * 2, 2)


def exported(tmp_path):
    residrop.export(network().eval(), tmp_path / "a.safetensors", batch()[0])


def measured(tmp_path):
    model, batches = network(), [batch()]
    costs_of(model, "flops", batches[0][0])
    with suppress(residrop.UsageError):  # a busy machine
        costs_of(model, "time", batches[0][0], repeats=2)
    sensitivity(model, batches)
    discrepancy(model, batches)
    gradient_growth(model, batches, passes=1)


def compared(tmp_path):
    for _ in bench_skip(["resnet-8"], ["0.5"], Settings(steps=1, warmup=0, batch_size=4)):
        pass


CALLS = {
    "training by block": lambda _: trained(),
    "training by row": lambda _: trained(granularity="row"),
    "training of units": lambda _: trained("swapout"),
    "apply and remove": applied,
    "attach and detach": attached,
    "draws given and observed": given,
    "prediction": predicted,
    "export": exported,
    "measurements": measured,
    "bench skip": compared,
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow if one == "bench skip" else ()) for one in CALLS]
)
def test_a_call_that_ended_leaves_nothing(name, tmp_path):
    CALLS[name](tmp_path)  # whatever is made once
    before = alive()
    CALLS[name](tmp_path)
    assert alive() == before
