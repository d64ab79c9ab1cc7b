"""Blocks of two streams in diffusers: where one is absent, both streams go on as they were. Which output is which is
written down here for every model, by hand."""

import copy
import inspect
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import residrop
from residrop.schedule.sampler import Plan
from sweep.sources import build

IMAGE, TEXT = "hidden_states", "encoder_hidden_states"
ORDER = {
    "SD3Transformer2DModel": (TEXT, IMAGE),
    "FluxTransformer2DModel": (TEXT, IMAGE),
    "Flux2Transformer2DModel": (TEXT, IMAGE),
    "ChromaTransformer2DModel": (TEXT, IMAGE),
    "QwenImageTransformer2DModel": (TEXT, IMAGE),
    "AuraFlowTransformer2DModel": (TEXT, IMAGE),
    "CogVideoXTransformer3DModel": (IMAGE, TEXT),
    "CogView4Transformer2DModel": (IMAGE, TEXT),
    "MochiTransformer3DModel": (IMAGE, TEXT),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of diffusers itself
    pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed"),
]


def _handing_on(block: nn.Module, order: tuple[str, str]) -> Any:
    signature = inspect.signature(type(block).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(block, *args, **kwargs).arguments
        return tuple(given[name] for name in order)

    return forward


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@pytest.mark.parametrize("name", ORDER)
def test_both_streams_skip_an_absent_block(name):
    built = build(f"diffusers/{name}")
    plain = built.model.double().eval()
    model = copy.deepcopy(plain)
    args, kwargs = tree_map(_double, (built.args, built.kwargs))
    report = residrop.apply(model, survival=0.5, rescale="none", example=kwargs or args)
    sites = [one for one in report.blocks for _ in one.rates]
    tried = 0
    for number, site in enumerate(sites):
        if not site.kind.endswith("whole") or site.name.startswith("single"):
            continue
        reference = copy.deepcopy(plain)
        block = reference.get_submodule(site.name)
        block.forward = _handing_on(block, ORDER[name])
        with residrop.using(model, Plan.of([other != number for other in range(len(sites))])):
            found = model(*args, **kwargs)[0]
        wanted = reference(*args, **kwargs)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        ours = torch.autograd.grad(found.square().sum(), list(model.parameters()), allow_unused=True)
        theirs = torch.autograd.grad(wanted.square().sum(), list(reference.parameters()), allow_unused=True)
        for parameter, *pair in zip(model.parameters(), ours, theirs, strict=True):
            got, expected = (torch.zeros_like(parameter) if one is None else one for one in pair)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        tried += 1
    assert tried > 0
