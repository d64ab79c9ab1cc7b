"""`residrop evaluate --uncertainty`, and what `predict` and `export` do with what it fitted."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from command_line import strictly
from residrop.data import load
from residrop.inference import predict, score
from residrop.inference.uncertainty import with_temperature
from residrop.training import Recipe, load_run, train
from residrop.training.calibration import load_fitted


def assert_one_line(result, *words):
    """Bad input: exit code 2 and one line that says what is wrong."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Standard errors from fewer sets of images: they are tested with the measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("residrop.cli.uncertainty.study.DRAWS", 40)
        patch.setattr("residrop.cli.uncertainty.study.FEW_DRAWS", 2)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory of a run with validation images, of which some are decided wrongly."""
    path = tmp_path_factory.mktemp("uncertainty") / "run"
    options = {"limit": 300, "validation": 60, "epochs": 2, "batch_size": 32, "samples": 0, "precision": "fp32"}
    train(Recipe(network="resnet-8", rule="swapout", survival="0.7", device="cpu", **options), path, quiet=True)
    return path


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """The same with what --uncertainty leaves, and its numbers."""
    from residrop.cli import main

    path = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(trained, path)
    arguments = ["evaluate", str(path), "--uncertainty", "--ood", "rotated", "digits", "--samples", "3"]
    assert main([*arguments, "--json", str(path.parent / "found.json")]) == 0
    return path, json.loads((path.parent / "found.json").read_text())


@pytest.fixture
def fitted(measured, tmp_path):
    """A copy that may be written into."""
    return shutil.copytree(measured[0], tmp_path / "fitted")


def test_measures_are_those_of_the_evaluation(measured):
    _, found = measured
    kinds = {(one["samples"], one["temperature"] == 1): one for one in found["uncertainty"]["measures"]}
    assert set(kinds) == {(0, True), (0, False), (3, True), (3, False)}
    for samples, name in ((0, "deterministic"), (3, "sampled")):
        for key in ("error", "nll", "ece"):
            assert kinds[samples, True][key]["value"] == pytest.approx(found["details"][name][key], rel=1e-5)
        assert kinds[samples, False]["error"] == kinds[samples, True]["error"]
    known = found["details"]["deterministic"]["error_se"]
    assert kinds[0, True]["error"]["standard_error"] == pytest.approx(known, rel=0.5)


def test_foreign_images_are_told_apart_and_own_ones_are_not(measured):
    found = {
        (one["source"], one["samples"], one["score"]): one["auroc"]["value"]
        for one in measured[1]["uncertainty"]["ood"]
    }
    assert len(found) == 2 * (2 + 4)
    turned = [value for (source, *_), value in found.items() if "turned by 90" in source]
    assert max(turned) > 55
    same = [value for (source, *_), value in found.items() if source == "digits"]
    assert same == pytest.approx([50.0] * 6)


def test_conformal_sets_are_of_all_methods_and_grow_with_the_promise(measured):
    found = measured[1]["uncertainty"]["conformal"]
    assert len(found) == 2 * 3 * 7
    for samples in (0, 3):
        for method in ("thr", "aps", "raps"):
            sizes = [one["size"]["value"] for one in found if (one["samples"], one["method"]) == (samples, method)]
            assert sizes == sorted(sizes)


def test_the_page_loads_nothing_and_has_the_pictures(measured):
    path, found = measured
    page = (path / "uncertainty.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 4
    assert page.count("<table>") == 3 + 2
    assert found["uncertainty"]["recommendation"] in page
    for name in ("reliability", "risk-coverage", "conformal", "ood"):
        with Image.open(path / f"{name}.png") as picture:
            assert picture.size[0] > 500


def test_tables_and_the_recommendation_are_printed(cli, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    code, out, err = cli("evaluate", run, "--uncertainty", "--samples", "0")
    assert code == 0, err
    assert "60 images are too few to promise a coverage of 0.99" in out
    for words in ("Brier score", "AURC", "coverage at 5% risk", "THR", "RAPS", "fitted on 60 validation images"):
        assert words in out
    assert "sampled passes" not in out
    assert out.splitlines()[-1].startswith("temperature")
    assert not (run / "ood.png").exists()


def test_corrupted_images_at_five_strengths(cli, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("residrop.cli.uncertainty.study.CORRUPTIONS", ("cutout",))
    run = shutil.copytree(trained, tmp_path / "run")
    code, out, _ = cli("evaluate", run, "--uncertainty", "--corruptions", "--samples", "0", "--json", "-")
    found = strictly(out)["uncertainty"]
    assert code == 0
    errors = {(one["corruption"], one["strength"]): one["error"]["value"] for one in found["corruptions"]}
    assert set(errors) == {("cutout", strength) for strength in range(1, 6)}
    clean = found["measures"][0]["error"]["value"]
    assert errors["cutout", 5] > clean + 5
    assert (run / "corruptions.png").exists()
    assert "Corrupted images" in (run / "uncertainty.html").read_text()


# Images to fit on


@pytest.fixture
def photos(place):
    """A folder of labelled digits that no other test uses, 16 pixels large and coloured."""
    train = load("digits").train
    for number in range(200):
        path = place / "photos" / "test" / str(int(train.labels[number])) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(train.pixels[number, 0].numpy()).convert("RGB").resize((16, 16)).save(path)
    return place / "photos"


def test_a_run_without_validation_images_takes_others(cli, tmp_path, run, place):
    assert_one_line(
        cli("evaluate", run, "--uncertainty"), "held out no validation images; give others", "--calibration DATA"
    )
    assert not (run / "calibration.json").exists()


def test_the_test_images_are_refused_for_fitting(cli, run):
    result = cli("evaluate", run, "--uncertainty", "--calibration", "digits")
    assert_one_line(result, "--calibration digits has 355 of the test images")


def test_other_images_to_fit_on(cli, trained, tmp_path, photos, place):
    run = shutil.copytree(trained, tmp_path / "run")
    wrong = cli("evaluate", run, "--uncertainty", "--samples", "0", "--calibration", f"folder:{photos}")
    assert_one_line(wrong, "was trained on 1-channel images")  # files of a folder are in colour
    # as of another version of the set, with a tenth of the images left
    (place / "shards").mkdir()
    _shards(place / "shards", load("digits").train)
    code, out, err = cli(
        "evaluate", run, "--uncertainty", "--samples", "0", "--calibration", f"parquet:{place / 'shards'}"
    )
    assert code == 0, err
    assert "fitted on 200 images of parquet:shards" in out
    assert load_fitted(load_run(run).run, "model", 0)[0].images == 200


def _shards(folder, images):
    """Grey images with labels as the shards of a data set."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for number in range(200):
        file = io.BytesIO()
        Image.fromarray(images.pixels[number, 0].numpy()).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": int(images.labels[number])})
    table = pa.Table.from_pylist(rows)
    for part in ("train", "test"):
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")


