"""Draws: which blocks, rows and units are present in a step, as a pure function of (seed, step, block). No torch.

Every coin comes from a counter-based hash of Python integers, so two calls with the same numbers agree: on every rank,
under activation checkpointing, and after a resume. Nothing is read from or left in a random number generator, and
nothing asks the device.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import ceil, floor
from operator import mul
from struct import unpack
from typing import Any, Literal, NamedTuple

from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError, PlanError
from residrop.schedule.coupling import (
    Coupling,
    absent_blocks,
    arcs_given_presence,
    check_apart,
    check_coupling,
    gaps_end_to_end,
    one_of_two,
    positions,
    ways_round,
)
from residrop.schedule.timing import Schedule, Timing, parse

__all__ = ["DepthSampler", "Draw", "Granularity", "Plan", "Rows", "Scope", "Site", "derive_key"]

Granularity = Literal["block", "row", "unit", "number"]
Scope = Literal["shared", "per_rank"]

_MASK = 0xFFFFFFFFFFFFFFFF
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of the SplitMix64 sequence
_UNIT = 2.0**64
_COINS, _KEYS, _TURN, _AGAIN, _ORDER = 1, 2, -1, -3, -4
_ORDER_LASTS = 4  # training steps, because sorting takes more time than the rest of a coupled draw
_STREAMS = {"train": 3, "sample": 4}
_LOOKS = 5


def _mix(z: int, lanes: int = _MASK) -> int:
    """The output function of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit integers.

    With `lanes`, a mask of 64 bits in every 128, it is that of all lanes of `z` at once: the product of two 64-bit
    numbers has 128 bits and does not reach the next lane.
    """
    z = ((z ^ (z >> 30) & lanes) * 0xBF58476D1CE4E5B9) & lanes
    z = ((z ^ (z >> 27) & lanes) * 0x94D049BB133111EB) & lanes
    return z ^ (z >> 31) & lanes


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
        fewest: number of rows that live at least where any do, 1 or 2.
        at: of coupled rows, where the window begins (`residrop.schedule.coupling.positions`); None if that is random.
    """

    rates: tuple[float, ...]
    alive: bool | None = None
    key: int | None = None
    fewest: int = 1
    at: int | None = None

    @property
    def expected(self) -> bool:
        """True if every coin is to be replaced by its mean."""
        return self.alive is None and self.key is None

    def rows(self, batch_size: int) -> Rows:
        """Window of live rows in a batch of `batch_size` rows.

        The number of rows is rates[0] * batch_size rounded up or down at random, so that its mean is exact for every
        batch size; the start is uniform over the batch, so every row survives with probability rates[0]. Where that
        would leave fewer rows than `fewest`, it is 0 or `fewest`, at random with the same mean (a batch of one row has
        no two to leave).
        """
        if self.key is None:
            raise PlanError("this draw has no key for rows; it was made for a block-level rule or an expectation")
        if batch_size < 1:
            return Rows(0, 0)
        if self.at is None:
            return Rows((derive_key(self.key, 2) * batch_size) >> 64, self.live(batch_size))
        return Rows(self._first(batch_size)[0] % batch_size, self.live(batch_size))

    def _first(self, batch_size: int) -> tuple[int, int]:
        """Of coupled rows, the first at or after the beginning of the arc, and how far behind it its point lies, in
        units of 2^-64 of the distance between points."""
        assert self.at is not None
        before = (self.at - (1 << 64)) * batch_size
        first = -(before >> 64)
        return first, before + (first << 64)

    def live(self, batch_size: int) -> int:
        """Number of live rows in a batch of `batch_size` rows, as in `rows`."""
        mean = self.rates[0] * batch_size
        whole, step = floor(mean), 1
        if whole < self.fewest <= batch_size:
            whole, step = 0, self.fewest
        if mean == whole:
            return whole
        if self.at is not None and step == 1:
            return max(0, -((self._first(batch_size)[1] - _arc(self.rates[0]) * batch_size) >> 64))
        assert self.key is not None
        return whole + step * (derive_key(self.key, 1) < (mean - whole) / step * _UNIT)


