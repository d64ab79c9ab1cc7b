"""What tests of commands share: a small training, and what must hold of output."""

import json

import pytest

SMALL = ["--network", "resnet-8", "--limit", "200", "--epochs", "2", "--precision", "fp32", "--samples", "2"]
KEYS = {
    "rule",
    "parameters",
    "deterministic_error",
    "sampled_error",
    "samples",
    "train_seconds",
    "relative_time",
    "expected_depth",
}


def strictly(text):
    """JSON without NaN and infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def assert_refused(result, place, before=()):
    """Bad input: exit code 2, one line that says what is wrong, nothing on disk."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("residrop: error: ")
    assert err.count("\n") == 1, err
    assert len(err) > len("residrop: error: ") + 15
    assert everything(place) == sorted(before)


def assert_refused_by_tyro(result, place, prog):
    """Options that are not understood: exit code 2, tyro's message, which names the help, nothing on disk."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert f"{prog} --help" in " ".join(err.split())
    assert "Traceback" not in err
    assert everything(place) == []
