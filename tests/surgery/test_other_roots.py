"""What other libraries make of a model under rules: graphs of torch.fx, feature extractors, traces, inner modules."""

import warnings

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

import residrop
from residrop.blocks.attach import sampler_of
from residrop.blocks.residual import Chain
from residrop.common.errors import PlanError
from residrop.schedule.sampler import Plan


def resnet(level: str) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=3)
    residrop.apply(model, survival=0.5, granularity=level, seed=1)
    return model


def native(level: str) -> nn.Module:
    torch.manual_seed(0)
    rules = [residrop.StochasticDepth(0.5, level) for _ in range(3)]
    blocks = [residrop.Residual(nn.Conv2d(4, 4, 3, padding=1), None, rule, nn.ReLU()) for rule in rules]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Chain(*blocks), nn.Flatten())
    residrop.attach(model, seed=1)
    return model


X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
every_model = pytest.mark.parametrize("make", [resnet, native])
every_level = pytest.mark.parametrize("level", ["block", "row"])


@every_level
def test_feature_extractors_train_once_they_are_attached(level):
    model, plain = resnet(level), resnet(level)
    expected = plain.eval()(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torchvision: the two graphs have other nodes
        made = create_feature_extractor(model, ["layer2", "fc"])
    assert torch.equal(made.eval()(X)["fc"], expected)
    with pytest.raises(PlanError, match=r"call residrop.attach on the module that has taken its place"):
        made.train()(X)
    residrop.attach(made, seed=1)
    for _ in range(4):
        found = made(X)
        assert torch.equal(found["fc"], plain.train()(X))
        assert found["layer2"].shape == (4, 128, 4, 4)
    assert sampler_of(made).step == 4


@every_model
@every_level
def test_graphs_of_a_model_in_training_call_its_blocks(make, level):
    model, plain = make(level).train(), make(level).train()
    graph = torch.fx.symbolic_trace(model)
    assert sampler_of(model).step == 0
    residrop.attach(graph, seed=1)
    for _ in range(3):
        assert torch.equal(graph(X), plain(X))


@every_model
@every_level
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_one_draw_is_not_frozen_by_traces_and_exports(make, level):
    model = make(level).train()
    with pytest.raises(PlanError, match=r"torch.jit.trace would freeze one draw .* call model.eval\(\) first"):
        torch.jit.trace(model, X)
    with pytest.raises(PlanError, match=r"torch.export would freeze one draw"):
        torch.export.export(model, (X,))
    assert sampler_of(model).step == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_a_given_plan_can_be_traced():
    model = resnet("block").eval()
    with residrop.using(model, Plan.of([True, False, True, True, False])), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, X)
        assert torch.equal(traced(X), model(X))


class Wrapper(nn.Module):
    """As a PEFT model around a plain one, which merge_and_unload gives back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_unwrapped_models_say_that_they_have_to_be_attached():
    wrapped = Wrapper(ResNet(BasicBlock, [2, 1, 1, 1], num_classes=3))
    residrop.apply(wrapped, survival=0.5)
    for _ in range(2):
        wrapped(X).sum().backward()
    unwrapped = wrapped.inner
    with pytest.raises(PlanError, match=r"taken its place .after merge_and_unload"):
        unwrapped(X)
    assert torch.equal(unwrapped.eval()(X), wrapped.eval()(X))
    residrop.attach(unwrapped.train())
    unwrapped(X).sum().backward()
    assert sampler_of(unwrapped).step == 1
    residrop.remove(unwrapped)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_merged_adapters_train_on_once_they_are_attached():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    residrop.apply(model, survival=0.5)
    tokens = torch.randint(64, (2, 5))
    model.train()(input_ids=tokens, labels=tokens)
    merged = model.merge_and_unload().requires_grad_(True)
    with pytest.raises(PlanError, match=r"taken its place .after merge_and_unload"):
        merged(input_ids=tokens, labels=tokens)
    residrop.attach(merged)
    merged(input_ids=tokens, labels=tokens).loss.backward()
    assert sampler_of(merged).step == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("rule", ["stochastic-depth", "backward-depth"])
def test_adapters_of_absent_branches_have_no_gradient_and_do_not_move(rule, use_reentrant):
    """All else is frozen, so at_least=1 keeps every step trainable."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64, use_cache=False
    )
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters).train()
    assert len(residrop.apply(model, rule, 0.3, at_least=1).blocks) == 3
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    tokens = torch.randint(64, (2, 5))
    for step in range(6):
        present = [draw.alive for draw in sampler_of(model).plan(step).draws]
        before = {name: one.detach().clone() for name, one in trained.items()}
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        for name, one in trained.items():
            layer = int(name.split("layers.")[1].split(".")[0])
            alive = present[2 * layer + ("mlp" in name)]
            assert (one.grad is not None) == alive
            assert alive or torch.equal(one, before[name])
        optimizer.zero_grad()
    assert sampler_of(model).step == 6
