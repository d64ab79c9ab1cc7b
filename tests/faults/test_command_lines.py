"""Command lines that nobody would write: each ends in an exit code and, if it is refused, in one line that says why."""

import os
import resource
import warnings
from pathlib import Path
from random import Random

import pytest

from residrop.cli import main
from residrop.training import Recipe, train

SMALL = [
    *("--network", "resnet-8", "--limit", "40", "--epochs", "1", "--batch-size", "20", "--samples", "0"),
    *("--precision", "fp32", "--device", "cpu"),
]
NUMBERS = [
    *("0", "1", "-1", "2", "3", "0.5", "1.5", "nan", "inf", "-inf", "1e400", "1e-320", "-0.0", "1e-9", "", "ten"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616", "1" + "0" * 30),
    *("1" + "0" * 400, "1000000000000", "4294967296", "1_000", "٣", "1e3", "None", "0x10"),
]
PATHS = [
    *("", ".", "..", "/", "a.png", "new/folder/a.json", "x" * 300, "new/" + "y" * 300, "z/" * 3000 + "a", "~"),
    *("/dev/null", "/dev/null/a", "/proc/a", "loop", "dangling", "-", "$$", "$x^2$", "a\nb", "写真", "[bold]"),
    *(os.fsdecode(b"\xff\xfe.json"), os.fsdecode(b"\x80/\xff.onnx"), "folder:" + os.fsdecode(b"\xff"), "{0}"),
    *("folder:.", "folder:file", "folder:$$", "parquet:.", "run", "run/recipe.json", "a.safetensors", "a.onnx/"),
]
WORDS = [
    *("cpu", "cuda", "hpu", "privateuseone", "meta", "cpu:7", "mps", "xpu", "auto", "abacus", "cuda:9999999999"),
    *("constant", "swapout", "stochastic-depth", "mix", "uniform(0.5)", "linear_decay(0.5)", "uniform(nan)"),
    *("0.5,0.5", "warmup(0.5)", "progressive(1e308)", "early(0.9, 0.9)", "points(0:0)", "0.5 of flops", "9 of time"),
    *("resnet-8", "resnet-20", "resnet-99999999999999999998", "vanilla-3", "stable-vanilla-50", "timm:resnet18"),
    *("a:$", "torchvision:resnet18", "torchvision:nothing", "digits", "swapout/v2-20-w1", "swapout/table-2", "all"),
    *("fp32", "last", "best", "layers", "16,16", "16,-1,3,3", "9223372036854775807,2,2,2", "90s", "1e999h", "0.1s"),
]
OPTIONS = {
    "train": (
        "network rule survival survival-timing theta-2 granularity rescale rows width block drops lr lr-drops "
        "warmup momentum weight-decay epochs batch-size micro-batches validation limit seed precision device samples "
        "data normalization augmentation budget spend refresh least watch select workers out json recipe "
        "checkpoint-minutes channels-last resume quiet"
    ),
    "compare": "rules seeds out json recipe network survival lr seed limit data device epochs resume",
    "evaluate": "samples adaptive confidence curve repetitions weights data device json",
    "predict": "samples weights device json",
    "recalibrate": "data batches mode device json",
    "export": "to weights sampled json",
    "analyze survival": "survival width data images seed device picture json budgets unit least",
    "analyze depth": "survival width data images seed device picture json unit beta",
    "analyze discrepancy": "survival width data images seed device picture json",
    "analyze gradients": "survival width data images seed device picture json passes",
    "analyze noise": "survival width data images seed device picture json",
    "recipes": "networks rules data json",
    "reproduce": "rows seeds scale variant points data budget missing workers steps device runs ledger json",
    "report": "ledger markdown html",
    "bench skip": "models survival batch-size steps precision device seed json",
    "bench swapout": "shapes widths batch-size steps device seed json",
    "bench inference": "cases samples batch-size steps device seed json",
    "bench throughput": "batch-size steps device seed json",
}
FILES = ("out", "json", "data", "picture", "to", "html", "markdown", "ledger", "runs")
NUMERIC = (
    "theta-2 width drops lr lr-drops warmup momentum weight-decay epochs batch-size micro-batches validation limit "
    "seed samples refresh least workers checkpoint-minutes seeds confidence repetitions batches images budgets beta "
    "passes scale points steps widths"
)
WORK = ("epochs", "samples", "repetitions", "batches", "passes", "seeds")  # would run for as long as they are asked to
BASES = {
    "train": SMALL,
    "compare": [*SMALL, "--rules", "constant"],
    "evaluate": ["run", "--samples", "1", "--device", "cpu"],
    "predict": ["run", "a.png", "--samples", "1", "--device", "cpu"],
    "recalibrate": ["run", "--batches", "1", "--device", "cpu"],
    "export": ["run", "--to", "a.safetensors"],
    **{
        f"analyze {name}": ["vanilla-3", "--images", "4", "--width", "4"] for name in ("depth", "gradients", "survival")
    },
    **{f"analyze {name}": ["vanilla-3", "--images", "4", "--width", "4"] for name in ("discrepancy", "noise")},
    "report": ["run"],
}


def line_of(random):
    """A command with one to three options of its own and values from the pools; benchmarks get at least one bad one."""
    command = random.choice(list(OPTIONS))
    line = [*command.split(), *BASES.get(command, [])]
    if random.random() < 0.15:  # another target
        line = [*command.split(), random.choice(PATHS + WORDS), *BASES.get(command, [])[1:]]
    for option in random.sample(OPTIONS[command].split(), random.choice((1, 1, 2, 3))):
        line.append(f"--{option}")
        numbers = [one for one in NUMBERS if option not in WORK or not one.isdecimal() or not 6 < len(one) < 20]
        fitting = numbers if option in NUMERIC.split() else PATHS if option in FILES else WORDS
        if random.random() < 0.9:
            line.append(random.choice(fitting))
        elif random.random() < 0.7:
            line += random.choices(random.choice((PATHS, WORDS)), k=random.choice((1, 2)))
    if command.startswith(("bench", "reproduce")):  # which would run for minutes
        line += ["--device", random.choice(("hpu", "privateuseone", "abacus", "nan", ""))]
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "run"
    recipe = Recipe(network="resnet-8", limit=40, epochs=1, batch_size=20, samples=0, precision="fp32", device="cpu")
    train(recipe, path, quiet=True)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch, trained):
    """A working directory with a run, a file and links that lead nowhere; half of the usual memory at most."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    (work / "run").symlink_to(trained)
    (work / "file").write_text("no folder")
    (work / "loop").symlink_to("loop")
    (work / "dangling").symlink_to("nowhere/at/all")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**30, hard))
    yield work
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tried(line, capsys):
    """What is wrong with how a command line ends; None if nothing is."""
    capsys.readouterr()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(line)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    out, err = capsys.readouterr()
    if code not in (0, 2):
        return f"exit code {code}"
    *_, last = ["", *err.splitlines()]  # a training has said how far it is
    if code == 2 and not ("--help" in err or (last.startswith("residrop: error: ") and err.count(": error: ") == 1)):
        return f"says {err[:300]!r}"
    return "a traceback" if "Traceback" in out + err else None


def check(count, seed, capsys, record_property):
    """What ends wrongly of `count` random lines."""
    random, found = Random(seed), []
    for _ in range(count):
        line = line_of(random)
        if (wrong := tried(line, capsys)) is not None:
            found.append(f"{line}: {wrong}")
    record_property("tried", count)
    return found


VANILLA = ["vanilla-3", "--images", "4", "--width", "4"]
REPORTED = [
    ["train", *SMALL, "--device", "hpu"],
    ["train", *SMALL, "--device", "privateuseone"],
    ["train", *SMALL, "--width", "9223372036854775807"],
    ["train", *SMALL, "--lr", "9223372036854775808"],
    ["train", *SMALL, "--batch-size", "9223372036854775808"],
    ["train", *SMALL, "--json", "/proc/a"],
    ["train", *SMALL, "--out", "x" * 300],
    ["train", *SMALL, "--data", "folder:" + "x" * 300],
    ["analyze", "depth", *VANILLA, "--width", "9223372036854775807"],
    ["analyze", "depth", *VANILLA, "--images", "9223372036854775808"],
    ["analyze", "depth", *VANILLA, "--images", "1000000000000"],
    ["analyze", "depth", *VANILLA, "--beta", "nan"],
    ["analyze", "depth", *VANILLA, "--picture", "."],
    ["analyze", "depth", *VANILLA, "--picture", "file/below"],
    ["evaluate", "run", "--samples", "9223372036854775808"],
    ["evaluate", os.fsdecode(b"\xff")],
    ["export", "run", "--to", "x" * 300 + ".pt2"],
    ["report", "--ledger", "x" * 300],
    ["reproduce", "--ledger", "x" * 300],
    ["bench", "swapout", "--shapes", "9223372036854775808,2", "--steps", "1"],
]


@pytest.mark.parametrize("line", REPORTED, ids=lambda line: " ".join(line)[:60].encode("ascii", "replace").decode())
def test_lines_that_ended_in_tracebacks_are_refused(place, capsys, record_property, line):
    assert tried(line, capsys) is None
    assert main(line) == 2
    record_property("tried", 1)


ACCEPTED = [
    ["analyze", "depth", *VANILLA, "--picture", "$x^2$.png"],
    ["analyze", "depth", *VANILLA, "--beta", "1e-300"],
    ["analyze", "depth", *VANILLA, "--json", os.fsdecode(b"\xff.json"), "--picture", os.fsdecode(b"\xff.png")],
    ["report", "run", "--html", "$$.html", "--markdown", os.fsdecode(b"\xff.md")],
]


@pytest.mark.parametrize("line", ACCEPTED, ids=lambda line: " ".join(line)[-30:].encode("ascii", "replace").decode())
def test_odd_names_and_numbers_are_accepted(place, capsys, record_property, line):
    assert tried(line, capsys) is None
    assert main(line) == 0
    record_property("tried", 1)


def test_thirty_command_lines(place, capsys, record_property):
    assert not check(30, 1, capsys, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_command_lines(place, capsys, record_property, seed):
    assert not check(100, 100 + seed, capsys, record_property)
