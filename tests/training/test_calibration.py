"""calibration.json: what is kept of earlier fits, and what is ignored."""

import json

import pytest
import torch

from residrop.common.errors import RunError
from residrop.inference.uncertainty import Conformal
from residrop.training import Run
from residrop.training.calibration import FILE, Fitted, load_fitted, save_fitted


@pytest.fixture
def run(tmp_path):
    """A directory of which nothing but the weights matters."""
    for name in ("model", "recalibrated"):
        torch.save(name, tmp_path / f"{name}.safetensors")
    return Run(tmp_path)


def fitted(temperature):
    sets = Conformal("raps", 0.9, 0.7, 50), Conformal("thr", 0.99, float("inf"), 50)
    return Fitted(temperature, sets, 50, "validation images of the run")


def test_what_was_fitted_is_read_again(run):
    save_fitted(run, "model", {0: fitted(1.5), 30: fitted(None)})
    assert load_fitted(run, "model", 0) == (fitted(1.5), "")
    assert load_fitted(run, "model", 30) == (fitted(None), "")


def test_other_numbers_of_passes_and_other_weights_stay(run):
    save_fitted(run, "model", {0: fitted(1.5), 30: fitted(2.0)})
    save_fitted(run, "recalibrated", {0: fitted(3.0)})
    save_fitted(run, "model", {0: fitted(1.6), 10: fitted(2.5)})
    found = {samples: load_fitted(run, "model", samples)[0] for samples in (0, 10, 30)}
    assert found == {0: fitted(1.6), 10: fitted(2.5), 30: fitted(2.0)}
    assert load_fitted(run, "recalibrated", 0)[0] == fitted(3.0)
    none, why = load_fitted(run, "recalibrated", 30)
    assert none is None
    assert "fitted for 0 sampled passes, not for 30" in why
    assert f"run residrop evaluate {run.path} --uncertainty --weights recalibrated --samples 30" in why


def test_new_weights_make_what_was_fitted_before_void(run):
    save_fitted(run, "model", {0: fitted(1.5), 30: fitted(2.0)})
    torch.save("others", run.path / "model.safetensors")
    assert load_fitted(run, "model", 0)[0] is None
    save_fitted(run, "model", {0: fitted(1.1)})
    assert load_fitted(run, "model", 0)[0] == fitted(1.1)
    assert load_fitted(run, "model", 30)[0] is None


def test_nothing_was_fitted(run):
    none, why = load_fitted(run, "model", 0)
    assert none is None
    assert "nothing was fitted for these weights; run residrop evaluate" in why
    assert not (run.path / FILE).exists()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"model": 3}', '{"model": {}}'],
)
def test_damaged_files_are_refused(run, text):
    (run.path / FILE).write_text(text)
    with pytest.raises(RunError, match=r"calibration\.json"):
        load_fitted(run, "model", 0)


def test_a_temperature_that_is_none_is_refused(run):
    save_fitted(run, "model", {0: fitted(1.5)})
    values = json.loads((run.path / FILE).read_text())
    del values["sha256"]
    for wrong in ("warm", -1.0, True):
        values["model"]["passes"]["0"]["temperature"] = wrong
        (run.path / FILE).write_text(json.dumps(values))
        with pytest.raises(RunError, match=r"calibration.json is damaged \(temperature is"):
            load_fitted(run, "model", 0)