def _arc(rate: float) -> int:
    # for a whole number w, w < x and w < ceil(x) are the same, and a power of two times a float is exact
    return ceil(rate * _UNIT)


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
        granularity: what one coin decides; `number` is a key per block in place of a coin (`residrop.rules.gaussian`).
        scope: `shared` ranks draw the same, `per_rank` ranks draw their own.
        fewest: see `Draw`; for row-level sites.
        in_backward: whether absence is a matter of backward passes only, so that nothing is to be sampled.
    """

    rates: tuple[float, ...]
    granularity: Granularity = "block"
    scope: Scope = "shared"
    fewest: int = 1
    in_backward: bool = False


def _check_at_least(at_least: int, coupling: str, sites: Sequence[Site]) -> None:
    if at_least not in (0, 1):
        raise ConfigError(f"at_least is {at_least!r}; give 1 to have one block present in every step, or 0")
    if at_least and coupling != "independent":
        raise ConfigError(
            f"at_least=1 draws steps without a block again, with independent coins, and coupling is {coupling!r}; "
            "leave one of them out"
        )
    coins = [site for site in sites if site.rates and site.granularity == "block"]
    if at_least and not any(site.rates[0] for site in coins):
        raise ConfigError("at_least=1 needs a block-level rule with a survival rate above 0")
    if at_least and len({site.scope for site in coins}) > 1:
        raise ConfigError(
            "at_least=1 needs blocks of one scope: those that ranks share would differ where they are drawn again"
        )


class DepthSampler:
    """Makes the plan of every step for the rules of one model, and hands each rule its draw.

    Args:
        sites: one per rule, from input to output.
        seed: any integer; the same on all ranks.
        timing: the share of every drop that is in force at a step: a `Timing`, or a string such as "warmup(1000)" that
            `residrop.schedule.timing.parse` reads. Times are training steps.
        rank: index of this process, or a function that gives it at the moment of a draw; enters only draws whose scope
            is `per_rank`.
        coupling: how the presence of a block depends on that of others in the same step: `independent`; `systematic`:
            as many blocks are present as the sum of their rates, rounded up or down at random; `balanced`: their costs
            add up to the mean, up to the cost of one block; `apart`: of two neighbours one is present at least. The
            random order in which the first two have blocks lasts for four draws (of rows and sampled passes, one). Rows
            likewise: each row of a batch has so many blocks. Every rate stays exact. Blocks of one granularity and
            scope are coupled with one another. Windows that would leave one row to a norm that needs two have two rows
            or none, whatever the others have. Ranks that draw their own (`per_rank`) agree in the number of present
            blocks, or rows of all blocks, under `systematic` and `balanced`.
        costs: for `balanced`, a number for every rule, in any unit.
        at_least: 1 if in every step one block with a coin is present at least, for models of which little is trained
            besides. Steps without any are drawn again from the law of independent coins under this condition, so that
            block l is present with probability p_l / (1 - prod_j (1 - p_j)). Rescaling and expectation stay those of
            p_l.
        draw_every: for how many training steps the coins of blocks stay as they are; rows and units are drawn anew in
            every step. With coupling="systematic" and presence in backward only, so many blocks are trained for that
            long, and then others (after LISA, Pan et al. 2024, arXiv 2403.17919). Where rates move in between, a block
            goes or comes when its own rate passes its number.

    Raises:
        ConfigError: a coupling that the sites cannot have; `at_least` where no rate is above 0, or beside a coupling;
            `draw_every` that is no whole number of at least 1.

    The state is two integers, `seed` and `step` (the number of training steps drawn so far).
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        seed: int = 0,
        timing: Timing | str = "constant",
        rank: int | Callable[[], int] = 0,
        coupling: Coupling = "independent",
        costs: Sequence[float] = (),
        at_least: int = 0,
        draw_every: int = 1,
    ) -> None:
        self.at_least = at_least
        self.draw_every = check_whole("draw_every", draw_every, least=1)
        self.seed = check_whole("seed", seed)
        self.step = 0
        self._rank = rank
        self._looks = 0  # training forwards without gradients since the last step
        kinds = (site.granularity for site in sites if site.rates)
        self.costs = tuple(map(float, costs))
        self.coupling: Coupling = check_coupling(coupling, kinds, self.costs, len(sites))
        self._place(sites, parse(timing))
        self._now = _Force()
        self._resting = self._now  # what is in force between forwards of the root: what a context asks for
        self._passes: list[tuple[int, _Force, _Force]] = []  # of running forwards: step and forces before each
        self._last = self._now  # what the last forward of the root obeyed
        self._recalled: _Force | None = None  # what a running backward pass recomputes under
        self._called: set[int] = set()  # blocks of the running pass
        self._told_of_sharing = False
        self.observers: list[Callable[[Plan, int | None], None]] = []  # told every training plan and its batch size
        self._laid: _Laid | None = None  # of the last coupled draw
        self.graph_draws: Any = None  # the draw in force as data for a compiled graph (`residrop.rules.tracing`)

    def _place(self, sites: Sequence[Site], timing: Timing) -> None:
        placed = tuple(sites)
        _check_at_least(self.at_least, self.coupling, placed)
        schedule = Schedule(tuple(rate for site in placed for rate in site.rates), timing)
        layout = _Layout(placed, self.coupling, self.costs)
        for ring, _ in layout.apart:
            check_apart([placed[place].rates[0] for place in ring], timing.most)
        final = _Ready(layout, schedule, timing.final)
        self.sites, self.schedule, self._layout, self._final = placed, schedule, layout, final
        self._current = final

    @property
    def rank(self) -> int:
        """Index of this process, now."""
        return self._rank() if callable(self._rank) else self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        self._rank = rank

    def change(self, sites: Sequence[Site]) -> None:
        """Go on with other rates, one site per rule as before; seed, step and timing stay.

        Raises:
            ConfigError: rates that the coupling cannot have. Nothing is changed then.
        """
        self._place(sites, self.schedule.timing)

    def rates_at(self, step: int) -> list[tuple[float, ...]]:
        """The rates of every site at training step `step`."""
        return list(self._ready_at(step).rates)

    def _ready_at(self, step: int) -> "_Ready":
        share, ready = self.schedule.timing.share(step), self._current
        if share != ready.share:
            ready = self._final if share == self._final.share else _Ready(self._layout, self.schedule, share)
            self._current = ready
        return ready

    def plan(self, step: int | None = None, *, part: int = 0, stream: Literal["train", "sample"] = "train") -> Plan:
        """The plan of a step: a pure function of its arguments, `seed`, `rank` and the sites.

        Args:
            step: training step (default: `self.step`), or number of the sampled pass.
            part: micro-batch of an update. Block coins ignore it; rows and units of each part are drawn afresh.
            stream: `train`, or `sample` for stochastic inference, which uses the rates that the timing ends with.
        """
        step = self.step if step is None else step
        if stream == "train":
            return self._plan(self._ready_at(step), step, part, _STREAMS[stream])
        plan = self._plan(self._final, step, part, _STREAMS[stream])
        if not any(site.in_backward for site in self.sites):
            return plan
        pairs = zip(self.sites, plan.draws, self._final.rates, strict=True)
        return plan._replace(draws=tuple(Draw(rates) if site.in_backward else draw for site, draw, rates in pairs))

    def _plan(self, ready: "_Ready", step: int, part: int, code: int) -> Plan:
        layout = self._layout
        words, turns = layout.counters, list[int]()
        toss, order = step, step
        if code == _STREAMS["train"]:
            toss -= step % self.draw_every
            order -= step % (_ORDER_LASTS * self.draw_every)
        for ones, coin, own in layout.groups:
            base = derive_key(self.seed, code, _COINS, toss) if coin else derive_key(self.seed, code, _KEYS, step, part)
            if layout.rings:
                turns.append(derive_key(base, _TURN - own))  # the same on all ranks
            if coin and layout.ordered:
                base = derive_key(self.seed, code, _ORDER, order)
            words += ones * (derive_key(base, self.rank) if own else base)
        if turns:
            return Plan(tuple(self._coupled(ready, words & layout.lanes, turns)), step)
        words = _mix(words & layout.lanes, layout.lanes)
        # of each lane, byte 8 is what a subtraction has left of the 2^64 in `limits`: 1 if the word is below the limit
        coins = (ready.limits - words).to_bytes(layout.size, "little")[8::16]
        draws = [pair[coin] for pair, coin in zip(ready.pairs, coins, strict=True)]
        if self.at_least and not any(draws[index].alive for index in layout.coins):
            draws = self._with_one(ready, draws, derive_key(self.seed, code, _COINS, toss, _AGAIN))
        if layout.keyed:
            keys = unpack(layout.format, words.to_bytes(layout.size, "little"))
            for index in layout.keyed:
                draws[index] = Draw(ready.rates[index], None, keys[index], self.sites[index].fewest)
        return Plan(tuple(draws), step)

    def _with_one(self, ready: "_Ready", draws: list[Draw], key: int) -> list[Draw]:
        """Draws in which no block is present, drawn again: which is the first that is, and independent coins behind."""
        places = self._layout.coins
        rates = [ready.rates[place][0] for place in places]
        before = list(accumulate((1.0 - rate for rate in rates), mul, initial=1.0))  # nothing up to here
        word = derive_key(key, self.rank) if self.sites[places[0]].scope == "per_rank" else key
        none = 1.0 - derive_key(word, 0) / _UNIT * (1.0 - before[-1])
        first = next((number for number, left in enumerate(before[1:]) if left < none), None)
        if first is None:  # rounded away
            first = max(range(len(rates)), key=rates.__getitem__)
        for number, place in enumerate(places[first:]):
            alive = number == 0 or derive_key(word, number) < ready.arcs[place]
            draws[place] = ready.pairs[place][alive]
        return draws

    def _coupled(self, ready: "_Ready", words: int, turns: Sequence[int]) -> list[Draw]:
        layout, draws = self._layout, list(ready.present)
        laid = self._laid
        if laid is None or words != laid.words or ready is not laid.ready:  # both stand still while an order lasts
            laid = self._laid = _Laid(words, ready, layout)
        for place, ((order, coin), turn) in enumerate(zip(layout.rings, turns, strict=True)):
            if not coin:
                for index, at in positions(self.coupling, order, ready.arcs, laid.keys, turn).items():
                    draws[index] = Draw(ready.rates[index], None, laid.keys[index], self.sites[index].fewest, at)
                continue
            if layout.ordered:
                absent = absent_blocks(*laid.gaps[place], turn)
            else:
                coins = (ready.limits - laid.mixed).to_bytes(layout.size, "little")[8::16]
                absent = one_of_two(order, coins)
            for index in absent:
                draws[index] = ready.absent[index]
        return draws

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
        """What forwards obey now."""
        return self._now

    @property
    def running(self) -> bool:
        """Whether a forward of the root has begun and not ended; also after one that Ctrl-C has cut off."""
        return bool(self._passes)

    @contextmanager
    def _obeying(self, force: "_Force") -> Generator[None, None, None]:
        before = self._resting, self._now
        self._resting = self._now = force
        try:
            yield
        finally:
            self._resting, self._now = before

    def before_forward(self, training: bool, *, nested: bool = False, learning: bool = True) -> None:
        """Called before every forward of the root module: make the plan of this pass.

        Args:
            training: whether the root is in training mode.
            nested: whether the root is running already, and has called itself.
            learning: whether gradients are recorded. A training forward without is no step: it has a draw of its own,
                at the rates of the step that comes next.
        """
        self._recalled = None  # backward passes of earlier forwards name theirs again
        self._called.clear()
        if not nested:
            self._passes.clear()
            self._now = self._resting
        self._passes.append((self.step, self._now, self._resting))
        if self._now.given:
            return
        if self._resting.sample is not None:
            plan, following = self.plan(self._resting.sample, stream="sample"), self._resting.sample + 1
            self._resting = replace(self._resting, sample=following)
            self._now = _Force(plan, sample=following, always=True)
        elif training and learning:
            self._now = _Force(self.plan())
            self.step, self._looks = self.step + 1, 0
        elif training:
            code = derive_key(_LOOKS, self._looks)
            self._now = _Force(self._plan(self._ready_at(self.step), self.step, 0, code))
            self._looks += 1

    def after_forward(self, *, failed: bool) -> None:
        """Called after every forward of the root module, whose draw ends with it: methods and inner modules that are
        called by themselves later have none. A pass that raised an error was no step."""
        self._last = self._now
        if self._passes:
            step, before, resting = self._passes.pop()
            if failed:
                self.step, self._resting = step, resting
            self._now = before if self._passes else self._resting

    def called_again(self, block: int) -> bool:
        """Whether a block was called before in this forward of the root, told once; `block` is its id()."""
        if self._now.given or self._now.plan is None or self._told_of_sharing:
            return False
        self._told_of_sharing = block in self._called
        self._called.add(block)
        return self._told_of_sharing

    def recall(self, force: "_Force | None") -> None:
        """From here on, recomputation in backward obeys what its own forward obeyed; None: what is in force."""
        self._recalled = force

    def draw(self, index: int, training: bool, over: bool = False) -> Draw | None:
        """The draw of rule `index`; None means expectation at the rule's own rates.

        Expectation outside a plan is that of the rates that the timing ends with: the rule's own, unless it ends
        elsewhere (with `early` and `plateau` at full depth).

        Args:
            index: the rule's place in the plan.
            training: whether the rule is in training mode.
            over: whether the forward that is meant is over: a backward pass runs it again (activation checkpointing),
                or an engine asks what it has used.
        """
        force = (self._recalled or (self._last if self._now.plan is None else self._now)) if over else self._now
        if not (training or force.always):
            return None if self._final.share == 1.0 else Draw(self._final.rates[index])
        if force.plan is None:
            raise PlanError(
                "a block with coins was run outside of a forward of its root, so it has no draw: call the module that "
                "residrop.attach or residrop.apply was given (not an inner module or another method of it), call "
                "residrop.attach on the module that has taken its place (after merge_and_unload, "
                "create_feature_extractor or torch.fx), or give a plan with residrop.using(model, plan)"
            )
        return force.plan.draws[index]

    def giving(self, plan: Plan) -> AbstractContextManager[None]:
        """A context in which all forwards obey `plan`; PlanError, at once, if it was made for other rules."""
        if len(plan.draws) != len(self.sites):
            raise PlanError(f"the plan has {len(plan.draws)} draws, the model {len(self.sites)} rules; they must agree")
        for number, (site, draw) in enumerate(zip(self.sites, plan.draws, strict=True), start=1):
            if not _fits(site, draw):
                what = f"{site.granularity}-level with {len(site.rates)} rates" if site.rates else "always present"
                raise PlanError(f"draw {number} of the plan is {draw}, but rule {number} is {what}")
        return self._obeying(_Force(plan, given=True, always=True))

    def sampling(self, first: int) -> AbstractContextManager[None]:
        """A context in which every forward is a sampled pass, numbered from `first` on."""
        return self._obeying(_Force(sample=first, always=True))

    @contextmanager
    def one_draw(self) -> Generator[None, None, None]:
        """A context in which all training forwards obey the plan of the step that comes next; it has been one step when
        the context ends without an error."""
        step = self.step
        with self._obeying(_Force(self.plan(), given=True)):
            yield
        self.step = step + 1

    def in_expectation(self) -> AbstractContextManager[None]:
        """A context without a plan, also inside of the other two: in eval mode coins are their means."""
        return self._obeying(_Force())


