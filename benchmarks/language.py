"""Sub-networks of small language models: python benchmarks/language.py [--json FILE].

A Llama of transformers with random weights learns the characters of Python's reference texts (pydoc_data, which comes
with Python; the last tenth of every text is held out), at constant depth and with random depth. Then its sub-networks:
the held-out loss in bits a character by budget and way of choosing, means and standard errors over seeds; layers are
chosen on training text.

--curves FILE: instead, of the trainings with and without random depth of examples/language_model.py, which leaves that
file: held-out loss at their end, FLOPs and seconds.
"""

import argparse
import json
import math
import shlex
import sys
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, stdev
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import residrop
from residrop.cli.pictures import panels
from residrop.research import ledger

# one coin a layer and step, as in LayerDrop (Fan et al., 2020) and Stochastic Depth
WAYS = {"constant depth": None, "uniform 0.8": "uniform(0.8)", "linear decay to 0.5": "linear_decay(0.5)"}
LENGTH, HELD_OUT, WARMUP = 128, 0.1, 0.1


def texts() -> tuple[Tensor, Tensor, int]:
    """Training and held-out characters as numbers, int64, and how many there are."""
    parts = [topics[name] for name in sorted(topics)]
    number = {character: index for index, character in enumerate(sorted(set("".join(parts))))}
    cuts = [int(len(part) * (1.0 - HELD_OUT)) for part in parts]
    kept = "".join(part[:cut] for part, cut in zip(parts, cuts, strict=True))
    held_out = "".join(part[cut:] for part, cut in zip(parts, cuts, strict=True))
    train, test = (torch.tensor([number[character] for character in text]) for text in (kept, held_out))
    return train, test, len(number)


