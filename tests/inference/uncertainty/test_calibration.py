"""Proper scores, calibration errors and temperatures, against slow references and other libraries."""

import math
from itertools import pairwise

import numpy as np
import pytest
import sklearn.calibration
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from torch_uncertainty.metrics.classification import AdaptiveCalibrationError, BrierScore
from torchmetrics.functional.classification import multiclass_calibration_error

from residrop.common.errors import ConfigError
from residrop.inference.uncertainty import (
    brier,
    calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    with_temperature,
)


def decided(probabilities, labels):
    confidence, decision = probabilities.max(1)
    return confidence, decision == labels


def test_scores_of_single_images_are_their_definitions(predictions):
    p, y = predictions(50, 3)
    squares = [sum((float(p[i, c]) - (c == int(y[i]))) ** 2 for c in range(3)) for i in range(50)]
    assert brier(p, y).tolist() == pytest.approx(squares, abs=1e-6)
    assert negative_log_likelihood(p, y).tolist() == pytest.approx([-math.log(p[i, y[i]]) for i in range(50)])


@pytest.mark.parametrize("classes", [2, 5])
def test_mean_scores_are_those_of_scikit_learn_and_torch_uncertainty(predictions, classes):
    p, y = predictions(classes=classes)
    assert float(negative_log_likelihood(p, y).mean()) == pytest.approx(log_loss(y, p), rel=1e-6)
    wanted = BrierScore(num_classes=classes)
    wanted.update(p, y)
    assert float(brier(p, y).mean()) == pytest.approx(float(wanted.compute()), rel=1e-5)


def test_brier_score_of_two_classes_is_twice_that_of_scikit_learn(predictions):
    p, y = predictions(classes=2)
    assert float(brier(p, y).mean()) == pytest.approx(2 * brier_score_loss(y, p[:, 1]), rel=1e-6)


def test_a_probability_of_zero_costs_a_finite_number():
    p = torch.tensor([[1.0, 0.0]])
    assert float(negative_log_likelihood(p, torch.tensor([1]))) == pytest.approx(87.3, abs=0.1)


def test_equal_widths_are_those_of_torchmetrics(predictions):
    p, y = predictions()
    p[:20] = torch.eye(5, dtype=p.dtype)[y[:20]]  # a confidence of exactly 1
    found = calibration_error(*decided(p, y))
    assert found == pytest.approx(float(multiclass_calibration_error(p, y, num_classes=5, n_bins=15)), rel=1e-6)


def by_hand(confidence, right, edges):
    """Bins closed on the left, the last on both sides."""
    rows = []
    for low, high in pairwise(edges):
        inside = [i for i, c in enumerate(confidence) if low <= c < high or (c == high == edges[-1])]
        if inside:
            rows.append((np.mean(confidence[inside]), np.mean(right[inside]), len(inside)))
    return [list(column) for column in zip(*rows, strict=True)]


def test_equal_widths_are_counted_as_by_hand(predictions):
    confidence, right = decided(*predictions(80))
    confidence[0] = 1.0
    confidence[1] = 0.5
    found = reliability(confidence, right, bins=4)
    wanted = by_hand(confidence.double().numpy(), right.numpy(), [0.0, 0.25, 0.5, 0.75, 1.0])
    assert [part.tolist() for part in found] == [pytest.approx(column) for column in wanted]
    gaps = sum(abs(a - c) * n for c, a, n in zip(*wanted, strict=True))
    assert found.error == pytest.approx(gaps / 80)


def test_equal_masses_are_those_of_scikit_learn(predictions):
    confidence, right = decided(*predictions(317))
    found = reliability(confidence, right, binning="mass")
    accuracy, mean = calibration_curve(right.numpy(), confidence.double().numpy(), n_bins=15, strategy="quantile")
    assert found.accuracy.tolist() == pytest.approx(accuracy.tolist())
    assert found.confidence.tolist() == pytest.approx(mean.tolist())
    assert int(found.images.max() - found.images.min()) <= 1


def test_equal_masses_are_those_of_torch_uncertainty_where_they_divide(predictions):
    p, y = predictions(300)
    wanted = AdaptiveCalibrationError(task="multiclass", num_bins=15, num_classes=5)
    wanted.update(p, y)
    assert calibration_error(*decided(p, y), binning="mass") == pytest.approx(float(wanted.compute()), rel=1e-5)


