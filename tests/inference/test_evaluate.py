import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from residrop.blocks.attach import attach, sampler_of
from residrop.blocks.residual import Residual
from residrop.common.errors import UsageError
from residrop.inference import (
    ClassScores,
    Evaluation,
    Scores,
    error_curve,
    evaluate,
    evaluate_adaptive,
    predict,
    score,
)
from residrop.models import create
from residrop.rules.catalogue import make_rule


@pytest.fixture
def model():
    made = create("resnet-8", rule="swapout", classes=4, channels=1, seed=0)
    with torch.no_grad():
        for _ in range(3):
            made(torch.randn(16, 1, 8, 8))
    return made


@pytest.fixture
def batches():
    return [(torch.randn(n, 1, 8, 8), torch.randint(0, 4, (n,))) for n in (20, 20, 7)]


def scores_by_hand(p, labels, bins=15):
    p, labels = p.double().numpy(), labels.numpy()
    decided, confidence = p.argmax(1), p.max(1)
    right = decided == labels
    ece = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    error = 1.0 - right.mean()
    found = {
        "error": 100 * error,
        "error_se": 100 * math.sqrt(error * (1 - error) / len(labels)),
        "nll": -np.log(p[np.arange(len(labels)), labels]).mean(),
        "ece": 100 * ece,
    }
    five = np.argsort(p, axis=1)[:, -5:]
    return found | ({"top5_error": 100 * (five != labels[:, None]).all(1).mean()} if p.shape[1] > 5 else {})


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_scores_are_those_by_hand(sharpness):
    p = (sharpness * torch.randn(500, 6)).softmax(dim=1)
    labels = torch.multinomial(p.sqrt(), 1).squeeze(1)
    found, wanted = score(p, labels), scores_by_hand(p, labels)
    assert {name: getattr(found, name) for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_five_classes_have_no_top_5():
    assert score(torch.full((3, 5), 0.2), torch.tensor([0, 1, 2])).top5_error is None


def test_confusion_and_errors_by_class_are_those_by_hand(model, batches):
    found = evaluate(model, batches, 0)
    wanted = torch.zeros(4, 4, dtype=torch.int64)
    for x, y in batches:
        for label, decision in zip(y, predict(model, x, 0).classes, strict=True):
            wanted[label, decision] += 1
    assert torch.equal(found.confusion, wanted)
    assert sum(row.images for row in found.by_class()) == found.images == 47
    for label, row in enumerate(found.by_class()):
        others = wanted[label].clone()
        others[label] = 0
        assert row.images == wanted[label].sum()
        assert row.error == pytest.approx(100 * int(others.sum()) / row.images)
        assert row.taken == others.max()
        assert row.taken == 0 or others[row.taken_for] == row.taken
    assert sum(row.error * row.images for row in found.by_class()) / 47 == pytest.approx(found.deterministic.error)


def test_classes_without_images_or_errors_have_no_numbers():
    one = Scores(0.0, 0.0, 0.0, 0.0)
    found = Evaluation(one, None, 0, None, None, None, 3, torch.tensor([[3, 0], [0, 0]]))
    assert found.by_class() == [ClassScores(3, 0.0, None, 0), ClassScores(0, None, None, 0)]
    assert "confusion" not in found.to_dict()


def test_scores_of_one_image_and_of_certainty():
    sure = score(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert (sure.error, sure.error_se, sure.nll, sure.ece) == (0.0, 0.0, 0.0, 0.0)
    wrong = score(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert wrong.error == wrong.ece == 100.0
    assert math.isfinite(wrong.nll)


def test_evaluation_is_that_of_the_predictions(model, batches):
    found = evaluate(model, batches, samples=5)
    labels = torch.cat([y for _, y in batches])
    once = torch.cat([predict(model, x, 0).probabilities for x, _ in batches])
    sampled = [predict(model, x, 5, first=5 * number, keep=True) for number, (x, _) in enumerate(batches)]
    for scores, p in ((found.deterministic, once), (found.sampled, torch.cat([s.probabilities for s in sampled]))):
        wanted = scores_by_hand(p, labels)
        assert {name: getattr(scores, name) for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    passes = torch.cat([s.sample_classes for s in sampled], dim=1).numpy()
    errors = 100.0 * (passes != labels.numpy()).mean(axis=1)
    assert found.single_pass_error == pytest.approx(errors.mean())
    assert found.single_pass_error_se == pytest.approx(errors.std(ddof=1) / math.sqrt(5))
    spread = torch.cat([s.standard_error.gather(1, s.classes[:, None]) for s in sampled])
    assert found.probability_se == pytest.approx(spread.mean().item(), rel=1e-5)
    assert found.probability_se > 0
    assert (found.samples, found.images) == (5, 47)


def test_every_batch_has_samples_of_its_own(model):
    x, y = torch.randn(9, 1, 8, 8), torch.zeros(9, dtype=torch.long)
    once, twice = evaluate(model, [(x, y)], 3), evaluate(model, [(x, y), (x, y)], 3)
    assert once.deterministic.nll == pytest.approx(twice.deterministic.nll)
    assert once.sampled.nll != pytest.approx(twice.sampled.nll, rel=1e-6)


def test_no_samples_leave_sampled_inference_out(model, batches):
    found = evaluate(model, batches, samples=0)
    assert found.sampled is None
    assert found.single_pass_error is None
    assert found.single_pass_error_se is None
    assert found.probability_se is None
    assert found.samples == 0
    assert found.deterministic == evaluate(model, batches, samples=2).deterministic


def test_one_sample_has_no_standard_error_over_passes(model, batches):
    found = evaluate(model, batches, samples=1)
    assert found.single_pass_error == pytest.approx(found.sampled.error)
    assert found.single_pass_error_se is None


def test_one_sample_has_no_standard_error_of_a_probability(model, batches):
    # 0.0 claims certainty where the other standard error is None
    assert evaluate(model, batches, samples=1).probability_se is None


def test_negative_samples_are_refused(model, batches):
    # torch.zeros(-1) fails first: a traceback from `residrop evaluate RUN --samples -1`
    with pytest.raises(UsageError, match="samples is -1"):
        evaluate(model, batches, samples=-1)


def test_constant_depth_is_the_same_both_ways(batches):
    model = create("resnet-8", classes=4, channels=1)
    found = evaluate(model, batches, samples=3)
    assert found.sampled == found.deterministic
    assert found.single_pass_error == pytest.approx(found.deterministic.error)
    assert found.single_pass_error_se == 0.0
    assert found.probability_se == 0.0


def test_evaluation_repeats_and_leaves_the_model_as_it_was(model, batches):
    model.blocks.block1.eval()
    flags = [module.training for module in model.modules()]
    step = sampler_of(model).step
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert evaluate(model, batches, samples=2) == evaluate(model, batches, samples=2)
    assert [module.training for module in model.modules()] == flags
    assert sampler_of(model).step == step
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_progress_is_told_after_every_batch(model, batches):
    done = []
    evaluate(model, batches, samples=0, on_batch=done.append)
    assert done == [20, 40, 47]


def test_batches_may_be_a_generator_and_the_result_is_json(model, batches):
    found = evaluate(model, (batch for batch in batches), samples=2)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["deterministic"]["error"] == found.deterministic.error
    assert again["images"] == 47


# Other outputs than logits [n, classes]


def per_place(form):
    """Tensor[n, 3, 4, 5] to logits [n, 4, 4, 5], [n, 20, 4], [n, 4, 5] or numbers; attached."""
    blocks = [Residual(nn.Conv2d(8, 8, 3, padding=1), rule=make_rule("swapout", 0.6)) for _ in range(2)]
    body = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Conv2d(8, 4, 1))
    ends = {"tokens": (nn.Flatten(2), Moved()), "binary": (First(),)}
    model = nn.Sequential(body, *ends.get(form, ()))
    attach(model, seed=0)
    return model


class Moved(nn.Module):
    def forward(self, y):
        return y.transpose(1, 2)


class First(nn.Module):
    def forward(self, y):
        return y[:, 0]


@pytest.mark.parametrize("form", ["classes", "tokens", "binary"])
def test_decisions_at_many_places_are_scored_together(form):
    model, count = per_place(form), 2 if form == "binary" else 4
    places = (20,) if form == "tokens" else (4, 5)
    batches = [(torch.randn(n, 3, 4, 5), torch.randint(0, count, (n, *places))) for n in (6, 3)]
    batches[0][1][2].view(-1)[3:] = -100  # an image that is labelled in part
    found = evaluate(model, batches, 5, kind=form)
    once = [predict(model, x, 0, kind=form) for x, _ in batches]
    sampled = [predict(model, x, 5, first=5 * number, kind=form, keep=True) for number, (x, _) in enumerate(batches)]
    labels = torch.cat([y.flatten() for _, y in batches])
    used = labels != -100
    dim = once[0].class_dim

    def flat(parts, dim=dim):
        return torch.cat([part.movedim(dim, -1).flatten(0, -2) for part in parts])

    for scores, several in ((found.deterministic, once), (found.sampled, sampled)):
        p = flat([one.probabilities for one in several])[used]
        wanted = scores_by_hand(p, labels[used])
        del wanted["error_se"]
        assert {name: getattr(scores, name) for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        wrong = torch.zeros(len(labels))
        wrong[used] = (p.argmax(1) != labels[used]).float()
        image, counts = wrong.view(9, -1).sum(1).double(), used.view(9, -1).sum(1)
        spread = (image - image.sum() / counts.sum() * counts).square().sum().sqrt() / counts.sum()
        assert scores.error_se == pytest.approx(100 * spread.item())
    passes = torch.stack([flat([one.sample_probabilities[k] for one in sampled])[used].argmax(1) for k in range(5)])
    errors = 100.0 * (passes != labels[used]).double().mean(1)
    assert found.single_pass_error == pytest.approx(errors.mean().item())
    assert found.single_pass_error_se == pytest.approx(errors.std().item() / math.sqrt(5))
    spread = flat([one.standard_error for one in sampled])[used]
    best = flat([one.probabilities for one in sampled])[used].argmax(1, keepdim=True)
    assert found.probability_se == pytest.approx(spread.gather(1, best).mean().item(), rel=1e-5)
    assert found.images == 9
    assert found.confusion.sum() == used.sum()


def test_calibration_errors_are_those_of_torchmetrics():
    p = (4 * torch.randn(3000, 6)).softmax(1)
    p[:5] = torch.eye(6)[:5]  # certain
    labels = torch.multinomial(p.sqrt(), 1).squeeze(1)
    wanted = multiclass_calibration_error(p, labels, num_classes=6, n_bins=15)
    assert score(p, labels).ece == pytest.approx(100 * wanted.item(), rel=1e-5)


def test_certain_decisions_have_a_bin_of_their_own():
    # wrong with certainty beside right with 0.95: their gaps would cancel in one bin
    p = torch.tensor([[1.0, 0.0]] * 10 + [[0.95, 0.05]] * 10)
    labels = torch.tensor([1] * 10 + [0] * 10)
    wanted = multiclass_calibration_error(p, labels, num_classes=2, n_bins=15)
    assert score(p, labels).ece == pytest.approx(100 * wanted.item(), rel=1e-5) == pytest.approx(52.5)


@pytest.mark.parametrize("outputs", [None, lambda y: (y[:, :2], y[:, 2:].exp())], ids=["mean", "mean and variance"])
def test_numbers_are_scored_as_by_hand(outputs):
    model = per_place("numbers")
    shape = (4, 4, 5) if outputs is None else (2, 4, 5)
    batches = [(torch.randn(n, 3, 4, 5), torch.randn(n, *shape)) for n in (6, 3)]
    found = evaluate(model, batches, 5, kind="numbers", outputs=outputs)
    y = torch.cat([y for _, y in batches]).double()
    sampled = [predict(model, x, 5, first=5 * k, kind="numbers", outputs=outputs) for k, (x, _) in enumerate(batches)]
    mean = torch.cat([one.mean for one in sampled]).double()
    variance = torch.cat([one.total_variance for one in sampled]).double()
    scores = found.sampled
    square = (mean - y).square().flatten(1).mean(1)
    assert scores.rmse == pytest.approx(square.mean().sqrt().item(), rel=1e-5)
    assert scores.rmse_se == pytest.approx(square.std(correction=0).item() / 3 / 2 / scores.rmse, rel=1e-5)
    assert scores.mae == pytest.approx((mean - y).abs().mean().item(), rel=1e-5)
    law = torch.distributions.Normal(mean, variance.sqrt())
    assert scores.nll == pytest.approx(-law.log_prob(y).mean().item(), rel=1e-4)
    inside = ((y - mean).abs() <= 1.6448536 * variance.sqrt()).double()
    assert scores.coverage == pytest.approx(100 * inside.mean().item())
    assert scores.coverage_se == pytest.approx(100 * inside.flatten(1).mean(1).std(correction=0).item() / 3)
    assert scores.width == pytest.approx(2 * 1.6448536 * variance.sqrt().mean().item(), rel=1e-5)
    assert (found.deterministic.coverage is None) == (outputs is None)
    assert json.loads(json.dumps(found.to_dict()))["inputs"] == 9


def test_several_heads_have_an_evaluation_each():
    model, x = per_place("classes"), torch.randn(6, 3, 4, 5)
    y = {"what": torch.randint(0, 4, (6, 4, 5)), "how much": torch.randn(6, 4)}

    def heads(out):
        return {"what": out, "how much": out.mean((2, 3))}

    kinds = {"what": "classes", "how much": "numbers"}
    found = evaluate(model, [(x, y)], 3, outputs=heads, kind=kinds)
    assert found["what"] == evaluate(model, [(x, y["what"])], 3)
    alone = evaluate(model, [(x, y["how much"])], 3, outputs=lambda out: out.mean((2, 3)), kind="numbers")
    assert found["how much"] == alone
    with pytest.raises(UsageError, match="labels have nothing for output 'how much'"):
        evaluate(model, [(x, {"what": y["what"]})], 3, outputs=heads, kind=kinds)


def test_labels_of_another_shape_and_detections_are_refused():
    model, x = per_place("classes"), torch.randn(6, 3, 4, 5)
    with pytest.raises(UsageError, match=r"labels have shape \[6\], the predictions \[6, 4, 5\]; they must agree"):
        evaluate(model, [(x, torch.zeros(6, dtype=torch.long))], 0)
    with pytest.raises(UsageError, match=r"labels are torch\.float32; give .* as torch\.int64"):
        evaluate(model, [(x, torch.zeros(6, 4, 5))], 0)
    with pytest.raises(UsageError, match=r"a label 255, and the predictions have 4 classes; .* ignore="):
        evaluate(model, [(x, torch.full((6, 4, 5), 255))], 0)
    flat = nn.Sequential(model, nn.Flatten())
    attach(flat, seed=0)
    for measured in (evaluate_adaptive, error_curve):
        with pytest.raises(UsageError, match=r"labels have shape \[6, 1\], the predictions \[6\]"):
            measured(flat, [(x, torch.zeros(6, 1, dtype=torch.long))])
    with pytest.raises(UsageError, match="no images to evaluate"):
        evaluate(model, [], 0)
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    with pytest.raises(UsageError, match=r"detections are scored by torchmetrics"):
        evaluate(model, [(x, x)], 0, outputs=lambda out: [nothing] * len(out))