def test_changed_training_images_are_refused(cli, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    described = json.loads((run / "dataset.json").read_text())
    described.pop("sha256", None)
    (run / "dataset.json").write_text(json.dumps(described | {"digest": "0" * 16}))
    assert_one_line(cli("evaluate", run, "--uncertainty"), "trained on other images than digits has now")


@pytest.mark.parametrize("option", [["--ood", "rotated"], ["--corruptions"], ["--calibration", "digits"]])
def test_parts_of_it_alone_are_refused(cli, run, option):
    assert_one_line(cli("evaluate", run, *option), f"{option[0]} is part of --uncertainty")


def test_foreign_images_of_another_form_and_of_no_source(cli, trained, tmp_path, photos):
    run = shutil.copytree(trained, tmp_path / "run")
    assert_one_line(
        cli("evaluate", run, "--uncertainty", "--ood", "nowhere"), "--ood: source 'nowhere': neither a folder"
    )
    code, out, err = cli("evaluate", run, "--uncertainty", "--samples", "0", "--ood", f"folder:{photos}?size=16")
    assert code == 0, err
    assert "photos?size=16 were changed from 3x16x16 to 1x8x8" in out


# What predict and export do with it


def test_predict_applies_the_temperature_and_says_so(cli, fitted, digits):
    code, out, err = cli("predict", fitted, *digits[0], "--samples", "3", "--json", "-")
    rows = strictly(out)
    opened, model = load_run(fitted)
    temperature = load_fitted(opened, "model", 3)[0].temperature
    assert code == 0
    assert f"temperature {temperature:.2f} of the probabilities, fitted on 60 validation images" in err
    found = predict(model, opened.normalization()(load("digits").test.pixels[:12]), 3)
    wanted = with_temperature(found.probabilities, temperature).amax(1)
    assert [row["probability"] for row in rows] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert [row["entropy"] for row in rows] == pytest.approx(found.entropy.tolist(), rel=1e-3)
    assert {row["temperature"] for row in rows} == {temperature}


def test_standard_errors_follow_the_temperature(cli, fitted, digits):
    """By the jackknife, whose derivative is that of the temperature where samples are many and alike."""
    rows = [
        strictly(cli("predict", fitted, *digits[0], "--samples", "3", "--temperature", t, "--json", "-")[1])
        for t in (1, 1.0001, 2)
    ]
    plain, nearly, other = ([row["standard_error"] for row in one] for one in rows)
    assert nearly == pytest.approx(plain, rel=1e-2, abs=1e-6)
    assert other != pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "3", "--temperature", "1"], ""),
        (["--samples", "3", "--temperature", "2"], "temperature 2 of the probabilities, as given"),
        (
            ["--samples", "2"],
            "without a temperature: calibration.json was fitted for 0 and 3 sampled passes",
        ),
    ],
)
def test_other_temperatures(cli, fitted, digits, arguments, words):
    code, _, err = cli("predict", fitted, digits[0][0], *arguments, "--json", "-")
    assert code == 0
    assert ("of the probabilities" in err or "without a temp" in err) == bool(words)
    assert words in err


