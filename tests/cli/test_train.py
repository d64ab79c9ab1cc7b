"""`residrop train` as a user meets it."""

import shlex
import shutil

import pytest

from command_line import KEYS, SMALL, assert_refused, everything, strictly
from residrop.cli.shared import Fields, parse
from residrop.cli.train import Train
from residrop.training import PRESETS, Recipe, Run, loop, preset
from residrop.training.presets import train_command


def test_help_of_train_has_every_field_of_the_recipe(cli):
    _, out, _ = cli("train", "--help")
    missing = [name for name in Recipe().to_dict() if f"--{name.replace('_', '-')}" not in out]
    assert missing == []


def test_defaults_in_the_help_are_those_of_the_recipe(cli):
    _, out, _ = cli("train", "--recipe", "swapout/v2-20-w2", "--help")
    flat = " ".join(out.replace("│", " ").split())
    assert "(default: resnet-ours-20)" in flat
    assert "(default: 256)" in flat


def test_train_writes_runs_numbered_from_one(cli, place):
    for number in ("001", "002"):
        code, out, _ = cli("train", *SMALL, "--json", f"{number}.json", "--quiet")
        assert code == 0
        assert "deterministic (expectation)" in out
        assert "sampled (2 passes)" in out
        assert (place / "runs" / f"digits-{number}" / "model.safetensors").exists()
    assert sorted(path.name for path in (place / "runs").iterdir()) == ["digits-001", "digits-002"]
    found = strictly((place / "001.json").read_text())
    assert found.keys() >= KEYS
    assert found == Run(place / "runs/digits-001").evaluation()
    assert found["rule"] == "stochastic-depth"
    assert found["parameters"] == 75_002
    assert found["samples"] == 2
    assert found["expected_depth"] == pytest.approx(2.0)


def test_train_takes_the_recipe_and_overrides_its_fields(cli, place):
    code, out, err = cli(
        "train", "--recipe", "digits/swapout", *SMALL, "--network=resnet-ours-8", "--out", "deep/er/run", "--json", "-"
    )
    assert code == 0
    assert strictly(out)["rule"] == "swapout"
    assert "epoch   2/2" in err
    recipe = Run(place / "deep/er/run").recipe()
    base = preset("digits/swapout").recipe
    assert recipe == base.replace(
        network="resnet-ours-8",
        limit=200,
        epochs=2,
        precision="fp32",
        samples=2,
        survival="linear(1, 0.5)",
        normalization="channel",
    )


def test_recipe_may_be_a_file_and_names_the_run(cli, place):
    (place / "own").mkdir()
    (place / "own" / "wide.toml").write_text('base = "digits/swapout"\nlr = 0.07\nnetwork = "resnet-ours-8"\n')
    assert cli("train", "--recipe", "own/wide.toml", *SMALL[2:], "--lr-factor", "0.5", "--quiet")[0] == 0
    recipe = Run(place / "runs/wide-001").recipe()
    assert (recipe.lr, recipe.lr_factor, recipe.network, recipe.rule) == (0.07, 0.5, "resnet-ours-8", "swapout")
    code, out, _ = cli("recipes", "own/wide.toml")
    assert code == 0
    assert out.startswith("own/wide.toml: based on digits/swapout\n")
    assert "  lr: 0.07\n" in out
    compared = cli("compare", "--recipe", "own/wide.toml", *SMALL[2:], "--rules", "swapout", "--quiet")
    assert compared[0] == 0, compared[2]
    assert (place / "runs" / "compare-wide-001" / "swapout-seed0" / "recipe.json").exists()


def test_quiet_train_writes_nothing_to_standard_error(cli):
    code, _, err = cli("train", *SMALL, "--quiet")
    assert (code, err) == (0, "")


def test_resume_reads_the_recipe_from_the_run(cli, place, monkeypatch):
    assert cli("train", *SMALL, "--lr", "0.07", "--out", "run", "--quiet")[0] == 0
    monkeypatch.setattr(loop, "_update", lambda *args: pytest.fail("trained again"))
    code, out, _ = cli("train", "--resume", "--out", "run", "--json", "-")
    assert code == 0
    assert strictly(out)["samples"] == 2
    code, _, err = cli("train", "--resume", "--out", "run", "--lr", "0.08")
    assert code == 2
    assert err.startswith("residrop: error: run was started with another recipe: lr (was 0.07, is 0.08)")
    assert len(err.splitlines()) == 1


def test_resume_of_a_run_that_is_not_there_is_refused(cli, place):
    # a typo in --out starts the default training in a new directory
    assert_refused(cli("train", *SMALL, "--resume", "--out", "typo", "--quiet"), place)


def test_train_into_a_run_or_a_file_is_one_line(cli, place, run):
    before = everything(run)
    result = cli("train", *SMALL, "--out", run)
    assert_refused(result, place)
    assert "already holds a run; continue it with --resume, or choose another --out" in result[2]
    assert everything(run) == before
    (place / "file").write_text("mine")
    assert_refused(cli("train", *SMALL, "--out", "file"), place, [str(place / "file")])


def test_unwritable_json_is_refused_before_hours_of_training(cli, place):
    assert_refused(cli("train", *SMALL, "--quiet", "--json", "/dev/null/x.json"), place)


def test_augmentation_that_cannot_be_is_refused_before_a_run_is_made(cli, place):
    # what is left "already holds a run", so the corrected command is refused, too
    assert_refused(cli("train", *SMALL, "--quiet", "--flips", "alternating", "--out", "run"), place)


def test_images_too_small_for_the_network_are_refused_before_a_run_is_made(cli, place, digits):
    for part in ("train", "test"):
        for label in "ab":
            folder = place / "tiny" / part / label
            folder.mkdir(parents=True)
            shutil.copy(digits[0][0], folder / "1.png")
            shutil.copy(digits[0][1], folder / "2.png")
    code, _, err = cli("train", *SMALL, "--quiet", "--data", f"folder:{place}/tiny?size=3", "--out", "run")
    assert code == 2
    assert err.count("\n") == 1
    assert not (place / "run").exists()


FURTHER = {
    "words": Recipe(freeze=("conv1", "*.bn?"), without=("blocks.block2",), lr_drops=(), watch=("discrepancy",)),
    "none": Recipe(decay_vectors=False, ema=0.9, nesterov=False, survival="linear(1, 0.5)", normalization="unit"),
    "another": Recipe(network="timm:resnet18?drop_path_rate=0.1", rule="mix", theta_2="0.7", coupling="independent"),
}


@pytest.mark.parametrize("recipe", [*(preset(name).recipe for name in PRESETS), *FURTHER.values()])
def test_the_command_of_a_recipe_gives_the_recipe(recipe):
    program, verb, *options = shlex.split(train_command(recipe))
    assert (program, verb) == ("residrop", "train")
    defaults = Train(settings=Fields.from_recipe(preset("digits").recipe))
    assert parse(Train, options, "residrop train", defaults).settings.recipe() == recipe
