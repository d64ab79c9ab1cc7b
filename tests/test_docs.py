"""The pages: their code runs, their command lines parse, their numbers are measured, and the site builds offline."""

import ast
import importlib
import json
import math
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import torch.distributed as dist
import tyro

import residrop
from residrop import cli
from residrop.research.papers import find
from residrop.training import preset

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
CONTINUED = ("extend.md",)  # pages whose blocks build on those before; elsewhere every block stands alone
OPTIONAL = ("timm", "transformers", "accelerate", "lightning")


# Python


def python_of(page: Path) -> list[tuple[int, str]]:
    """Code of a page and the line it begins at, line by line where the page has it: tracebacks point into the page."""
    text = page.read_text()
    blocks = []
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        above = text[: found.start(1)].count("\n")
        blocks.append((above + 1, "\n" * above + found[1]))
    if page.name not in CONTINUED:
        return blocks
    whole = ""
    for _, code in blocks:
        whole += code[whole.count("\n") :]
    return [(blocks[0][0], whole)]


CODE = [
    pytest.param(page, code, id=f"{page.relative_to(ROOT)}:{line}") for page in PAGES for line, code in python_of(page)
]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder, a process group of one and a catalogue that no other test sees."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    rules = dict(residrop.RULES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield lambda: [monkeypatch.setenv(*pair) for pair in torchrun.items()]
    if dist.is_initialized():
        dist.destroy_process_group()
    residrop.RULES.clear()
    residrop.RULES.update(rules)


@pytest.mark.parametrize(("page", "code"), CODE)
def test_python_of_the_pages_runs(page, code, alone):
    for library in OPTIONAL:
        if re.search(rf"^(import|from) {library}\b", code, re.MULTILINE):
            pytest.importorskip(library)
    if "init_process_group" in code:
        alone()
    names = {"__name__": page.stem}
    exec(compile(code, str(page), "exec"), names)
    assert "residrop" in names


