"""For Lightning's `Trainer`."""

from typing import Any

from residrop.common.extras import extra
from residrop.engines.integrations.updates import Per, Updates, check_per, started
from residrop.schedule.sampler import DepthSampler

with extra("lightning"):
    from lightning.pytorch import Callback

__all__ = ["SamplerCallback"]


class SamplerCallback(Callback):
    """Saves the sampler of the trained model with Lightning's checkpoints and takes it up on resuming.

    `Trainer(..., callbacks=[SamplerCallback()])`. Attach, or give to `residrop.apply`, the module that `training_step`
    calls (`self.model`), in `__init__` or `configure_model`: Lightning calls the LightningModule's own forward only
    under some strategies. The state is two integers.

    Args:
        per: what a step of the sampler is. "forward": each training forward, so an update of k micro-batches
            (`accumulate_grad_batches`) takes k steps. "update": each optimizer update; its micro-batches have the same
            block coins, and times of a timing are updates.

    Raises:
        ConfigError: another `per`; when training begins, a model that was never attached.
        RankError: when training begins, ranks that would not draw the same.
    """

    def __init__(self, per: Per = "forward") -> None:
        self.per: Per = check_per(per)
        self._sampler: DepthSampler | None = None
        self._updates: Updates | None = None
        self._updated = 0
        self._saved: dict[str, int] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._sampler = started(pl_module, self._saved)
        self._updates = Updates(self._sampler) if self.per == "update" else None
        self._saved = {}

    def state_dict(self) -> dict[str, Any]:
        """What goes into the checkpoint."""
        return dict(self._saved) if self._sampler is None else dict(self._sampler.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by the trainer before `on_fit_start`, when it resumes."""
        self._saved = dict(state_dict)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._updates is not None:
            self._updated = trainer.global_step
            self._updates.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._updates is not None:
            self._updates.end(updated=trainer.global_step > self._updated)
