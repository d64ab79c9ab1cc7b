"""residrop on models of everybody's libraries, against the plain model with masked branches (see this package)."""

import pytest

from sweep.checks import examine
from sweep.sources import all_names

SAMPLE = (
    "torch/TransformerEncoder, batch first",
    "torchvision/mobilenet_v2",
    "torchvision/swin_t",
    "timm/beit",
    "timm/byobnet",
    "timm/convnext",
    "timm/deit",
    "timm/vision_transformer",
    "timm/resnet",
    "timm/swin_transformer",
    "transformers/bart",
    "transformers/bert",
    "transformers/convnext",
    "transformers/gpt2",
    "transformers/llama",
    "transformers/mixtral",
    "transformers/opt",
    "transformers/t5",
    "transformers/vit",
    "transformers/wav2vec2",
)


def check_model(name: str, *, quick: bool) -> None:
    found = examine(name, quick=quick)
    if found.status == "not built":
        pytest.skip(found.refused[""])
    assert found.problems == []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "every" in metafunc.fixturenames:  # the libraries are only asked for their models where these tests run
        left_out = "not slow" in metafunc.config.option.markexpr
        metafunc.parametrize("every", [] if left_out else [name for name in all_names() if name not in SAMPLE])


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    check_model(name, quick=True)


@pytest.mark.slow
def test_every_model(every: str) -> None:
    check_model(every, quick=False)
