"""`residrop shrink` as a user meets it."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from residrop.training import load_run


def test_a_smaller_run_is_evaluated_exported_predicts_and_trains_on(cli, run, digits, place):
    code, out, _ = cli(
        "shrink", run, "--budget", "2 of blocks", "--to", "small.onnx", "--out", "small", "--json", "a.json"
    )
    assert code == 0
    told = json.loads((place / "a.json").read_text())
    assert "error on test images" in out
    assert f"left out: {told['removed'][0]}" in out
    assert len(told["kept"]) == 2
    smaller = load_run("small")
    assert smaller.recipe.without == tuple(told["removed"])
    assert smaller.recipe.rule == "constant"
    names = load_run(run).model.state_dict().keys()
    assert {
        name for name in names if not name.startswith(f"{told['removed'][0]}.branch")
    } == smaller.model.state_dict().keys()
    code, out, _ = cli("evaluate", "small", "--samples", "0", "--json", "-")
    assert json.loads(out[out.index("{") :])["details"]["deterministic"]["error"] == pytest.approx(told["error"][1])
    paths, _ = digits
    assert cli("predict", "small", *paths[:2])[0] == 0
    assert cli("export", "small", "--to", "again.safetensors")[0] == 0
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(place / "small.onnx"))
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        wanted = smaller.model(x)
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), wanted, rtol=1e-3, atol=1e-4
    )
    code, out, _ = cli("shrink", run, "--budget", "2 of blocks", "--out", "other")
    (line,) = [one for one in out.splitlines() if one.startswith("train it further: ")]
    _, *healed = shlex.split(line.removeprefix("train it further: "))
    code, _, error = cli(*healed, "--epochs", "1", "--out", "healed", "--rule", "stochastic-depth", "--quiet")
    assert (code, error) == (0, "")
    assert load_run("healed").recipe.without == tuple(told["removed"])
    code, _, error = cli("shrink", run, "--budget", "2 of blocks", "--out", "small")
    assert code == 2
    assert "already holds a run" in error


def test_a_run_of_measured_rates_and_coupled_draws_shrinks(cli, place):
    how = ("--budget", "0.7 of flops", "--spend", "sensitivity", "--refresh", "1", "--coupling", "systematic")
    options = ("--network", "resnet-8", "--limit", "100", "--epochs", "1", "--samples", "0", "--quiet")
    assert cli("train", *how, *options, "--out", "whole")[0] == 0
    assert cli("shrink", "whole", "--budget", "2 of blocks", "--by", "every_other", "--out", "two")[0] == 0
    assert load_run("two").recipe.coupling == "independent"


def test_a_smaller_run_of_transformers_shrinks_again_under_the_first_names(cli, place):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    options = ("--limit", "200", "--epochs", "1", "--samples", "0", "--quiet")
    assert cli("train", "--network", "transformers:vit", "--rule", "constant", *options, "--out", "whole")[0] == 0
    assert cli("shrink", "whole", "--budget", "2 of blocks", "--by", "every_other", "--out", "two")[0] == 0
    names = load_run("two").recipe.without
    assert [name.rpartition(".")[2] for name in names] == ["1", "3"]
    code, out, error = cli("shrink", "two", "--budget", "1 of blocks", "--by", "every_other", "--out", "one")
    assert (code, "Error" in error) == (0, False)
    names = load_run("one").recipe.without
    assert [name.rpartition(".")[2] for name in names] == ["1", "3", "2"]
    assert f"--without {' '.join(names)}" in out
    assert not [one.name for one in place.iterdir() if one.name.startswith(".")]


def test_frontier_is_a_table_and_a_picture(cli, small_run, run, tmp_path):
    code, out, error = cli(
        "shrink", run, "--frontier", "--budget", "blocks", "--batches", "2", "--json", tmp_path / "f.json"
    )
    assert (code, "Traceback" in error) == (0, False)
    told = json.loads((tmp_path / "f.json").read_text())
    assert [len(one["kept"]) for one in told["points"]] == [3, 2, 2, 2, 1, 1, 1, 0, 0]
    assert "error of sub-networks on test images" in out
    assert Path(told["picture"]).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN", "--budget", "lots"), "budget 'lots' is not understood"),
        (("RUN", "--budget", "9 of blocks"), "the network has 3 blocks"),
        (("RUN", "RUN"), "2 runs were given; give one, or several with --frontier"),
        (("RUN", "--batches", "0"), "batches is 0"),
        (("RUN", "--budget", "0 of blocks"), "a budget of 0 of blocks leaves no residual block; give a larger one"),
        (("RUN", "--to", "small.bin"), "small.bin ends in '.bin'; choose one of .onnx"),
        (("nowhere",), "is no directory"),
        (("SWAPOUT",), "of which none is absent as a whole"),
    ],
)
def test_what_cannot_be_done_is_one_line(cli, run, small_run, arguments, message):
    places = {"RUN": run, "SWAPOUT": small_run}
    before = set(run.parent.iterdir())
    code, _, error = cli("shrink", *(places.get(one, one) for one in arguments))
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert set(run.parent.iterdir()) == before
