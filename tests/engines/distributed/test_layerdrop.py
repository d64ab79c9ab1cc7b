"""Layer drop of Hugging Face transformers on two processes, as it is and under rules.

Its loops apply a "dropped" layer all the same, and keep its output, when they see that FSDP manages them; nobody seems
to have reported that. What these tests show of it was seen with transformers 5.23 and torch 2.15.
"""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(checked):
    return checked("layerdrop.py", 2, "theirs", "theirs_fsdp1", "theirs_alone", "ours", "together", "crossed")[0]


@pytest.mark.parametrize("engine", ["theirs", "theirs_fsdp1"])
def test_their_layer_drop_does_nothing_under_fsdp(found, engine):
    """fully_shard, and FullyShardedDataParallel: every layer is applied in every step, at layer drop 0.5."""
    assert found[engine] == {"applied": [4] * 8, "same_as_without": True}
    assert max(found["theirs_alone"]["applied"]) < 4  # without FSDP it does something
    assert not found["theirs_alone"]["same_as_without"]


def test_their_layer_drop_takes_the_wrong_layers_where_only_those_are_sharded(found):
    """Its loop is not told: every rank skips layers of its own, and gathers half of one layer and half of another."""
    assert found["crossed"]["off"] > 0.1


def test_their_layer_drop_hangs_where_only_layers_are_sharded(torchrun, tmp_path):
    """As fairseq's did (facebookresearch/fairseq#3875, fairscale#796)."""
    done = torchrun(
        2, Path(__file__).parent / "workers" / "layerdrop.py", tmp_path / "found.json", "apart", timeout=120
    )
    assert done.returncode != 0
    assert "Timed out waiting 10000ms" in done.stderr
    assert "finished step 7" not in done.stdout


@pytest.mark.parametrize("target", ["ours", "together"])
def test_rules_leave_the_same_layers_out_on_all_ranks(found, target):
    """Gradients of one process; absent layers are neither gathered nor reduced."""
    ours = found[target]
    assert ours["error"] <= 1e-6
    assert ours["one_sided"] == 0
    assert ours["steps_equal"]
    assert set(ours["live"]) >= {0, 1, 2, 3}
    around = 1 if target == "ours" else 0  # the rest of the model is a unit, too
    assert ours["reduced"] == [live + around for live in ours["live"]]


def test_traffic_is_that_of_live_layers(found):
    """Each is gathered in forward and backward, and reduced: three collectives; the rest of the model takes two."""
    ours = found["ours"]
    assert ours["collectives"] == [2 + 3 * live for live in ours["live"]]
