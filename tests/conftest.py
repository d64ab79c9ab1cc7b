"""Shared set-up of the whole suite: paths, threads and seeds."""

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Under --import-mode=importlib nothing is importable by name; this makes `helpers`, `reference` and `conformance` so.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("helpers", "conformance")

from helpers import UNLOCKED, seed  # noqa: E402
from residrop.functional import use_compiler  # noqa: E402

settings.register_profile(
    "residrop",
    derandomize=not UNLOCKED,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("residrop")


# One property over a product of options, seconds each: of these the first and every n-th after it run by default, and
# all of them where slow tests do.
EVERY = {
    "test_expectation_equals_average_of_samples": 7,
    "test_unit_level_is_one_full_graph": 3,
    "test_training_equals_eager_and_is_compiled_once": 4,
    "test_given_plans_sampling_and_eval": 4,
    "test_every_rule_equals_eager": 2,
    "test_checkpointed_compiled_root": 3,
    "test_compiled_with_checkpointed_blocks": 3,
    "test_training_with_it_equals_eager": 2,
    "test_applied_models": 3,
    "test_moving_rates_are_not_compiled_in": 4,
    "test_many_blocks_stay_below_the_recompile_limit": 2,
    "test_names_and_copies": 3,
    "test_row_level_is_one_full_graph": 2,
    "test_applied_models_are_one_full_graph_at_row_level": 2,
    "test_views_are_read_where_they_are": 2,
    "test_compiled_blocks_in_an_eager_root": 2,
    "test_block_with_some_rows": 5,
    "test_block_under_every_combination_of_coins": 5,
    "test_block_is_the_plain_one_where_nothing_is_dropped": 5,
    "test_export_in_eval_is_that_of_the_plain_model": 2,
    "test_samples_do_not_depend_on_the_stack": 3,
    "test_rows_survive_at_the_rate": 3,
    "test_recipe_builds": 2,
    "test_a_call_that_ended_leaves_nothing": 3,
    "test_lines_that_ended_in_tracebacks_are_refused": 2,
    "test_variant_is_another_training_that_builds": 3,
    "test_every_network_under_every_rule_predicts_the_same": 2,
    "test_files_predict_as_the_model_at_any_batch_size": 3,
    "test_a_network_is_rebuilt_from_safetensors_alone": 3,
    "test_a_sampled_pass_from_a_file_is_that_of_the_same_plan": 3,
    "test_nothing_of_residrop_is_left": 2,
}


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for item in items:
        family = item.path.name, item.name.partition("[")[0]
        if family[1] in EVERY:
            if seen[family] % EVERY[family[1]]:
                item.add_marker(pytest.mark.slow)
            seen[family] += 1


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tensors of these tests are small, and pytest-xdist runs one process per core


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    value = seed(0)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - the global generator is what must not leak between tests
    torch.manual_seed(value)


@pytest.fixture(autouse=True)
def _no_compiler() -> None:
    use_compiler(False)  # or it would be started in whichever test has the 2^30th unit
