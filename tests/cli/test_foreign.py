"""Every command on runs with a network of timm, from the images to a file that predicts elsewhere."""

import json

import onnxruntime
import pytest
import torch

from command_line import strictly
from residrop.inference import predict
from residrop.training import Recipe, load_run, train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    recipe = Recipe(
        network="timm:test_resnet", survival="0.7", epochs=1, limit=64, batch_size=32, lr=0.02, samples=2,
        precision="fp32", device="cpu",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("foreign") / "run"
    train(recipe, path, quiet=True)
    return path


def test_evaluate_and_predict(cli, made, digits):
    code, out, _ = cli("evaluate", made, "--samples", "2", "--json", "-")
    assert code == 0
    wanted = json.loads((made / "evaluation.json").read_text())
    assert strictly(out)["deterministic_error"] == wanted["deterministic_error"]
    paths, _ = digits
    code, out, _ = cli("predict", made, *paths[:2], "--samples", "2", "--json", "-")
    assert code == 0
    assert len(strictly(out)) == 2


def test_recalibrate_measures_batch_norm_anew(cli, made):
    code, out, err = cli("recalibrate", made)
    assert code == 0, err
    assert "recalibrated.safetensors" in out
    assert cli("evaluate", made, "--weights", "recalibrated", "--samples", "0")[0] == 0


def test_exported_file_predicts_what_the_run_does(cli, made, tmp_path):
    code, out, _ = cli("export", made, "--to", tmp_path / "net.onnx")
    assert code == 0
    assert "checked with onnxruntime" in out
    run, model = load_run(made)
    x = torch.randn(3, 3, run.dataset()["size"], run.dataset()["size"])
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    torch.testing.assert_close(found.softmax(1), predict(model, x, 0).probabilities, rtol=1e-4, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["mean"]) == pytest.approx(run.normalization().mean.flatten().tolist())
    assert "timm:test_resnet" in facts["network"]


@pytest.mark.parametrize("instrument", ["survival", "gradients", "discrepancy", "depth"])
def test_analyze(cli, made, instrument):
    code, out, err = cli("analyze", instrument, made)
    assert code == 0, err
    assert "drawn: " in out


def test_report(cli, made, tmp_path):
    code, _, _ = cli("report", made, "--html", tmp_path / "report.html")
    assert code == 0
    assert "timm:test_resnet" in (tmp_path / "report.html").read_text()


def test_compare(cli, place):
    options = "--network timm:test_resnet --epochs 1 --limit 64 --batch-size 32 --lr 0.02 --samples 2 --precision fp32"
    rules = ("--rules", "constant", "stochastic-depth", "swapout")
    code, out, err = cli("compare", *options.split(), *rules, "--quiet", "--json", "-")
    assert code == 0, err
    rows = strictly(out)
    assert [row["rule"] for row in rows] == ["constant", "stochastic-depth", "swapout"]
    assert rows[0]["expected_depth"] > rows[1]["expected_depth"]
