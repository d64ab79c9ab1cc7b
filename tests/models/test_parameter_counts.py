"""Parameter counts of the papers' networks: exact and as published."""

import pytest
import torch
from torchvision.models import resnet50, resnet152

from residrop.models import create

OURS = "resnet-ours-"
SWAPOUT_T1 = "Singh et al. 2016, Table 1"
SWAPOUT_T3 = "Singh et al. 2016, Table 3"
SWAPOUT_T4 = "Singh et al. 2016, Table 4"
SWAPOUT_T5 = "Singh et al. 2016, Table 5"

# name, options, exact count, published in millions, where published
PUBLISHED = [
    ("resnet-20", {}, 269_722, 0.27, SWAPOUT_T1 + ", ResNet v1"),
    ("resnet-110", {}, 1_727_962, 1.7, SWAPOUT_T4 + ", ResNet v1(110)"),
    ("resnet-110", {"classes": 100}, 1_733_812, 1.7, SWAPOUT_T5 + ", Stochastic Depth v1(110)"),
    (
        "resnet-110",
        {"conv_bias": True},
        1_732_010,
        1.7,
        SWAPOUT_T4 + ", ResNet v1(110), here with the biases of Huang et al.'s release",
    ),
    pytest.param(
        "resnet-1202", {}, 19_421_274, 19.4, SWAPOUT_T4 + ", Stochastic Depth v1(1202)", marks=pytest.mark.slow
    ),
    (OURS + "20", {}, 273_066, 0.27, SWAPOUT_T1 + ", ResNet v1 Ours x1"),
    (OURS + "20", {"width": 2, "block": "v1"}, 1_085_770, 1.09, SWAPOUT_T1 + ", Swapout v1 x2"),
    (OURS + "20", {"width": 2, "block": "v2"}, 1_085_770, 1.09, SWAPOUT_T1 + ", Swapout v2 x2"),
    (OURS + "20", {"width": 4, "block": "v2"}, 4_330_122, 4.33, SWAPOUT_T3 + ", Swapout v2 (20) x4"),
    (OURS + "32", {"width": 4, "block": "v2"}, 7_432_074, 7.43, SWAPOUT_T4 + ", Swapout v2 (32) x4"),
    (
        OURS + "20",
        {"width": 2, "block": "v2", "classes": 100},
        1_097_380,
        1.10,
        SWAPOUT_T5 + ", Swapout v2 (20) x2",
    ),
    (
        OURS + "56",
        {"width": 2, "block": "v2", "classes": 100},
        3_427_876,
        3.43,
        SWAPOUT_T5 + ", Swapout v2 (56) x2",
    ),
    (
        OURS + "32",
        {"width": 4, "block": "v2", "classes": 100},
        7_455_204,
        7.46,
        SWAPOUT_T5 + ", Swapout v2 (32) x4",
    ),
]

# The papers give no number for these.
MEASURED = [
    ("resnet-56", {}, 853_018),
    ("resnet-152", {}, 2_408_474),
    ("stable-resnet-110", {}, 1_727_962),
    ("depth-dropout-resnet-56", {}, 897_818),
    ("imagenet-resnet-18", {}, 11_689_512),
    ("imagenet-resnet-152", {}, 60_192_808),
    ("imagenet-depth-dropout-resnet-18", {}, 12_043_816),
    ("stable-vanilla-50", {"width": 512, "in_features": 4, "out_features": 8}, 50 * 512**2 + 12 * 512),
]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build_meta(name: str, options: dict[str, object]) -> torch.nn.Module:
    with torch.device("meta"):
        return create(name, **options)


@pytest.mark.parametrize(("name", "options", "exact", "published", "source"), PUBLISHED)
def test_count_is_the_published_one(name, options, exact, published, source):
    measured = count(build_meta(name, options))
    assert measured == exact
    assert measured == pytest.approx(published * 1e6, rel=0.02), source


@pytest.mark.parametrize(("name", "options", "exact"), MEASURED)
def test_count_is_the_measured_one(name, options, exact):
    assert count(build_meta(name, options)) == exact


@pytest.mark.parametrize("block", ["v1", "v2"])
def test_rules_add_no_parameters(block):
    plain = build_meta("resnet-ours-20", {"block": block})
    swapout = build_meta("resnet-ours-20", {"block": block, "rule": "swapout"})
    assert count(swapout) == count(plain)


@pytest.mark.parametrize(("depth", "theirs"), [(50, resnet50), (152, resnet152)])
def test_imagenet_count_is_torchvisions(depth, theirs):
    with torch.device("meta"):
        reference = theirs()
    assert count(build_meta(f"imagenet-resnet-{depth}", {})) == count(reference)
