"""Error against the number of samples, adaptive evaluation, and the commands that show them."""

import json

import numpy as np
import pytest
import torch

import residrop
from residrop.common.errors import ConfigError
from residrop.inference import error_curve, evaluate_adaptive, predict, predict_adaptive


@pytest.fixture
def model():
    made = residrop.create("resnet-8", rule="swapout", classes=4, channels=1, seed=0)
    with torch.no_grad():
        for _ in range(3):
            made(torch.randn(16, 1, 8, 8))
    return made


@pytest.fixture
def batches():
    return [(torch.randn(n, 1, 8, 8), torch.randint(0, 4, (n,))) for n in (20, 20, 7)]


def test_curve_is_that_of_disjoint_predictions(model, batches):
    found = error_curve(model, batches, samples=4, repetitions=3)
    labels = torch.cat([y for _, y in batches])
    errors = np.empty((3, 4))
    for repetition in range(3):
        every = torch.cat(
            [
                predict(model, x, 4, first=(3 * number + repetition) * 4, keep=True).sample_probabilities
                for number, (x, _) in enumerate(batches)
            ],
            dim=1,
        )
        for count in range(1, 5):
            errors[repetition, count - 1] = 100 * (every[:count].mean(0).argmax(1) != labels).double().mean()
    assert found.samples == (1, 2, 3, 4)
    assert found.error == pytest.approx(errors.mean(0))
    assert found.error_se == pytest.approx(errors.std(0, ddof=1) / np.sqrt(3))
    once = torch.cat([predict(model, x, 0).classes for x, _ in batches])
    assert found.deterministic == pytest.approx(100 * float((once != labels).double().mean()))
    assert (found.repetitions, found.images) == (3, 47)
    assert json.loads(json.dumps(found.to_dict()))["error"] == list(found.error)


def test_one_repetition_has_no_standard_error(model, batches):
    assert error_curve(model, batches, 2, 1).error_se is None


@pytest.mark.parametrize("given", [{"samples": 0}, {"repetitions": 0}])
def test_bad_numbers_are_refused(model, batches, given):
    with pytest.raises(ConfigError, match="is 0; give a whole number of at least 1"):
        error_curve(model, batches, **given)


def test_no_images_are_refused(model):
    for measure in (error_curve, evaluate_adaptive):
        with pytest.raises(ConfigError, match="no images to evaluate"):
            measure(model, [])


def test_adaptive_evaluation_is_that_of_the_predictions(model, batches):
    told = []
    found = evaluate_adaptive(model, batches, confidence=0.8, max_samples=12, on_batch=told.append)
    labels = torch.cat([y for _, y in batches])
    some = [
        predict_adaptive(model, x, confidence=0.8, max_samples=12, first=12 * k) for k, (x, _) in enumerate(batches)
    ]
    classes = torch.cat([one.classes for one in some])
    full = torch.cat([predict(model, x, 12, first=12 * number).classes for number, (x, _) in enumerate(batches)])
    used = torch.cat([one.used for one in some]).numpy()
    assert found.mean_samples == pytest.approx(used.mean())
    assert found.samples_se == pytest.approx(used.std(ddof=1) / np.sqrt(47))
    assert found.error == pytest.approx(100 * float((classes != labels).double().mean()))
    assert found.full_error == pytest.approx(100 * float((full != labels).double().mean()))
    assert found.agreement == pytest.approx(100 * float((classes == full).double().mean()))
    assert found.settled == pytest.approx(100 * float(torch.cat([one.settled for one in some]).double().mean()))
    assert (found.images, found.confidence, found.max_samples) == (47, 0.8, 12)
    assert told == [20, 40, 47]
    assert json.loads(json.dumps(found.to_dict()))["agreement"] == found.agreement