def test_sets_are_printed_and_hold_the_decision_where_it_is_sure(cli, fitted, digits):
    code, out, err = cli(
        "predict", fitted, *digits[0], "--samples", "3", "--coverage", "0.95", "--sets", "aps", "--json", "-"
    )
    rows = strictly(out)
    opened, model = load_run(fitted)
    predictor = next(
        one for one in load_fitted(opened, "model", 3)[0].conformal if (one.method, one.coverage) == ("aps", 0.95)
    )
    found = predict(model, opened.normalization()(load("digits").test.pixels[:12]), 3)
    wanted = [
        [str(k) for k, inside in enumerate(row) if inside] for row in predictor.sets(found.probabilities).tolist()
    ]
    assert code == 0
    assert [row["set"] for row in rows] == wanted
    assert "set, 95% promised" in err


def test_sets_that_were_not_fitted_are_refused(cli, fitted, run, digits):
    image = digits[0][0]
    for place, samples, coverage, words in (
        (fitted, "3", "0.85", "0.8, 0.9, 0.95, 0.99: give one"),
        (fitted, "2", "0.9", "was fitted for 0 and 3 sampled passes"),
        (run, "2", "0.9", "run residrop evaluate"),
    ):
        assert_one_line(cli("predict", place, image, "--samples", samples, "--coverage", coverage), words)


def test_other_weights_than_fitted_have_no_temperature(cli, fitted, digits):
    assert cli("recalibrate", fitted)[0] == 0
    shutil.copy(fitted / "recalibrated.safetensors", fitted / "model.safetensors")
    _, _, err = cli("predict", fitted, digits[0][0], "--samples", "3", "--json", "-")
    assert "calibration.json was fitted for other weights and is ignored" in err
    _, _, err = cli("predict", fitted, digits[0][0], "--weights", "recalibrated", "--json", "-")
    assert "nothing was fitted for these weights" in err


def test_damaged_calibrations_are_refused(cli, fitted, digits):
    path = fitted / "calibration.json"
    path.write_text(path.read_text().replace('"temperature": 0', '"temperature": 1', 1))
    assert_one_line(cli("predict", fitted, digits[0][0], "--samples", "3"), "calibration.json", "fit again")
    path.write_text('{"model": 3}')
    assert_one_line(cli("predict", fitted, digits[0][0], "--samples", "3"), "calibration.json is damaged")


@pytest.mark.parametrize("ending", [pytest.param("pt2", marks=pytest.mark.slow), "safetensors"])
def test_export_divides_logits_by_the_temperature(cli, fitted, tmp_path, ending):
    path = tmp_path / f"digits.{ending}"
    code, out, err = cli("export", fitted, "--to", path, "--json", "-")
    assert code == 0, err
    temperature = json.loads(out)["temperature"]
    assert temperature == load_fitted(load_run(fitted).run, "model", 0)[0].temperature
    assert f"temperature {temperature:.2f} of the probabilities" in err
    assert str(temperature).encode() in path.read_bytes()


@pytest.mark.slow
def test_an_exported_temperature_changes_probabilities(cli, fitted, tmp_path):
    files = {}
    for name, options in (("fitted", []), ("none", ["--temperature", "1"]), ("given", ["--temperature", "2"])):
        assert cli("export", fitted, "--to", tmp_path / f"{name}.pt2", *options)[0] == 0
        files[name] = torch.export.load(tmp_path / f"{name}.pt2").module()
    x = torch.randn(5, 1, 8, 8)
    opened, model = load_run(fitted)
    temperature = load_fitted(opened, "model", 0)[0].temperature
    with torch.no_grad():
        for name, by in (("fitted", temperature), ("none", 1.0), ("given", 2.0)):
            torch.testing.assert_close(files[name](x), model(x) / by, rtol=1e-4, atol=1e-5)


def test_a_sampled_pass_is_exported_without_a_temperature(cli, fitted, tmp_path):
    result = cli("export", fitted, "--to", tmp_path / "a.pt2", "--sampled", "--temperature", "2")
    assert_one_line(result, "--temperature belongs to one pass in expectation")


def test_scores_with_the_temperature_are_the_better_ones(measured):
    """On its own validation images a fitted temperature has the smaller likelihood; here it has on test images, too."""
    opened, model = load_run(measured[0])
    test = load("digits").test
    found = predict(model, opened.normalization()(test.pixels), 0).probabilities
    tempered = with_temperature(found, load_fitted(opened, "model", 0)[0].temperature)
    assert score(tempered, test.labels).nll < score(found, test.labels).nll
