"""`residrop analyze`: what it says of runs, networks by name and Vanilla networks is what the instruments say."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import residrop
import residrop.cli.analyze
from residrop.blocks.attach import sampler_of
from residrop.cli import main
from residrop.cli.analyze.targets import Analysis, find_target
from residrop.common.errors import ConfigError
from residrop.schedule.survival import linear_decay
from residrop.theory import costs_of, discrepancy, gradient_growth, growth_rates, sensitivity
from residrop.training import Recipe, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directory of a run that measured its own rates and watched its blocks."""
    path = tmp_path_factory.mktemp("analyze") / "run"
    recipe = Recipe(
        network="resnet-8",
        limit=200,
        epochs=2,
        batch_size=64,
        lr=0.05,
        precision="fp32",
        device="cpu",
        samples=0,
        budget="0.5",
        spend="sensitivity",
        refresh=1,
        watch=("discrepancy",),
    )
    train(recipe, path, quiet=True)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def analyze(tmp_path, capsys):
    """Return a function from arguments to the JSON that the command writes, the table it prints, and its picture."""

    def call(instrument, *arguments):
        picture = tmp_path / "picture.png"
        code = main(["analyze", instrument, *map(str, arguments), "--picture", str(picture), "--json", "found.json"])
        said = capsys.readouterr()
        assert code == 0, said.err
        with Image.open(picture) as image:
            assert image.width > 500
        return json.loads((tmp_path / "found.json").read_text()), said.out

    return call


def row_of(found, **wanted):
    (row,) = [row for row in found["rows"] if all(row[key] == value for key, value in wanted.items())]
    return row


# Depth


def test_depth_of_a_network_by_name(analyze):
    found, said = analyze("depth", "resnet-20", "--survival", "linear_decay(0.5)", "--unit", "flops", "--images", "2")
    rates = linear_decay(9, 0.5)
    row = row_of(found, mode="its own")
    assert row["mean"] == pytest.approx(math.fsum(rates))
    assert row["std"] == pytest.approx(math.fsum(p * (1 - p) for p in rates) ** 0.5)
    assert row["rates"] == pytest.approx(row_of(found, mode="linear")["rates"])
    assert row_of(found, mode="uniform")["std"] > row["std"]
    assert sum(row["probabilities"]) == pytest.approx(1.0)
    model = residrop.create("resnet-20", rule="stochastic-depth", survival=0.5)
    costs = costs_of(model, "flops", torch.randn(2, 3, 32, 32))
    spent = costs.fixed + sum(p * c for p, c in zip(rates, costs.branches, strict=True))
    assert row["work_mean"] == pytest.approx(spent / costs.total)
    assert "resnet-20: live blocks of 9 in a step" in said


def test_depth_below_what_linear_decay_can_drop_has_no_linear_mode(analyze):
    found, _ = analyze("depth", "vanilla-6", "--survival", "0.1", "--width", "8")
    assert [row["mode"] for row in found["rows"]] == ["its own", "uniform"]


# Survival


def test_survival_of_a_run_shows_modes_and_its_course(analyze, run):
    found, said = analyze("survival", run, "--budgets", "0.3", "0.7", "--images", "32", "--unit", "flops")
    target = find_target(Analysis(target=str(run), images=32))
    assert target.rates == tuple(found["course"][-1]["rates"])
    assert found["scores"] == pytest.approx(sensitivity(target.model, target.batches).scores.tolist())
    assert [line["epoch"] for line in found["course"]] == [0, 1]
    total = found["fixed"] + sum(found["costs"])
    modes = {row["mode"] for row in found["rows"]}
    assert modes == {"uniform", "linear", "sensitivity", "sensitivity per cost", "max_regularization"}
    met = [row for row in found["rows"] if "rates" in row]
    assert len(met) >= 9
    for row in met:
        spent = found["fixed"] + sum(p * c for p, c in zip(row["rates"], found["costs"], strict=True))
        assert spent / total == pytest.approx(row["budget"])
    assert row_of(found, mode="linear", budget=0.3)["refused"].startswith("a budget of")
    assert "32 test images" in " ".join(said.split())


def test_survival_leaves_the_run_alone(analyze, run):
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    analyze("survival", run, "--images", "8")
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


# Gradients


def test_gradients_of_vanilla_networks_are_predicted(analyze):
    found, said = analyze("gradients", "vanilla-10", "--width", "256", "--samples", "400", "--budgets", "0.7")
    assert [(row["mode"], row["budget"]) for row in found["rows"]] == [
        ("standard", 1.0),
        ("uniform", 0.7),
        ("linear", 0.7),
    ]
    uniform = row_of(found, mode="uniform")
    assert uniform["predicted_rates"][0] == growth_rates((0.7,) * 10)[0]
    for row in found["rows"]:
        for measured, error, expected in zip(row["rates"], row["rates_error"], row["predicted_rates"], strict=True):
            assert abs(measured - expected) < 5 * error + 0.02
    assert "(1.7000)" in said


