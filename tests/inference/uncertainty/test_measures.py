"""All measures at once, their standard errors and comparisons, the recommendation, and what is collected."""

import pytest
import torch

from residrop.common.errors import ConfigError
from residrop.inference import evaluate, score
from residrop.inference.scores import counted, scores_of
from residrop.inference.uncertainty import (
    Collector,
    Estimate,
    Kind,
    Measured,
    calibration_error,
    collect,
    detection,
    fit_conformal,
    measure,
    measure_detection,
    measure_sets,
    recommend,
    risk_coverage,
    with_temperature,
)
from residrop.inference.uncertainty.measures import MEASURES
from residrop.inference.uncertainty.recommend import compare
from residrop.models import create


def test_measures_are_those_of_the_functions(predictions):
    p, y = predictions()
    found = measure(p, y, repetitions=10).values
    known = score(p, y)
    assert found["error"] == pytest.approx(known.error)
    assert found["nll"] == pytest.approx(known.nll)
    assert found["ece"] == pytest.approx(known.ece, rel=1e-6)
    confidence, right = p.amax(1), p.argmax(1) == y
    assert found["ece_mass"] == pytest.approx(100 * calibration_error(confidence, right, binning="mass"))
    curve = risk_coverage(1 - confidence, (~right).double())
    assert found["aurc"] == pytest.approx(100 * curve.area)
    assert found["coverage_at_5"] == pytest.approx(100 * curve.coverage_at(0.05))


def test_other_scores_change_what_is_withheld_alone(predictions):
    p, y = predictions()
    plain, other = measure(p, y, repetitions=2).values, measure(p, y, torch.rand(300), repetitions=2).values
    changed = {name for name in MEASURES if plain[name] != other[name]}
    assert {"aurc"} <= changed <= {"aurc", "coverage_at_1", "coverage_at_5"}


def test_standard_errors_are_those_of_means_and_of_paired_differences(predictions):
    p, y = predictions(1000)
    found, tempered = (measure(one, y, repetitions=200) for one in (p, with_temperature(p, 2.0)))
    error, spread = found.estimate("error")
    known = 100 * (error / 100 * (1 - error / 100) / 1000) ** 0.5
    assert spread == pytest.approx(known, rel=0.15)
    assert tempered.less(found, "error") == Estimate(0.0, 0.0)  # decisions are the same, set by set
    change = tempered.less(found, "nll")
    assert 0 < change.standard_error < found.estimate("nll").standard_error / 2


def test_detection_has_standard_errors():
    inside, outside = torch.randn(200), torch.randn(100) + 1
    found = measure_detection(inside, outside, repetitions=50)
    assert [one.value for one in found.values()] == pytest.approx([100 * one for one in detection(inside, outside)])
    known = 100 * (1 / 12 / 100 + 1 / 12 / 200) ** 0.5  # of an AUROC where the kinds are alike; less where not
    assert 0 < found["auroc"].standard_error < known


def test_sets_are_counted(predictions):
    fitted = fit_conformal(*predictions(200), 0.9)
    p, y = predictions(seed=1)
    found, sets = measure_sets(fitted, p, y), fitted.sets(p)
    assert found["size"].value == pytest.approx(sum(map(sum, sets.tolist())) / 300)
    assert found["covered"].value == pytest.approx(100 * sum(sets[i, y[i]].item() for i in range(300)) / 300)
    assert found["empty"].value == pytest.approx(100 * sum(not any(row) for row in sets.tolist()) / 300)


@pytest.mark.parametrize("images", [1, 2, 9])
def test_few_images(predictions, images):
    found = measure(*predictions(images, 2), repetitions=20)
    assert all(value >= 0 for value in found.values.values())
    assert found.draws.shape == (20, len(MEASURES))


def test_bad_labels_are_refused(predictions):
    p, y = predictions()
    with pytest.raises(ConfigError, match="labels lie in"):
        measure(p, y + 4)


# The recommendation


