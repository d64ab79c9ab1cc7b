"""Folders to publish: a run that loads as before, with a card and scores that the Hugging Face hub reads."""

import json
import re
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.torch import load_file

import residrop
from residrop.cli import main
from residrop.common.errors import ConfigError, RunError
from residrop.data import Normalization
from residrop.research.papers import find_row
from residrop.research.papers.work import Settings, Source, rows_of_run, training, variant_of
from residrop.research.report import publish
from residrop.training import Recipe
from residrop.training.checked import write_record
from residrop.training.checkpoint import Run
from residrop.training.networks import build_network

SCORES = {"error": 9.25, "error_se": 0.29, "nll": 0.333, "ece": 4.5, "top5_error": 0.5}


def finished(path, *, data="parquet:/home/somebody/cifar10", images=10_000, sampled=None, **changes):
    """A run directory as `train` leaves it, of an untrained network."""
    options = {"network": "resnet-8", "rule": "stochastic-depth", "survival": "0.8", "precision": "fp32", **changes}
    recipe = Recipe(data=data, epochs=1, **options)
    dataset = {"classes": [f"class {number}" for number in range(10)], "channels": 3, "size": 32, "steps": 5}
    mean = torch.full((3, 1, 1), 0.5)
    run = Run.create(path, recipe, {**dataset, "digest": "0" * 16}, Normalization("channel", mean, 0.5 * mean))
    torch.manual_seed(recipe.seed)
    run.save_weights("model", build_network(recipe, {**dataset, "normalization": "channel"}))
    (path / "metrics.jsonl").write_text('{"epoch": 1, "train_loss": 2.0, "seconds": 3.0}\n')
    (path / "last.pt").write_bytes(b"of no use to others")
    (path / "logs.json").write_text('{"wandb": "somebody/private"}')
    details = {"deterministic": SCORES, "sampled": None, "samples": 0, "images": images}
    if sampled is not None:
        details |= {"sampled": {**SCORES, "error": sampled}, "samples": 30}
    found = {"rule": recipe.rule, "parameters": 75_000, "deterministic_error": 9.25, "sampled_error": sampled}
    found |= {"samples": details["samples"], "train_seconds": 3.0, "details": details, "run": {}}
    write_record(path / "evaluation.json", found)
    return path


def test_a_published_run_is_one_that_loads_and_says_nothing_of_this_machine(tmp_path):
    source = finished(tmp_path / "runs" / "first", weights="/home/somebody/start.safetensors")
    (model,) = publish([source], tmp_path / "models")
    target = tmp_path / "models" / "first"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(residrop.load_run(target).model(x), residrop.load_run(source).model(x))
    assert residrop.load_run(target).classes == residrop.load_run(source).classes
    assert residrop.load_run(target).recipe == residrop.load_run(source).recipe.replace(
        data="parquet:cifar10", weights="start.safetensors"
    )
    kept = {path.name for path in target.iterdir()}
    assert {"last.pt", "logs.json", "run.lock"}.isdisjoint(kept)
    for path in target.rglob("*"):
        assert path.is_dir() or b"somebody" not in path.read_bytes()
    assert (model.error, model.images, model.seed) == (9.25, 10_000, 0)
    assert model.bytes == (target / "model.safetensors").stat().st_size


def test_card_and_scores_are_what_the_hub_reads(tmp_path):
    publish([finished(tmp_path / "run", sampled=8.875)], tmp_path / "models")
    folder = tmp_path / "models" / "run"
    card = ModelCard.load(folder / "README.md").data
    assert (card.library_name, card.pipeline_tag, card.datasets) == (
        "residrop",
        "image-classification",
        ["uoft-cs/cifar10"],
    )
    assert [(one.metric_type, one.metric_value, one.dataset_type) for one in card.eval_results] == [
        ("accuracy", 90.75, "uoft-cs/cifar10"),
        ("accuracy", 91.125, "uoft-cs/cifar10"),
    ]
    files = sorted((folder / ".eval_results").iterdir())
    assert [path.name for path in files] == ["cifar10.yaml", "cifar10_sampled.yaml"]
    entries = [parse_eval_result_entries(yaml.safe_load(path.read_text())) for path in files]
    assert [(one.dataset_id, one.value) for (one,) in entries] == [
        ("uoft-cs/cifar10", 90.75),
        ("uoft-cs/cifar10", 91.125),
    ]
    assert "30 sampled passes" in entries[1][0].notes
    text = (folder / "README.md").read_text()
    assert "| deterministic | 9.25 ± 0.29 | 0.333 | 4.50 |" in text
    assert "| 30 sampled passes | 8.88 ± 0.29 |" in text


