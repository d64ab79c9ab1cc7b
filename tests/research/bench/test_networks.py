import sys

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth

from residrop.common.errors import ConfigError, MissingExtraError
from residrop.research.bench.found import FOUND
from residrop.research.bench.networks import has_timm, network
from residrop.research.bench.peers import IndexGather
from residrop.rules import StochasticDepth
from residrop.schedule.sampler import Draw
from residrop.schedule.survival import linear_decay
from small_networks import small_found

NAMES = ["resnet-8", "resnet-8/v2", "resnet-ours-8", "depth-dropout-resnet-8", "torchvision/resnet18"]
NAMES += ["timm/test_vit"] if has_timm() else []


@pytest.fixture(scope="module", params=[*NAMES, *FOUND])
def net(request):
    pytest.importorskip(request.param.partition("/")[0] if request.param in FOUND else "torch")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        small_found(patch)
        return network(request.param)


def branches(net):
    return sum(unit.droppable for unit in net.chain().units)


def test_chain_is_the_network(net):
    x = net.inputs(3)
    chain = net.chain()
    y = chain.stem(x)
    for unit in chain.units:
        y = unit.present(y)
    torch.testing.assert_close(chain.head(y), net.model(x))


@pytest.mark.parametrize("make", [lambda rate: StochasticDepth(rate), lambda rate: IndexGather(rate, False)])
def test_every_branch_gets_a_rule_and_the_parameters_are_shared(net, make):
    model = net.under(make, "linear_decay(0.5)")
    rules = [module for module in model.modules() if type(module) is type(make(0.5))]
    blocks = len(net.blocks_of(net.model))
    assert len(rules) == branches(net)
    assert sorted({rule.rates[0] for rule in rules}, reverse=True) == list(linear_decay(blocks, 0.5))
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.model.parameters()}
    assert not any(isinstance(module, type(make(0.5))) for module in net.model.modules())


def test_every_branch_ends_in_a_mask(net):
    model = net.masked(lambda rate: TorchvisionStochasticDepth(1 - rate, "batch"), "0")  # every branch is dropped
    masks = [module for module in model.modules() if isinstance(module, TorchvisionStochasticDepth)]
    assert len(masks) == branches(net)
    x = net.inputs(3)
    chain = net.chain()
    y = chain.stem(x)
    for unit in chain.units:
        y = y if unit.absent is None else unit.absent(y)
    torch.testing.assert_close(model(x), chain.head(y))
    assert not any(isinstance(module, TorchvisionStochasticDepth) for module in net.model.modules())


def test_sizes_of_found_networks():
    pytest.importorskip("transformers")
    net = network("transformers/opt_6_layers")
    assert (net.pixels, net.tokens, net.batch_size) == (None, 64, 32)
    batch = net.inputs(5, torch.Generator().manual_seed(0))
    assert (batch.shape, batch.dtype) == ((5, 64), torch.int64)
    assert torch.equal(batch, net.inputs(5, torch.Generator().manual_seed(0)))
    assert branches(net) == 12


@pytest.mark.parametrize("name", FOUND)
def test_packages_of_found_networks_are_asked_for(name, monkeypatch):
    package = name.partition("/")[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"residrop\[{package}\]"):
        network(name)


def test_sizes():
    assert (network("resnet-8").pixels, network("resnet-8").batch_size) == (32, 64)
    assert (network("torchvision/resnet18").pixels, network("torchvision/resnet18").batch_size) == (64, 32)
    assert network("imagenet-resnet-18").pixels == 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "network 'resnet' is unknown; networks are named as"),
        ("renset-8", "network 'renset-8' is unknown"),
        ("resnet-9", "it must be 6n"),
        ("resnet-8/v3", "block is 'v3'"),
        ("vanilla-4", "reads no images"),
        ("torchvision/resnet17", "torchvision knows no model 'resnet17'"),
        ("torchvision/vgg11", "is no ResNet"),
    ],
)
def test_unknown_networks_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        network(name)


@pytest.mark.parametrize(
    ("name", "message"), [("timm/vit_huge", "timm knows no model 'vit_huge'"), ("timm/resnet18", "no plain vision")]
)
def test_unknown_networks_of_timm_are_refused(name, message):
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=message):
        network(name)


def test_timm_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr("residrop.research.bench.networks.has_timm", lambda: False)
    with pytest.raises(ConfigError, match="needs timm, which is not installed"):
        network("timm/test_vit")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("key", range(10))
def test_gather_is_row_level_presence(scaled, key):
    torch.manual_seed(0)
    x, draw = torch.randn(7, 3), Draw((0.4,), key=key)
    rule = IndexGather(0.4, scaled)
    rule.draw = lambda: draw
    start, live = draw.rows(7)
    expected = x.clone()
    for row in range(start, start + live):
        expected[row % 7] += (1 / 0.4 if scaled else 1.0) * torch.tanh(x[row % 7])
    torch.testing.assert_close(rule(x, nn.Identity(), torch.tanh), expected)
    torch.testing.assert_close(rule(x, nn.Identity(), torch.tanh, post=torch.relu), expected.relu())
