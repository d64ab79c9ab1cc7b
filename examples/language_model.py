"""A small Llama learns to write, at constant depth, with layer dropout, and growing: its loss by FLOPs and by seconds.

    python examples/language_model.py

The text is Python's own reference (pydoc_data, which comes with Python), character by character; the last tenth of
every topic is held out. One line, `residrop.apply(model, **residrop.method(...))`, makes an unmodified model of
transformers train by a published method. "constant@0.79" is constant depth with 0.79 of the steps, for about as many
FLOPs as the layer dropout. Needs transformers and matplotlib; half an hour on two cores.
"""

import argparse
import json
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import residrop

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
default = ["constant", "constant@0.79", "dont-drop-dropout", "growth"]
parser.add_argument("--methods", nargs="+", default=default, help="names of residrop.METHODS, @ share of the steps")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--seeds", type=int, default=2)
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--out", type=Path, default=Path("runs/language_model"), help="folder of curves and picture")
given = parser.parse_args()
BATCH, LENGTH, POINTS = 16, 128, 20


def texts():
    """Training and held-out characters as numbers, and how many different ones there are."""
    pages = [topics[name] for name in sorted(topics)]
    number = {character: index for index, character in enumerate(sorted(set("".join(pages))))}
    parts = "".join(page[: -len(page) // 10] for page in pages), "".join(page[-len(page) // 10 :] for page in pages)
    return *(torch.tensor([number[character] for character in part]) for part in parts), len(number)


def make(characters, method, steps, seed):
    """A Llama with random weights that trains by `method` for so many steps."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": given.width, "intermediate_size": 8 * given.width // 3, "num_attention_heads": 4}
    tokens = {"vocab_size": characters, "max_position_embeddings": LENGTH, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_hidden_layers=given.layers))
    how = {"rule": "constant", "survival": 1.0} if method == "constant" else residrop.method(method, steps)
    residrop.apply(model, **how, seed=seed)
    return model


@torch.no_grad()
def bits(model, text, plan):
    """Held-out loss in bits a character; `plan` says which layers there are, None is all."""
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)[::2]  # every other piece is enough
    with residrop.using(model.eval(), plan) if plan else torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(64)]
    model.train()
    return sum(losses) / len(rows) / math.log(2)


def train(name, text, held_out, characters, seed):
    """Points (FLOPs, seconds, held-out loss) along a training: AdamW, warm-up, a constant rate that falls at last."""
    method, _, share = name.partition("@")
    steps = round(float(share or 1) * given.steps)
    model = make(characters, method, steps, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    rate = LambdaLR(optimizer, lambda step: min((step + 1) / 100, 1.0, 5 * (1 - step / steps)))
    draw, sampler = torch.Generator().manual_seed(seed), residrop.sampler_of(model)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model.eval()(input_ids=text[: BATCH * LENGTH].view(BATCH, LENGTH))
    layers = residrop.branch_flops(model, input_ids=text[: BATCH * LENGTH].view(BATCH, LENGTH))
    points, seconds, seen = [], 0.0, residrop.observe(model.train(), layers)
    for step in tqdm(range(steps), f"{name}, seed {seed}"):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=draw)
        tokens, started = text[starts + torch.arange(LENGTH)], time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        if (step + 1) % max(steps // POINTS, 1) == 0 or step + 1 == steps:  # a growing network is what it has so far
            loss = bits(model, held_out, sampler.plan(step) if method == "growth" else None)
            flops = 3 * (step + 1) * (whole.get_total_flops() - seen.skipped_flops * sum(layers))  # backward is 2 of 3
            points.append((flops, seconds, loss))
    return points


given.out.mkdir(parents=True, exist_ok=True)
settings = {name: getattr(given, name) for name in ("steps", "layers", "width")}
file = given.out / f"curves-{given.steps}-{given.layers}-{given.width}.json"
found = json.loads(file.read_text()) if file.exists() else {"settings": settings, "curves": {}}  # of a stopped run
data, curves = texts(), found["curves"]
for method in given.methods:
    for seed in range(len(curves.setdefault(method, [])), given.seeds):
        curves[method].append(train(method, *data, seed))
        file.write_text(json.dumps(found))
for method, runs in curves.items():
    ends, base = [run[-1] for run in runs], [run[-1] for run in curves[given.methods[0]]]
    flops, seconds = (sum(end[place] for end in ends) / sum(end[place] for end in base) for place in (0, 1))
    losses = ", ".join(f"{end[2]:.3f}" for end in ends)
    print(f"{method}: {losses} bits a character, {flops:.2f} of the FLOPs and {seconds:.2f} of the time of the first")
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
for place, unit in enumerate(("training FLOPs", "training seconds")):
    for color, (method, runs) in enumerate(curves.items()):
        for run in runs:
            x, label = [one[place] for one in run], method if run is runs[0] else None
            axes[place].plot(x, [one[2] for one in run], f"C{color}", label=label)
    axes[place].set(xlabel=unit, ylim=(None, 4.0))
axes[0].set(ylabel="held-out loss, bits a character")
axes[0].legend()
figure.savefig(given.out / "curves.png", dpi=120)