@pytest.mark.parametrize("changes", [{"data": "parquet:/data/mine"}, {"images": 100}, {"data": "cifar100"}])
def test_other_data_have_no_score_under_a_name_of_the_hub(tmp_path, changes):
    publish([finished(tmp_path / "run", **changes)], tmp_path / "models")
    folder = tmp_path / "models" / "run"
    assert not (folder / ".eval_results").exists()
    card = ModelCard.load(folder / "README.md").data
    assert card.eval_results is None
    assert card.datasets is None


def test_python_of_the_card_runs(tmp_path, capsys):
    publish([finished(tmp_path / "run")], tmp_path / "models")
    folder = tmp_path / "models" / "run"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(code.replace("FOLDER", str(folder)), {"pixels": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)})
    assert "class " in capsys.readouterr().out


def test_the_table_has_earlier_models_too_and_one_of_the_same_name_is_replaced(tmp_path):
    models = tmp_path / "models"
    first = finished(tmp_path / "first")
    (first / "curves.png").write_bytes(b"a picture")
    publish([first], models)
    assert "](curves.png)" in (models / "first" / "README.md").read_text()
    publish([finished(tmp_path / "second | b", seed=3)], models)
    (first / "curves.png").unlink()
    again = publish([first], models)
    assert [model.name for model in again] == ["first", "second | b"]
    assert not (models / "first" / "curves.png").exists()
    rows = [line for line in (models / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert [line.replace("\\|", "").count("|") for line in rows] == [13, 13]
    assert "(second%20%7C%20b/README.md)" in rows[1]
    assert [one["seed"] for one in json.loads((models / "models.json").read_text())] == [0, 3]


def test_runs_of_rows_are_known_by_their_names():
    for name, variant, scale, known in (
        ("swapout/table-2/linear-1-0.5-stochastic", None, 1.0, ""),
        ("stochastic-depth/table-1/constant-cifar10", "resnet-20", 0.01, ", resnet-20, schedule x 0.01"),
    ):
        table, row = find_row(name)
        one = variant_of(table.paper, variant)
        recipe = one.of(row.recipe) if one else row.recipe
        made = training(recipe, 2, Settings(scale=scale), None)
        assert f"{name}{known}" in rows_of_run(made.name)
        other = training(recipe, 2, Settings(scale=scale), Source(None, "other images", 100, "abcdef1234567890"))
        assert rows_of_run(other.name) == ()
    assert rows_of_run("digits-001") == rows_of_run("resnet-20-constant-0123456789abcdef-cpu-scale1-seed0") == ()


def test_a_row_of_a_paper_is_named_with_the_paper(tmp_path):
    _, row = find_row("swapout/table-2/linear-1-0.5-stochastic")
    name = training(row.recipe, 0, Settings(), None).name
    (model,) = publish([finished(tmp_path / name)], tmp_path / "models")
    assert "swapout/table-2/linear-1-0.5-stochastic" in model.rows
    assert "Swapout" in (tmp_path / "models" / name / "README.md").read_text()
    assert "swapout/table-2/linear-1-0.5-stochastic" in (tmp_path / "models" / "README.md").read_text()


def test_refusals_leave_nothing(tmp_path):
    first, other = finished(tmp_path / "a" / "run"), finished(tmp_path / "b" / "run")
    models = tmp_path / "models"
    with pytest.raises(ConfigError, match="two runs are called run"):
        publish([first, other], models)
    with pytest.raises(ConfigError, match=r"lies in --models .* already"):
        publish([first], tmp_path / "a")
    (other / "evaluation.json").unlink()
    with pytest.raises(RunError, match="is not finished; continue it with residrop train --resume"):
        publish([other], models)
    shutil.copy(first / "normalization.safetensors", first / "model.safetensors")
    with pytest.raises(RunError, match="does not fit the recipe's network"):
        publish([first], models)
    recipe = Run(first).recipe().replace(network="transformers:/home/somebody/resnet")
    write_record(first / "recipe.json", recipe.to_dict())
    with pytest.raises(ConfigError, match="a folder without which it cannot be loaded"):
        publish([first], models)
    assert not models.exists()


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "run")
    assert main(["report", "run", "--models", "models"]) == 0
    assert "a table of 1 model(s)" in capsys.readouterr().out
    assert load_file(tmp_path / "models" / "run" / "model.safetensors")
    assert not (tmp_path / "report.html").exists()
    assert main(["report", "run", "--models", "models", "--html", "page.html"]) == 0
    assert (tmp_path / "page.html").exists()
    capsys.readouterr()
    assert main(["report", "--models", "models"]) == 2
    assert "--models publishes runs, and none were given" in capsys.readouterr().err
    assert main(["report", "run", "--models", "page.html"]) == 2
    assert "--models page.html cannot be written" in capsys.readouterr().err
