"""`residrop recalibrate` as a user meets it."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from residrop.training import load_run
from residrop.training.setup import loader_of_run


def test_recalibrated_weights_are_written_beside_the_others_and_evaluated(cli, small_run):
    before = (small_run / "model.safetensors").read_bytes()
    code, out, _ = cli("recalibrate", small_run, "--json", small_run / "done.json")
    assert code == 0
    assert f"compare: residrop evaluate {small_run} --weights recalibrated" in out
    done = json.loads((small_run / "done.json").read_text())
    assert (done["mode"], done["layers"], done["images"], done["batches"]) == ("layers", 7, 200, 4)
    assert (small_run / "model.safetensors").read_bytes() == before
    old, new = (load_file(small_run / f"{name}.safetensors") for name in ("model", "recalibrated"))
    changed = {name for name, value in new.items() if not torch.equal(old[name], value)}
    assert changed == {name for name in old if name.endswith(("running_mean", "running_var"))}
    results = []
    for weights in ("model", "recalibrated"):
        code, out, _ = cli("evaluate", small_run, "--samples", "0", "--weights", weights, "--json", "-")
        results.append(json.loads(out[out.index("{") :])["details"]["deterministic"]["nll"])
        assert code == 0
    assert results[0] != results[1]
    Image.fromarray(torch.randint(0, 256, (8, 8), dtype=torch.uint8).numpy()).save(small_run / "one.png")
    found = [
        json.loads(
            cli("predict", small_run, small_run / "one.png", "--samples", "0", "--weights", weights, "--json", "-")[1]
        )
        for weights in ("model", "recalibrated")
    ]
    assert found[0][0]["probability"] != found[1][0]["probability"]


def test_statistics_are_those_of_the_training_images_without_the_held_out_ones(cli, small_run):
    assert cli("recalibrate", small_run, "--batches", "2", "--mode", "at-once")[0] == 0
    loader, (_, model) = loader_of_run(load_run(small_run)[0]), load_run(small_run, "recalibrated")
    x = torch.cat([x for x, _ in loader.eval_batches()])
    with torch.no_grad():
        of_test = model.stem(x).mean(dim=(0, 2, 3))
    found = model.blocks.block1.branch.bn1.running_mean
    torch.testing.assert_close(found, of_test, rtol=0, atol=0.2)  # other images, the same kind
    assert not torch.allclose(found, of_test, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "RUN", "--weights", "recalibrated"), "make them with residrop recalibrate"),
        (("predict", "RUN", "a.png", "--weights", "recalibrated"), "make them with residrop recalibrate"),
        (("recalibrate", "RUN", "--batches", "0"), "batches is 0"),
        (("recalibrate", "missing"), "is no directory"),
        (("recalibrate", "RUN", "--data", "no-such-folder"), "no-such-folder"),
    ],
)
def test_mistakes_are_one_line(cli, small_run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*(small_run if word == "RUN" else word for word in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("residrop: error: ")
    assert message in err
    assert err.count("\n") == 1
