"""Draws: which blocks, rows and units are present in a step, as a pure function of (seed, step, block). No torch.

Every coin comes from a counter-based hash of Python integers, so two calls with the same numbers agree: on every rank,
under activation checkpointing, and after a resume. Nothing is read from or left in a random number generator, and
nothing asks the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal, NamedTuple

from residrop.errors import PlanError
from residrop.survival import Schedule, check_whole

__all__ = ["DepthSampler", "Draw", "Granularity", "Plan", "Rows", "Scope", "Site", "derive_key"]

Granularity = Literal["block", "row", "unit"]
Scope = Literal["shared", "per_rank"]

_MASK = 0xFFFFFFFFFFFFFFFF
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of the SplitMix64 sequence
_UNIT = 2.0**64
_COINS, _KEYS = 1, 2
_STREAMS = {"train": 3, "sample": 4}


def _mix(z: int) -> int:
    """The output function of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def derive_key(*words: int) -> int:
    """Hash integers of any size or sign (used modulo 2^64) to one 64-bit key; the order of the words matters."""
    key = 0
    for word in words:
        key = _mix(((key ^ (word & _MASK)) + _GAMMA) & _MASK)
    return key


class Rows(NamedTuple):
    """The live rows of a batch of n: the window start, start + 1, ..., start + live - 1, modulo n."""

    start: int
    live: int


class Draw(NamedTuple):
    """What one block is told for one step.

    Attributes:
        rates: survival rates or thetas in force at this step, in the order of the rule's own `rates`; empty means
            just those.
        alive: the coin of a block-level rule; None for other granularities and for the expectation.
        key: 64-bit key of row-level and unit-level randomness; None for the expectation.
    """

    rates: tuple[float, ...]
    alive: bool | None = None
    key: int | None = None

    @property
    def expected(self) -> bool:
        """True if every coin is to be replaced by its mean."""
        return self.alive is None and self.key is None

    def rows(self, batch_size: int) -> Rows:
        """Window of live rows in a batch of `batch_size` rows.

        The number of rows is rates[0] * batch_size rounded up or down at random, so that its mean is exact for every
        batch size; the start is uniform over the batch, so every row survives with probability rates[0].
        """
        if self.key is None:
            raise PlanError("this draw has no key for rows; it was made for a block-level rule or an expectation")
        if batch_size < 1:
            return Rows(0, 0)
        mean = self.rates[0] * batch_size
        whole = floor(mean)
        more = derive_key(self.key, 1) < (mean - whole) * _UNIT
        return Rows((derive_key(self.key, 2) * batch_size) >> 64, whole + more)


class Plan(NamedTuple):
    """The draw of every block for one step: frozen data that can be made, kept and given by hand.

    Attributes:
        draws: one Draw per rule of the model, from input to output.
        step: the step it was made for.
    """

    draws: tuple[Draw, ...]
    step: int = 0

    @classmethod
    def of(cls, alive: Sequence[bool]) -> "Plan":
        """Write a block-level plan by hand, one coin per block from input to output, at the rules' own rates."""
        return cls(tuple(Draw((), alive=bool(coin)) for coin in alive))


@dataclass(frozen=True)
class Site:
    """What the sampler knows of one rule.

    Attributes:
        rates: survival rates in [0, 1]; empty for a rule without randomness.
        granularity: what one coin decides.
        scope: `shared` ranks draw the same, `per_rank` ranks draw their own.
    """

    rates: tuple[float, ...]
    granularity: Granularity = "block"
    scope: Scope = "shared"


