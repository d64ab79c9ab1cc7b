"""Sampling an input only while its decision is open.

The question is what the decision after all `max_samples` = N passes will be. The first n of them are n draws without
replacement from the N, so tests of a finite population's mean apply, and may be looked at after every pass: for a class
a that leads and any other class c, the hypothesis "a is not ahead of c after all N passes" is that the N differences
d_k = p_k[a] - p_k[c] in [-1, 1] have a mean of at most 0. A gambler stakes a share of his capital on the next d_k being
larger than the mean of the rest that would end in a draw. If the hypothesis holds, he has no better prospect than to
keep his capital: it exceeds 1/alpha at any time with probability at most alpha (Ville's inequality; Waudby-Smith &
Ramdas 2024, "Estimating means of bounded random variables by betting", sampling without replacement).

a settles when the capitals against all c exceed 1/(alpha w_a). The weights w_a are made of the first pass, which is not
betted on, and sum to 1 over the classes that may settle; so a class other than the final one settles with probability
at most alpha = 1 - confidence, for every input.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from residrop.blocks.attach import sampler_of
from residrop.common.checks import check_whole, is_number
from residrop.common.errors import ConfigError
from residrop.functional.units import row_normal
from residrop.inference.sampled.batch import Batch
from residrop.inference.sampled.outputs import Kinds, Outputs, Reader
from residrop.inference.sampled.predictions import warn_if_not_finite
from residrop.inference.sampled.shared import passes
from residrop.schedule.sampler import derive_key

__all__ = ["AdaptivePrediction", "check_confidence", "predict_adaptive"]

_CANDIDATES = 3  # classes that may settle: the likeliest of the first pass
_SMOOTHING = 0.1  # added to their probabilities, so that a first pass that misleads can be overruled
_BOLDNESS = 0.95  # largest stake, as a share of the one that may lose everything
_ORDERS = 0x0DE5  # parts the key of the orders of passes from those of plans
_VARIANCE = 0.05  # of a difference, before anything is known


class AdaptivePrediction(NamedTuple):
    """Class probabilities of n inputs, and how many passes they took.

    Attributes:
        probabilities: Tensor[n, classes] float32, the mean over the passes that the input was given.
        used: Tensor[n] int64, the number of those passes.
        settled: Tensor[n] bool, whether it stopped because its decision was settled, not because passes ran out.
        max_samples: the largest number of passes.
        confidence: probability, of every input, that its decision is that of `max_samples` passes; at least.
        class_dim: the dimension of classes in `probabilities` (which has places of dense outputs, as `Prediction`).
    """

    probabilities: Tensor
    used: Tensor
    settled: Tensor
    max_samples: int
    confidence: float
    class_dim: int = 1

    @property
    def classes(self) -> Tensor:
        """Tensor[n] int64, the most probable class."""
        return self.probabilities.argmax(dim=self.class_dim)

    @property
    def mean_samples(self) -> float:
        """Passes that an input was given, on average; NaN for no inputs."""
        return float(self.used.double().mean())


class Race:
    """The bets on n inputs. Tensors are [n, candidates, classes] float64: a leads, c is behind.

    Args:
        p: Tensor[n, classes], probabilities of the first pass.
        horizon: number of passes N that decide.
        alpha: allowed probability that a class settles that N passes do not decide for.
    """

    def __init__(self, p: Tensor, horizon: int, alpha: float) -> None:
        p = p.double()
        self.horizon, self.count = horizon, 1
        top, self.candidates = p.topk(min(_CANDIDATES, p.shape[1]), dim=1)
        weights = (top + _SMOOTHING) / (top + _SMOOTHING).sum(dim=1, keepdim=True)
        self.goal = -(alpha * weights).log()
        self.total = p.clone()
        self.sum = self._differences(p)
        self.square = self.sum**2
        self.capital = torch.zeros_like(self.sum)  # its logarithm
        self.capital.scatter_(2, self.candidates[:, :, None], torch.inf)  # nobody races against himself

    def _differences(self, p: Tensor) -> Tensor:
        return p.gather(1, self.candidates)[:, :, None] - p[:, None, :]

    def update(self, p: Tensor) -> None:
        """Tell the probabilities Tensor[n, classes] of the next pass."""
        p = p.double()
        d, seen = self._differences(p), self.count
        even = -self.sum / (self.horizon - seen)  # mean of the passes to come that would end in a draw
        mean = self.sum / seen
        variance = (_VARIANCE + (self.square - seen * mean**2).clamp_min(0.0)) / (seen + 1)
        edge = (mean - even).clamp_min(0.0)
        most = _BOLDNESS / (1.0 + even).clamp_min(1e-9)
        stake = torch.minimum(edge / (variance + edge**2), most)
        self.capital += torch.log1p(stake * (d - even).clamp_min(-1.0 - even))
        self.sum += d
        self.square += d**2
        self.total += p
        self.count += 1

    def settled(self) -> Tensor:
        """Bool Tensor[n]: whether the class that leads now is settled."""
        sure = self.sum > self.horizon - self.count  # no passes to come can change it
        ahead = (self.capital >= self.goal[:, :, None]) | sure
        leads = self.candidates == self.total.argmax(dim=1, keepdim=True)
        return (ahead.all(dim=2) & leads).any(dim=1)

    def keep(self, wanted: Tensor) -> None:
        """Go on with some inputs, bool Tensor[n]."""
        for name in ("candidates", "goal", "total", "sum", "square", "capital"):
            setattr(self, name, getattr(self, name)[wanted])


@functools.cache
def _least(horizon: int, alpha: float) -> int:
    """Passes after which the surest decision settles."""
    sure = torch.tensor([[1.0, 0.0]])
    race = Race(sure, horizon, alpha)
    while race.count < horizon and not bool(race.settled()):
        race.update(sure)
    return race.count


def check_confidence(confidence: object) -> float:
    """Return it as a float; ConfigError unless it is a number between 0 and 1."""
    if not is_number(confidence) or not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence is {confidence!r}; give a number between 0 and 1")
    return float(confidence)


@torch.no_grad()
def predict_adaptive(
    model: nn.Module,
    x: Any,
    *,
    confidence: float = 0.95,
    max_samples: int = 30,
    first: int = 0,
    stack: int | None = None,
    outputs: Outputs = None,
    kind: Kinds = None,
    dropout: bool = False,
    flips: bool = False,
) -> AdaptivePrediction:
    """Predict a batch by sampling, each input only while its decision is open.

    The samples are those of `predict(model, x, max_samples, first=first)`, of which an input is given the first few;
    for every input the decision is that of all `max_samples` with probability at least `confidence` (over the draws;
    see the module). Inputs that are settled leave the batch.

    Under block- and row-level rules, in networks known to be sequences, every input has these passes in an order of its
    own (a function of the seed, `first` and its place in the batch): an unlucky sub-network among the first passes
    would else delay all inputs together. Where samples are made one at a time (other models;
    branches that are repeated, outputs that are read again), rules whose draws belong to a batch as a whole draw for
    the smaller batch; the bound then speaks of passes made so.

    Where a model decides at many places (pixels, tokens), the bound is one for every place, and an input leaves the
    batch when all its places are settled.

    Args:
        model: an attached network.
        x: the batch, as in `predict`.
        confidence: in (0, 1).
        max_samples: passes after which an input is decided in any case.
        first: number of the first sampled pass; the same number and seed give the same samples.
        stack: rows (inputs times samples) that go through the network together, though never fewer than x has; None
            chooses for the device.
        outputs: as in `predict`; one head.
        kind: as in `predict`; classes, tokens or binary.
        dropout: as in `predict`.
        flips: as in `predict`; all inputs have their passes in one order then.

    Raises:
        ConfigError: a bad number, a model that is not attached, an output whose meaning cannot be told, or one that is
            no decision between classes.
    """
    alpha = 1.0 - check_confidence(confidence)
    check_whole("max_samples", max_samples, least=1)
    stack = None if stack is None else check_whole("stack", stack, least=1)
    batch = Batch(x)
    n = len(batch)
    read = Reader(outputs, kind, batch.shapes, model)
    with passes(model, batch, read, first=first, stack=stack, dropout=dropout, flips=flips) as sampled:
        own = _orders(sampler_of(model).seed, first, n, max_samples) if sampled.is_tree else None

        def drawn(start: int, count: int, rows: Tensor) -> tuple[Any, ...]:
            if own is not None:
                return sampled.draw_own(first + own[rows.cpu(), start : start + count], rows)
            return sampled.draw(range(first + start, first + start + count), None if len(rows) == n else rows)

        count = _least(max_samples, alpha)
        rows = torch.arange(n, device=batch.device)
        heads = drawn(0, count, rows)
        dim = _class_dim(read)
        (found,) = heads
        shape = found[0].movedim(dim, -1).shape  # n, places, classes
        if shape[0] != n:
            raise ConfigError(
                f"the output has {shape[0]} rows for {n} inputs, so no input could leave; use residrop.predict"
            )

        def flat(p: Tensor) -> Tensor:
            return p.movedim(dim, -1).flatten(0, -2)

        places = math.prod(shape[1:-1])
        race = Race(flat(found[0]), max_samples, alpha)
        for p in found[1:]:
            race.update(flat(p))
        probabilities = torch.empty(shape, dtype=found.dtype, device=found.device)
        used = torch.full((n,), max_samples, device=found.device)
        settled = torch.zeros(n, dtype=torch.bool, device=found.device)
        while True:
            done = race.settled().view(len(rows), places).all(dim=1)
            stop = done if race.count < max_samples else torch.ones_like(done)
            leave = rows[stop]
            means = (race.total / race.count).view(len(rows), *shape[1:])
            probabilities[leave] = means[stop].to(probabilities.dtype)
            used[leave], settled[leave] = race.count, done[stop]
            if bool(stop.all()):
                break
            rows = rows[~stop]
            race.keep((~stop).repeat_interleave(places))
            # looks grow rarer; the passes of one look share what their draws agree on, those of two do not
            count = min(math.ceil(race.count / (5 if own is None else 2)), max_samples - race.count)
            (found,) = drawn(race.count, count, rows)
            for p in found:
                race.update(flat(p))
    warn_if_not_finite(probabilities)
    moved = probabilities.movedim(-1, dim).contiguous()
    return AdaptivePrediction(moved, used, settled, max_samples, float(confidence), dim)


def _orders(seed: int, first: int, rows: int, passes: int) -> Tensor:
    """int64 Tensor[rows, passes] on the CPU: for every row a random order of 0, ..., passes - 1."""
    return row_normal(rows * passes, derive_key(seed, _ORDERS, first)).view(rows, passes).argsort(dim=1)


def _class_dim(read: Reader) -> int:
    """The dimension of classes of a single output; ConfigError if there are several, or no classes."""
    heads = read.heads or {}
    if len(heads) != 1:
        raise ConfigError(f"adaptive sampling goes by one decision; say with outputs= which of {list(heads)} it is")
    (head,) = heads.values()
    if head.kind in ("numbers", "detections"):
        raise ConfigError(f"{head.kind} are no decision that could be settled; use residrop.predict")
    return head.class_dim
