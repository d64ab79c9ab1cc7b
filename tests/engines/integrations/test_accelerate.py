"""Accelerate with a model under rules: no glue is needed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import residrop
from residrop import Residual, StochasticDepth

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

DEPTH = 6


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps one state per process, with the precision of the first accelerator."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Residual(nn.Linear(8, 8), rule=StochasticDepth(0.5)) for _ in range(DEPTH)]
    model = nn.Sequential(*blocks, nn.Linear(8, 3))
    residrop.attach(model, seed=7)
    return model


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(48, 8, generator=generator), torch.randint(3, (48,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def prepared(accelerator: Accelerator):
    model = network()
    sampler = residrop.sampler_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    accelerator.register_for_checkpointing(sampler)
    return model, optimizer, data, sampler


def epoch(accelerator, model, optimizer, data, sampler, per_update=False):
    """One epoch; returns the sampler's step and the live branches of every update."""
    seen = []
    for number, (x, y) in enumerate(data):
        with accelerator.accumulate(model):
            if per_update:
                plan = sampler.plan(number // 2, part=number % 2)
                with residrop.using(model, plan):
                    loss = F.cross_entropy(model(x), y)
            else:
                loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                seen.append((sampler.step, [block.branch.weight.grad is not None for block in model[:DEPTH]]))
            optimizer.step()
            optimizer.zero_grad()
    return seen


def test_steps_and_dead_branches():
    parts = prepared(accelerator := Accelerator(cpu=True))
    seen = epoch(accelerator, *parts)
    sampler = parts[3]
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [live for _, live in seen] == [[draw.alive for draw in sampler.plan(n).draws] for n in range(6)]


def test_a_registered_sampler_is_saved_and_taken_up(tmp_path):
    parts = prepared(accelerator := Accelerator(cpu=True))
    epoch(accelerator, *parts)
    accelerator.save_state(str(tmp_path))
    epoch(accelerator, *parts)
    again = prepared(accelerator := Accelerator(cpu=True))
    accelerator.load_state(str(tmp_path))
    assert again[3].state_dict() == {"seed": 7, "step": 6}
    epoch(accelerator, *again)
    for one, other in zip(parts[0].parameters(), again[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_micro_batches_are_steps_unless_they_share_a_plan():
    parts = prepared(accelerator := Accelerator(cpu=True, gradient_accumulation_steps=2))
    assert [step for step, _ in epoch(accelerator, *parts)] == [2, 4, 6]
    parts = prepared(accelerator := Accelerator(cpu=True, gradient_accumulation_steps=2))
    seen = epoch(accelerator, *parts, per_update=True)
    assert [live for _, live in seen] == [[draw.alive for draw in parts[3].plan(n).draws] for n in range(3)]
    assert parts[3].step == 0


def test_mixed_precision_wraps_the_forward_not_the_draws():
    parts = prepared(accelerator := Accelerator(cpu=True, mixed_precision="bf16"))
    seen = epoch(accelerator, *parts)
    assert [live for _, live in seen] == [[draw.alive for draw in parts[3].plan(n).draws] for n in range(6)]
    assert accelerator.unwrap_model(parts[0]) is parts[0]
