"""What a model returns, as tensors that can be averaged over passes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from residrop.common.checks import check_choice
from residrop.common.errors import ConfigError

__all__ = ["Head", "Kind", "Kinds", "Outputs", "Reader"]

Kind = Literal["classes", "tokens", "binary", "numbers", "detections"]
Kinds = Kind | Mapping[str, Kind] | None
Outputs = str | int | Sequence[str] | Callable[[Any], Any] | None

_MEANINGS = {
    "classes": "logits [n, C, ...] of C classes",
    "tokens": "logits [n, T, C]",
    "binary": "one logit for yes or no each",
    "numbers": "a regression",
    "detections": "a list of boxes, scores and labels",
}
_MAIN = ("logits", "out")  # of transformers' models for a task, of torchvision's segmentation models
_PROBLEMS: dict[str | None, Any] = {"regression": "numbers", "multi_label_classification": "binary"}
_SUM_OF_PROBABILITIES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # how far from 1 it may lie; else 1e-3


class Head(NamedTuple):
    """One thing that a model predicts.

    Attributes:
        kind: what its numbers are.
        class_dim: the dimension of classes.
        has_variance: of numbers, whether the model predicts their variance, too.
    """

    kind: Kind
    class_dim: int = 1
    has_variance: bool = False


class Reader:
    """From a model's output to what is averaged: probabilities, numbers, or lists of detections.

    Calling it gives a tuple with one element a head (in the order of `heads`): Tensor[rows, ...] float32 (float64 of
    numbers in float64); of numbers with a variance Tensor[rows, 2, ...]; of detections a list of one dict an image.

    Args:
        outputs: which part of the output is meant: the name of a field, the index in a tuple, names of several fields,
            or a function from the output to a tensor, to a pair (mean, variance) of tensors, or to a dict of these.
            None takes a tensor, or the field `logits` or `out`.
        kind: what it is, one for all heads or one a head; None tells it from the output.
        shapes: of the inputs.
        model: whose output it is, for its `config.problem_type`.

    Raises:
        ConfigError: an unknown kind. When it is called: no such output, what it means cannot be told, or it is not
            what `kind` says. The message lists the choices.
    """

    def __init__(
        self,
        outputs: Outputs = None,
        kind: Kinds = None,
        shapes: Sequence[torch.Size] = (),
        model: nn.Module | None = None,
    ) -> None:
        for given in kind.values() if isinstance(kind, Mapping) else [kind] * (kind is not None):
            check_choice("kind", given, Kind)
        self._outputs, self._kind = outputs, kind
        self._inner = [shape[1:] for shape in shapes]
        self._problem = getattr(getattr(model, "config", None), "problem_type", None)
        self.heads: dict[str | None, Head] | None = None  # None until something was read

    def __call__(self, output: Any) -> tuple[Any, ...]:
        found = self._picked(output)
        if not found:
            raise ConfigError(f"outputs is {self._outputs!r}; name at least one")
        for name, value in found.items():
            if isinstance(value, Tensor) and not value.ndim:
                raise ConfigError(f"output {name!r} is one number for all inputs; give a tensor with the batch first")
        if self.heads is None:
            unknown = set(self._kind) - set(found) if isinstance(self._kind, Mapping) else set()
            if unknown:
                names = ", ".join(map(repr, found))
                raise ConfigError(f"kind has {sorted(unknown)}, which outputs= does not; it has {names}")
            self.heads = {name: self._head(name, value, output) for name, value in found.items()}
        return tuple(_READ[head.kind](found[name]) for name, head in self.heads.items())

    def mirrored_back(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """What was read of mirror images, Tensor[passes, rows, ...] a head, as if of the images themselves.

        Raises:
            ConfigError: these are not classes of images or of pixels.
        """
        assert self.heads is not None
        for head, value in zip(self.heads.values(), values, strict=True):
            if head.kind not in ("classes", "binary") or (head.kind == "classes" and value.ndim == 4):
                raise ConfigError(
                    f"flips=True takes classes of images or pixels, not {head.kind} of shape {list(value.shape[1:])}, "
                    "whose mirror image it does not know"
                )
        return tuple(value.flip(-1) if value.ndim > 4 else value for value in values)

    def _picked(self, output: Any) -> dict[str | None, Any]:
        outputs = self._outputs
        if callable(outputs):
            value = outputs(output)
            return dict(value) if isinstance(value, Mapping) else {None: value}
        if isinstance(outputs, (str, int)):
            return {None: _part(output, outputs)}
        if outputs is not None:
            return {name: _part(output, name) for name in outputs}
        if isinstance(output, Tensor) or _is_detections(output):
            return {None: output}
        parts = _parts(output)
        tensors = [name for name, value in parts.items() if isinstance(value, Tensor)]
        main: list[Any] = [name for name in _MAIN if name in tensors]
        if not isinstance(output, Mapping) and len(tensors) == 1:
            main = tensors
        if "pred_boxes" in tensors:
            raise ConfigError(
                f"the model returns {_listed(parts)}, boxes that are not yet detections; give a function that makes a "
                "list of dicts with boxes, scores and labels of it (transformers: "
                "outputs=lambda o: processor.post_process_object_detection(o))"
            )
        if len(main) != 1:
            raise ConfigError(
                f"the model returns {_listed(parts) or type(output).__name__}; say which of it is meant: outputs= a "
                "name or index, a list of names (several heads), or a function from the output to a tensor"
            )
        return {None: parts[main[0]]}

    def _head(self, name: str | None, value: Any, output: Any) -> Head:
        kind: Any = self._kind
        if isinstance(kind, Mapping):
            if name not in kind:
                raise ConfigError(f"kind has no entry for output {name!r}; it has {', '.join(map(repr, kind))}")
            kind = kind[name]
        kind = kind or self._told(name, value, output)
        paired = isinstance(value, tuple)
        if paired and kind != "numbers":
            raise ConfigError(f"outputs gives a pair, which only kind='numbers' takes (mean, variance), not {kind!r}")
        if kind in ("classes", "tokens"):
            _check_logits(value, kind)
        return Head(kind, value.ndim - 1 if kind == "tokens" else 1, has_variance=paired)

    def _told(self, name: str | None, value: Any, output: Any) -> Kind:
        if _is_detections(value):
            return "detections"
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] >= 2:
            if value.ndim == 2:
                return _PROBLEMS.get(self._problem, "classes")
            if value.ndim >= 4 and value.shape[1:] not in self._inner:
                return "classes"
            maker = type(output).__name__
            if value.ndim == 3 and ("LMOutput" in maker or maker.startswith("TokenClassifier")):
                return "tokens"
        what = "the output" if name is None else f"output {name!r}"
        said = f"has shape {list(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        choices = ", ".join(f"{kind!r} ({meaning})" for kind, meaning in _MEANINGS.items())
        raise ConfigError(f"{what} {said}, which does not tell what it means; give kind= one of {choices}")


def _parts(output: Any) -> dict[str | int, Any]:
    """Fields of a mapping, elements of a sequence; nothing of anything else."""
    if isinstance(output, Mapping):
        return {name: value for name, value in output.items() if value is not None}
    return dict(enumerate(output)) if isinstance(output, (tuple, list)) else {}


def _listed(parts: Mapping[str | int, Any]) -> str:
    shown = {name: list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for name, v in parts.items()}
    return ", ".join(f"{name!r} {what}" for name, what in shown.items())


def _part(output: Any, name: str | int) -> Any:
    parts = _parts(output)
    if isinstance(name, int) and -len(parts) <= name < 0 and not isinstance(output, Mapping):
        name += len(parts)
    if name in parts:
        return parts[name]
    if isinstance(name, str) and not isinstance(output, Tensor) and getattr(output, name, None) is not None:
        return getattr(output, name)
    raise ConfigError(f"the model's output has no {name!r}; it is {_listed(parts) or type(output).__name__}")


def _is_detections(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, Mapping) and {"boxes", "scores", "labels"} <= one.keys() for one in value
    )


def _check_logits(value: Any, kind: str) -> None:
    """ConfigError unless this can be logits of at least two classes."""
    least, dim = (2, 1) if kind == "classes" else (3, -1)
    if not _is_floating(value) or value.ndim < least or value.shape[dim] < 2:
        what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"the output is {what}, not {_MEANINGS[kind]} with at least two classes; the softmax of one number is 1 "
            "whatever it is (kind='binary' takes one logit for yes or no)"
        )
    if value.numel() == 0:
        return
    values = value.detach().float()
    sums = values.sum(dim=dim) - 1.0
    if bool((values.amin() >= 0.0) & (sums.abs().amax() < _SUM_OF_PROBABILITIES.get(value.dtype, 1e-3))):
        raise ConfigError(
            "the output is not negative and sums to 1 over the classes: probabilities, not logits; give their "
            "logarithm (outputs=torch.log), whose softmax they are"
        )


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _floats(value: Any, kind: str) -> Tensor:
    if not _is_floating(value):
        what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"the output is {what}, which cannot be {_MEANINGS[kind]}; give a floating-point tensor")
    return value.float()


def _classes(value: Tensor) -> Tensor:
    return value.float().softmax(dim=1)


def _tokens(value: Tensor) -> Tensor:
    return value.float().softmax(dim=-1)


def _binary(value: Any) -> Tensor:
    """One logit z each: no and yes as two classes in dimension 1, [n], [n, 1] to [n, 2]; [n, K] to [n, 2, K]."""
    logits = _floats(value, "binary")
    if logits.ndim > 1 and logits.shape[1] == 1:
        logits = logits.squeeze(1)
    return torch.stack((torch.sigmoid(-logits), torch.sigmoid(logits)), dim=1)


def _numbers(value: Any) -> Tensor:
    parts = value if isinstance(value, tuple) else (value,)
    parts = [part if _is_floating(part) and part.dtype == torch.float64 else _floats(part, "numbers") for part in parts]
    if len(parts) == 1:
        return parts[0].clone()  # a model may give the same memory in every pass
    if len(parts) != 2 or parts[0].shape != parts[1].shape:
        shapes = " and ".join(str(list(part.shape)) for part in parts)
        raise ConfigError(f"numbers are a tensor or a pair (mean, variance) of one shape; outputs gives {shapes}")
    return torch.stack(parts, dim=1)


def _detections(value: Any) -> list[dict[str, Tensor]]:
    if not _is_detections(value):
        raise ConfigError(f"the output is a {type(value).__name__}, not a list of dicts with boxes, scores and labels")
    return [
        {
            "boxes": one["boxes"].detach().float(),
            "scores": one["scores"].detach().float(),
            "labels": one["labels"].detach(),
        }
        for one in value
    ]


_READ: dict[Kind, Callable[[Any], Any]] = {
    "classes": _classes,
    "tokens": _tokens,
    "binary": _binary,
    "numbers": _numbers,
    "detections": _detections,
}
assert set(_READ) == set(_MEANINGS) == set(get_args(Kind))