def batch_of(text: Tensor, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Pieces from random places, as a model of transformers takes them."""
    starts = torch.randint(len(text) - LENGTH, (size, 1), generator=generator)
    pieces = text[starts + torch.arange(LENGTH)]
    return {"input_ids": pieces, "labels": pieces}


def trained(way: str, seed: int, text: Tensor, characters: int, arguments: argparse.Namespace) -> nn.Module:
    """A network, trained: AdamW, linear warm-up, cosine."""
    torch.manual_seed(seed)
    width = arguments.width
    config = transformers.LlamaConfig(
        vocab_size=characters,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    if survival := WAYS[way]:
        residrop.apply(model, survival=survival, seed=seed)
    steps = arguments.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.98))
    warmup = WARMUP * steps
    rates = LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in track(range(steps), f"{way}, seed {seed}", console=Console(stderr=True)):
        loss = model(**batch_of(text, arguments.batch_size, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
    return model.eval()


@torch.no_grad()
def bits(model: nn.Module, text: Tensor) -> float:
    """Loss in bits a character, over all pieces of a text."""
    pieces = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in pieces.split(32)]
    return sum(losses) / len(pieces) / math.log(2)


def curves(path: Path) -> list[dict[str, Any]]:
    """One row for every method: means over the seeds, and shares of the first method."""
    found = json.loads(path.read_text())
    rows: list[dict[str, Any]] = []
    for name, runs in found["curves"].items():
        ends = [run[-1] for run in runs]
        flops, seconds, bits = (list(values) for values in zip(*ends, strict=True))
        row: dict[str, Any] = {"method": name, "seeds": len(ends)}
        row |= {key: int(found["settings"][key]) for key in ("steps", "layers", "width")}
        row |= {"training_flops": fmean(flops), "training_seconds": fmean(seconds), "final_bits": fmean(bits)}
        if len(bits) > 1:
            row["final_bits_se"] = stdev(bits) / math.sqrt(len(bits))
        base = rows[0] if rows else row
        row |= {f"{key}_of_first": row[key] / base[key] for key in ("training_flops", "training_seconds")}
        rows.append(row)
    table = Table("method", "bits a character", "x FLOPs", "x seconds")
    for row in rows:
        spread = f" ± {row['final_bits_se']:.3f}" if "final_bits_se" in row else ""
        shares = (f"{row[f'training_{unit}_of_first']:.3f}" for unit in ("flops", "seconds"))
        table.add_row(row["method"], f"{row['final_bits']:.3f}{spread}", *shares)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Loss against the share of FLOPs, a panel for every way of training, a line for every way of choosing."""
    ways = list(dict.fromkeys(row["trained"] for row in rows))
    title = f"Llama of {rows[0]['of']} layers: sub-networks"
    with panels(path, len(ways), title) as axes:
        for axis, way in zip(axes, ways, strict=True):
            for by in dict.fromkeys(row["by"] for row in rows):
                own = [row for row in rows if (row["trained"], row["by"]) == (way, by)]
                share, loss, bars = ([one.get(name, 0.0) for one in own] for name in ("share", "bits", "bits_se"))
                axis.errorbar(share, loss, bars, fmt=".-", capsize=2, label=by)
            highest = max(row["bits"] for row in rows)
            axis.set(
                title=f"trained with {way}",
                xlabel="share of FLOPs",
                ylabel="bits a character",
                ylim=(0, 1.05 * highest),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--by", nargs="+", default=["greedy", "removal", "sensitivity", "every_other", "first", "random"]
    )
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.0, 0.75, 0.5, 0.25], help="shares of the layers")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--work", type=Path, default=Path("runs/language"), help="folder of the trained models")
    parser.add_argument("--curves", type=Path, help="of examples/language_model.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG of the loss against FLOPs")
    arguments = parser.parse_args()
    if arguments.curves:
        rows = curves(arguments.curves)
        if arguments.json:
            what = "Small language models by published methods: loss, FLOPs and seconds of the training"
            command = "python examples/language_model.py; python benchmarks/language.py --curves"
            ledger.save(arguments.json, what, f"{command} runs/language_model/curves-1000-8-128.json", rows)
        return
    text, held_out, characters = texts()
    arguments.work.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for way in arguments.ways:
            kept = arguments.work / f"{way.replace(' ', '-')}-{arguments.steps}-seed{seed}"
            if not kept.exists():  # of a stopped benchmark
                network = trained(way, seed, text, characters, arguments)
                if WAYS[way]:
                    residrop.remove(network)
                network.save_pretrained(kept)
            model = transformers.LlamaForCausalLM.from_pretrained(kept)
            generator = torch.Generator().manual_seed(arguments.steps)
            batches = [batch_of(text, 32, generator) for _ in range(4)]
            points = residrop.frontier(
                model,
                batches,
                partial(bits, text=held_out),
                budgets={1.0, *arguments.budgets},
                unit="blocks",
                by=arguments.by,
                seed=seed,
            )
            for one in points:
                row = {"bits": one.metric, "layers": len(one.kept), "of": one.blocks}
                row["share"] = one.flops / points[0].flops  # the first is the whole network
                found.setdefault((way, one.by, float(one.budget.split()[0])), []).append(row)
    rows = []
    for (way, by, budget), points in found.items():
        values = [one["bits"] for one in points]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        rows.append(
            {"trained": way, "by": by, "budget": budget, "layers": points[0]["layers"], "of": points[0]["of"]}
            | {"seeds": len(values), "steps": arguments.steps, "width": arguments.width}
            | {"share": points[0]["share"], "bits": fmean(values)}
            | ({} if error is None else {"bits_se": error})
        )
    table = Table("trained with", "chosen by", "layers", "bits a character")
    for row in rows:
        spread = f" ± {row['bits_se']:.3f}" if "bits_se" in row else ""
        table.add_row(row["trained"], row["by"], f"{row['layers']} of {row['of']}", f"{row['bits']:.3f}{spread}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if arguments.picture:
        draw(arguments.picture, rows)
    if arguments.json:
        command = "python benchmarks/language.py"
        if arguments.ways != list(WAYS):
            command += f" --ways {shlex.join(arguments.ways)}"
        ledger.save(arguments.json, "Sub-networks of small language models", command, rows)


if __name__ == "__main__":
    main()
