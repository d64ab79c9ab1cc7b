"""A model's own dropout modules in sampled passes: their masks are functions of the seed, the pass and the row."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from residrop.common.errors import ConfigError
from residrop.functional.units import placed, unit_dropout, unit_mask
from residrop.schedule.sampler import derive_key

__all__ = ["Dropouts", "dropping"]

_ELEMENTS = (nn.Dropout,)
_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_OTHERS = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_STREAM = 0xD80  # parts these keys from those of plans


class Dropouts:
    """The dropout modules of a model with p > 0. Every pass has to be announced to `begin`.

    Args:
        model: any.
        seed: of the sampler.
        rows: of the batch.

    Raises:
        ConfigError: it has none, has some that cannot be sampled, or is compiled as a whole.
    """

    def __init__(self, model: nn.Module, seed: int, rows: int) -> None:
        self.seed, self.total = seed, rows
        self.numbers: dict[nn.Module, int] = {}
        for module in model.modules():
            if isinstance(module, _OTHERS) and module.p > 0:
                raise ConfigError(f"dropout=True does not sample {type(module).__name__}; only nn.Dropout and 1d to 3d")
            plain = isinstance(module, _ELEMENTS + _CHANNELS) and type(module).forward in _FORWARDS
            if plain and float(module.p) > 0:  # pyright: ignore[reportArgumentType]
                self.numbers[module] = len(self.numbers)
        if not self.numbers:
            raise ConfigError(f"dropout=True, but {type(model).__name__} has no nn.Dropout with p > 0 to sample")
        if any(module._compiled_call_impl is not None for module in model.modules()) or _is_compiled(model):
            raise ConfigError("dropout=True cannot reach into a compiled model; give the model as it was before")
        self._calls = Counter[nn.Module]()
        self._pass = 0
        self._rows: Tensor | None = None
        self.called = False
        self.on_call: Any = None  # called before every mask

    def begin(self, number: int, rows: Tensor | None) -> None:
        """The pass with this number comes next, on these rows of the batch (int64 Tensor[m]; None is all)."""
        self._calls.clear()
        self._pass, self._rows = number, rows

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook: the input with some units absent, the others divided by the probability to be present."""
        if self.on_call is not None:
            self.on_call()
        x: Tensor = args[0] if args else output
        key = derive_key(self.seed, _STREAM, self._pass, self.numbers[module], self._calls[module])
        self._calls[module] += 1
        self.called = True
        present = 1.0 - module.p
        if present <= 0.0:
            return torch.zeros_like(x)
        if isinstance(module, _ELEMENTS) and self._rows is None:
            return unit_dropout(x, present, key) / present
        like = x if isinstance(module, _ELEMENTS) else x[(..., *[slice(0, 1)] * (x.ndim - 2))]
        return x * self._mask(like, present, key) / present

    def _mask(self, like: Tensor, present: float, key: int) -> Tensor:
        """Bool mask like `like`; rows of a part have those of their places in the whole batch."""
        rows = self._rows
        if rows is None or len(like) % len(rows):
            return unit_mask(like, present, key)
        each = len(like) // len(rows)  # windows of an image, say
        places = (rows[:, None] * each + torch.arange(each, device=rows.device)).flatten()
        with placed(places, self.total * each):
            return unit_mask(like, present, key)


_FORWARDS = {cls.forward for cls in _ELEMENTS + _CHANNELS}


def _is_compiled(model: nn.Module) -> bool:
    from torch._dynamo.eval_frame import OptimizedModule

    return any(isinstance(module, OptimizedModule) for module in model.modules())


@contextmanager
def dropping(dropouts: Dropouts | None) -> Iterator[None]:
    """Inside, these modules drop although they are in eval mode.

    Raises:
        ConfigError: on leaving without an error, none of them has been called.
    """
    if dropouts is None:
        yield
        return
    handles = [module.register_forward_hook(dropouts) for module in dropouts.numbers]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a whole encoder layer, which calls no dropout
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
    if not dropouts.called:
        raise ConfigError("dropout=True, but no pass has called any of the model's dropout modules")