@dataclass(frozen=True)
class _Force:
    """What forwards obey: a plan, whether it was given by hand, and the number of the next sampled pass."""

    plan: Plan | None = None
    given: bool = False  # by hand
    sample: int | None = None  # None outside `sampling`
    always: bool = False  # whether coins are obeyed in eval mode, too: those given by hand and those of `sampling`


class _Layout:
    """What a plan owes to the sites alone. One long integer holds all words: that of site i begins at bit 128 i."""

    def __init__(self, sites: tuple[Site, ...], coupling: Coupling, costs: Sequence[float]) -> None:
        ones = [1 << 128 * index for index in range(len(sites))]
        self.size = 16 * len(sites)  # bytes
        self.format = "<" + "Q8x" * len(sites)
        self.lanes = _MASK * sum(ones)
        self.counters = sum((_GAMMA * index & _MASK) * one for index, one in enumerate(ones, 1))
        drawn = [index for index, site in enumerate(sites) if site.rates]
        self.coins = [index for index in drawn if sites[index].granularity == "block"]
        self.keyed = [index for index in drawn if sites[index].granularity != "block"]
        numbers = [index for index in self.keyed if sites[index].granularity == "number"]  # one for all micro-batches
        groups = [
            (sum(ones[index] for index in places if (sites[index].scope == "per_rank") is own), coin, own)
            for places, coin in ((self.coins + numbers, True), ([i for i in self.keyed if i not in numbers], False))
            for own in (False, True)
        ]
        self.groups = [group for group in groups if group[0]]
        # words as numbers in [1, 2), which are sorted faster: the low bits of a double, under the exponent of 1
        self.doubles = "<" + "d8x" * len(sites)
        self.fractions, self.units = (sum(bits * one for one in ones) for bits in ((1 << 52) - 1, 0x3FF << 52))
        self.ordered = coupling in ("systematic", "balanced")
        self.rings: list[tuple[list[list[int]], bool]] = []  # of coupled draws, and whether they are coins
        self.apart: list[tuple[list[int], bool]] = []
        for places, coin in ((self.coins, True), (self.keyed, False)) if coupling != "independent" else ():
            for own in (False, True):
                some = [place for place in places if (sites[place].scope == "per_rank") is own]
                if some:
                    self.rings.append((ways_round(coupling, some, costs), coin))
                    self.apart += [(some, coin)] if coupling == "apart" else []
        ends = [0]
        for site in sites:
            ends.append(ends[-1] + len(site.rates))
        self.spans = list(pairwise(ends))


