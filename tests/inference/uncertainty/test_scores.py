"""Scores of uncertainty, and standard errors by the bootstrap."""

import pytest
import torch
from torch_uncertainty.metrics.classification import MutualInformation

from residrop.blocks.attach import attach
from residrop.common.errors import ConfigError
from residrop.inference import predict
from residrop.inference.uncertainty import Collector, bootstrap, standard_error, uncertainty_scores
from residrop.models import create


@pytest.fixture
def found():
    model = create("resnet-8", rule="swapout", survival=0.5, seed=0, classes=4, channels=1)
    return predict(model, torch.randn(12, 1, 8, 8), samples=9, keep=True)


def test_scores_of_samples_are_their_definitions(found):
    scores = uncertainty_scores(found)
    mean = found.sample_probabilities.mean(0)
    torch.testing.assert_close(scores["max_probability"], 1 - mean.amax(1))
    torch.testing.assert_close(scores["entropy"], torch.distributions.Categorical(mean).entropy())
    votes = found.sample_probabilities.argmax(2).T.tolist()
    wanted = [1 - max(map(row.count, row)) / 9 for row in votes]
    assert scores["disagreement"].tolist() == pytest.approx(wanted)
    assert max(wanted) > 0


def test_mutual_information_is_that_of_torch_uncertainty(found):
    wanted = MutualInformation(reduction="none")
    wanted.update(found.sample_probabilities.transpose(0, 1))
    torch.testing.assert_close(uncertainty_scores(found)["mutual_information"], wanted.compute(), atol=1e-6, rtol=1e-3)


def test_one_pass_has_two_scores():
    model = create("resnet-8", rule="swapout", seed=0, classes=4, channels=1)
    assert set(uncertainty_scores(predict(model, torch.randn(3, 1, 8, 8), 0))) == {"max_probability", "entropy"}


def test_standard_error_of_a_mean_is_the_known_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    found = standard_error(lambda index: float(values[index].mean()), 400, repetitions=2000)
    known = float(values.std(correction=0)) / 20
    assert float(found) == pytest.approx(known, rel=0.1)  # its own standard error is 1 / sqrt(2 * 2000) = 1.6%


def test_bootstrap_is_the_same_under_one_seed_and_pairs():
    values = torch.randn(50).double()

    def both(index):
        return [float(values[index].mean()), float(values[index].mean()) + 1.0]

    found = bootstrap(both, 50, repetitions=20, seed=3)
    assert found.shape == (20, 2)
    torch.testing.assert_close(found[:, 1] - found[:, 0], torch.ones(20, dtype=torch.float64))
    assert torch.equal(found, bootstrap(both, 50, repetitions=20, seed=3))
    assert not torch.equal(found, bootstrap(both, 50, repetitions=20, seed=4))


@pytest.mark.parametrize(("images", "repetitions"), [(0, 10), (10, 1), (2.5, 10)])
def test_bad_numbers_are_refused(images, repetitions):
    with pytest.raises(ConfigError, match="give a whole number of at least"):
        bootstrap(lambda index: 0.0, images, repetitions=repetitions)


def test_scores_of_tokens_go_over_classes_and_a_collector_takes_one_decision_an_image():
    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = create("resnet-8", rule="swapout", seed=0, classes=12, channels=1)

        def forward(self, x):
            return self.body(x).view(-1, 3, 4)

    model, x = Turned(), torch.randn(5, 1, 8, 8)
    attach(model, seed=0)
    found = predict(model, x, 4, kind="tokens")
    for score in uncertainty_scores(found).values():
        assert score.shape == (5, 3)
    torch.testing.assert_close(uncertainty_scores(found)["max_probability"], 1 - found.probabilities.amax(2))
    with pytest.raises(ConfigError, match="one decision between classes for each image"):
        Collector().add(torch.zeros(5, 3, dtype=torch.long), found, None)
    with pytest.raises(ConfigError, match="one decision between classes for each image"):
        Collector().add(torch.zeros(5), predict(model, x, 0, kind="numbers"), None)
