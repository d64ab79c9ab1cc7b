"""Risk and coverage, against every order of ties, scikit-learn's sorting and torch-uncertainty."""

from itertools import permutations

import pytest
import torch
from torch_uncertainty.metrics.classification import AURC, CovAt5Risk

from residrop.common.errors import ConfigError
from residrop.inference.uncertainty import risk_coverage

SCORES = torch.tensor([0.3, 0.1, 0.3, 0.3, 0.7, 0.7])
LOSSES = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])


def curves():
    """Risks in all orders of images that rise in their score."""
    for order in permutations(range(6)):
        scores = SCORES[list(order)]
        if bool((scores.diff() >= 0).all()):
            yield torch.cumsum(LOSSES[list(order)], 0) / torch.arange(1, 7)


def test_risk_of_ties_is_the_mean_over_their_orders():
    found = risk_coverage(SCORES, LOSSES)
    every = torch.stack(list(curves()))
    assert len(every) == 12
    torch.testing.assert_close(found.risk.float(), every.mean(0))
    assert found.area == pytest.approx(float(every.mean()))
    assert found.reachable.tolist() == [True, False, False, True, False, True]


def test_coverage_is_what_a_threshold_can_accept():
    found = risk_coverage(SCORES, LOSSES)
    accepted = {}
    for threshold in SCORES.unique().tolist():
        inside = threshold >= SCORES
        accepted[float(inside.double().mean())] = float(LOSSES[inside].double().mean())
    for risk in (0.0, 0.3, 0.49, 0.5, 1.0):
        wanted = max((share for share, loss in accepted.items() if loss <= risk), default=0.0)
        assert found.coverage_at(risk) == pytest.approx(wanted)


def test_coverage_is_zero_where_the_surest_images_are_wrong():
    assert risk_coverage(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])).coverage_at(0.05) == 0.0


def test_without_ties_it_is_torch_uncertainty(predictions):
    p, y = predictions(400)
    uncertainty, losses = 1 - p.double().amax(1), (p.argmax(1) != y).double()
    found = risk_coverage(uncertainty, losses)
    area, coverage = AURC(), CovAt5Risk()
    area.update(p, y)
    coverage.update(p, y)
    # theirs is a trapezoid from coverage 1/n to 1, ours the mean over all coverages: the same risks
    trapezoid = float(torch.trapezoid(found.risk, found.coverage)) / (1 - 1 / 400)
    assert trapezoid == pytest.approx(float(area.compute()), rel=1e-5)
    assert found.coverage_at(0.05) == pytest.approx(float(coverage.compute()), abs=1e-6)


def test_order_of_images_does_not_matter(predictions):
    p, y = predictions(100)
    uncertainty, losses = (1 - p.amax(1)).round(decimals=1), (p.argmax(1) != y).float()
    order = torch.randperm(100)
    found, again = risk_coverage(uncertainty, losses), risk_coverage(uncertainty[order], losses[order])
    torch.testing.assert_close(found.risk, again.risk)
    assert torch.equal(found.reachable, again.reachable)


@pytest.mark.parametrize(
    ("scores", "losses", "words"),
    [
        (torch.tensor([]), torch.tensor([]), "at least 1"),
        (torch.tensor([0.5]), torch.tensor([1.0, 0.0]), r"give a floating-point Tensor\[1\]"),
        (torch.tensor([torch.nan]), torch.tensor([1.0]), "NaN"),
        (torch.tensor([1]), torch.tensor([1.0]), "floating-point"),
        (torch.tensor([0.5]), torch.tensor([True]), "losses is torch.bool"),
    ],
)
def test_bad_input_is_refused(scores, losses, words):
    with pytest.raises(ConfigError, match=words):
        risk_coverage(scores, losses)


def test_bad_risks_are_refused():
    with pytest.raises(ConfigError, match="risk is 5"):
        risk_coverage(SCORES, LOSSES).coverage_at(5)
