"""`residrop export` as a user meets it."""

import json
import os
import sys
import threading

import pytest
import torch

from command_line import assert_refused_by_tyro
from residrop.training import load_run


@pytest.mark.parametrize("ending", ["onnx", "pt2", "safetensors"])
def test_export_writes_a_file_that_predicts(cli, small_run, ending, tmp_path):
    path = tmp_path / f"digits.{ending}"
    code, out, err = cli("export", small_run, "--to", path, "--json", "-")
    assert code == 0
    done = json.loads(out[out.index("{") :])
    assert done["difference"] < 1e-5
    assert "outputs agree" in err
    assert path.stat().st_size > 10_000


def test_exported_facts_are_what_a_program_needs(cli, small_run, tmp_path):
    assert cli("export", small_run, "--to", tmp_path / "digits.pt2")[0] == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "digits.pt2", extra_files=extra).module()
    facts = dict(json.loads(extra["metadata.json"]).items())
    classes = json.loads(facts["classes"])
    mean, std = (torch.tensor(json.loads(facts[name])).view(-1, 1, 1) for name in ("mean", "std"))
    found, model = load_run(small_run)
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    x = (pixels / 255 - mean) / std
    torch.testing.assert_close(x, found.normalization()(pixels))
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
    assert classes == found.dataset()["classes"]
    assert (facts["size"], facts["channels"]) == ("8", "1")


def test_export_of_recalibrated_weights_and_sampled(cli, small_run, tmp_path):
    assert cli("recalibrate", small_run)[0] == 0
    assert cli("export", small_run, "--weights", "recalibrated", "--to", tmp_path / "a.pt2")[0] == 0
    assert cli("export", small_run, "--sampled", "--to", tmp_path / "b.pt2")[0] == 0
    x = torch.randn(2, 1, 8, 8)
    program = torch.export.load(tmp_path / "a.pt2").module()
    sampled = torch.export.load(tmp_path / "b.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), load_run(small_run, "recalibrated")[1](x), rtol=1e-4, atol=1e-5)
        passes = [sampled(x, torch.full((3, 2), number, dtype=torch.int32)) for number in (1, 2)]
    assert not torch.equal(*passes)


SLOW = [pytest.param(ending, marks=pytest.mark.slow) for ending in ("onnx", "pt2")]


@pytest.mark.parametrize("ending", ["safetensors", *SLOW])
def test_export_follows_links_and_writes_to_fifos(cli, small_run, ending, tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    (tmp_path / f"link.{ending}").symlink_to(folder / "file")
    os.mkfifo(tmp_path / f"fifo.{ending}")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / f"fifo.{ending}").read_bytes()), daemon=True)
    reader.start()
    for name in ("link", "fifo"):
        code, _, err = cli("export", small_run, "--to", tmp_path / f"{name}.{ending}")
        assert code == 0, err
    reader.join(20)
    assert (tmp_path / f"link.{ending}").is_symlink()
    assert (tmp_path / f"fifo.{ending}").is_fifo()
    assert len(got[0]) == pytest.approx((folder / "file").stat().st_size, rel=0.01)
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_file_that_does_not_agree_replaces_nothing(cli, small_run, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("the last one")
    monkeypatch.setattr("residrop.inference.deploy.export._TOLERANCE", -1.0)
    code, _, err = cli("export", small_run, "--to", path)
    assert code == 2
    assert "was not kept: its outputs differ" in err
    assert path.read_text() == "the last one"


def test_onnx_without_its_libraries_says_what_to_install(cli, small_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = cli("export", small_run, "--to", tmp_path / "a.onnx")
    assert code == 2
    assert "pip install 'residrop[export]'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "RUN", "--weights", "recalibrated", "--to", "x.onnx"), "make them with residrop recalibrate"),
        (("export", "RUN", "--to", "model.txt"), "choose one of .onnx, .pt2, .safetensors"),
        (("export", "RUN", "--to", "no/such/model.pt2"), "is no directory"),
    ],
)
def test_mistakes_are_one_line(cli, small_run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*(small_run if word == "RUN" else word for word in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("residrop: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "RUN", "--weights", "last"), "--weights"),
        (("export", "RUN"), "--to"),
    ],
)
def test_options_that_are_not_understood_are_told_by_tyro(cli, place, small_run, arguments, words):
    result = cli(*(small_run if word == "RUN" else word for word in arguments))
    assert_refused_by_tyro(result, place, f"residrop {arguments[0]}")
    assert words in result[2]


@pytest.mark.parametrize("command", ["recalibrate", "export"])
def test_help_explains(cli, command):
    code, out, _ = cli(command, "--help")
    flat = " ".join(out.split())
    assert code == 0
    assert "Run directory" in flat
    assert f"\n  {command} " in cli("--help")[1]