def made(error, nll, ece, spread=0.1):
    """Measures whose draws differ between kinds by this standard error."""
    values = dict.fromkeys(MEASURES, 0.0) | {"error": error, "nll": nll, "ece": ece}
    generator = torch.Generator().manual_seed(int(1000 * (error + nll + ece)))
    centre = torch.tensor([values[name] for name in MEASURES], dtype=torch.float64)
    return Measured(values, centre + spread * torch.randn(400, len(MEASURES), generator=generator, dtype=torch.float64))


def test_a_temperature_that_repairs_the_mean_is_recommended():
    said = recommend(
        {
            Kind(0): made(5.0, 2.0, 3.0),
            Kind(30): made(3.0, 2.0, 9.0),
            Kind(30, 0.7): made(3.0, 1.0, 2.0),
        }
    )
    assert said.startswith("30 sampled passes instead of one: error better by 2.00 ± 0.1")
    assert "ECE worse by 6.00 ± 0.1" in said
    assert "temperature 0.70 of their mean: ECE better by 7.00 ± 0.1" in said
    assert "; use 30 sampled passes, temperature 0.70: its NLL is 1.000 ± 0.1" in said
    assert said.count(". ") == 0
    assert "\n" not in said


def test_differences_within_two_standard_errors_are_not_called_better():
    said = recommend({Kind(0): made(5.0, 2.0, 3.0), Kind(30): made(4.8, 1.8, 3.2)})
    assert "better" not in said
    assert "worse" not in said
    assert "error not to be told apart (-0.20 ± 0.1" in said
    assert said.endswith("use one pass: no other has a lower NLL by more than 2 standard errors.")


def test_one_pass_with_a_temperature():
    said = recommend({Kind(0): made(5.0, 2.0, 3.0), Kind(0, 1.5): made(5.0, 1.0, 1.0)})
    assert said.startswith("temperature 1.50 of one pass: ECE better by 2.00")
    assert "; use one pass, temperature 1.50: its NLL is 1.000 ± 0.1" in said
    assert recommend({Kind(0): made(5.0, 2.0, 3.0)}) == "One pass is all that was measured."


@pytest.mark.parametrize(
    ("difference", "sign"),
    [((1.0, 0.4), 1), ((-1.0, 0.4), -1), ((1.0, 0.5), 0), ((1.0, 0.0), 0), ((0.0, 0.0), 0), ((float("nan"), 1.0), 0)],
)
def test_a_difference_must_exceed_two_standard_errors(difference, sign):
    assert compare(Estimate(*difference)) == sign


# What is collected


def test_collected_predictions_are_those_of_evaluate():
    model = create("resnet-8", rule="swapout", seed=0, classes=4, channels=1)
    batches = [(torch.randn(n, 1, 8, 8), torch.randint(4, (n,))) for n in (7, 3)]
    done, collector = [], Collector()
    found = collect(model, batches, 3, on_batch=done.append)
    known = evaluate(model, batches, 3, on_predictions=collector.add)
    assert done == [7, 10]
    assert torch.equal(found.labels, torch.cat([y for _, y in batches]))
    for samples, wanted in ((0, known.deterministic), (3, known.sampled)):  # added up batch by batch, to the last bit
        parts = zip(found.probabilities[samples].split((7, 3)), found.labels.split((7, 3)), strict=True)
        assert scores_of([counted(*part) for part in parts]) == wanted
    again = collector.predictions()
    assert all(torch.equal(found.probabilities[kind], again.probabilities[kind]) for kind in (0, 3))
    assert {kind: set(scores) for kind, scores in found.scores.items()} == {
        0: {"max_probability", "entropy"},
        3: {"max_probability", "entropy", "mutual_information", "disagreement"},
    }


def test_without_samples_there_is_one_kind_and_without_images_none():
    model = create("resnet-8", rule="swapout", seed=0, classes=4, channels=1)
    assert list(collect(model, [(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))], 0).probabilities) == [0]
    with pytest.raises(ConfigError, match="no images to evaluate; give at least one batch"):
        collect(model, [], 0)
