"""Data-parallel gradients on two processes: those of live blocks, equal to one process, and nothing else sent."""

import importlib.util

import pytest

QUICK = [
    "ours",
    "buckets",
    "stock",
    "rows",
    "accumulated",
    "stock_accumulated",
    "two_forwards",
    "checkpointed",
    "checkpointed_reentrant",
    "stock_checkpointed",
    "tied",
    "late",
    "late_quiet",
    "own_blocks",
    "own_rows",
    "own_rows_untouched",
    "own_blocks_untouched",
    "stock_own_rows",
    "backward",
    "stock_backward",
    "backward_checkpointed",
    "backward_accumulated",
    "backward_rows",
    "backward_own_blocks",
    "early",
    "unused",
    "join",
    "buffers",
    "stays",
    "stock_dead",
    "refusals",
    "mismatches",
]


HAS_TIMM = importlib.util.find_spec("timm") is not None


@pytest.fixture(scope="module")
def found(checked):
    return checked("gradients.py", 2, *QUICK, *(["foreign"] if HAS_TIMM else []))[0]


def test_gradients_equal_one_process_and_dead_blocks_have_none(found, assert_follows):
    """50 updates at p = 0.5. Layer drop broke c10d (pytorch/pytorch#42793): no hang here, and no zeros for dead blocks.

    `grad is None` on every rank where one process has None, so momentum and weight decay leave dead blocks alone.
    """
    assert_follows(found["ours"])
    assert found["ours"]["dead"] > 1000


def test_dead_blocks_are_not_sent(found):
    """DDP cannot be told in advance what is unused (pytorch/pytorch#90171); here the draw says it: live bytes only."""
    ours, stock = found["ours"], found["stock"]
    flags = ours["bytes"] - ours["live_bytes"]
    assert 0 < flags <= 50 * 4 * ours["parameters"]  # one number per live parameter
    assert ours["collectives"] == 50
    assert stock["collectives"] == 100  # gradients, and a map of what was used
    assert ours["bytes"] < 0.6 * stock["bytes"]


def test_small_buckets_are_sent_while_backward_runs(found, assert_follows):
    assert_follows(found["buckets"])
    assert found["buckets"]["collectives"] > 50  # of 10 updates
    assert found["buckets"]["bytes"] - found["buckets"]["live_bytes"] <= 10 * 4 * found["buckets"]["parameters"]


def test_stock_ddp_follows_with_find_unused_parameters(found, assert_follows):
    assert_follows(found["stock"])
    assert_follows(found["stock_accumulated"])


def test_stock_ddp_leaves_dead_gradients_alone(found):
    """It sends zeros for them, and gives the parameters no gradient; the sampler is found through the wrapper."""
    dead = found["stock_dead"]
    assert dead["none"] == [True, True]
    assert dead["left_alone"] == [True, True]
    assert dead["through_wrapper"]
    assert dead["sent"] >= dead["all_bytes"]


def test_accumulation_sends_once_what_any_part_used(found, assert_follows):
    """Every micro-batch has its own draw: a block live in the first and dead in the last one is still reduced."""
    assert_follows(found["accumulated"])
    assert found["accumulated"]["collectives"] == 25


def test_two_forwards_in_one_backward(found, assert_follows):
    assert_follows(found["two_forwards"])


@pytest.mark.parametrize("name", ["late", "late_quiet"])
def test_late_backward_of_an_earlier_forward(found, name):
    assert found[name]["grad_error"] <= 1e-6
    assert found[name]["one_sided"] == 0
    assert found[name]["dead"] > 0


@pytest.mark.parametrize("name", ["checkpointed", "checkpointed_reentrant", "stock_checkpointed"])
def test_activation_checkpointing(found, assert_follows, name):
    """Checkpointing and layer drop collide under DDP (huggingface/transformers#30113); both forms work here."""
    assert_follows(found[name])


def test_checkpointing_does_not_send_twice(found):
    """Reentrant checkpoints run nested backward passes; only the end of the outermost one is the end."""
    assert found["checkpointed_reentrant"]["collectives"] == found["ours"]["collectives"]
    assert found["checkpointed_reentrant"]["bytes"] == found["ours"]["bytes"]


@pytest.mark.parametrize("name", ["backward", "stock_backward", "backward_checkpointed", "backward_accumulated"])
def test_presence_in_backward_only(found, assert_follows, name):
    """Parameters of a block that is not differentiated have no gradient on any rank."""
    assert_follows(found[name])


def test_what_is_not_differentiated_is_not_sent(found):
    backward, ours = found["backward"], found["ours"]
    assert backward["bytes"] == ours["bytes"]
    assert backward["collectives"] == ours["collectives"]


@pytest.mark.parametrize("name", ["backward_rows", "backward_own_blocks"])
def test_presence_in_backward_only_by_rows_and_by_rank(found, name):
    assert found[name]["error"] <= 1e-6
    assert found[name]["grad_error"] <= 1e-6


def test_tied_weights_whose_gradient_comes_in_parts(found, assert_follows):
    assert_follows(found["tied"])


def test_rows_of_every_rank(found):
    """Row level, shared draws: each rank keeps the window of its own rows."""
    assert found["rows"]["error"] <= 1e-6
    assert found["rows"]["grad_error"] <= 1e-6