class _Ready:
    """Draws made ahead for one share of the drops: plans only pick among them as long as the rates stand still."""

    def __init__(self, layout: _Layout, schedule: Schedule, share: float) -> None:
        self.share = share
        flat = schedule.under(share)
        self.rates = [flat[start:end] for start, end in layout.spans]
        self.pairs = [(_CONSTANT, _CONSTANT)] * len(layout.spans)
        rates = [self.rates[index] for index in layout.coins]
        for index, dead, alive in zip(layout.coins, _draws(rates, False), _draws(rates, True), strict=True):
            self.pairs[index] = dead, alive
        self.arcs = [0] * len(layout.spans)  # rates times 2^64
        for index in (*layout.coins, *layout.keyed) if layout.rings else layout.coins:
            self.arcs[index] = _arc(self.rates[index][0])
        limits = list(self.arcs)
        if layout.rings:
            self.gaps = [(1 << 64) - arc for arc in self.arcs]
            self.absent, self.present = zip(*self.pairs, strict=True)
        for places, coin in layout.apart:
            if coin:
                for place, limit in zip(places, arcs_given_presence([limits[place] for place in places]), strict=True):
                    limits[place] = limit
        self.limits = layout.lanes + int.from_bytes(b"".join(one.to_bytes(16, "little") for one in limits), "little")


