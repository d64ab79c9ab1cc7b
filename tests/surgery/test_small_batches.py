"""Blocks that take statistics of a 1x1 map (selective kernels, squeeze and excitation with batch norm)."""

import pytest
import torch

import residrop

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("rows", [2, 3])
def test_selective_kernels_train_in_small_batches(rows):
    torch.manual_seed(0)
    model = timm.create_model("skresnet18", num_classes=3)
    residrop.apply(model, survival=0.5, granularity="row", seed=1)
    for _ in range(4):
        model(torch.randn(rows, 3, 32, 32)).sum().backward()
    assert residrop.sampler_of(model).step == 4