class DepthSampler:
    """Makes the plan of every step for the rules of one model, and hands each rule its draw.

    Args:
        sites: one per rule, from input to output.
        seed: any integer; the same on all ranks.
        warmup_steps: steps over which all rates fall linearly from 1 to their value.
        rank: index of this process; enters only draws whose scope is `per_rank`.

    The state is two integers, `seed` and `step` (the number of training steps drawn so far).
    """

    def __init__(self, sites: Sequence[Site], *, seed: int = 0, warmup_steps: int = 0, rank: int = 0) -> None:
        self.sites = tuple(sites)
        self.schedule = Schedule(tuple(rate for site in self.sites for rate in site.rates), warmup_steps)
        self.seed = check_whole("seed", seed)
        self.step = 0
        self.rank = rank
        self._now = _Force()
        self._recalled: _Force | None = None  # what a running backward pass recomputes under

    def rates_at(self, step: int) -> list[tuple[float, ...]]:
        """The rates of every site at training step `step`."""
        flat = self.schedule.at(step)
        rates: list[tuple[float, ...]] = []
        taken = 0
        for site in self.sites:
            rates.append(flat[taken : taken + len(site.rates)])
            taken += len(site.rates)
        return rates

    def plan(self, step: int | None = None, *, part: int = 0, stream: Literal["train", "sample"] = "train") -> Plan:
        """The plan of a step: a pure function of its arguments, `seed`, `rank` and the sites.

        Args:
            step: training step (default: `self.step`), or number of the sampled pass.
            part: micro-batch of an update. Block coins ignore it; rows and units of each part are drawn afresh.
            stream: `train`, or `sample` for stochastic inference, which uses the final rates.
        """
        step = self.step if step is None else step
        rates = self.rates_at(step) if stream == "train" else [site.rates for site in self.sites]
        code = _STREAMS[stream]
        coins = derive_key(self.seed, code, _COINS, step)
        keys = derive_key(self.seed, code, _KEYS, step, part)
        own_coins = own_keys = None
        draws: list[Draw] = []
        counter = 0
        for site, rate in zip(self.sites, rates, strict=True):
            counter += _GAMMA
            if not rate:
                draws.append(_CONSTANT)
            elif site.granularity == "block":
                base = coins
                if site.scope == "per_rank":
                    base = own_coins = own_coins or derive_key(coins, self.rank)
                draws.append(Draw(rate, alive=_mix((base + counter) & _MASK) < rate[0] * _UNIT))
            else:
                base = keys
                if site.scope == "per_rank":
                    base = own_keys = own_keys or derive_key(keys, self.rank)
                draws.append(Draw(rate, key=_mix((base + counter) & _MASK)))
        return Plan(tuple(draws), step)

    def expectation(self, step: int | None = None) -> Plan:
        """The plan in which every coin is its mean, at the rates of training step `step` (default: `self.step`)."""
        step = self.step if step is None else step
        return Plan(tuple(Draw(rate) for rate in self.rates_at(step)), step)

    def state_dict(self) -> dict[str, int]:
        """Two integers to save beside the optimizer: `seed` and `step`."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where the saved sampler stood."""
        self.seed, self.step = state["seed"], state["step"]

    # The rest is how a plan reaches the rules; `attach`, `using` and `sampling` call it.

    @property
    def in_force(self) -> "_Force":
        """What forwards obey now. Assigning it undoes `give` and `start_sampling`."""
        return self._now

    @in_force.setter
    def in_force(self, force: "_Force") -> None:
        self._now = force

    def before_forward(self, training: bool) -> None:
        """Called before every forward of the root module: make the plan of this pass."""
        self._recalled = None  # backward passes of earlier forwards name theirs again
        if self._now.given:
            return
        if self._now.sample is not None:
            plan = self.plan(self._now.sample, stream="sample")
            self._now = _Force(plan, sample=self._now.sample + 1)
        elif training:
            self._now = _Force(self.plan())
            self.step += 1

    def recall(self, force: "_Force") -> None:
        """From here on, recomputation in backward obeys what its own forward obeyed."""
        self._recalled = force

    def draw(self, index: int, training: bool, recomputing: bool = False) -> Draw | None:
        """The draw of rule `index`; None means expectation at the rule's own rates.

        Args:
            index: the rule's place in the plan.
            training: whether the rule is in training mode.
            recomputing: whether a backward pass runs this forward again (activation checkpointing).
        """
        force = self._recalled if recomputing and self._recalled is not None else self._now
        if not (training or force.given or force.sample is not None):
            return None
        if force.plan is None:
            raise PlanError(
                "a block in training mode was run before its root: call the module that residrop.attach was given, "
                "or give a plan with residrop.using(model, plan)"
            )
        return force.plan.draws[index]

    def give(self, plan: Plan) -> None:
        """Obey `plan` until `in_force` is put back; PlanError if it was made for other rules."""
        if len(plan.draws) != len(self.sites):
            raise PlanError(f"the plan has {len(plan.draws)} draws, the model {len(self.sites)} rules; they must agree")
        for number, (site, draw) in enumerate(zip(self.sites, plan.draws, strict=True), start=1):
            if not _fits(site, draw):
                what = f"{site.granularity}-level with {len(site.rates)} rates" if site.rates else "always present"
                raise PlanError(f"draw {number} of the plan is {draw}, but rule {number} is {what}")
        self._now = _Force(plan, given=True)

    def start_sampling(self, first: int) -> None:
        """Every forward is a sampled pass, numbered from `first` on, until `in_force` is put back."""
        self._now = _Force(sample=first)


@dataclass(frozen=True)
class _Force:
    """What forwards obey: a plan, whether it was given by hand, and the number of the next sampled pass."""

    plan: Plan | None = None
    given: bool = False  # a plan given by hand is obeyed in eval mode, too
    sample: int | None = None  # None outside `sampling`


def _fits(site: Site, draw: Draw) -> bool:
    if not site.rates:
        return draw.alive is not False
    if len(draw.rates) not in (0, len(site.rates)):
        return False
    return draw.expected or (draw.alive is not None if site.granularity == "block" else draw.key is not None)


_CONSTANT = Draw((), alive=True)
