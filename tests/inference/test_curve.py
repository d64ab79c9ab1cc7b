"""Error against the number of samples, adaptive evaluation, and the commands that show them."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import residrop
from residrop.cli import main
from residrop.common.errors import ConfigError
from residrop.inference import ErrorCurve, error_curve, evaluate_adaptive, predict, predict_adaptive
from residrop.training import Recipe, load_run, train
from residrop.training.setup import loader_of_run


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
                predict(model, x, 4, first=(3 * number + repetition) * 4).sample_probabilities
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


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Directory of a run that knows its digits."""
    path = tmp_path_factory.mktemp("curve") / "run"
    recipe = Recipe(network="resnet-8", rule="stochastic-depth", epochs=4, batch_size=64, samples=2, precision="fp32")
    train(recipe, path, quiet=True)
    return path


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return call


def test_evaluate_adaptive_prints_samples_error_and_agreement(cli, run):
    code, out, err = cli("evaluate", run, "--samples", 10, "--adaptive", "--confidence", 0.9, "--json", "-")
    assert code == 0
    found = json.loads(out)["adaptive"]
    opened, model = load_run(run)
    wanted = evaluate_adaptive(model, loader_of_run(opened).eval_batches(), confidence=0.9, max_samples=10)
    assert found == wanted.to_dict()
    assert f"adaptive sampling: {wanted.mean_samples:.2f} ± {wanted.samples_se:.2f} of 10 passes an image" in err
    assert f"agreement with all 10 passes: {wanted.agreement:.2f}% of {wanted.images} images" in err
    assert wanted.agreement > 95
    assert "curve" not in json.loads(out)
    assert not (run / "samples.png").exists()


def test_evaluate_curve_draws_and_prints(cli, run, tmp_path):
    target = tmp_path / "curve.json"
    code, out, _ = cli("evaluate", run, "--samples", 6, "--curve", "--repetitions", 2, "--json", target)
    assert code == 0
    found = json.loads(target.read_text())["curve"]
    opened, model = load_run(run)
    wanted = error_curve(model, loader_of_run(opened).eval_batches(), 6, 2)
    assert found == json.loads(json.dumps(wanted.to_dict()))
    assert isinstance(wanted, ErrorCurve)
    assert "error of averaged passes, 2 repetitions" in " ".join(out.split())
    assert f"{wanted.error[5]:.2f}%" in out
    assert f"curve: {run / 'samples.png'}" in out
    with Image.open(run / "samples.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 500


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adaptive", "--samples", "0"], "samples is 0, but --adaptive needs sampled passes"),
        (["--curve", "--samples", "0"], "samples is 0, but --curve needs sampled passes"),
        (["--curve", "--repetitions", "0"], "repetitions is 0; give a whole number of at least 1"),
        (["--adaptive", "--confidence", "1.5"], "confidence is 1.5; give a number between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(cli, run, arguments, words):
    code, out, err = cli("evaluate", run, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("residrop: error: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_run_that_cannot_be_written_is_told_before_the_work(cli, run, monkeypatch):
    room = sys.modules["residrop.cli.evaluating"]
    monkeypatch.setattr(room.os, "access", lambda path, mode: False)
    monkeypatch.setattr(room, "evaluate", lambda *args, **options: pytest.fail("work was done"))
    code, _, err = cli("evaluate", run, "--curve")
    assert code == 2
    assert "cannot be written, where --curve draws samples.png" in err


def test_one_image_or_repetition_is_shown_without_standard_errors(cli, run):
    code, out, _ = cli("evaluate", run, "--samples", 2, "--curve", "--repetitions", 1)
    assert code == 0
    assert "error of averaged passes, 1 repetition " in " ".join(out.split())
