"""Models under rules in joblib's processes, which pickle what they are given and what they return."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import residrop

joblib = pytest.importorskip("joblib")


def forwards(model: nn.Module, x: Tensor) -> tuple[list[Tensor], nn.Module]:
    """Three steps in training mode, in whatever process; and the model after them."""
    torch.set_num_threads(1)
    return [model.train()(x).detach() for _ in range(3)], model


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["block", "row"])
def test_processes_go_on_with_the_weights_and_the_draws(granularity):
    model, x = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=3), torch.randn(3, 3, 32, 32)
    residrop.apply(model, survival=0.5, granularity=granularity, seed=3)
    model.train()(x)
    here, _ = forwards(copy.deepcopy(model), x)
    there = joblib.Parallel(n_jobs=2, backend="loky")(joblib.delayed(forwards)(model, x) for _ in range(2))
    for outs, returned in there:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outs, here, strict=True))
        assert residrop.sampler_of(returned).step == 4
        assert returned.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(returned.parameters(), model.parameters(), strict=True))
        residrop.remove(returned)
        assert type(returned.layer1[0]) is BasicBlock
    assert residrop.sampler_of(model).step == 1
