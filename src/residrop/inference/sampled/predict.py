"""Predictions of a randomly present network: in expectation (one pass), or averaged over sampled passes."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from residrop.blocks.attach import in_expectation, rules_of, sampler_of
from residrop.blocks.modes import evaluating
from residrop.common.checks import check_whole
from residrop.inference.sampled.batch import Batch
from residrop.inference.sampled.outputs import Kinds, Outputs, Reader
from residrop.inference.sampled.predictions import NumberPrediction, Prediction, warn_if_not_finite
from residrop.inference.sampled.shared import passes
from residrop.inference.sampled.sums import sums_of

__all__ = ["Sampled", "default_samples", "predict", "predicted"]

_SAMPLES = 30  # as in the Swapout paper


def default_samples(model: nn.Module, dropout: bool = False) -> int:
    """Passes that `predict` makes of a model unless told: 30 if a rule draws unit by unit (Swapout), else 0.

    Under rules that leave whole branches out, the mean over passes was worse calibrated than one pass in expectation,
    and no better in error, in every training that was measured (docs/inference.md).
    """
    return _SAMPLES if dropout or any(rule.granularity == "unit" for rule in rules_of(model)) else 0


def predict(
    model: nn.Module,
    x: Any,
    samples: int | None = None,
    *,
    first: int = 0,
    keep: bool = False,
    stack: int | None = None,
    outputs: Outputs = None,
    kind: Kinds = None,
    dropout: bool = False,
    flips: bool = False,
) -> Any:
    """Predict for a batch what the model predicts: classes, numbers or detections.

    `samples=0` is deterministic inference: every coin is replaced by its mean (Swapout section 3, Huang eq. 5).
    `samples=N` averages probabilities (or numbers) of N passes with coins tossed and batch norm in eval mode; the paper
    takes 30. The model's training flags are left as they were.

    Samples share what is certain (`residrop.inference.sampled.shared`): in networks of `residrop.create`, and in an
    `nn.Sequential`, what comes before the first random block is computed once, and under block- and row-level rules
    also what comes before samples part; modules without rules must treat every row by itself there, as usual modules
    do in eval mode. Other models are called once a sample, their blocks as far as a sample differs from one before. The
    samples are those of single passes in `residrop.sampling`: equal draws; equal numbers up to rounding, which depends
    on how many rows go through the network at once. With `stack=1` no two samples do; under block- and unit-level
    rules they are then equal bit for bit.

    What is averaged, by `kind`:

    - "classes": softmax over dimension 1 of logits [n, C] or, of dense predictions, [n, C, ...].
    - "tokens": softmax over the last dimension of logits [n, T, C].
    - "binary": sigmoid of one logit each, [n] or [n, 1], as two classes, no and yes; of several independent questions
      [n, K] probabilities are [n, 2, K].
    - "numbers": a regression [n, ...]; `outputs` may give a pair (mean, variance).
    - "detections": a list of one dict an image with boxes, scores and labels, as torchvision's detectors return it
      (masks and key points are left out); see `residrop.inference.merge_detections`.

    With kind=None it is recognised: logits [n, C], C >= 2, are classes (unless the model's `config.problem_type` says
    otherwise); so are tensors of four or more dimensions, unless their shape is that of an input; three-dimensional
    `logits` of transformers' token classifiers and language models are tokens; lists of dicts are detections.
    Everything else is refused: one output might be a logit or a number. (A regression with several outputs [n, C] looks
    like logits: say kind="numbers".)

    Args:
        model: an attached network.
        x: the batch as the model takes it: Tensor[n, ...], a list of n inputs, a tuple of arguments, or a mapping of
            arguments by name.
        samples: number of sampled passes, 0 for deterministic; None is 30 if a rule draws unit by unit (Swapout) or
            dropout is sampled, else 0 (`default_samples`).
        first: number of the first sampled pass; the same number and seed give the same samples.
        keep: keep what the single passes give, of which quantiles are made; else memory does not grow with `samples`.
        stack: rows (inputs times samples) that go through the network together; None chooses for the device.
        outputs: which part of what the model returns is meant: a name, an index, a list of names (several heads), or a
            function from it to a tensor, a pair (mean, variance), or a dict of these, which is called with some rows
            at a time. None takes a tensor, or the field `logits` (transformers) or `out` (torchvision's segmentation).
        kind: see above; one for all heads, or one a head as a dict.
        dropout: in sampled passes, sample the model's own nn.Dropout (1d to 3d, too) as well. Masks are functions of
            the seed, the number of the pass and the row's place in the batch. Dropout inside attention kernels, which
            is no module, stays off.
        flips: passes of odd numbers see the images mirrored, left and right (of pixels, what they give is mirrored
            back); with samples=0 the two passes in expectation are averaged. For classes of images or pixels.

    Returns:
        A `Prediction` (classes, tokens, binary), `NumberPrediction` or `DetectionPrediction`; of several heads a dict.

    Warns:
        NotFiniteWarning: NaN or infinity for some inputs; they are named.

    Raises:
        ConfigError: a bad number, a model that is not attached, or an output whose meaning cannot be told.
    """
    found = predicted(
        model,
        x,
        default_samples(model, dropout) if samples is None else samples,
        first=first,
        keep=keep,
        stack=stack,
        outputs=outputs,
        kind=kind,
        dropout=dropout,
        flips=flips,
    )
    for one in found.values() if isinstance(found, dict) else (found,):
        if isinstance(one, Prediction):
            warn_if_not_finite(one.probabilities)
        elif isinstance(one, NumberPrediction):
            warn_if_not_finite(one.mean)
    return found


@torch.no_grad()
def predicted(
    model: nn.Module,
    x: Any,
    samples: int,
    *,
    first: int = 0,
    keep: bool = False,
    stack: int | None = None,
    outputs: Outputs = None,
    kind: Kinds = None,
    dropout: bool = False,
    flips: bool = False,
    on_pass: Callable[[tuple[Any, ...]], None] | None = None,
) -> Any:
    """As `predict`; `on_pass` is told what a `Reader` gives of every pass, in their order."""
    check_whole("samples", samples, least=0)
    stack = None if stack is None else check_whole("stack", stack, least=1)
    batch = Batch(x)
    read = Reader(outputs, kind, batch.shapes, model)
    if samples == 0:
        with _expectation(model):
            found = [read(batch.called(model))]
            if flips:
                values = tuple(value[None] for value in read(batch.mirrored().called(model)))
                found.append(tuple(value[0] for value in read.mirrored_back(values)))
        return _gathered(read, found, 0, keep, on_pass)
    sampler_of(model)
    with passes(model, batch, read, first=first, stack=stack, dropout=dropout, flips=flips) as sampled:
        return _gathered(read, sampled.stream(first, samples), samples, keep, on_pass)


def _expectation(model: nn.Module) -> AbstractContextManager[None]:
    """Eval mode without draws, also inside of `sampling`; a plan that was given by hand (`using`) is obeyed."""
    given = any(rule.sampler is not None and rule.sampler.in_force.given for rule in rules_of(model))
    return evaluating(model) if given else in_expectation(model)


def _gathered(
    read: Reader,
    found: Iterable[tuple[Any, ...]],
    samples: int,
    keep: bool,
    on_pass: Callable[[tuple[Any, ...]], None] | None,
) -> Any:
    """The prediction of passes in their order, a tuple of heads each."""
    sums = None
    for values in found:
        if sums is None:
            assert read.heads is not None
            sums = [sums_of(head, keep) for head in read.heads.values()]
        if on_pass is not None:
            on_pass(values)
        for total, value in zip(sums, values, strict=True):
            total.add(value)
    assert sums is not None
    assert read.heads is not None
    results = dict(zip(read.heads, (total.result(samples) for total in sums), strict=True))
    return results.get(None, results)


class Sampled(nn.Module):
    """A network that predicts by sampling when it is called: what the network takes, to probabilities or numbers.

    Not logits: the mean over samples is one of probabilities. The draws are the same in every call, so equal inputs
    give equal outputs; no gradient is recorded, and the network's own training flags do not matter.

    Called, it gives `Prediction.probabilities`, `NumberPrediction.mean` or `DetectionPrediction.images`, of several
    heads a dict of these.

    Args:
        model: an attached network; it is a child of this module under the name `model`.
        samples: number of sampled passes, 0 for deterministic.
        first: number of the first pass.
        details: give whole predictions with all samples instead.
        outputs: as in `predict`.
        kind: as in `predict`.
        dropout: as in `predict`.
        flips: as in `predict`.

    Raises:
        ConfigError: a bad number, or a model that is not attached.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int = _SAMPLES,
        *,
        first: int = 0,
        details: bool = False,
        outputs: Outputs = None,
        kind: Kinds = None,
        dropout: bool = False,
        flips: bool = False,
    ) -> None:
        super().__init__()
        self.samples = check_whole("samples", samples, least=0)
        self.first = check_whole("first", first, least=0)
        sampler_of(model)
        self.model = model
        self.details, self.outputs, self.dropout, self.flips = details, outputs, dropout, flips
        self.kind: Kinds = kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = predict(
            self.model,
            Batch.of_call(args, kwargs),
            self.samples,
            first=self.first,
            keep=self.details,
            outputs=self.outputs,
            kind=self.kind,
            dropout=self.dropout,
            flips=self.flips,
        )
        if self.details:
            return found
        return {name: _main(one) for name, one in found.items()} if isinstance(found, dict) else _main(found)

    def extra_repr(self) -> str:
        return f"samples={self.samples}, first={self.first}, details={self.details}"


def _main(found: Any) -> Any:
    return getattr(found, {Prediction: "probabilities", NumberPrediction: "mean"}.get(type(found), "images"))
