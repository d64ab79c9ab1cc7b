import pytest
import torch
from torchvision.models import resnet18, resnet50

from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.models import ImageNetResNet, create, reshaping_blocks
from residrop.models.blocks import TransformShortcut


def residuals(model):
    return [module for module in model.modules() if isinstance(module, Residual)]


@pytest.mark.parametrize(("depth", "theirs"), [(18, resnet18), (50, resnet50)])
@torch.no_grad()
def test_equals_torchvision_on_its_weights(depth, theirs):
    reference, model = theirs(), ImageNetResNet(depth)
    for ours, value in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        ours.copy_(value)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), reference(x))  # training mode: batch statistics, and they move
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(
    ("depth", "indices"),
    [(18, (2, 4, 6)), (34, (3, 7, 13)), (50, (0, 3, 7, 13)), (152, (0, 3, 11, 47))],
)
def test_transforms_replace_the_identity_shortcuts_only(depth, indices):
    assert reshaping_blocks(depth) == indices
    with torch.device("meta"):
        blocks = residuals(ImageNetResNet(depth, transform=True))
    kept = [i for i, block in enumerate(blocks) if not isinstance(block.shortcut, TransformShortcut)]
    assert tuple(kept) == indices


def test_stable_factor_counts_blocks():
    with torch.device("meta"):
        blocks = residuals(ImageNetResNet(50, stable=True))
    assert [block.branch.scale.factor for block in blocks] == pytest.approx([0.25] * 16)


def test_other_classes_and_channels():
    model = create("imagenet-depth-dropout-resnet-18", rule="depth-dropout", classes=5, channels=1)
    assert model(torch.randn(2, 1, 33, 40)).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 20}, "depth is 20; allowed: 18, 34, 50, 101, 152"),
        ({"classes": 0}, "classes is 0"),
        ({"bn_gamma_init": "one"}, "bn_gamma_init is 'one'; choose one of 'ones', 'uniform'"),
        ({"rules": []}, "0 rules were given for 8 residual blocks"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageNetResNet(**{"depth": 18, **options})


def test_forward_refuses_other_channels():
    with torch.device("meta"):
        model = ImageNetResNet(18)
        with pytest.raises(ConfigError, match=r"reads \[n, 3, height, width\]"):
            model(torch.randn(1, 4, 64, 64))
