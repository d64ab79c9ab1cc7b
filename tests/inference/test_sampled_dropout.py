"""A model's own dropout in sampled passes."""

import pytest
import torch
from torch import nn

import residrop
from residrop.blocks.attach import attach, sampler_of, using
from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.functional.units import unit_mask
from residrop.inference import Sampled, predict, predict_adaptive
from residrop.inference.sampled.dropout import _STREAM
from residrop.rules.catalogue import make_rule
from residrop.schedule.sampler import derive_key

SAMPLES = 6


class Branch(nn.Sequential):
    def __init__(self, p):
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(p))


def network(rule="stochastic-depth", survival=0.6, inside=0.3, last=0.5):
    parts = [nn.Linear(5, 8)]
    parts += [Residual(Branch(inside if number == 1 else 0.0), rule=make_rule(rule, survival)) for number in range(4)]
    model = nn.Sequential(*parts, nn.Dropout(last), nn.Linear(8, 3))
    attach(model, seed=4)
    return model


@torch.no_grad()
def by_hand(model, x, number):
    """A pass with the masks written out."""
    model.eval()
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]

    def drop(module, args, output):
        key = derive_key(sampler_of(model).seed, _STREAM, number, modules.index(module), 0)
        return args[0] * unit_mask(args[0], 1 - module.p, key) / (1 - module.p)

    handles = [module.register_forward_hook(drop) for module in modules]
    with using(model, sampler_of(model).plan(number, stream="sample")):
        y = model(x).softmax(1)
    for handle in handles:
        handle.remove()
    return y


@pytest.mark.parametrize("rule", ["stochastic-depth", "constant", "swapout"])
def test_passes_are_those_with_masks_written_out(rule):
    model, x = network(rule, 1.0 if rule == "constant" else 0.6), torch.randn(7, 5)
    found = predict(model, x, SAMPLES, first=2, keep=True, dropout=True)
    every = torch.stack([by_hand(model, x, number) for number in range(2, 2 + SAMPLES)])
    torch.testing.assert_close(found.sample_probabilities, every, rtol=0.0, atol=1e-6)
    assert len(every.unique(dim=0)) == SAMPLES
    assert not torch.equal(predict(model, x, SAMPLES, first=2).probabilities, found.probabilities)
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Dropout))


def test_samples_of_constant_depth_are_monte_carlo_dropout():
    # theta = 1 - p of one unit: the mean over many passes is the expectation where the rest is linear
    model = nn.Sequential(nn.Linear(5, 8), Residual(nn.Linear(8, 8), rule=make_rule("constant", 1.0)), nn.Dropout(0.4))
    attach(model, seed=4)
    x = torch.randn(3, 5)
    found = predict(model, x, 4000, dropout=True, kind="numbers")
    expected = predict(model, x, 0, dropout=True, kind="numbers").mean
    assert ((found.mean - expected).abs() < 5 * expected.abs() * (0.4 / 0.6 / 4000) ** 0.5 + 1e-6).all()
    torch.testing.assert_close(found.variance, expected**2 * (0.4 / 0.6), rtol=0.15, atol=1e-5)


def test_a_row_has_its_mask_in_every_batch_and_in_adaptive_sampling():
    model, x = network("constant", 1.0), torch.randn(12, 5)
    every = predict(model, x, 20, keep=True, dropout=True).sample_probabilities
    part = predict(model, x[:5], 20, keep=True, dropout=True).sample_probabilities
    torch.testing.assert_close(part, every[:, :5], rtol=0.0, atol=1e-6)
    adaptive = predict_adaptive(model, x, max_samples=20, confidence=0.8, dropout=True)
    used = adaptive.used.tolist()
    assert len(set(used)) > 1
    wanted = torch.stack([every[:count, row].mean(0) for row, count in enumerate(used)])
    torch.testing.assert_close(adaptive.probabilities, wanted, rtol=0.0, atol=2e-6)