@pytest.mark.parametrize("name", ["own_blocks_untouched", "own_rows_untouched"])
def test_draws_per_rank_need_nothing_but_the_plan(found, assert_follows, name):
    """A branch dead on one rank counts as zero there, one dead on all has no gradient (pytorch/vision#7722: own masks).

    `own_rows`: one row a rank, p = 0.4, so that a branch is often dead on one rank or on both.
    """
    assert_follows(found[name])


@pytest.mark.parametrize("name", ["own_blocks", "own_rows", "stock_own_rows"])
def test_draws_per_rank_with_touched_branches(found, name):
    assert found[name]["error"] <= 1e-6
    assert found[name]["grad_error"] <= 1e-6
    assert found[name]["dead"] > 0


def test_unused_parameters(found):
    assert found["unused"] == {"never": True, "error": pytest.approx(0.0, abs=1e-6)}


def test_the_rank_is_that_of_the_moment_of_the_draw(found):
    """Accelerator() and TrainingArguments make the process group after the model is built and attached."""
    first, second = found["early"]
    assert first != second


def test_a_rank_without_data_joins(found):
    assert found["join"]["one_sided"] == [0, 0]
    assert max(found["join"]["error"]) <= 1e-6


def test_batch_norm_statistics_are_those_of_rank_0(found):
    buffers = found["buffers"]
    assert buffers["rank0_as_stock"]
    assert buffers["differ_before"]
    assert buffers["equal_after"]


def test_channels_last_gradients_equal_stock_ddp_to_the_bit(found):
    assert found["buffers"]["grads_as_stock"] == [True, True]
    assert found["buffers"]["strides"] == [True, True]


def test_the_model_stays_what_it_is(found):
    stays = found["stays"]
    assert stays["class"]
    assert stays["started_as_rank0"] == [True, True]
    # a copy and an average of the model, the model, its evaluation, the model without the handle
    assert stays["collectives"] == [0, 1, 0, 0]
    assert stays["counted"] == [1, True, True]


@pytest.mark.skipif(not HAS_TIMM, reason="needs timm")
def test_foreign_blocks_with_two_branches(found):
    foreign = found["foreign"]
    assert foreign["error"] <= 1e-6
    assert foreign["one_sided"] == 0
    assert foreign["dead"] > 0
    assert foreign["live_bytes"] < foreign["bytes"] < 1.05 * foreign["live_bytes"]


def test_refusals_say_what_to_do(found):
    assert "set sparse=False" in found["refusals"]["sparse"]
    assert "positive number" in found["refusals"]["bucket"]
    assert "residrop.attach" in found["refusals"]["unattached"]


# check_ranks


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("seed", "seed (rank 1 has 4, the other 3)"),
        ("seed_data_parallel", "seed (rank 1 has 4, the other 3)"),
        ("large_seed", "seed (rank 1 has "),
        ("rates", "survival rates (rank 1 from the rest)"),
        ("rules", "rules (rank 1 from the rest)"),
        ("parameters", "parameters (rank 1 from the rest)"),
        ("timing", "timing or coupling (rank 1 from the rest)"),
        ("coupling", "timing or coupling (rank 1 from the rest)"),
        ("step", "step (rank 1 has 1, the other 0)"),
        ("rank", "draw as numbers 0, 0"),
    ],
)
def test_ranks_that_differ_are_named_on_all_ranks(found, part, text):
    said = found["mismatches"][part]
    assert text in said[0]
    assert said[0] == said[1]


def test_equal_ranks_pass_at_the_price_of_one_small_message(found):
    assert found["mismatches"]["nothing"] == ["", ""]
    assert found["mismatches"]["cost"] == [["allgather"], 56]
    assert found["mismatches"]["ranks_after"] == [0, 1]  # data_parallel sets them


# longer


@pytest.mark.slow
def test_four_processes(checked, assert_follows):
    names = ["ours", "stock", "accumulated", "checkpointed_reentrant"]
    found, _ = checked("gradients.py", 4, *names, "own_rows_untouched", "own_blocks_untouched", "join", "mismatches")
    for name in names:
        assert_follows(found[name])
    assert found["own_rows_untouched"]["error"] <= 1e-6
    assert_follows(found["own_blocks_untouched"])
    assert max(found["join"]["error"]) <= 1e-6
    assert found["ours"]["bytes"] < 0.6 * found["stock"]["bytes"]
    assert found["mismatches"]["seed"] == [found["mismatches"]["seed"][0]] * 4
    assert "seed (rank 3 has 4, the others 3)" in found["mismatches"]["seed"][0]


@pytest.mark.slow
def test_compiled_as_a_whole(checked, assert_follows):
    found, _ = checked("gradients.py", 2, "compiled")
    assert_follows(found["compiled"])
    assert found["compiled"]["collectives"] == 10
    assert found["compiled"]["bytes"] < 1.02 * found["compiled"]["live_bytes"]


@pytest.mark.slow
def test_500_updates_without_hang_or_drift(checked, assert_follows):
    found, _ = checked("gradients.py", 2, "soak", "stock_soak")
    assert_follows(found["soak"], tolerance=1e-5)
    assert_follows(found["stock_soak"], tolerance=1e-5)
    assert found["soak"]["collectives"] == 500
