"""transformers.Trainer with a model under rules."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

import residrop
from residrop.common.errors import ConfigError

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from residrop.engines.integrations.transformers import SamplerCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true:UserWarning")


class Texts(Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(3, 60, (64, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Watch(TrainerCallback):
    """What every optimizer update was made with: the sampler's step, and which branches have gradients."""

    def __init__(self) -> None:
        self.steps, self.live, self.static_draws = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(residrop.sampler_of(model).step)
        branches = [rules for block in model.model.layers for rules in block.residrop_branches()]
        self.live.append([_last(parts).weight.grad is not None for _, parts in branches])


def _last(parts):
    (body,) = [part for part in parts if hasattr(part, "down_proj") or hasattr(part, "o_proj")]
    return body.down_proj if hasattr(body, "down_proj") else body.o_proj


def trained(place: Path, *, steps: int = 6, resume: bool = False, per: str = "forward", accumulate: int = 1, **options):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    special = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**small, **special))
    residrop.apply(model, survival=0.5, seed=7)
    watch = Watch()
    arguments = TrainingArguments(
        output_dir=str(place),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.01,
        weight_decay=0.1,
        save_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    callbacks = [SamplerCallback(per), watch]
    trainer = Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(place / "checkpoint-3") if resume else None)
    return model, watch


def test_each_forward_is_a_step_and_dead_branches_stand_still(tmp_path):
    model, watch = trained(tmp_path, eval_strategy="steps", eval_steps=2)
    sampler = residrop.sampler_of(model)
    assert watch.steps == [1, 2, 3, 4, 5, 6]  # evaluation in between draws nothing
    for number, live in enumerate(watch.live):
        assert live == [draw.alive for draw in sampler.plan(number).draws]
    assert not all(map(all, watch.live))


def test_resumed_training_is_the_unbroken_one(tmp_path):
    """The two integers of the sampler are in the trainer's checkpoint, and taken from it."""
    model, watch = trained(tmp_path)
    written = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    state = written["stateful_callbacks"]["SamplerCallback"]
    assert state == {"args": {"per": "forward"}, "attributes": {"saved": {"seed": 7, "step": 3}}}
    for options in ({}, {"restore_callback_states_from_checkpoint": True}):
        again, rest = trained(tmp_path, resume=True, **options)
        assert rest.steps == watch.steps[3:]
        assert rest.live == watch.live[3:]
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_micro_batches_are_steps_or_share_one(tmp_path):
    _, watch = trained(tmp_path / "forwards", steps=3, accumulate=2)
    assert watch.steps == [2, 4, 6]
    model, watch = trained(tmp_path / "updates", steps=3, accumulate=2, per="update")
    sampler = residrop.sampler_of(model)
    assert sampler.step == 3
    assert watch.steps == [0, 1, 2]  # counted when the update is made
    assert watch.live == [[draw.alive for draw in sampler.plan(number).draws] for number in range(3)]
    again, rest = trained(tmp_path / "updates", steps=5, accumulate=2, per="update", resume=True)
    assert rest.steps == [3, 4]
    assert residrop.sampler_of(again).step == 5


def test_gradient_checkpointing_of_the_trainer(tmp_path):
    model, _ = trained(tmp_path / "plain", steps=3)
    for reentrant in (False, True):
        options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
        again, watch = trained(tmp_path / str(reentrant), steps=3, **options)
        assert watch.steps == [1, 2, 3]
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=1e-6)


def test_other_choices_are_refused():
    with pytest.raises(ConfigError, match=r"per is 'batch'; choose 'forward' .* or 'update'"):
        SamplerCallback("batch")  # pyright: ignore
