"""`residrop recipes` as a user meets it."""

import json
import os
import threading

import pytest

from command_line import strictly
from residrop.training import PRESETS, Recipe


@pytest.mark.parametrize(
    ("option", "word"), [(None, "swapout/v2-20-w2"), ("--networks", "resnet-ours-<depth>"), ("--rules", "skipforward"),
                         ("--data", "cifar100")]
)  # fmt: skip
def test_recipes_lists(cli, option, word):
    arguments = [option] if option else []
    code, out, err = cli("recipes", *arguments)
    assert (code, err) == (0, "")
    code, out, err = cli("recipes", *arguments, "--json", "-")
    rows = strictly(out)
    assert code == 0
    assert word in [next(iter(row.values())) for row in rows]
    assert "what it is" in rows[0]


@pytest.mark.parametrize("name", ["digits", "swapout/v2-32-w4-cifar100"])
def test_recipes_shows_one_in_full(cli, name):
    code, out, err = cli("recipes", name)
    assert (code, err) == (0, "")
    assert PRESETS[name].title in " ".join(out.split())
    assert all(f"  {key}: {value}\n" in out for key, value in PRESETS[name].recipe.to_dict().items())
    found = strictly(cli("recipes", name, "--json", "-")[1])
    assert Recipe.from_dict(found["recipe"]) == PRESETS[name].recipe


def test_json_is_written_to_a_pipe_not_over_it(cli, place):
    pipe = place / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(json.loads(pipe.read_text())))
    reader.start()
    assert cli("recipes", "--rules", "--json", pipe)[0] == 0
    reader.join(timeout=30)
    assert found[0][0]["rules"] == "constant"
    assert pipe.is_fifo()
