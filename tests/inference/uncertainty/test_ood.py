"""Detection of foreign images, against pairs by hand, scikit-learn and torch-uncertainty."""

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch_uncertainty.metrics.classification import FPR95

from residrop.common.errors import ConfigError
from residrop.inference.uncertainty import detection


def scores(rounded=False):
    generator = torch.Generator().manual_seed(3)
    inside, outside = torch.randn(150, generator=generator), 1 + 2 * torch.randn(70, generator=generator)
    return [part.round() if rounded else part for part in (inside, outside)]


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_measures_are_those_of_scikit_learn(rounded):
    inside, outside = scores(rounded)
    truth, values = [0] * 150 + [1] * 70, torch.cat([inside, outside]).numpy()
    found = detection(inside, outside)
    assert found.auroc == pytest.approx(roc_auc_score(truth, values), rel=1e-6)
    assert found.aupr == pytest.approx(average_precision_score(truth, values), rel=1e-5)
    false, true, _ = roc_curve(truth, values, drop_intermediate=False)
    assert found.fpr95 == pytest.approx(min(false[true >= 0.95]), abs=1e-6)


def test_area_counts_pairs_and_half_the_ties():
    inside, outside = scores(rounded=True)
    wins = [(o > i) + 0.5 * (o == i) for i in inside.tolist() for o in outside.tolist()]
    assert detection(inside, outside).auroc == pytest.approx(sum(wins) / len(wins), rel=1e-6)


def test_false_positives_are_those_of_torch_uncertainty():
    inside, outside = scores()
    with pytest.warns(UserWarning, match="buffer"):
        wanted = FPR95(pos_label=1)
    wanted.update(torch.cat([inside, outside]), torch.cat([torch.zeros(150), torch.ones(70)]).long())
    assert detection(inside, outside).fpr95 == pytest.approx(float(wanted.compute()), abs=1e-6)


def test_large_scores_do_not_become_equal():
    inside = torch.arange(100.0)  # a sigmoid in float32 is 1 from 17 on
    assert detection(inside, inside + 100).auroc == 1.0


def test_a_score_that_knows_nothing():
    found = detection(torch.ones(30), torch.ones(10))
    assert found == pytest.approx((0.5, 0.25, 1.0))


@pytest.mark.parametrize(("inside", "outside"), [([], [1.0]), ([1.0], []), ([torch.nan], [1.0]), ([1.0], [torch.inf])])
def test_bad_input_is_refused(inside, outside):
    with pytest.raises(ConfigError, match="give"):
        detection(torch.tensor(inside), torch.tensor(outside))
