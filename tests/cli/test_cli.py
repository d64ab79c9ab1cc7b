"""The command line as a user meets it: help, exit codes, messages. What each command does is in files of their own."""

import os
import subprocess
import sys

import pytest

import residrop.cli.recipes
from command_line import assert_refused, assert_refused_by_tyro, everything

# Help


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert all(f"\n  {command} " in out for command in ("train", "compare", "evaluate", "predict", "recipes"))
    assert "residrop COMMAND --help" in out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["--recipe", "--out", "--resume", "--json", "--epochs", "--survival", "linear_decay", "Ctrl-C"]),
        ("compare", ["--rules", "--seeds", "--resume", "constant", "Table 1", "relative"]),
        ("evaluate", ["--samples", "--data", "--device", "--json", "Run directory"]),
        ("predict", ["--samples", "entropy", "Pillow", "mutual information"]),
        ("recipes", ["--networks", "--rules", "--data"]),
    ],
)
def test_help_of_a_command_teaches(cli, place, command, words):
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    assert [word for word in words if word not in flat] == []
    assert everything(place) == []


# Bad input


BAD = {
    "unknown command": (["nonsense"], "'nonsense' is unknown; choose one of train, compare"),
    "misspelt command": (["trian"], "'trian' is unknown; did you mean train? residrop --help lists all"),
    "zero epochs": (["train", "--epochs", "0"], "epochs is 0; give a whole number of at least 1"),
    "negative rate": (["train", "--lr", "-1"], "lr is -1.0"),
    "nan": (["train", "--lr", "nan"], "lr is nan"),
    "best of nothing": (["train", "--select", "best"], "set validation"),
    "unsorted drops": (["train", "--lr-drops", "0.7", "0.5"], "rising order"),
    "micro-batches": (["train", "--micro-batches", "3"], "3 equal micro_batches"),
    "unknown recipe": (["train", "--recipe", "swapout/v3"], "did you mean swapout/v"),
    "no recipe file": (["train", "--recipe", "own.toml"], "'own.toml' cannot be read: No such file"),
    "unknown rule": (["train", "--rule", "nonsense"], "'nonsense' is unknown; choose one of constant"),
    "unknown network": (["train", "--network", "resmet-20"], "'resmet-20' is unknown"),
    "impossible depth": (["train", "--network", "resnet-21"], "21"),
    "unknown data": (["train", "--data", "nonsense"], "neither a folder nor a known name"),
    "missing folder": (["train", "--data", "folder:nowhere"], "nowhere"),
    "unknown device": (["train", "--device", "abacus"], "'abacus' cannot be used here"),
    "absent device": (["train", "--device", "cuda:63"], "'cuda:63' cannot be used here"),
    "survival above one": (["train", "--survival", "1.5"], "1.5"),
    "survival below zero": (["train", "--survival=-0.5"], "-0.5"),
    "survival of other length": (["train", "--network", "resnet-8", "--survival", "1,1"], "2 survival rates"),
    "survival schedule": (["train", "--survival", "parabola(1)"], "'parabola' is unknown"),
    "theta_2 of another rule": (["train", "--theta-2", "0.5"], "theta_2"),
    "granularity of another rule": (["train", "--rule", "swapout", "--granularity", "row"], "granularity"),
    "too many held out": (["train", "--validation", "5000"], "validation=5000"),
    "resume what": (["train", "--resume"], "add --out DIRECTORY"),
    "out below a device": (["train", "--out", "/dev/null/run"], "/dev/null/run cannot be written"),
    "out in proc": (["train", "--out", "/proc/run"], "/proc/run cannot be written"),
    "compare: unknown rule": (["compare", "--rules", "constant", "nonsense"], "'nonsense' is unknown"),
    "compare: no rules": (["compare", "--rules"], "0 rules"),
    "compare: zero seeds": (["compare", "--seeds", "0"], "0 seeds"),
    "compare: negative seeds": (["compare", "--seeds", "-2"], "-2 seeds"),
    "compare: resume what": (["compare", "--resume"], "add --out DIRECTORY"),
    "evaluate: missing run": (["evaluate", "nowhere"], "nowhere is no directory"),
    "evaluate: not a run": (["evaluate", "."], "recipe.json does not exist"),
    "predict: missing run": (["predict", "nowhere", "a.png"], "nowhere is no directory"),
    "predict: no images": (["predict", "nowhere"], "no image files were given"),
    "recipes: unknown": (["recipes", "digit"], "did you mean digits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(cli, place, case):
    arguments, words = BAD[case]
    result = cli(*arguments)
    assert_refused(result, place)
    assert words in result[2]


NOT_UNDERSTOOD = {
    "bad option": (["train", "--nonsense", "3"], "--nonsense"),
    "misspelt option": (["train", "--epoch", "3"], "--epochs"),
    "missing value": (["train", "--epochs"], "--epochs"),
    "not a number": (["train", "--epochs", "ten"], "'ten'"),
    "bad choice": (["train", "--select", "first"], "'last', 'best'"),
    "evaluate: no run": (["evaluate"], "evaluate --help"),
    "recipes: bad option": (["recipes", "--everything"], "--everything"),
}


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_options_that_are_not_understood_are_told_by_tyro(cli, place, case):
    arguments, words = NOT_UNDERSTOOD[case]
    result = cli(*arguments)
    assert_refused_by_tyro(result, place, f"residrop {arguments[0]}")
    assert words in " ".join(result[2].split())


def test_only_the_first_of_several_processes_prints_what_tyro_says(cli, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli("train", "--nonsense", "3") == (2, "", "")


def test_a_missing_package_is_one_line_that_installs_it(cli, place, monkeypatch):
    monkeypatch.delitem(sys.modules, "residrop.cli.recipes")
    monkeypatch.setitem(sys.modules, "tyro", None)
    result = cli("recipes")
    assert_refused(result, place)
    assert "tyro is not installed; run: python -m pip install 'residrop[train]'" in result[2]


# Ctrl-C


def test_ctrl_c_outside_training_is_one_word(cli, monkeypatch):
    def interrupt(target):
        raise KeyboardInterrupt

    monkeypatch.setattr(residrop.cli.recipes, "console_for", interrupt)
    assert cli("recipes") == (130, "", "residrop: interrupted\n")


# As a process


def process(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "residrop", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_module_gives_exit_codes(place):
    bad = process("train", "--epochs", "0")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("residrop: error: ")
    assert "epochs is 0; give a whole number of at least 1" in bad.stderr
    assert bad.stderr.count("\n") == 1
    assert everything(place) == []


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "residrop", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate()
    assert process.returncode == 0
    assert said == b""