class _Laid:
    """What coupled draws owe to the words of a step: keys of rows, and for coins the order of the blocks."""

    def __init__(self, words: int, ready: _Ready, layout: _Layout) -> None:
        self.words, self.ready = words, ready
        self.mixed = mixed = _mix(words, layout.lanes)
        self.keys = unpack(layout.format, mixed.to_bytes(layout.size, "little")) if layout.keyed else ()
        if layout.ordered and layout.coins:
            numbers = (mixed & layout.fractions | layout.units).to_bytes(layout.size, "little")
            order = unpack(layout.doubles, numbers)
            self.gaps = [gaps_end_to_end(ring, ready.gaps, order) for ring, coin in layout.rings if coin]


def _draws(rates: list[tuple[float, ...]], alive: bool) -> list[Draw]:
    # what Draw(rate, alive) makes, in half the time, which counts where the rates move at every step
    new: Callable[[type[Draw], tuple[object, ...]], Draw] = tuple.__new__  # pyright: ignore
    return [new(Draw, (rate, alive, None, 1, None)) for rate in rates]


def _fits(site: Site, draw: Draw) -> bool:
    if not site.rates:
        return draw.alive is not False
    if len(draw.rates) not in (0, len(site.rates)):
        return False
    return draw.expected or (draw.alive is not None if site.granularity == "block" else draw.key is not None)


_CONSTANT = Draw((), alive=True)
