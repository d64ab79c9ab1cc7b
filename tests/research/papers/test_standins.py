"""Recipes of data that is too large for tests, end to end on a generated tree of image files."""

import numpy as np
import pytest
from PIL import Image

from residrop.cli import main
from toy_paper import train_here


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Two classes of four images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("residrop.research.papers.runner.train_all", train_here)
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "tree" / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpeg")
    return tmp_path / "tree"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "data"),
    [
        (("depth-dropout/table-3", "0.5"), "imagenet:{}"),
        (("stochastic-depth/table-1", "stochastic-svhn"), "folder:{}?size=32"),
    ],
)
def test_one_command_measures_a_row(tree, capsys, row, data):
    target, key = row
    arguments = ["--rows", key, "--scale", "0.001", "--data", data.format(tree), "--device", "cpu"]
    assert main(["reproduce", target, *arguments]) == 0
    out, err = capsys.readouterr()
    assert "8 + 8 images of 2 classes" in err
    assert "nothing is recorded" in err
    assert f"[{key}]" in out
    assert "│ 0.001 │ cpu" in " ".join(out.split())
    assert not (tree.parent / "results").exists()
