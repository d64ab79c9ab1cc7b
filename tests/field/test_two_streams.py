"""Blocks of two streams (diffusers' SD3 and Flux) and layers that hand a bias on (WavLM)."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import residrop
from residrop.common.errors import PlanError
from residrop.schedule.sampler import Draw, Plan

D = 8


class Joint(nn.Module):
    """As diffusers' JointTransformerBlock: text and image, returned in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.of_image, self.of_text = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        mean = hidden_states.mean(1, keepdim=True) + encoder_hidden_states.mean(1, keepdim=True) + temb[:, None]
        text = encoder_hidden_states + self.of_text(encoder_hidden_states + mean)
        return text, hidden_states + self.of_image(hidden_states * mean)


class Single(nn.Module):
    """As those of DiT, PixArt and Wan: the text is read only."""

    def __init__(self) -> None:
        super().__init__()
        self.of_image = nn.Linear(D, D)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hidden_states + self.of_image(encoder_hidden_states.mean(1, keepdim=True) + temb[:, None])


class Diffusion(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, image: Tensor, text: Tensor, time: Tensor, both: bool = False) -> Any:
        for block in self.blocks:
            out = block(hidden_states=image, encoder_hidden_states=text, temb=time)
            text, image = (text, out) if isinstance(out, Tensor) else out
        return (image, text) if both else image

    def both(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        return self(*given, both=True)


def by_hand(model: nn.Module, given: tuple[Tensor, ...], factors: list[Any]) -> tuple[Tensor, Tensor]:
    """Image and text, the branches (text first) times factors."""
    image, text, time = given
    for block in model.blocks:
        new_text, new_image = block(image, text, time)
        of_text, of_image = factors.pop(0), factors.pop(0)
        text, image = text + of_text * (new_text - text), image + of_image * (new_image - image)
    return image, text


def live(draw: Draw, rows: int) -> Any:
    if draw.key is None:
        return float(bool(draw.alive))
    window = draw.rows(rows)
    return torch.tensor([(row - window.start) % rows < window.live for row in range(rows)]).view(-1, 1, 1).double()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("level", ["block", "row"])
@pytest.mark.parametrize("tokens", [5, 6])  # of the text; the image has 6
def test_two_streams_train(level, tokens, whole):
    """Each stream is a branch with a coin of its own; of a whole block both skip together."""
    torch.manual_seed(0)
    model = Diffusion(Joint).double().train()
    plain = copy.deepcopy(model)
    given = [torch.randn(4, *inner, dtype=torch.float64) for inner in ((6, D), (tokens, D), (D,))]
    for one in given:
        one.requires_grad_()
    report = residrop.apply(
        model, survival=0.5, blocks="blocks.*", granularity=level, rescale="none", branches=not whole, seed=1
    )
    assert [len(entry.rates) for entry in report.blocks] == [1 if whole else 2] * 3
    for step in range(6):
        plan = residrop.sampler_of(model).plan(step)
        found = model.both(*given)
        factors = [live(draw, 4) for draw in plan.draws for _ in range(2 if whole else 1)]
        expected = by_hand(plain, given, factors)
        torch.testing.assert_close(found, expected)
        ours = torch.autograd.grad(sum(one.square().sum() for one in found), given)
        theirs = torch.autograd.grad(sum(one.square().sum() for one in expected), given)
        torch.testing.assert_close(ours, theirs)
    assert residrop.sampler_of(model).step == 6
    torch.testing.assert_close(model.eval()(*given), plain(*given), rtol=0, atol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_an_absent_block_hands_both_streams_on(whole):
    model = Diffusion(Joint).train()
    image, text, time = torch.randn(2, 6, D), torch.randn(2, 5, D), torch.randn(2, D)
    residrop.apply(model, survival=0.5, blocks="blocks.*", branches=not whole)
    with residrop.using(model, Plan.of([False] * (3 if whole else 6))):
        found = model.both(image, text, time)
        assert all(torch.equal(*pair) for pair in zip(found, (image, text), strict=True))


@pytest.mark.parametrize("level", ["block", "row"])
def test_one_stream_trains(level):
    model = Diffusion(Single)
    given = torch.randn(2, 6, D, requires_grad=True), torch.randn(2, 5, D), torch.randn(2, D)
    residrop.apply(model, survival=0.5, blocks="blocks.*", granularity=level)
    for _ in range(6):
        model(*given).sum().backward()
    assert residrop.sampler_of(model).step == 6


class Routed(nn.Module):
    """As a layer of Zaya: its router adds to what the router before gave, and the first one starts that."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D))
        self.down, self.expert = nn.Linear(D, 3), nn.Linear(3, D)

    def forward(self, hidden_states: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        states = self.down(hidden_states) + (0 if states is None else states)
        return hidden_states * self.scale + self.expert(states.softmax(-1)), states


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Routed() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        states = None
        for layer in self.layers:
            x, states = layer(x, states)
        return x


@pytest.mark.parametrize("level", ["block", "row"])
def test_what_layers_hand_to_the_next_one_skips_with_them(level):
    """An example shows it; the layer that starts it cannot be absent."""
    torch.manual_seed(0)
    model = Router().double()
    plain, x = copy.deepcopy(model), torch.randn(4, 5, D, dtype=torch.float64)
    report = residrop.apply(
        model, survival=0.5, blocks="layers.*", granularity=level, rescale="none", example=x, seed=1
    )
    assert [entry.name for entry in report.blocks] == ["layers.1", "layers.2", "layers.3"]
    assert [name for name, _ in report.left_alone] == ["layers.0"]
    assert torch.equal(model.eval()(x), plain(x))
    for step in range(6):
        y, states = plain.layers[0](x)
        for layer, draw in zip(plain.layers[1:], residrop.sampler_of(model).plan(step).draws, strict=True):
            new, new_states = layer(y, states)
            y, states = (one + live(draw, 4) * (other - one) for one, other in ((y, new), (states, new_states)))
        torch.testing.assert_close(model.train()(x), y)


def test_layer_that_makes_a_bias_for_the_others_is_refused():
    pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parents[1] / "surgery"))
    from transformers_models import SPEECH, audio, built

    model = built("WavLMModel", "WavLMConfig", **SPEECH)()
    residrop.apply(model, survival=0.5, blocks="encoder.layers.*", branches=False)
    with pytest.raises(PlanError, match=r"WavLMEncoderLayer returns, besides the hidden state, .* leave it out"):
        model.train()(**audio())
    residrop.remove(model)
    residrop.apply(model, survival=0.5, blocks="encoder.layers.[12]", branches=False)  # all but the first
    for _ in range(4):
        model(**audio())[0].sum().backward()
    assert residrop.sampler_of(model).step == 4
