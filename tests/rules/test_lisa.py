"""Two complaints about LISA, a fixed number of random layers in training: that the number has no effect, and that no
memory is saved. Of the method `lisa` on a Llama neither holds."""

import pytest
import torch

import residrop
from residrop.research.bench.measure import saved_bytes

transformers = pytest.importorskip("transformers")

LAYERS = 8
TOKENS = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))


def llama(present):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=LAYERS, use_cache=False)
    model = transformers.LlamaForCausalLM(config).train()
    if present < LAYERS:
        how = residrop.method("lisa", 1000) | {"survival": f"blocks({present})", "draw_every": 5}
        residrop.apply(model, **how, seed=3)
    return model


def loss(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


def train(model, steps):
    """Losses of these steps of AdamW, all of whose parameters are known to it from the start; and the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        found = loss(model)
        found.backward()
        optimizer.step()
        losses.append(found.item())
    return losses, optimizer


def moved(model, before):
    """Numbers of the layers of which something has moved, and of those of which all has."""
    layers = list(zip(model.model.layers, before.model.layers, strict=True))
    of = [
        [not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
        for one, other in layers
    ]
    return [index for index, each in enumerate(of) if any(each)], [index for index, each in enumerate(of) if all(each)]


def test_the_number_of_layers_has_an_effect():
    """The same loss whatever the number of active layers (OptimalScale/LMFlow#726): here so many move, to the last
    parameter, the others not by a bit, others in the next period, and trainings differ from the second step on."""
    courses = {}
    for present in (1, 3, LAYERS):
        model, untouched = llama(present), llama(present)
        losses, _ = train(model, 5)
        some, entire = moved(model, untouched)
        assert some == entire
        assert len(some) == present
        train(model, 45)
        assert len(moved(model, untouched)[0]) >= min(LAYERS, present + 2)
        courses[present] = losses
    assert len({course[0] for course in courses.values()}) == 1  # forwards are whole
    assert all(len({course[step] for course in courses.values()}) == 3 for step in range(1, 5))


def bytes_of(tensors):
    return sum(one.nbytes for one in tensors if one is not None)


def test_memory_falls_with_the_number_of_layers():
    """No memory is saved (MakazhanAlpamys/Soup#306): here an absent layer keeps no activations, and has no gradient
    and, until its turn comes, no optimizer state."""
    activations, gradients, states = {}, {}, {}
    for present in (0, 2, 4, LAYERS):
        model = llama(present)
        loss(model)  # blocks look at themselves once
        activations[present] = saved_bytes(lambda model=model: loss(model), model.parameters())
        model = llama(present)
        _, optimizer = train(model, 3)
        layers = list(model.model.layers.parameters())
        gradients[present] = bytes_of(one.grad for one in layers)
        states[present] = bytes_of(optimizer.state[one]["exp_avg"] for one in layers if one in optimizer.state)
    whole = bytes_of(llama(1).model.layers.parameters())
    for present in (0, 2, 4, LAYERS):
        assert gradients[present] == states[present] == whole * present // LAYERS
    share = [(activations[present] - activations[0]) / (activations[LAYERS] - activations[0]) for present in (2, 4)]
    assert share == pytest.approx([2 / LAYERS, 4 / LAYERS], abs=0.01)
    assert activations[0] < 0.1 * activations[LAYERS]
