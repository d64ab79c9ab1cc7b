"""A head with one output: its softmax is 1 whatever it says, so it is refused unless its kind is told."""

import pytest
import torch

import residrop
from residrop.common.errors import ConfigError
from residrop.inference import error_curve, evaluate_adaptive

X, Y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
CALLS = {
    "predict": lambda model: residrop.predict(model, X, 3),
    "predict in expectation": lambda model: residrop.predict(model, X, 0),
    "predict_adaptive": lambda model: residrop.predict_adaptive(model, X, max_samples=4),
    "Sampled": lambda model: residrop.Sampled(model, 3)(X),
    "evaluate": lambda model: residrop.evaluate(model, [(X, Y)], 2),
    "evaluate in expectation": lambda model: residrop.evaluate(model, [(X, Y)], 0),
    "evaluate_adaptive": lambda model: evaluate_adaptive(model, [(X, Y)], max_samples=4),
    "error_curve": lambda model: error_curve(model, [(X, Y)], 3, 2),
}


@pytest.mark.parametrize("rule", ["stochastic-depth", "swapout"])
@pytest.mark.parametrize("name", CALLS)
def test_one_output_is_refused(name, rule):
    model = residrop.create("resnet-8", rule=rule, classes=1, seed=0).eval()
    with pytest.raises(ConfigError, match=r"\[\d+, 1\], .*kind=.*'binary'"):
        CALLS[name](model)


def test_what_the_message_advises_works():
    model = residrop.create("resnet-8", rule="swapout", classes=1, seed=0).eval()
    found = residrop.predict(model, X, 0, kind="binary").probabilities
    torch.testing.assert_close(found[:, 1:], torch.sigmoid(model(X)).detach())


def test_a_second_output_of_zero_works_too():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = residrop.create("resnet-8", rule="swapout", classes=1, seed=0)

        def forward(self, x):
            z = self.net(x)
            return torch.cat([torch.zeros_like(z), z], 1)

    model = Both().eval()
    residrop.attach(model, seed=0)
    found = residrop.predict(model, X, 0).probabilities[:, 1:]
    torch.testing.assert_close(found, torch.sigmoid(model.net(X)).detach())
