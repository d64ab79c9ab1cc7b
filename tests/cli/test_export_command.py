"""`residrop recalibrate` and `residrop export` as a user meets them."""

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from residrop.cli import main
from residrop.training import Recipe, load_run, train
from residrop.training.setup import loader_of_run


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def cli(capsys):
    """Return a function from arguments to (exit code, standard output, standard error)."""

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def run(tmp_path):
    """Directory of a run of half a second."""
    recipe = Recipe(
        network="resnet-8",
        block="v2",
        rule="swapout",
        survival="0.6",
        limit=200,
        validation=40,
        epochs=2,
        batch_size=64,
        lr=0.05,
        samples=0,
        precision="fp32",
        device="cpu",
    )
    train(recipe, tmp_path / "run", quiet=True)
    return tmp_path / "run"


def test_recalibrated_weights_are_written_beside_the_others_and_evaluated(cli, run):
    before = (run / "model.safetensors").read_bytes()
    code, out, _ = cli("recalibrate", run, "--json", run / "done.json")
    assert code == 0
    assert f"compare: residrop evaluate {run} --weights recalibrated" in out
    done = json.loads((run / "done.json").read_text())
    assert (done["mode"], done["layers"], done["images"], done["batches"]) == ("layers", 7, 200, 4)
    assert (run / "model.safetensors").read_bytes() == before
    old, new = (load_file(run / f"{name}.safetensors") for name in ("model", "recalibrated"))
    changed = {name for name, value in new.items() if not torch.equal(old[name], value)}
    assert changed == {name for name in old if name.endswith(("running_mean", "running_var"))}
    results = []
    for weights in ("model", "recalibrated"):
        code, out, _ = cli("evaluate", run, "--samples", "0", "--weights", weights, "--json", "-")
        results.append(json.loads(out[out.index("{") :])["details"]["deterministic"]["nll"])
        assert code == 0
    assert results[0] != results[1]
    Image.fromarray(torch.randint(0, 256, (8, 8), dtype=torch.uint8).numpy()).save(run / "one.png")
    found = [
        json.loads(cli("predict", run, run / "one.png", "--samples", "0", "--weights", weights, "--json", "-")[1])
        for weights in ("model", "recalibrated")
    ]
    assert found[0][0]["probability"] != found[1][0]["probability"]


def test_statistics_are_those_of_the_training_images_without_the_held_out_ones(cli, run):
    assert cli("recalibrate", run, "--batches", "2", "--mode", "at-once")[0] == 0
    loader, (_, model) = loader_of_run(run_of(run)), load_run(run, "recalibrated")
    x = torch.cat([x for x, _ in loader.eval_batches()])
    with torch.no_grad():
        of_test = model.stem(x).mean(dim=(0, 2, 3))
    found = model.blocks.block1.branch.bn1.running_mean
    torch.testing.assert_close(found, of_test, rtol=0, atol=0.2)  # other images, the same kind
    assert not torch.allclose(found, of_test, rtol=0, atol=1e-6)


def run_of(path):
    return load_run(path)[0]


@pytest.mark.parametrize("ending", ["onnx", "pt2", "safetensors"])
def test_export_writes_a_file_that_predicts(cli, run, ending, tmp_path):
    path = tmp_path / f"digits.{ending}"
    code, out, err = cli("export", run, "--to", path, "--json", "-")
    assert code == 0
    done = json.loads(out[out.index("{") :])
    assert done["difference"] < 1e-5
    assert "outputs agree" in err
    assert path.stat().st_size > 10_000


def test_exported_facts_are_what_a_program_needs(cli, run, tmp_path):
    assert cli("export", run, "--to", tmp_path / "digits.pt2")[0] == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "digits.pt2", extra_files=extra).module()
    facts = dict(json.loads(extra["metadata.json"]).items())
    classes = json.loads(facts["classes"])
    mean, std = (torch.tensor(json.loads(facts[name])).view(-1, 1, 1) for name in ("mean", "std"))
    found, model = load_run(run)
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    x = (pixels / 255 - mean) / std
    torch.testing.assert_close(x, found.normalization()(pixels))
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
    assert classes == found.dataset()["classes"]
    assert (facts["size"], facts["channels"]) == ("8", "1")


def test_export_of_recalibrated_weights_and_sampled(cli, run, tmp_path):
    assert cli("recalibrate", run)[0] == 0
    assert cli("export", run, "--weights", "recalibrated", "--to", tmp_path / "a.pt2")[0] == 0
    assert cli("export", run, "--sampled", "--to", tmp_path / "b.pt2")[0] == 0
    x = torch.randn(2, 1, 8, 8)
    program = torch.export.load(tmp_path / "a.pt2").module()
    sampled = torch.export.load(tmp_path / "b.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), load_run(run, "recalibrated")[1](x), rtol=1e-4, atol=1e-5)
        passes = [sampled(x, torch.full((3, 2), number, dtype=torch.int32)) for number in (1, 2)]
    assert not torch.equal(*passes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "RUN", "--weights", "recalibrated"), "make them with residrop recalibrate"),
        (("export", "RUN", "--weights", "recalibrated", "--to", "x.onnx"), "make them with residrop recalibrate"),
        (("evaluate", "RUN", "--weights", "last"), "--weights"),
        (("predict", "RUN", "a.png", "--weights", "recalibrated"), "make them with residrop recalibrate"),
        (("export", "RUN"), "--to"),
        (("export", "RUN", "--to", "model.txt"), "choose one of .onnx, .pt2, .safetensors"),
        (("export", "RUN", "--to", "no/such/model.pt2"), "is no directory"),
        (("recalibrate", "RUN", "--batches", "0"), "batches is 0"),
        (("recalibrate", "missing"), "is no directory"),
        (("recalibrate", "RUN", "--data", "no-such-folder"), "no-such-folder"),
    ],
)
def test_mistakes_are_one_line(cli, run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*(run if word == "RUN" else word for word in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert err.strip().count("\n") == 0


def test_onnx_without_its_libraries_says_what_to_install(cli, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = cli("export", run, "--to", tmp_path / "a.onnx")
    assert code == 2
    assert "pip install 'residrop[export]'" in err


@pytest.mark.parametrize("command", ["recalibrate", "export"])
def test_help_explains(cli, command):
    code, out, _ = cli(command, "--help")
    flat = " ".join(out.split())
    assert code == 0
    assert "Run directory" in flat
    assert f"\n  {command} " in cli("--help")[1]
