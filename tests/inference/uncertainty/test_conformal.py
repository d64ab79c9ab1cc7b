"""Conformal sets: their promise over many splits, references by hand, MAPIE and torch-uncertainty."""

import json
import math

import numpy as np
import pytest
import torch
from mapie.classification import SplitConformalClassifier
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from torch_uncertainty.post_processing import ConformalClsAPS, ConformalClsRAPS

from helpers import ALPHA
from residrop.common.errors import ConfigError
from residrop.inference.uncertainty import Conformal, fit_conformal, nonconformity

METHODS = ["thr", "aps", "raps"]


def by_hand(p, label, method, u, penalty=0.01, free=5):
    if method == "thr":
        return 1 - p[label]
    order = sorted(range(len(p)), key=lambda c: (-p[c], c))
    rank = order.index(label) + 1
    found = sum(p[c] for c in order[: rank - 1]) + u * p[label]
    return found + (penalty * max(rank - free, 0) if method == "raps" else 0)


@pytest.mark.parametrize("method", METHODS)
def test_nonconformity_is_its_definition(predictions, method):
    p, _ = predictions(20, 7)
    p[0] = 1 / 7  # ties
    u = torch.rand(20)
    found = nonconformity(p, method, u, penalty=0.2, free=2)
    for i in range(20):
        wanted = [by_hand(p[i].tolist(), c, method, float(u[i]), 0.2, 2) for c in range(7)]
        assert found[i].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("method", "theirs"), [("aps", ConformalClsAPS), ("raps", ConformalClsRAPS)])
def test_nonconformity_is_that_of_torch_uncertainty(predictions, method, theirs):
    p, y = predictions(60, 7)
    options = {"penalty": 0.3, "regularization_rank": 2} if method == "raps" else {}
    other = theirs(alpha=0.1, randomized=False, **options)
    found = nonconformity(p, method, torch.ones(60), penalty=0.3, free=2)
    torch.testing.assert_close(found, other._calculate_all_labels(p))
    torch.testing.assert_close(found.gather(1, y[:, None]).squeeze(1), other._calculate_single_label(p, y))


class Given(ClassifierMixin, BaseEstimator):
    """An estimator whose inputs are its probabilities."""

    def __init__(self, classes=5):
        self.classes = classes
        self.classes_ = np.arange(classes)

    def fit(self, x, y):
        return self

    def predict(self, x):
        return x.argmax(1)

    def predict_proba(self, x):
        return x


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_sets_of_thr_are_those_of_mapie(predictions, coverage):
    (p, y), (later, _) = predictions(137), predictions(200, seed=1)
    other = SplitConformalClassifier(Given(), confidence_level=coverage, conformity_score="lac", prefit=True)
    other.conformalize(p.numpy(), y.numpy())
    _, wanted = other.predict_set(later.numpy())
    found = fit_conformal(p, y, coverage, "thr").sets(later)
    assert found.tolist() == wanted[:, :, 0].tolist()


def coverage_law(calibration, later, k):
    """Beta-binomial: how many of `later` exchangeable images have a nonconformity up to the k-th of `calibration`."""
    return stats.betabinom(later, k, calibration + 1 - k).pmf(np.arange(later + 1))


def region_of_sums(pmf, count):
    """Accepted sums of `count` independent draws: each tail beyond has at most ALPHA / 2. Convolved, so exact."""
    total = np.ones(1)
    for _ in range(count):
        total = np.convolve(total, pmf)
    below = np.cumsum(total)
    return int(np.searchsorted(below, ALPHA / 2)), int(np.searchsorted(below, 1 - ALPHA / 2))


@pytest.mark.parametrize("method", METHODS)
def test_coverage_is_as_promised_over_200_splits(predictions, method):
    """Under random division of fixed images the number covered has the beta-binomial law, whatever the images.

    So splits are independent. With 99 images to fit on, k = 90, the mean is exactly 0.9 for distinct scores. The sum of
    200 splits of 100 images is accepted between 17,699 and 18,283: 0.885 to 0.914.
    """
    p, y = predictions(199, 10)
    generator = torch.Generator().manual_seed(7)
    covered = 0
    for split in range(200):
        order = torch.randperm(199, generator=generator)
        fitted = fit_conformal(p[order[:99]], y[order[:99]], 0.9, method, seed=split)
        later = order[99:]
        covered += int(fitted.sets(p[later]).gather(1, y[later, None]).sum())
    low, high = region_of_sums(coverage_law(99, 100, 90), 200)
    assert low <= covered <= high
    assert (low, high) == (17699, 18283)


def test_threshold_is_the_quantile_of_finite_samples(predictions):
    p, y = predictions(39)
    scores = sorted((1 - p.double().gather(1, y[:, None]).squeeze(1)).tolist())
    for coverage in (0.5, 0.8, 0.9, 0.95, 0.975):
        assert fit_conformal(p, y, coverage).threshold == scores[math.ceil(round(40 * coverage, 9)) - 1]


def test_too_few_images_give_all_classes(predictions):
    p, y = predictions(8)
    found = fit_conformal(p, y, 0.9)
    assert found.threshold == math.inf
    assert bool(found.sets(p).all())
    assert Conformal.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert fit_conformal(*predictions(9), 0.9).threshold < math.inf


@pytest.mark.parametrize("method", METHODS)
def test_sets_do_not_depend_on_batches_and_survive_json(predictions, method):
    found = fit_conformal(*predictions(100), 0.8, method, seed=5)
    again = Conformal.from_dict(json.loads(json.dumps(found.to_dict())))
    p, _ = predictions(90, seed=1)
    whole = found.sets(p)
    parts = [again.sets(part, first) for part, first in ((p[:40], 0), (p[40:], 40))]
    assert torch.equal(torch.cat(parts), whole)
    assert 0.5 < float(whole.sum(1).double().mean()) < 5


def test_the_largest_sets_of_raps_are_smaller(predictions):
    fit, later = predictions(2000, 30), predictions(2000, 30, seed=1)[0]
    sizes = [
        fit_conformal(*fit, 0.9, method, penalty=0.1, free=2).sets(later).sum(1).double() for method in ("aps", "raps")
    ]
    assert float(sizes[1].max()) < float(sizes[0].max())


def test_two_classes(predictions):
    for method in METHODS:
        assert fit_conformal(*predictions(50, 2), 0.9, method).sets(predictions(5, 2)[0]).shape == (5, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coverage": 0.0}, "coverage is 0.0"),
        ({"coverage": 1}, "between 0 and 1"),
        ({"coverage": math.nan}, "between 0 and 1"),
        ({"method": "lac"}, "method is 'lac'; choose one of 'thr', 'aps', 'raps'"),
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"free": -1}, "free is -1"),
    ],
)
def test_bad_settings_are_refused(predictions, options, words):
    with pytest.raises(ConfigError, match=words):
        fit_conformal(*predictions(20), **options)


@pytest.mark.parametrize(
    "values", [{}, {"method": "thr"}, {"method": "lac", "coverage": 0.9, "threshold": 1, "images": 3}]
)
def test_what_describes_no_predictor_is_refused(values):
    with pytest.raises(ConfigError, match="describes no conformal predictor"):
        Conformal.from_dict(values)
