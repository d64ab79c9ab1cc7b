"""Blocks of two streams (diffusers' SD3 and Flux) and layers that hand a bias on (WavLM) under the generic rule."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import residrop
from residrop.common.errors import PlanError

D = 8


class Joint(nn.Module):
    """As diffusers' JointTransformerBlock: text and image, returned in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.of_image, self.of_text = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        mean = hidden_states.mean(1, keepdim=True) + encoder_hidden_states.mean(1, keepdim=True) + temb[:, None]
        return encoder_hidden_states + self.of_text(mean), hidden_states + self.of_image(mean)


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

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            out = block(hidden_states=image, encoder_hidden_states=text, temb=time)
            text, image = (text, out) if isinstance(out, Tensor) else out
        return image


@pytest.mark.parametrize("level", ["block", "row"])
@pytest.mark.parametrize("tokens", [5, 6])  # of the text; the image has 6
def test_two_streams_are_refused_at_the_first_training_forward(level, tokens):
    model = Diffusion(Joint)
    given = torch.randn(2, 6, D), torch.randn(2, tokens, D), torch.randn(2, D)
    plain = model(*given)
    residrop.apply(model, survival=0.5, blocks="blocks.*", granularity=level)
    with pytest.raises(PlanError, match=r"Joint returns, besides the hidden state, .* of two streams"):
        model(*given)
    assert residrop.sampler_of(model).step == 0
    assert torch.equal(model.eval()(*given), plain)


@pytest.mark.parametrize("level", ["block", "row"])
def test_one_stream_trains(level):
    model = Diffusion(Single)
    given = torch.randn(2, 6, D, requires_grad=True), torch.randn(2, 5, D), torch.randn(2, D)
    residrop.apply(model, survival=0.5, blocks="blocks.*", granularity=level)
    for _ in range(6):
        model(*given).sum().backward()
    assert residrop.sampler_of(model).step == 6


def test_layer_that_makes_a_bias_for_the_others_is_refused():
    pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parents[1] / "surgery"))
    from transformers_models import SPEECH, audio, built

    model = built("WavLMModel", "WavLMConfig", **SPEECH)()
    residrop.apply(model, survival=0.5, blocks="encoder.layers.*")
    with pytest.raises(PlanError, match=r"WavLMEncoderLayer returns, besides the hidden state, .* leave it out"):
        model.train()(**audio())
    residrop.remove(model)
    residrop.apply(model, survival=0.5, blocks="encoder.layers.[12]")  # all but the first
    for _ in range(4):
        model(**audio())[0].sum().backward()
    assert residrop.sampler_of(model).step == 4
