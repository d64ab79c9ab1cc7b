"""A transformers Trainer over a model whose branches are present at random, stopped and resumed.

    python examples/transformers_trainer.py

A small Llama learns to continue arithmetic progressions modulo 11. `residrop.apply` puts the attention and the MLP of
every layer under a coin of their own; what a coin leaves out is not computed, in forward and backward. Then the same
training is stopped halfway and resumed by another trainer: `SamplerCallback` keeps the draws in the checkpoint, so it
ends with the weights of the one that was not stopped. Needs transformers and accelerate.
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import residrop
from residrop.engines.integrations.transformers import SamplerCallback

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
steps = parser.parse_args().steps

MODULUS, LENGTH = 11, 12


def progressions(count, seed):
    """Rows start, start + d, start + 2 d, ... modulo 11, as token ids."""
    draw = torch.Generator().manual_seed(seed)
    start, difference = torch.randint(MODULUS, (2, count, 1), generator=draw)
    return (start + difference * torch.arange(LENGTH)) % MODULUS


def make():
    """A Llama of 6 layers, its branches under linear decay to 0.5."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    tokens = {"vocab_size": MODULUS + 3, "pad_token_id": 11, "bos_token_id": 12, "eos_token_id": 13}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens))
    return model, residrop.apply(model, survival="linear_decay(0.5)", seed=1)


def train(model, folder, until, resume=False):
    """Train up to `until` updates of all `steps`."""
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=until,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        save_steps=steps // 2,
        logging_steps=steps // 4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in progressions(2048, seed=1)]
    Trainer(model, settings, train_dataset=data, callbacks=[SamplerCallback()]).train(resume_from_checkpoint=resume)


whole, report = make()
print(report)
with tempfile.TemporaryDirectory() as folder, residrop.observe(whole) as seen:
    train(whole, folder, steps)
print(seen)

with tempfile.TemporaryDirectory() as folder:
    model, _ = make()
    train(model, folder, steps // 2)
    model, _ = make()
    train(model, folder, steps, resume=True)
pairs = zip(model.parameters(), whole.parameters(), strict=True)
off = max(float((one - other).detach().abs().max()) for one, other in pairs)
print(f"stopped and resumed: {residrop.sampler_of(model).step} steps drawn, weights off by {off:.1e}")

unseen = progressions(512, seed=2)
with torch.no_grad():
    wrong = model.eval()(input_ids=unseen).logits[:, 1:-1].argmax(-1) != unseen[:, 2:]
print(f"next terms of unseen progressions: {100.0 * float(wrong.float().mean()):.1f}% wrong")
