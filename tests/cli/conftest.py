"""Shared by the tests of commands: a place to work in, the command line as a function, a run, images."""

import pytest
from PIL import Image

from residrop.cli import main
from residrop.data import load
from residrop.training import Recipe, train


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory and cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def cli(capsys):
    """Return a function from arguments to (exit code, standard output, standard error)."""

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Directory of a run that knows its digits; read only."""
    path = tmp_path_factory.mktemp("cli") / "run"
    recipe = Recipe(network="resnet-8", rule="stochastic-depth", epochs=4, batch_size=64, samples=2, precision="fp32")
    train(recipe, path, quiet=True)
    return path


@pytest.fixture
def digits(place):
    """Twelve test digits as PNG files, and their labels."""
    test = load("digits").test
    folder = place.parent / "images"
    folder.mkdir()
    paths = []
    for i in range(12):
        paths.append(folder / f"{i}.png")
        Image.fromarray(test.pixels[i, 0].numpy()).save(paths[-1])
    return paths, test.labels[:12]


@pytest.fixture
def small_run(tmp_path):
    """Directory of a run of half a second, to write into."""
    recipe = Recipe(
        network="resnet-8",
        block="v2",
        rule="swapout",
        survival="0.6",
        limit=200,
        validation=40,
        epochs=2,
        batch_size=64,
        lr=0.05,
        samples=0,
        precision="fp32",
        device="cpu",
    )
    train(recipe, tmp_path / "run", quiet=True)
    return tmp_path / "run"
