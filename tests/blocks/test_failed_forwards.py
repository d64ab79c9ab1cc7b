"""A forward that ends in an error is no step: nothing of it stays behind."""

import pytest
import torch
from torch import nn

import residrop
from residrop.blocks.attach import sampler_of


class Picky(nn.Module):
    def forward(self, x):
        if x.isnan().any():
            raise ValueError("not a number")
        return x


def network() -> nn.Module:
    blocks = [residrop.Residual(nn.Linear(4, 4), None, residrop.StochasticDepth(0.5)) for _ in range(3)]
    model = nn.Sequential(*blocks, Picky(), nn.Flatten())
    residrop.attach(model, seed=1)
    return model


GOOD, BAD = torch.ones(2, 4), torch.full((2, 4), torch.nan)


@pytest.mark.parametrize("handling", [False, True], ids=["plain", "inside an except block"])
def test_draws_and_counters_are_as_if_it_had_not_been(handling):
    model, reference = network(), network()
    with residrop.observe(model) as seen:
        for _ in range(5):
            if handling:
                with pytest.raises(ValueError, match="not a number"):
                    model(BAD)
                try:
                    raise RuntimeError("of the caller")
                except RuntimeError:
                    model(GOOD)
            else:
                model(GOOD)
                with pytest.raises(ValueError, match="not a number"):
                    model(BAD)
            reference(GOOD)
            assert sampler_of(model).step == sampler_of(reference).step
            assert sampler_of(model).in_force == sampler_of(reference).in_force
    assert seen.steps == 5


def test_refused_before_its_hook_or_after_it():
    model = network()
    model(GOOD)
    handle = model.register_forward_pre_hook(lambda module, args: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        model(GOOD)
    handle.remove()
    model.register_forward_hook(lambda module, args, out: 1 / 0)  # when the pass is over
    with pytest.raises(ZeroDivisionError):
        model(GOOD)
    assert sampler_of(model).step == 2


def test_sampled_passes_are_numbered_without_it():
    model = network()
    with residrop.sampling(model):
        first = model(GOOD)
    with residrop.sampling(model):
        with pytest.raises(ValueError, match="not a number"):
            model(BAD)
        assert torch.equal(model(GOOD), first)


def test_model_without_an_output_takes_steps():
    class Silent(nn.Sequential):
        def forward(self, x):
            super().forward(x)

    model = Silent(residrop.Residual(nn.Linear(4, 4), None, residrop.StochasticDepth(0.5)))
    residrop.attach(model)
    model(GOOD)
    assert sampler_of(model).step == 1
