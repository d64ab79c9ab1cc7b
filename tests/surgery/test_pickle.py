"""Whole models under rules in files and other processes: pickle, which torch.save, joblib, Ray and spawn use."""

import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import residrop
from residrop.common.errors import ConfigError
from residrop.rules import StochasticDepth
from residrop.surgery import forms
from residrop.surgery.blocks import AppliedBlock


def resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, [2, 1, 1, 1], num_classes=3)


def vit() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), *nn.TransformerEncoder(layer, 3).layers)


def applied(make=resnet, **options) -> nn.Module:
    model = make()
    residrop.apply(model, survival=0.5, seed=3, **options)
    return model


def native() -> nn.Module:
    blocks = [residrop.Residual(nn.Linear(4, 4), None, StochasticDepth(0.5), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*blocks)
    residrop.attach(model, seed=3, timing="warmup(4)")
    return model


WITHIN = {
    "resnet": (applied, (3, 3, 32, 32)),
    "rows": (lambda: applied(granularity="row"), (3, 3, 32, 32)),
    "whole": (lambda: applied(branches=False, blocks="layer1.*"), (3, 3, 32, 32)),
    "generic": (lambda: applied(vit, blocks=nn.TransformerEncoderLayer), (3, 5, 3)),
    "sequence": (lambda: applied(lambda: nn.Sequential(vit()), blocks=nn.TransformerEncoderLayer), (3, 5, 3)),
    "attached": (native, (3, 4)),
}
every_model = pytest.mark.parametrize("name", WITHIN)


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@every_model
def test_loaded_model_has_the_weights_and_goes_on_with_the_draws(name):
    make, shape = WITHIN[name]
    model, x = make().train(), torch.randn(shape)
    model(x)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(saved(model), weights_only=False)):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded.eval()(x), model.eval()(x))
        twin = pickle.loads(pickle.dumps(model)).train()
        for _ in range(5):
            assert torch.equal(loaded.train()(x), twin(x))
        assert residrop.sampler_of(loaded).step == 6
        assert residrop.sampler_of(model).step == 1
        assert residrop.sampler_of(loaded).plan(2) == residrop.sampler_of(model).plan(2)


@every_model
def test_rules_of_a_loaded_model_can_be_taken_away(name):
    if name == "attached":
        return
    make, shape = WITHIN[name]
    x, plain = torch.randn(shape), make()
    loaded = pickle.loads(pickle.dumps(plain))
    residrop.remove(plain)
    residrop.remove(loaded)
    assert [type(one) for one in loaded.modules()] == [type(one) for one in plain.modules()]
    assert torch.equal(loaded.train()(x), plain.train()(x))
    assert not loaded._forward_hooks
    assert not loaded._forward_pre_hooks
    residrop.apply(loaded, survival=0.5, blocks=(BasicBlock, nn.TransformerEncoderLayer))


def test_a_hook_that_comes_later_does_not_take_the_place_of_ours(monkeypatch):
    content = pickle.dumps(native())
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)  # as in a process that has just started
    loaded = pickle.loads(content)
    loaded.register_forward_pre_hook(print)
    loaded.register_forward_hook(print)
    assert len(loaded._forward_pre_hooks) == len(loaded._forward_hooks) == 2


def test_another_version_of_the_library_is_refused(monkeypatch):
    content = pickle.dumps(applied())
    monkeypatch.setattr("residrop.surgery.blocks.form_of", lambda function: "another")
    with pytest.raises(ConfigError, match=r"resnet\.BasicBlock has another forward here than where .* was saved"):
        pickle.loads(content)
    assert forms.form_of(BasicBlock.forward) != "another"


class OwnWay(nn.Linear):
    def __reduce__(self):
        return OwnWay, (self.in_features, self.out_features), self.__getstate__()


def test_blocks_with_a_way_of_their_own_are_refused_in_one_line():
    model = nn.Sequential(OwnWay(4, 4), OwnWay(4, 4))
    residrop.apply(model, survival=0.5, blocks=OwnWay)
    with pytest.raises(pickle.PicklingError, match=r"OwnWay has a way of its own .* call residrop\.remove\(model\)"):
        pickle.dumps(model)
    residrop.remove(model)
    pickle.loads(pickle.dumps(model))


@pytest.mark.slow
def test_another_process_loads_it(tmp_path):
    model, x = applied().train(), torch.randn(3, 3, 32, 32)
    torch.save((model, x), tmp_path / "model.pt")
    script = """
        import sys, torch
        model, x = torch.load(sys.argv[1], weights_only=False)
        torch.save([model(x).detach() for _ in range(3)], sys.argv[2])
    """
    out = tmp_path / "out.pt"
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model.pt"), str(out)]
    subprocess.run(command, check=True)
    for ours, theirs in zip([model(x).detach() for _ in range(3)], torch.load(out), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert any(isinstance(module, AppliedBlock) for module in model.modules())
