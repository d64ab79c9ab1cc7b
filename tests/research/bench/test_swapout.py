"""The benchmark of swapout: its rows, its variants, and its command."""

import json
import shutil

import pytest
import torch

from residrop.cli import main
from residrop.common.errors import ConfigError
from residrop.functional import kernels
from residrop.research import ledger
from residrop.research.bench import swapout
from residrop.research.bench.swapout import SwapoutSettings, bench_steps, bench_swapout

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
KEYS = {"shape", "dtype", "variant", "forward_seconds", "forward_backward_seconds", "relative_to_add", "saved_bytes"}
QUICK = SwapoutSettings(steps=2, warmup=1, batch_size=4)


def test_rows_of_the_operation():
    (rows,) = bench_swapout([(8, 4, 32, 32)], QUICK)
    by_name = {row["variant"]: row for row in rows}
    assert list(by_name) == ["add", "naive", "naive, compiled", "residrop, eager", "residrop, compiled"]
    assert all(row.keys() >= KEYS for row in rows)
    assert by_name["add"]["relative_to_add"] == 1.0
    size = 8 * 4 * 32 * 32 * 4
    kept = {name: row["saved_bytes"] for name, row in by_name.items()}
    assert kept["add"] == kept["residrop, eager"] == kept["residrop, compiled"] == 0
    assert kept["naive"] == 2 * size  # both masks
    json.dumps(rows)


def test_the_compiler_is_used_where_it_says_so(monkeypatch):
    modes, real = [], kernels.run

    def spy(*args, **options):
        found = real(*args, **options)
        modes.append((kernels._State.mode, found is not None))
        return found

    monkeypatch.setattr(kernels, "run", spy)
    list(bench_swapout([(8, 4, 32, 32)], QUICK))
    assert set(modes) == {(False, False), (True, True)}
    assert kernels._State.mode == "auto"


def test_rows_of_training_steps():
    (rows,) = bench_steps([("resnet-8", 1)], QUICK)
    assert [row["variant"] for row in rows] == ["constant depth", "naive", "residrop, eager", "residrop, compiled"]
    assert rows[0]["relative_to_constant"] == 1.0
    assert rows[0]["saved_bytes"] == rows[2]["saved_bytes"] == rows[3]["saved_bytes"] < rows[1]["saved_bytes"]


@pytest.mark.parametrize(
    ("parts", "variants"),
    [
        (lambda: bench_steps([("resnet-8", 1)], SwapoutSettings(steps=9, warmup=0, batch_size=4)), 4),
        (lambda: bench_swapout([(2, 2, 4, 4)], SwapoutSettings(steps=9, warmup=0)), 15),
    ],
)
def test_interruption_leaves_complete_steps(monkeypatch, parts, variants):
    """A part that was interrupted was lost whole."""
    seconds = iter([*[1.0] * (2 * variants + 1), KeyboardInterrupt()])  # two steps, and one form of the third

    def seconds_of(step, device):
        if isinstance(found := next(seconds), BaseException):
            raise found
        return found

    monkeypatch.setattr(swapout, "seconds_of", seconds_of)
    found = parts()
    rows = next(found)
    assert {row["steps"] for row in rows} == {2}
    with pytest.raises(KeyboardInterrupt):
        next(found)
    seconds = iter([1.0, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        next(parts())


def test_all_forms_have_the_same_weights():
    forms = [
        swapout._network("resnet-8", 1, rule, QUICK) for rule in ("constant", lambda _: swapout._Naive(), "swapout")
    ]
    first, *others = [list(form.parameters()) for form in forms]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", [(0, 4), ()])
def test_bad_shapes(shape):
    with pytest.raises(ConfigError, match="give positive sizes"):
        list(bench_swapout([shape], QUICK))


def test_channels_last_needs_four_dimensions():
    with pytest.raises(ConfigError, match="four for channels last"):
        list(bench_swapout([(4, 4)], SwapoutSettings(channels_last=True)))


def test_command(tmp_path, capsys):
    target = tmp_path / "rows.json"
    options = ["--shapes", "8,4,32,32", "--steps", "1", "--widths", "1", "--batch-size", "2", "--json", str(target)]
    assert main(["bench", "swapout", *options]) == 0
    out = capsys.readouterr().out
    assert "residrop, compiled" in out
    assert "resnet-20 W x1" in out
    document = json.loads(target.read_text())
    ledger.check(document)
    assert len(document["entries"]) == 9
    assert main(["bench", "swapout", "--shapes", "8,x"]) == 2
    assert "give sizes such as" in capsys.readouterr().err