@pytest.mark.slow
@pytest.mark.parametrize(("line", "code"), python_of(DOCS / "distributed.md"))
def test_code_of_the_distributed_page_runs_on_two_processes(line, code, tmp_path):
    pytest.importorskip("transformers" if "transformers" in code else "torch")
    (tmp_path / "block.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "block.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_code_is_where_the_page_has_it():
    page = DOCS / "extend.md"
    lines = page.read_text().splitlines()
    ((_, code),) = python_of(page)
    written = [(number, line) for number, line in enumerate(code.splitlines()) if line]
    assert len(written) > 60
    assert all(lines[number] == line for number, line in written)


# Shell


def shell_of(page: Path) -> list[str]:
    """Command lines of a page that call residrop: in blocks, and in the text."""
    text = page.read_text()
    blocks = re.findall(r"^```(?!python)\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    calls = [part.strip() for line in lines for part in line.split("&&")]
    return [line for line in [*calls, *re.findall(r"`([^`\n]+)`", text)] if re.match(r"(torchrun .* )?residrop ", line)]


SHELL = sorted({line for page in PAGES for line in shell_of(page)})
STANDS_FOR = {"NAME": "digits", "[NAME]": "digits", "...": ""}


class Parsed(Exception):
    pass


def words_of(line: str) -> list[str]:
    """Arguments that residrop is given; those only that stand for any number of others are left out."""
    words = shlex.split(re.split(r"residrop ", line, maxsplit=1)[1].split(" | ")[0], comments=True)
    words = [STANDS_FOR.get(word, word) for word in words if word != "--resume"]  # which asks for a directory
    words = [word for word in words if word]
    return [*words, "--help"] if len(words) == 1 else [*words, *(["model.onnx"] if words[-1] == "--to" else [])]


@pytest.fixture
def parsing(monkeypatch):
    """Commands end when their arguments are read; returns the exit code."""
    monkeypatch.chdir(ROOT)  # the pages give paths from there
    read = tyro.cli

    def only_read(*args, **kwargs):
        read(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", only_read)

    def code(words):
        try:
            return cli.main(words)
        except Parsed:
            return 0
        except SystemExit as stop:
            return stop.code

    return code


@pytest.mark.parametrize("line", SHELL)
def test_command_lines_of_the_pages_are_understood(line, parsing, capsys):
    assert parsing(words_of(line)) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("residrop train --epochs 3", 0),
        ("residrop train --epoch 3", 2),
        ("residrop train --recipe unknown", 2),
        ("residrop trains", 2),
        ("residrop export RUN --to", 0),
        ("residrop export RUN --too a", 2),
        ("residrop recipes [NAME]", 0),
        ("torchrun --nproc-per-node 2 -m residrop train --rule many words", 2),
        ("torchrun --nproc-per-node 2 -m residrop train ...", 0),
    ],
)
def test_command_check_catches(line, code, parsing, capsys):
    assert parsing(words_of(line)) == code, capsys.readouterr().err


def test_recipe_file_of_the_page_is_the_example_and_holds():
    text = (ROOT / "examples" / "recipe.toml").read_text()
    assert f"```toml\n{text}```\n" in (DOCS / "cli.md").read_text()
    found = preset(str(ROOT / "examples" / "recipe.toml"))
    assert found.recipe == preset("swapout/v2-20-w2-cifar100").recipe.replace(
        survival="linear(1, 0.8)", epochs=64, lr_schedule="cosine"
    )
    assert found.title == "CIFAR-100, Linear(1, 0.8), 64 epochs"


# Numbers

BLOCK = {"rule": "stochastic-depth", "granularity": "block", "survival": "uniform(0.5)", "variant": "residrop"}
DECAY = {**BLOCK, "survival": "linear_decay(0.5)"}
PEER = {**BLOCK, "variant": "torchvision StochasticDepth"}
BOTH = ({"model": "resnet-56"}, {"model": "resnet-110"})
TWENTY = {"model": "resnet-20 W x1"}
THREE = [{"rule": "constant"}, {"rule": "stochastic-depth"}, {"rule": "swapout"}]
TEN_EPOCHS = [{"rule": "constant"}] + [{"rule": "stochastic-depth", "expected_depth": depth} for depth in (8.5, 6.5)]
WIRED = [{"network": "resnet-56", "wiring": wiring} for wiring in ("data_parallel", "find_unused_parameters")]
IDEAL = "relative_to_ideal"
FOUND = [
    {"model": name} for name in ("transformers/t5_small_encoder", "transformers/opt_6_layers", "timm/hiera_tiny_224")
]
LOOKED_AT = [
    {"model": name, "granularity": "block", "example": "given"}
    for name in ("timm/vit_small_patch16_224", "torchvision/resnet50", "transformers/t5_small_encoder")
]
VIT, RESNET = ("ViT-Tiny", "timm:vit_tiny_patch16_224"), ("ResNet-18", "torchvision:resnet18")
QUOTED = [  # page, its words, file in results/, what tells each row, the value's name
    (
        "choose",
        "{:.2f} of constant depth on ResNet-56, {:.2f} on ResNet-110",
        "skip",
        [BLOCK | one for one in BOTH],
        "relative_to_constant",
    ),
    (
        "choose",
        "linear decay to 0.5 | {:.2f} and {:.2f} |",
        "skip",
        [DECAY | one for one in BOTH],
        "relative_to_constant",
    ),
    ("choose", "uniform 0.5 | {:.2f} and {:.2f} |", "skip", [PEER | one for one in BOTH], "relative_to_constant"),
    (
        "choose",
        "{:.2f} of constant depth, {:.2f} once compiled",
        "swapout",
        [TWENTY | {"variant": f"residrop, {how}"} for how in ("eager", "compiled")],
        "relative_to_constant",
    ),
    ("choose", "`swapout` | {:.2f}%, {:.2f}%, {:.2f}% |", "digits_compare", THREE, "deterministic_error"),
    ("choose", "30 samples | {:.2f}%, {:.2f}%, {:.2f}% |", "digits_compare", THREE, "sampled_error"),
    ("choose", "30 samples | {:.2f}%, ", "digits_compare", [{"rule": "depth-dropout"}], "deterministic_error"),
    ("choose", "%, {:.2f}% | the same", "digits_compare", [{"rule": "depth-dropout"}], "sampled_error"),
    ("choose", "0.5 | {:.2f}%, {:.2f}%, {:.2f}% |", "cifar10_10epochs", TEN_EPOCHS, "deterministic_error"),
    (
        "skipping",
        "{:.2f}, {:.2f} and {:.2f} of the ideal by block",
        "skip_found",
        [BLOCK | one for one in FOUND],
        IDEAL,
    ),
    (
        "skipping",
        "{:.2f}, {:.2f} and {:.2f} by row",
        "skip_found",
        [BLOCK | {"granularity": "row"} | one for one in FOUND],
        IDEAL,
    ),
    (
        "apply",
        "{:.1f} forward passes of ViT-S, {:.1f} of ResNet-50, {:.1f} of T5-small",
        "finding",
        LOOKED_AT,
        "forwards",
    ),
    ("apply", "seconds (T5-small: {:.1f} forward passes)", "finding", LOOKED_AT[2:], "first_forwards"),
    *(
        (
            "train",
            f"| {name} | {rate:g} | {{:+.2f}} ± ",
            "finetune_errors",
            [{"model": model, "drop_path": rate}],
            "difference",
        )
        for name, model, rate in ((*one, rate) for one in (VIT, RESNET) for rate in (0.0, 0.2))
    ),
    *(
        (
            "train",
            f"| {name} | 0.5 | | {{:.2f}} |",
            "finetune_times",
            [{"model": model, "drop_path": 0.5}],
            "relative_to_timm",
        )
        for name, model in (VIT, RESNET)
    ),
    *(
        ("train", " | {:.2f} | 1.00 |", "finetune_times", [{"model": model, "drop_path": 0.0}], "relative_to_timm")
        for _, model in (VIT, RESNET)
    ),
    *(
        (
            "train",
            words,
            "skip_finetune",
            [
                {"model": model, "survival": survival, "variant": variant, "granularity": "row"}
                for survival in ("linear(1, 0.8)", "linear(1, 0.5)")
            ],
            "relative_to_constant",
        )
        for words, model, variant in (
            ("{:.2f} and {:.2f} for ViT-Tiny", "timm/vit_tiny_patch16_224", "residrop"),
            ("and {:.2f} and {:.2f} for ResNet-18 at", "torchvision/resnet18", "residrop"),
            ("the ideal, takes {:.2f} and {:.2f},", "timm/vit_tiny_patch16_224", "ideal"),
            (", and {:.2f} and {:.2f}. ## A record", "torchvision/resnet18", "ideal"),
        )
    ),
    ("distributed", "{:.2f} MiB of gradients instead of {:.2f}", "wirings", WIRED, "bytes"),
]


@pytest.mark.parametrize(("page", "words", "file", "rows", "name"), QUOTED)
def test_quoted_numbers_are_those_measured(page, words, file, rows, name):
    measured = json.loads((ROOT / "results" / f"{file}_cpu_202611.json").read_text())["entries"]
    values = []
    for row in rows:
        (found,) = [one for one in measured if all(one.get(key) == pytest.approx(row[key]) for key in row)]
        values.append(found[name] / (2**20 if name == "bytes" else 1))
    text = " ".join((DOCS / f"{page}.md").read_text().split())
    assert words.format(*values) in text


@pytest.mark.parametrize(("document", "network"), [("board", "ResNet-20"), ("board_resnet-32", "ResNet-32")])
def test_the_record_board_is_quoted_as_it_is(document, network):
    page = (DOCS / "train.md").read_text().partition(f"| {network} |")[2].partition("\n\n")[0]
    rows = json.loads((ROOT / "results" / f"{document}_cpu_202611.json").read_text())["entries"]
    assert {row["depth"] for row in rows} == {int(network.removeprefix("ResNet-"))}
    for paper, today in zip(rows[::2], rows[1::2], strict=True):
        assert paper["rule"] == today["rule"]
        survival = {"linear_decay(0.9)": ", linear decay to 0.9", "linear(1, 0.5)": ", Linear(1, 0.5)", None: ""}
        name = paper["rule"].replace("constant", "constant depth").replace("-", " ") + survival[paper.get("survival")]
        cells = " | ".join(f"{row['error']:.2f} ± {row['error_sd']:.2f}" for row in (paper, today))
        assert f"| {name} | {cells} |" in page


def test_presence_in_backward_only_is_quoted_as_it_was_measured():
    page = (DOCS / "draws.md").read_text()
    rows = json.loads((ROOT / "results" / "backward_cpu_202611.json").read_text())["entries"]
    names = {
        "transf": "Llama, 8 layers",
        "timm/v": "timm ViT-S, 64 pixels",
        "torchv": "torchvision ResNet-50, 96 pixels",
    }
    keys = ["backward_relative_to_constant", "backward_relative_to_ideal", "step_relative_to_constant"]
    keys += ["saved_relative_to_constant", "peak_relative_to_constant"]
    ours = [row for row in rows if row["rule"] == "backward-depth"]
    assert len(ours) == 5
    for row in ours:
        numbers = " | ".join(f"{row[key]:.2f}" for key in keys)
        assert f"| {names[row['model'][:6]]} | {row['granularity']} | {numbers} |" in page
        assert row["backward_relative_to_ideal"] < 1.05


def test_language_models_are_quoted_as_they_were_measured():
    page = (DOCS / "language.md").read_text()
    rows = json.loads((ROOT / "results" / "language_model_cpu_202611.json").read_text())["entries"]
    names = ["constant depth", "constant depth, 790 steps", "`dont-drop-dropout`", "`growth`"]
    for name, row in zip(names, rows, strict=True):
        shares = (f"{row[f'training_{unit}_of_first']:.2f}" for unit in ("flops", "seconds"))
        loss = f"{row['final_bits']:.3f} ± {row['final_bits_se']:.3f}"
        assert f"| {name} | {loss} | {' | '.join(shares)} |" in page
        assert row["seeds"] == 2
    constant, shorter, dropout, growth = (row["final_bits"] for row in rows)
    differences = {"higher, and": dropout - constant, "better than": dropout - shorter, "higher. At": growth - constant}
    assert all(f"{value:.2f} bits {words}" in page for words, value in differences.items())
    saved = {words: 1 - row["training_flops_of_first"] for words, row in (("fewer", rows[2]), ("of the", rows[3]))}
    assert all(f"{100 * value:.0f}% {words}" in page for words, value in saved.items())


def test_coupled_draws_are_quoted_as_they_were_measured():
    page = (DOCS / "draws.md").read_text()
    rows = json.loads((ROOT / "results" / "coupling_steps_cpu_202611.json").read_text())["entries"]
    names = {"resnet-20": "ResNet-20", "transformers/llama, 8 layers": "Llama, 8 layers"}
    quoted = [row for row in rows if row["granularity"] == "block" or row["model"] == "resnet-20"]
    assert len(quoted) == 12
    for row in quoted:
        first = f"| {names[row['model']]} | {row['granularity']} | `{row['coupling']}` |"
        variance = f"{row['gradient_variance_ratio']:.2f} ± {row['gradient_variance_ratio_se']:.2f}"
        assert f"{first} {100 * row['flops_spread']:.1f}% | {100 * row['time_spread']:.0f}% | {variance} |" in page
    for row in json.loads((ROOT / "results" / "coupling_errors_cpu_202611.json").read_text())["entries"]:
        assert f"| `{row['coupling']}` | {_cells(row, 'error')} | {_cells(row, 'nll', digits=3)} |" in page


def test_times_of_draws_are_quoted_as_they_were_measured():
    page = (DOCS / "draws.md").read_text()
    rows = json.loads((ROOT / "results" / "draw_cpu_202611.json").read_text())["entries"]
    times = {(row["granularity"], row["coupling"]): row["microseconds"] for row in rows if row["timing"] == "constant"}
    blocks, by_rows = (
        [times[level, coupling] for coupling in ("independent", "systematic", "balanced", "apart")]
        for level in ("block", "row")
    )
    first, *coupled = (f"{time:.0f}" for time in blocks)
    assert f"takes {first} microseconds" in page
    assert "{} (`systematic`), {} (`balanced`) and {} (`apart`)".format(*coupled) in page
    assert "by rows {:.0f}, and {:.0f}, {:.0f} and {:.0f} (".format(*by_rows) in page
    assert max(blocks) < 2 * blocks[0]
    assert max(by_rows) < 2 * by_rows[0]


def _cells(row, *names, digits=2):
    return " | ".join(f"{row[name]:.{digits}f} ± {row[f'{name}_se']:.{digits}f}" for name in names)


def test_measured_uncertainty_is_quoted_as_it_is():
    page = (DOCS / "uncertainty.md").read_text()
    rows = [
        row
        for file in ("uncertainty_digits", "uncertainty_cifar10", "outputs")
        for row in json.loads((ROOT / "results" / f"{file}_cpu_202611.json").read_text())["entries"]
    ]
    quoted = 0
    for row in rows:
        if "tempered" in row and not (row["rule"] == "constant" and row["samples"]):
            way = f"{row['samples']} passes" if row["samples"] else "one pass"
            way += f", temperature {row['temperature']:.2f}" if row["tempered"] else ""
            cells = f"{_cells(row, 'error')} | {_cells(row, 'nll', digits=3)} | {_cells(row, 'ece')}"
        elif "foreign" in row and not (row["rule"] == "constant" and row["samples"]):
            way, cells = "", _cells(row, "auroc", digits=1)
        elif row.get("task") == "segmentation":
            way = "one pass" if row["way"] == "expectation" else "30 passes"
            cells = f"{_cells(row, 'error')} | {row['nll']:.3f} | {_cells(row, 'ece')} | {row['auroc_entropy']:.3f}"
        elif row.get("task") == "regression":
            way = row["way"]
            cells = f"{_cells(row, 'coverage', digits=1)} | {row['width']:.2f} | {row['nll']:.2f}"
        else:
            continue
        assert f"{way} | {cells} |" in page if way else cells in page, row
        quoted += 1
    assert quoted > 30


@pytest.mark.parametrize(
    ("data", "before"), [("digits", ("greedy", "every_other")), ("resnet-32", ("greedy",))], ids=["digits", "cifar10"]
)
def test_sub_networks_are_quoted_as_they_are(data, before):
    page = (DOCS / "shrink.md").read_text()
    rows = json.loads((ROOT / "results" / f"subnetworks_{data}_cpu_202611.json").read_text())["entries"]
    names = {"1": "constant depth", "linear_decay(0.5)": "stochastic depth", "uniform(0.8)": "uniform 0.8"}
    found = {}
    for row in rows:
        for kind in ("error", "error_before"):
            found.setdefault((row["by"], names[row["run.survival"]], kind), []).append(_cells(row, kind))
    for (by, name, kind), (whole, *cells) in found.items():
        line = f"| `{by}` | {name} | {' | '.join(cells)} |"
        assert line in page or (kind == "error_before" and by not in before)
        assert f"{whole} ({name}" in page or kind == "error_before"


def test_sub_networks_of_language_models_are_quoted_as_they_are():
    page = (DOCS / "shrink.md").read_text()
    rows = json.loads((ROOT / "results" / "subnetworks_language_cpu_202611.json").read_text())["entries"]
    found = {}
    for row in rows:
        found.setdefault((row["by"], row["trained"]), []).append(_cells(row, "bits", digits=3))
        assert row["seeds"] == 2
    for (by, trained), (whole, *cells) in found.items():
        assert f"| `{by}` | {trained} | {' | '.join(cells)} |" in page
        assert f"{whole} ({trained})" in " ".join(page.split())
    bits = {(row["trained"], row["layers"]): row["bits"] for row in rows if row["by"] == "greedy"}
    lost = [f"{bits[way, few] - bits[way, 8]:.2f}" for way in ("uniform 0.8", "constant depth") for few in (6, 4)]
    text = "loses {} bits with six layers and {} with four, where constant depth loses {} and {}.".format(*lost)
    assert text in " ".join(page.split())


def test_what_sub_networks_lose_is_quoted_as_it_was_measured():
    page = " ".join((DOCS / "shrink.md").read_text().split())
    rows = json.loads((ROOT / "results" / "subnetworks_resnet-32_cpu_202611.json").read_text())["entries"]
    found = {(row["run.survival"], row["budget"]): row for row in rows if row["by"] == "greedy"}

    def error(survival, share):
        return found[survival, f"{share} of time"]["error"]

    def lost(survival, share):
        return f"{error(survival, share) - error(survival, '1.0'):.1f}"

    constant, decay, uniform = "1", "linear_decay(0.5)", "uniform(0.8)"
    assert f"loses {lost(uniform, 0.8)} points at 0.8 of the time and {lost(uniform, 0.6)} at 0.6" in page
    assert f"none and {lost(decay, 0.6)}; constant depth loses {lost(constant, 0.8)} and {lost(constant, 0.6)}" in page
    assert float(lost(decay, 0.8)) <= 0.0
    behind = [f"{error(one, '1.0') - error(constant, '1.0'):.1f}" for one in (uniform, decay)]
    assert "by {} (uniform 0.8) and {} points (linear decay)".format(*behind) in page
    ahead = [error(constant, 0.8) - error(one, 0.8) for one in (uniform, decay)]
    assert "by {:.1f} ± 1.0 and {:.1f} ± 1.0 points".format(*ahead) in page
    assert all(0.9 < row["time"] / row["share"] < 1.1 for row in rows)  # "within a tenth"


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_adaptive_sampling_is_quoted_as_measured(data):
    page = (DOCS / "inference.md").read_text()
    for row in json.loads((ROOT / "results" / f"adaptive_{data}_cpu_202611.json").read_text())["entries"]:
        cells = f"{row['confidence']:g} | {row['mean_passes']:.2f} ± {row['passes_sd']:.2f} | {row['agreement']:.2f}%"
        assert f"| {cells} | {row['time_of_loop']:.2f} | {row['time_of_all']:.2f} |" in page


def test_healed_sub_networks_are_quoted_as_they_are():
    page = " ".join((DOCS / "shrink.md").read_text().split())
    rows = json.loads((ROOT / "results" / "subnetworks_healed_cifar10_cpu_202611.json").read_text())["entries"]
    constant, random_depth = (f"from {row['error_small']:.2f} to {row['error_healed']:.2f}%" for row in rows)
    assert f"{constant} for constant depth and {random_depth} for stochastic depth" in page


def test_times_of_sub_networks_are_quoted_as_they_are():
    page = (DOCS / "shrink.md").read_text()
    rows = json.loads((ROOT / "results" / "subnetworks_times_cpu_202611.json").read_text())["entries"]
    for row in rows:
        cells = [f"{row['budget']} of time", f"{row['blocks']} of {row['of']}", f"{row['predicted']:.2f}"]
        cells += [f"{row['measured']:.2f}", f"{row['milliseconds_whole']:.0f} → {row['milliseconds']:.0f} ms"]
        onnx = row.get("onnx_milliseconds")
        cells.append("" if onnx is None else f"{row['onnx_milliseconds_whole']:.0f} → {onnx:.0f} ms")
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in page
        assert row["unit"] == "time"
        assert abs(row["ratio"] - 1.0) < 0.1  # what the page says


def test_gpu_numbers_are_those_measured():
    def entries(file):
        return json.loads((ROOT / "results" / f"{file}.json").read_text())["entries"]

    names = ("relative_to_constant", "relative_to_ideal", "saved_relative_to_constant")
    found = {(row["model"], row["variant"], row["granularity"]): row for row in entries("skip_h200_202611")}
    vision = "torchvision StochasticDepth"
    order = [("residrop", "block"), ("residrop", "row"), ("index gather", "row"), ("timm DropPath", "row")]
    order += [(vision, "block"), (vision, "row")]
    models = ("timm/vit_base_patch16_224", "torchvision/resnet50")
    wanted = [[f"{found[(model, *one)][name]:.2f}" for name in names] for model in models for one in order]
    text = (DOCS / "skipping.md").read_text()
    lines = text[text.index("On one H200, uniform 0.5") :].split("\n\n")[1].splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")][2:] for line in lines] == wanted
    readme = " ".join((ROOT / "README.md").read_text().split())
    (vit, vit_row, _, timm, *_), (block, row, *_, torchvision, _) = wanted[:6], wanted[6:]
    assert f"ViT-B takes {vit[0]} of constant depth by block and {vit_row[0]} by row" in readme
    assert f"by row (timm `DropPath` {timm[0]})" in readme
    assert f"{block[0]} by block (torchvision {torchvision[0]}), but {row[0]} by row" in readme
    rows = [
        ("swapout/table-2/linear-1-0.5-deterministic", "in expectation"),
        ("swapout/table-2/linear-1-0.5-stochastic", "30 sampled passes"),
        ("swapout/table-3/20-w2-resnet", "constant depth"),
    ]
    measured = {one["id"]: one for table in (2, 3) for one in entries(f"swapout_table-{table}_cuda_scale1")}
    for key, words in rows:
        (here,), (error,) = measured[key]["measured"], measured[key]["standard_errors"]
        lines = (ROOT / "README.md").read_text().splitlines()
        line = next(line for line in lines if f"{words} | {measured[key]['published']}% |" in line)
        assert f"| {here:.2f}% ({error:.2f}) |" in line


def test_first_screen_of_readme_is_what_was_measured():
    def entries(file):
        return json.loads((ROOT / "results" / f"{file}.json").read_text())["entries"]

    def one(rows, **known):
        (found,) = [row for row in rows if all(row.get(name) == value for name, value in known.items())]
        return found

    half = [row for row in entries("skip_cpu_202611") if row["survival"] == "uniform(0.5)"]

    def skip(name, model, variant, granularity):
        return f"{one(half, model=model, variant=variant, granularity=granularity)[name]:.2f}"

    time, kept, deep, vit = (
        "relative_to_constant",
        "saved_relative_to_constant",
        "resnet-110",
        "timm/vit_small_patch16_224",
    )
    block, row = (("residrop", granularity) for granularity in ("block", "row"))
    timm, vision = ("timm DropPath", "row"), ("torchvision StochasticDepth", "row")
    speed, eager = entries("throughput_compiled_cpu_202611"), entries("throughput_cpu_202611")
    ours = {rule: one(speed, variant="residrop", rule=rule) for rule in ("constant", "stochastic-depth", "swapout")}
    images = [row["images_per_second"] for row in (*ours.values(), one(speed, variant="plain loop"))]
    times_loop, swapout_loop = (ours[rule]["relative_to_plain"] for rule in ("constant", "swapout"))
    eager_loop, eager_deep = (
        one(eager, variant="residrop", rule=rule)["relative_to_plain"] for rule in ("constant", "stochastic-depth")
    )
    constant, stochastic = (
        [row for row in entries("throughput_sizes_cpu_202611") if row["variant"] == "residrop" and row["rule"] == rule]
        for rule in ("constant", "stochastic-depth")
    )
    times, bare, more = (
        sorted(row[name] for row in rows)
        for rows, name in (
            (constant, "relative_to_plain"),
            (constant, "share_of_bare"),
            (stochastic, "relative_to_plain"),
        )
    )
    assert len(times) == len(more) == 9
    swapped, dropped = (
        one(entries(f"throughput_resnet-{name}_h200_202611"), variant="residrop", rule=rule)
        for name, rule in (("20_updates", "swapout"), ("110", "stochastic-depth"))
    )
    pace, deep_pace = swapped["images_per_second"], dropped["images_per_second"]
    outside = max(row["share_outside"] for row in speed if row["variant"] == "residrop")
    saved = one(entries("stochastic-depth_table-2_cpu_scale1"), id="stochastic-depth/table-2/saved-cifar10")
    rates = find("sd-regularization/table-1")
    measured = {
        row["id"].rpartition("/")[2]: row["measured"][0] for row in entries(f"{rates.id.replace('/', '_')}_cpu_scale1")
    }
    away = max(abs(measured[row.key] - row.theory) for row in rates.rows)
    printed = max(abs(row.published - row.theory) for row in rates.rows)
    text = " ".join((ROOT / "README.md").read_text().split())
    for words in (
        f"**{skip(time, deep, *block)}** (by row {skip(time, deep, *row)}) | "
        f"timm `DropPath` {skip(time, deep, *timm)}, torchvision {skip(time, deep, *vision)} |",
        f"**{skip(kept, deep, *block)}** (by row {skip(kept, deep, *row)}) | both {skip(kept, deep, *timm)} |",
        f"**{skip(time, vit, *block)}** (by row {skip(time, vit, *row)}) | both {skip(time, vit, *vision)} |",
        "**{:.0f}** at constant depth, {:.0f} with stochastic depth, {:.0f} with swapout | ".format(*images),
        f"with swapout | the usual loop {images[3]:.0f} |",
        f"makes {images[0]:.0f} images a second with ResNet-20, {times_loop:.2f} times the usual loop",
        f"under swapout {swapout_loop:.2f} times",
        f"Without a compiler it is {eager_loop:.2f} times the loop, {eager_deep:.2f} with stochastic depth",
        f"of what a step spends outside the network are at most {math.ceil(100 * outside)}%",
        f"it is {times[0]:.1f} to {times[-1]:.1f} times the loop and {bare[0]:.0%} to {bare[-1]:.0%} of what".replace(
            "% to", " to"
        ),
        f"with stochastic depth {more[0]:.1f} to {more[-1]:.1f} times (",
        f"{round(pace, -2):,.0f} images a second under swapout, {swapped['relative_to_plain']:.1f} times the loop: ",
        f"256 epochs of CIFAR-10 at that pace are {256 * 50_000 / pace / 60:.1f} minutes",
        f"under stochastic depth {round(deep_pace, -2):,.0f}, {dropped['relative_to_plain']:.1f} times the loop",
        f"**{saved['measured'][0]:.1f}%** | Huang et al.: {saved['published']:.1f}% measured, 25% by formula |",
        f"{len(measured)} networks: largest distance to theory | **{away:.3f}** | Hayou & Ayed: {printed:.3f} |",
    ):
        assert words in text


def test_compiled_steps_are_those_measured():
    rows = json.loads((ROOT / "results" / "compiled_cpu_202611.json").read_text())["entries"]
    ratios = {(row["network"], row["variant"]): f"{row['relative_to_eager']:.2f}" for row in rows}
    names = list(dict.fromkeys(row["network"] for row in rows))
    text = (DOCS / "skipping.md").read_text()
    starts = [row["start_seconds"] for row in rows if row["variant"] == "residrop.compile"]
    assert f" and {min(starts):.0f} to {max(starts):.0f} seconds at the start" in text
    assert len(names) == 4
    for name in names:
        assert f" | {ratios[name, 'torch.compile']} | {ratios[name, 'residrop.compile']} |\n" in text


def test_short_trainings_of_readme_are_those_measured():
    def errors(file, metric="error"):
        seeds = {}  # of all documents: those of another version of torch are in one of their own
        for path in sorted((ROOT / "results").glob(f"{file}*.json")):
            for entry in json.loads(path.read_text())["entries"]:
                if entry["metric"] == metric:
                    seeds.setdefault(entry["id"].rpartition("/")[2], []).extend(entry["measured"])
        return {key: statistics.mean(measured) for key, measured in seeds.items()}

    once, sampled = (errors("swapout_table-2_w1_cpu_scale0.01", metric) for metric in ("error", "sampled_error"))
    schedules = {row.key.rpartition("-")[0] for row in find("swapout/table-2").rows}
    assert len(schedules) == 5
    gains = [once[f"{key}-deterministic"] - sampled[f"{key}-stochastic"] for key in schedules]
    figure = json.loads(
        (ROOT / "results" / "stochastic-depth_figure-8-left_resnet-20_cpu_scale0.01_2.json").read_text()
    )
    curves = {entry["curve"]: dict(zip(entry["x"], entry["y"], strict=True)) for entry in figure["entries"]}
    behind = [curves["uniform"][rate] - curves["linear decay"][rate] for rate in (0.2, 0.5, 0.8)]
    ratios = errors("depth-dropout_table-1_resnet-20_cpu_scale0.03")
    dropped = ", ".join(f"{ratios[ratio]:.1f}" for ratio in ("0.25", "0.5", "0.75"))
    deep = [errors(f"stochastic-depth_table-1_resnet-{depth}_cpu_scale0.01") for depth in (20, 32)]
    first, second = (f"{one['stochastic-cifar10']:.1f} against {one['constant-cifar10']:.1f}%" for one in deep)
    text = (ROOT / "README.md").read_text()
    assert len(gains) == 5
    for words in (
        f"for all five schedules, by {min(gains):.1f} to {max(gains):.1f} points |",
        f"at all of p_L = 0.2, 0.5, 0.8, by {min(behind):.1f} to {max(behind):.1f} points |",
        f"{dropped}% at 0.25, 0.5, 0.75; but {ratios['0.0']:.1f}% without |",
        f"not seen: {first} at 20 layers, {second} at 32 |",
    ):
        assert words in text


def test_budget_study_is_the_one_measured():
    rows = json.loads((ROOT / "results" / "budgets_cifar10_cpu_202611.json").read_text())["entries"]

    def cell(mode, budget):
        mine = [row for row in rows if (row["mode"], row["budget"]) == (mode, budget)]
        errors, times = ([row[key] for row in mine] for key in ("error", "relative_time"))
        if not mine:
            return "-"
        return f"{statistics.mean(errors):.1f} ± {statistics.stdev(errors):.1f} ({statistics.mean(times):.2f})"

    text = (DOCS / "theory.md").read_text()
    modes = ("uniform", "linear", "SenseMode", "adaptive", "cost-aware")
    for budget in (0.3, 0.5, 0.7, 0.9):
        assert f"| {budget:g} | {' | '.join(cell(mode, budget) for mode in modes)} |" in text
    assert f"whose error is {cell('full depth', 1.0).partition(' (')[0]}." in " ".join(text.split())
    once, again = (
        [
            statistics.mean(row["error"] for row in rows if (row["mode"], row["budget"]) == (mode, budget))
            for budget in (0.3, 0.5, 0.7, 0.9)
        ]
        for mode in ("SenseMode", "adaptive")
    )
    behind = [b - a for a, b in zip(once, again, strict=True)]
    assert f"{min(behind):.1f} to {max(behind):.1f} points behind" in " ".join(text.split())


# The site


class Tags(HTMLParser):
    """Ids, links and loaded resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link":
            self.loaded.append(given.get("href", ""))
        else:
            self.loaded += [given[name] for name in ("src", "srcset", "poster", "data") if name in given]

    def handle_data(self, data: str) -> None:
        self.loaded += loaded_by_style(data)


def loaded_by_style(text: str) -> list[str]:
    """What style sheets load; the drawings that they hold are no resources."""
    return [
        url for url in re.findall(r"""(?:url\(|@import )\s*["']?([^"')\s]+)""", text) if not url.startswith("data:")
    ]


def from_elsewhere(site: Path) -> list[str]:
    """Scripts, styles, fonts, images that pages or their style sheets load from the network."""
    loaded = [(page, url) for page in site.rglob("*.html") for url in Tags(page.read_text()).loaded]
    loaded += [(sheet, url) for sheet in site.rglob("*.css") for url in loaded_by_style(sheet.read_text())]
    return [f"{page.relative_to(site)}: {url}" for page, url in loaded if re.match(r"(https?:)?//", url)]


def broken_links(site: Path) -> list[str]:
    """Links within the site to files or anchors that are not there."""
    pages = {page.resolve(): Tags(page.read_text()) for page in site.rglob("*.html")}
    broken = []
    for page, tags in pages.items():
        for link in tags.links:
            scheme, host, path, _, anchor = urlsplit(link)
            if scheme or host:
                continue
            root = site if path.startswith("/") else page.parent
            target = (root / unquote(path).lstrip("/")).resolve() if path else page
            ids = pages[target].ids if target in pages else set()
            if not target.is_file() or (anchor and not anchor.startswith("__") and unquote(anchor) not in ids):
                broken.append(f"{page.relative_to(site.resolve())}: {link}")
    return broken


def public_names() -> dict[str, str]:
    """Every name that the package and its public folders export, and where it is defined."""
    names = [("residrop", name) for names in residrop._NAMES.values() for name in names]
    for folder in ("engines/distributed", "inference", "theory"):
        module = f"residrop.{folder.replace('/', '.')}"
        tree = ast.parse((ROOT / "src" / "residrop" / folder / "__init__.py").read_text())
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        names += [(module, alias.name) for node in imports for alias in node.names]
    found = {}
    for module, name in names:
        value = getattr(importlib.import_module(module), name)
        path = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else None
        found[f"{module}.{name}"] = path or f"{module}.{name}"
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    # not --quiet, under which nothing is left to be strict about
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


def test_site_is_whole_and_needs_no_network(site, capsys):
    """One test, so that several processes of pytest-xdist build it once."""
    assert from_elsewhere(site) == []
    assert broken_links(site) == []
    documented = set().union(*(Tags(page.read_text()).ids for page in (site / "api").glob("*.html")))
    missing = [name for name, path in public_names().items() if path not in documented]
    assert missing == [], f"give them a line in docs/api/: {missing}"
    page = Tags((site / "cli.html").read_text())
    cli.main(["--help"])
    listed = re.findall(r"^  (\w+)  +\S.*  residrop ", capsys.readouterr().out, re.MULTILINE)
    assert len(listed) >= 8
    assert set(listed) <= page.ids
    pages = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    reached = {link for link in Tags((site / "index.html").read_text()).links if not urlsplit(link).scheme}
    assert {str(page) for page in pages} <= {urlsplit(link).path for link in reached} | {"index.html"}


def test_site_checks_catch(tmp_path):
    (tmp_path / "a.html").write_text(
        """<h1 id="top">A</h1><a href="#top"></a><a href="b.html#here"></a><a href="https://arxiv.org/abs/1"></a>
        <a href="b.html#gone"></a><a href="c.html"></a><img src="a.png"><script src="//cdn.org/x.js"></script>
        <link href="https://fonts.org/f.css">
        <style>@import "https://fonts.org/g.css"; a {background: url(data:)}</style>"""
    )
    (tmp_path / "b.html").write_text("""<p id="here"></p><a href="./a.html"></a><a href="/a.html#top"></a>""")
    (tmp_path / "s.css").write_text("""@font-face {src: url('http://fonts.org/h.woff')} b {src: url("local.woff")}""")
    assert broken_links(tmp_path) == ["a.html: b.html#gone", "a.html: c.html"]
    assert len(from_elsewhere(tmp_path)) == 4