def test_gradients_of_a_run_are_those_of_its_weights_and_of_its_training(analyze, run, tmp_path):
    found, _ = analyze("gradients", run, "--images", "16", "--passes", "2", "--beside", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (course,) = found["runs"].values()  # one directory, named twice
    assert [line["first_gradient"] for line in course] == [
        line["first_gradient"] for line in lines if line["first_gradient"]
    ]
    assert len(course) > 0
    target = find_target(Analysis(target=str(run), images=16))
    expected = gradient_growth(target.model, target.batches, rates=(1.0,) * 3, passes=2)
    assert row_of(found, mode="full depth")["q"] == pytest.approx(expected.q.tolist())
    assert row_of(found, mode="its own rates")["q"] != row_of(found, mode="full depth")["q"]


# Discrepancy


def test_discrepancy_along_a_training(analyze, run):
    found, _ = analyze("discrepancy", run, "--images", "16")
    target = find_target(Analysis(target=str(run), images=16))
    assert found["curvature"] == pytest.approx(discrepancy(target.model, target.batches).curvature.tolist())
    assert [line["epoch"] for line in found["course"]] == [0, 1, 2]
    assert found["predicted"] is None


def test_discrepancy_of_stable_networks_is_flat(analyze):
    found, said = analyze("discrepancy", "stable-vanilla-8", "--width", "128", "--networks", "60")
    assert len(found["curvature"]) == 8
    for h, error in zip(found["curvature"], found["standard_error"], strict=True):
        assert h == pytest.approx(found["predicted"], abs=5 * error + 0.02 * found["predicted"])
    assert "Theorem 1" in said


# Noise


def test_noise_of_vanilla_networks_along_a_training(analyze):
    options = ("--width", "16", "--networks", "2", "--inputs", "4", "--masks", "30", "--epochs", "0", "1")
    found, said = analyze("noise", "stable-vanilla-6", *options, "--depths", "3", "6")
    assert [row["epoch"] for row in found["rows"]] == [0, 1]
    assert [len(row["rejected"]) for row in found["rows"]] == [6, 6]
    assert found["rows"][0]["tests"] == [8] * 6
    assert found["rows"][0]["rejected"][0] == 1.0  # one coin
    assert found["by_depth"]["3"][0] > found["by_depth"]["6"][0] > 0
    assert found["by_depth"]["6"][0] == pytest.approx(found["rows"][0]["ratio"])
    assert "condition 2" in said


def test_noise_of_a_run(analyze, run):
    found, _ = analyze("noise", run, "--inputs", "3", "--masks", "20", "--images", "8")
    assert len(found["rows"][0]["rejected"]) == 3


# Targets


@pytest.mark.parametrize("name", ["torchvision:resnet18", "resnet18"])
def test_torchvision_models_by_name(name):
    target = find_target(Analysis(target=name, images=2, survival="linear_decay(0.5)"))
    assert target.rates == pytest.approx(linear_decay(8, 0.5))
    assert target.x.shape == (2, 3, 224, 224)
    torch.manual_seed(123)  # weights are those of --seed, whatever was drawn before
    again, other = (find_target(Analysis(target=name, images=2, seed=seed)).model for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(target.model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(again.conv1.weight, other.conv1.weight)


def test_timm_models_by_name(analyze):
    pytest.importorskip("timm")
    found, _ = analyze("depth", "timm:test_vit", "--images", "2")
    assert found["blocks"] == len(found["rows"][0]["rates"]) > 2


@pytest.mark.parametrize("name", ["resnet-8", "vanilla-4"])
def test_targets_are_measured_without_a_step(name):
    target = find_target(Analysis(target=name, images=4, data="digits" if name == "resnet-8" else None))
    assert sampler_of(target.model).step == 0
    assert len(target.x) == 4
    with torch.no_grad():
        assert target.loss(target.model(target.x), target.batches[0][1]).isfinite()


def test_survival_of_a_run_can_be_replaced(run):
    assert find_target(Analysis(target=str(run), survival="0.25")).rates == (0.25,) * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fun"], "instrument 'fun' is unknown"),
        (["depth", "nothing-5"], "'nothing-5' is no run directory"),
        (["depth", "jax:resnet18"], "'jax' is no library"),
        (["depth", "no/where"], "is no directory"),
        (["depth", "torchvision:resnet18", "--width", "3"], "width is for networks of residrop"),
        (["depth", "resnet-8", "--beta", "0"], "beta is 0.0"),
        (["depth", "resnet-8", "--survival", "2"], "rate is 2"),
        (["depth", "resnet-8", "--images", "1"], "images is 1"),
        (["survival", "resnet-8", "--budgets", "1.5"], "budgets is 1.5"),
        (["noise", "resnet-8", "--epochs", "0", "1"], "epochs is for Vanilla networks"),
        (["noise", "vanilla-4", "--epochs", "2", "1"], "epochs are (2, 1)"),
        (["noise", "vanilla-4", "--masks", "2"], "masks is 2"),
        (["gradients", "vanilla-4", "--beside", "nowhere"], "metrics.jsonl does not exist"),
        (["depth", "resnet-8", "--json", "/"], "--json / cannot be written"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path):
    assert main(["analyze", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_instrument(capsys):
    assert main(["analyze"]) == 0
    said = capsys.readouterr().out
    instruments = [path.stem for path in Path(residrop.cli.analyze.__file__).parent.glob("*.py")]
    for name in set(instruments) - {"__init__", "instrument", "targets"}:
        assert f"\n  {name} " in said
        assert main(["analyze", name, "--help"]) == 0
        assert f"residrop analyze {name}" in capsys.readouterr().out


def test_numbers_that_json_cannot_hold_are_null(analyze):
    found, _ = analyze("gradients", "vanilla-1100", "--width", "2", "--samples", "2", "--budgets")
    assert None in found["rows"][0]["q"] or None in found["rows"][0]["predicted_q"]


def test_picture_that_cannot_be_written_is_said(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["analyze", "depth", "resnet-8", "--picture", str(tmp_path / "file" / "a.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_timm_missing_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match="if installed"):
        find_target(Analysis(target="timm:resnet18"))
