"""Passes over training images that measure what goes into batch norms."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residrop.common.errors import ConfigError

__all__ = ["Batches", "at_once", "by_layers"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Batches:
    """The batches taken, as arguments of the model; counts them and their rows."""

    def __init__(self, data: Any, limit: int, device: torch.device) -> None:
        if isinstance(data, Tensor | str | Mapping) or not isinstance(data, Iterable):
            what = "one tensor" if isinstance(data, Tensor) else f"a {type(data).__name__}"
            raise ConfigError(f"data is {what}; give batches of it, such as a DataLoader or images.split(128)")
        self.data, self.limit, self.device = data, limit, device
        with contextlib.suppress(TypeError):
            self.limit = min(limit, len(data))  # pyright: ignore[reportArgumentType]
        self.taken = self.images = 0

    def __iter__(self) -> Iterator[Inputs]:
        for batch in self.data:
            inputs = self._arguments(batch)
            first = next((one for one in (*inputs[0], *inputs[1].values()) if isinstance(one, Tensor)), None)
            if first is None:
                raise ConfigError(f"a batch is {type(batch).__name__} without tensors; give tensors or (x, labels)")
            self.taken += 1
            self.images += len(first)
            yield inputs
            if self.taken == self.limit:
                break
        if not self.taken:
            raise ConfigError("data has no batches; give at least one")

    def _arguments(self, batch: Any) -> Inputs:
        if isinstance(batch, Mapping):
            return (), {name: self._moved(value) for name, value in batch.items()}
        return (self._moved(batch[0] if isinstance(batch, Sequence) else batch),), {}

    def _moved(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value


class _Moments:
    """Count, mean and squared deviations of every channel, in float64 (merged as in Chan, Golub & LeVeque 1983)."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Count the values of x, Tensor[N, C, ...], in; returns their own mean and (biased) variance, Tensor[C]."""
        values = x.detach().double()
        var, mean = torch.var_mean(values, dim=[0, *range(2, x.ndim)], correction=0)
        added, before = x.numel() // x.shape[1], self.count
        if not added:
            return mean, var
        self.count += added
        step = mean - self.mean
        self.squares = self.squares + var * added + step.square() * (before * added / self.count)
        self.mean = self.mean + step * (added / self.count)
        return mean, var

    def give(self, norm: Any) -> None:
        """Make these the running statistics of a batch norm."""
        if self.count < 2:
            raise ConfigError(f"{self.name} saw one value per channel, which has no variance; give more images")
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.squares / (self.count - 1))


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def at_once(model: nn.Module, source: Batches, norms: Mapping[str, Any], tell: Callable[[float], None]) -> list[str]:
    moments = {name: _Moments(name) for name in norms}
    with contextlib.ExitStack() as hooks:
        for name, norm in norms.items():
            hooks.callback(norm.register_forward_pre_hook(_by_the_batch(moments[name]), with_kwargs=True).remove)
        for args, kwargs in source:
            model(*args, **kwargs)
            tell(min(source.taken / source.limit, 1.0))
    seen = [name for name, found in moments.items() if found.count]
    for name in seen:
        moments[name].give(norms[name])
    return seen


def _by_the_batch(moments: _Moments) -> Callable[..., None]:
    """A hook that lets a batch norm normalise by the statistics of its input, which it counts in."""

    def hook(norm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        mean, var = moments.add(_input(args, kwargs))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)

    return hook


class _Enough(Exception):
    """Ends a pass at the layer that it is for."""


def by_layers(model: nn.Module, source: Batches, norms: Mapping[str, Any], tell: Callable[[float], None]) -> list[str]:
    names = {norm: name for name, norm in norms.items()}
    inputs = list(source)
    seen: list[str] = []
    stages = _stages(model, inputs[0])
    last = max((i for i, stage in enumerate(stages) if any(one in names for one in stage.modules())), default=0)
    for number, stage in enumerate(stages[: last + 1]):
        calls = _calls(stage, inputs[0], [norm for norm in stage.modules() if norm in names])
        for norm, count in calls.items():
            moments = _Moments(names[norm])
            for args, kwargs in inputs:
                _up_to(norm, count, moments, stage, args, kwargs)
            moments.give(norm)
            if names[norm] not in seen:
                seen.append(names[norm])
            tell(len(seen) / len(norms))
        if number < last:
            inputs = [((stage(*args),), {}) for args, _ in inputs]
    return seen


def _calls(stage: nn.Module, inputs: Inputs, norms: Sequence[nn.Module]) -> dict[nn.Module, int]:
    """The batch norms that are run, in their order, and how many times each."""
    counts: dict[nn.Module, int] = {}

    def count(norm: nn.Module, args: Any) -> None:
        counts[norm] = counts.get(norm, 0) + 1

    with contextlib.ExitStack() as hooks:
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(count).remove)
        stage(*inputs[0], **inputs[1])
    return counts


def _up_to(norm: nn.Module, calls: int, moments: _Moments, stage: nn.Module, args: Any, kwargs: Any) -> None:
    """Run a stage until `norm` is called for the last time; its inputs are counted in.

    A layer that is called several times normalises by the batch at hand until then: what it will do depends on itself.
    """
    left, count_in = calls, _by_the_batch(moments)

    def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left:
            count_in(norm, args, kwargs)
        else:
            moments.add(_input(args, kwargs))
            raise _Enough

    handle = norm.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_Enough):
            stage(*args, **kwargs)
    finally:
        handle.remove()


def _stages(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """Modules that, one after another, are the model; the model itself unless that is seen to be so."""
    args, kwargs = inputs
    parts = list(_parts(model))
    modules = [one for part in parts for one in part.modules()]
    if kwargs or parts == [model] or len(set(modules)) < len(modules) or not isinstance(args[0], Tensor):
        return [model]
    try:
        y = args[0]
        for part in parts:
            y = part(y)
        same = torch.allclose(y, model(*args), rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):
        same = False
    return parts if same else [model]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _parts(child)
    elif [name for name, _ in module.named_children()] == ["stem", "blocks", "tail"]:
        for child in module.children():
            yield from _parts(child)
    else:
        yield module