def test_images_of_equal_confidence_share_a_bin_whatever_their_order():
    confidence = torch.tensor([0.5] * 6 + [0.9, 0.9])
    right = torch.tensor([True, False, True, False, False, False, True, True])
    turned = torch.arange(7, -1, -1)
    found = reliability(confidence, right, bins=4, binning="mass")
    assert found.images.tolist() == [6, 2]
    again = reliability(confidence[turned], right[turned], bins=4, binning="mass")
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize("images", [1, 3, 14])
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_fewer_images_than_bins(predictions, images, binning):
    confidence, right = decided(*predictions(images))
    found = reliability(confidence, right, binning=binning)
    assert int(found.images.sum()) == images
    assert 0 <= calibration_error(confidence, right, binning=binning) <= 1


def test_temperature_is_that_of_the_logits():
    logits = 3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    found = with_temperature(logits.softmax(1), 1.7)
    torch.testing.assert_close(found, (logits / 1.7).softmax(1))
    p = logits.softmax(1)
    assert with_temperature(p, 1) is p


def test_fitted_temperature_has_the_smallest_likelihood_of_a_fine_grid(predictions):
    p, y = predictions(2000)
    found = fit_temperature(p, y)

    def loss(temperature):
        return float(negative_log_likelihood(with_temperature(p.double(), temperature), y).mean())

    grid = [0.05 * 1.02**step for step in range(303)]
    assert loss(found) <= min(map(loss, grid)) + 1e-9
    assert found == pytest.approx(1 / 0.6, rel=0.1)  # labels were drawn from 0.6 times the logits
    sharp = fit_temperature(with_temperature(p, 4.0), y)
    assert sharp == pytest.approx(found / 4, rel=1e-3)


def test_fitted_temperature_is_that_of_scikit_learn(predictions):
    fit = getattr(sklearn.calibration, "_TemperatureScaling", None) or pytest.skip("in scikit-learn since 1.8")
    p, y = predictions(500)
    inverse = fit().fit(p.double().log().numpy(), y.numpy()).beta_
    assert fit_temperature(p, y) == pytest.approx(1 / inverse, rel=1e-2)


def test_temperature_without_a_wrong_decision_is_refused():
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    with pytest.raises(ConfigError, match="all decisions on the 2 images to fit on are right"):
        fit_temperature(p, torch.tensor([0, 1]))


GOOD = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("p", "y", "words"),
    [
        (torch.empty(0, 3), torch.empty(0, dtype=torch.int64), "at least one image"),
        (torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), "two classes"),
        (torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64), "shape"),
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), "softmax outputs, not logits"),
        (torch.tensor([[0.4, 0.4]]), torch.tensor([0]), "sum is off 1 by 0.2"),
        (torch.tensor([[torch.nan, 0.5]]), torch.tensor([0]), "NaN"),
        (GOOD, torch.tensor([0, 2]), "labels lie in 0..2; allowed are 0..1"),
        (GOOD, torch.tensor([-1, 0]), "allowed are 0..1"),
        (GOOD, torch.tensor([0]), r"give an int64 Tensor\[2\]"),
        (GOOD, torch.tensor([0.0, 1.0]), "int64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("measure", [brier, negative_log_likelihood, fit_temperature])
def test_bad_input_is_refused_in_one_line(measure, p, y, words):
    with pytest.raises(ConfigError, match=words) as refused:
        measure(p, y)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, "1", True])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(ConfigError, match="finite number above 0"):
        with_temperature(GOOD, temperature)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.tensor([0.5]), torch.tensor([1.0])), "bool"),
        ((torch.tensor([0.5]), torch.tensor([True, True])), r"bool Tensor\[1\]"),
        ((torch.tensor([]), torch.tensor([], dtype=torch.bool)), "at least 1"),
        ((torch.tensor([1.5]), torch.tensor([True])), "confidence lies in"),
        ((torch.tensor([torch.nan]), torch.tensor([True])), "NaN"),
        ((torch.tensor([0.5]), torch.tensor([True]), 0), "bins is 0"),
        ((torch.tensor([0.5]), torch.tensor([True]), 5, "equal"), "binning is 'equal'"),
    ],
)
def test_bad_bins_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        reliability(*arguments)