def test_rows_that_were_unfolded_keep_their_masks():
    class Windows(nn.Module):
        """Splits every row into 3 windows, as Swin does, and drops within them."""

        def __init__(self):
            super().__init__()
            self.block = Residual(nn.Linear(4, 4), rule=make_rule("constant", 1.0))
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.block(x).view(-1, 2, 2)).view(len(x), -1)[:, :3] * 4

    model, x = Windows(), torch.randn(8, 12).view(8 * 3, 4).view(8, 3, 4)
    attach(model, seed=1)
    every = predict(model, x, 20, keep=True, dropout=True, kind="classes").sample_probabilities
    adaptive = predict_adaptive(model, x, max_samples=20, confidence=0.8, dropout=True, kind="classes")
    used = adaptive.used.tolist()
    assert len(set(used)) > 1
    wanted = torch.stack([every[:count, row].mean(0) for row, count in enumerate(used)])
    torch.testing.assert_close(adaptive.probabilities, wanted, rtol=0.0, atol=2e-6)


def test_blocks_before_the_first_dropout_are_still_shared():
    model, x, calls = network(last=0.5, inside=0.0), torch.randn(4, 5), []
    for block in model[1:5]:
        block.branch[0].register_forward_hook(lambda *_: calls.append(1))
    predict(model, x, 30, dropout=True)
    shared = len(calls)
    present = sum(draw.alive for number in range(30) for draw in sampler_of(model).plan(number, stream="sample").draws)
    assert shared < present / 2
    calls.clear()
    model = network(last=0.0, inside=0.3)
    model[1].branch[2].p = 0.3  # in the first block: nothing is shared behind it
    for block in model[1:5]:
        block.branch[0].register_forward_hook(lambda *_: calls.append(1))
    predict(model, x, 30, dropout=True)
    plans = [sampler_of(model).plan(number, stream="sample") for number in range(30)]
    assert len(calls) >= sum(draw.alive for plan in plans for draw in plan.draws[1:])


@pytest.mark.parametrize(("layer", "shape"), [(nn.Dropout1d, (4, 6, 5)), (nn.Dropout2d, (4, 6, 3, 3))])
def test_channels_are_dropped_whole(layer, shape):
    model = nn.Sequential(Residual(nn.Identity(), rule=make_rule("constant", 1.0)), layer(0.5))
    attach(model, seed=1)
    x = torch.rand(shape) + 1.0
    found = predict(model, x, 3, keep=True, dropout=True, kind="numbers").sample_values
    kept = (found != 0).flatten(3)
    assert torch.equal(kept.all(3), kept.any(3))
    assert kept.any(3).float().mean() == pytest.approx(0.5, abs=0.25)
    torch.testing.assert_close(found[kept.any(3)], (4 * x).expand(3, *shape)[kept.any(3)])


def test_fused_encoder_layers_drop_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    model = nn.TransformerEncoder(layer, 3)
    residrop.apply(model, rule="stochastic-depth", survival=0.7, seed=1)
    x = torch.randn(4, 5, 8)
    found = predict(model, x, 4, keep=True, dropout=True, kind="numbers").sample_values
    assert len(found.unique(dim=0)) == 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_cannot_be_sampled_is_refused():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"has no nn\.Dropout with p > 0"):
        predict(network(inside=0.0, last=0.0), x, 2, dropout=True)
    model = network()
    model.append(nn.AlphaDropout(0.2))
    with pytest.raises(ConfigError, match="does not sample AlphaDropout"):
        predict(model, x, 2, dropout=True)
    model = network(inside=0.0)
    model.forward = lambda x: model[6](model[4](model[3](model[2](model[1](model[0](x))))))
    with pytest.raises(ConfigError, match="no pass has called any"):
        predict(model, x, 2, dropout=True)


def test_sampled_dropout_is_off_by_default_and_in_the_module_too():
    model, x = network(), torch.randn(4, 5)
    wanted = predict(model, x, 4, dropout=True).probabilities
    assert torch.equal(Sampled(model, 4, dropout=True)(x), wanted)
    assert predict(model, x, dropout=True).samples == 30
