"""For `transformers.Trainer`."""

from typing import Any

from residrop.common.extras import extra
from residrop.engines.integrations.updates import Per, Updates, check_per, started
from residrop.schedule.sampler import DepthSampler

with extra("transformers"):
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

__all__ = ["SamplerCallback"]


class SamplerCallback(TrainerCallback, ExportableState):
    """Saves the sampler of the trained model with the trainer's checkpoints and takes it up on resuming.

    `Trainer(model, ..., callbacks=[SamplerCallback()])`, where `model` is attached, or was given to `residrop.apply`,
    before. The state is two integers in trainer_state.json.

    Args:
        per: what a step of the sampler is. "forward": each training forward, so an update of k micro-batches
            (`gradient_accumulation_steps`) takes k steps. "update": each optimizer update; its micro-batches have the
            same block coins, and times of a timing are updates.

    Raises:
        ConfigError: another `per`; when training begins, a model that was never attached.
        RankError: when training begins, ranks that would not draw the same.
    """

    def __init__(self, per: Per = "forward") -> None:
        self.per: Per = check_per(per)
        self.saved: dict[str, int] | None = None  # of the checkpoint, if the trainer restores callbacks by itself
        self._sampler: DepthSampler | None = None
        self._updates: Updates | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer writes into trainer_state.json."""
        saved = None if self._sampler is None else self._sampler.state_dict()
        return {"args": {"per": self.per}, "attributes": {"saved": saved}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        written = (state.stateful_callbacks or {}).get(type(self).__name__, {})
        written = written[0] if isinstance(written, list) else written
        self._sampler = started(model, self.saved or written.get("attributes", {}).get("saved"))
        self._updates = Updates(self._sampler) if self.per == "update" else None
        self.saved = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._updates is not None:
            self._updates.begin()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._updates is not None:
            self._updates.end(updated=False)
            self._updates.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._updates is not None:
            self._updates.end(updated=True)
