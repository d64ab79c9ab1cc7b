"""`apply` and `remove`."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from residrop.blocks.attach import connect, detach
from residrop.blocks.observe import branch_flops
from residrop.blocks.skippable import parameters_of
from residrop.common.errors import ConfigError, InactiveWarning
from residrop.rules.base import Rule
from residrop.rules.catalogue import make_rule
from residrop.schedule.coupling import Coupling
from residrop.schedule.survival import parse
from residrop.schedule.timing import Timing
from residrop.surgery.blocks import AppliedBlock, check_unchanged, install_rules, record_changes, uninstall_rules
from residrop.surgery.drops import Own, own_survival, replaced
from residrop.surgery.finding import as_whole
from residrop.surgery.libraries.transformers.layerdrop import end_layer_drop, layer_drops
from residrop.surgery.libraries.transformers.routers import watch_routers
from residrop.surgery.overlooked import overlooked
from residrop.surgery.read_block import ReadBlock
from residrop.surgery.report import Entry, Report
from residrop.surgery.rowwise import check_batch_first
from residrop.surgery.settled import mark_settled
from residrop.surgery.sites import Found, LeftAlone, check_bare, drops_of, find, own_drops
from residrop.surgery.streams import StreamBlock, stream_mixin
from residrop.surgery.trying import Tried, called_with, tried

__all__ = ["apply", "remove"]

Rates = str | float | Sequence[float]
Todo = list[tuple[Found, list[Rule]]]


def apply(
    model: nn.Module,
    rule: str | Callable[[float], Rule] = "stochastic-depth",
    survival: Rates = "from_model",
    *,
    blocks: Any = None,
    branches: bool = True,
    granularity: str | None = None,
    rescale: str | None = None,
    seed: int = 0,
    timing: Timing | str = "constant",
    coupling: Coupling = "independent",
    costs: Sequence[float] = (),
    at_least: int = 0,
    draw_every: int = 1,
    whole: Sequence[str] = (),
    cut: Sequence[str] = (),
    unused: Sequence[str] = (),
    example: Any = None,
    **options: Any,
) -> Report:
    """Put the residual blocks of any model under a rule, in place; `remove` is the way back.

    Blocks are found by the source of their forwards: a block adds a function of a value to that value, and this
    function is the branch that the rule may leave out. A transformer layer has two (attention and MLP), or three.
    Every block is compared once with its own forward: on `example` if there is one, else in the first training forward
    (one forward of the block, and half of one or one more, in eval mode and without gradients).

    Parameters, buffers, their names and all hooks stay as they are, so checkpoints of the plain model load into the
    changed one and back. Modules of the blocks that drop paths themselves (`DropPath`, `StochasticDepth`) drop nothing
    while the rule is in force: they would compute a branch and then mask it, the rule does not compute it.
    transformers' layer drop is taken over in the same way.
    With survival="from_model" a training loop may go on setting their `drop_prob`, `p` or `layerdrop` (a ramp of drop
    rates): the rules follow. With other rates setting them is an error, as two sources of one rate would disagree.

    Args:
        model: any model. It becomes the root: calling it in training mode draws the next step.
        rule: a name in `residrop.RULES`, or a function from one survival rate to a new rule.
        survival: "from_model" (the rates of the model's own drop modules, or of its layer drop, which is of whole
            layers and never rescaled), or rates for the L blocks in any form that `residrop.schedule.survival.parse`
            reads. The branches of a block (attention, MLP) have its rate, and coins of their own.
        blocks: which blocks: None (or "auto") for all that are found; a name pattern ("encoder.layers.*"), a class, a
            module list (which stands for its elements), a module, or several of these. A block of which no branches
            can be found needs input and output of one shape, and gets the generic rule x + b (block(x) - x).
        branches: False puts every block under one generic rule, even if its branches are found.
        granularity: `block` or `row`; None is the rule's default, or that of the model's own drop modules.
        rescale: None is "train" for stochastic (and Gaussian) depth, as in these models' own drop modules: a
            pretrained model's eval mode stays as it is. "test" is eq. 5 of Huang et al. 2016.
        seed: seed of all draws.
        timing: as in `residrop.attach`, as are `coupling`, `costs`, `at_least` and `draw_every`. With "balanced" and an
            example costs may be left out: they are FLOPs then.
        whole: names of block arguments that all rows share, which row level must not cut.
        cut: names of block arguments whose first dimension is the batch, where sizes do not tell.
        unused: where, in what blocks or branches return besides the hidden state, there is something that nothing needs
            from an absent one: an index ("1"), a key ("attentions"), or both with dots between. It is None then (at row
            level in every forward with coins). Everything else must be an argument handed on, None or a constant, or
            something that `example` shows not to be needed; or training is refused.
        example: a batch as the model takes it: a tensor, a tuple of its arguments, or a dict of them by name; of two
            rows at least for row level. The model is run on it once, without gradients and in eval mode. A block that
            turns out not to fit is then taken at block level, if only its rows do not fit, or whole, if only its
            branches do not, or else left alone, and the report says why; without an example the first training forward
            raises an error instead. Where blocks return something that an absent one cannot, the model is run once
            more without it, to see whether it needs it.
        options: further options of the rule.

    Returns:
        What was done: every block with its rates, and what was left alone and why.

    Raises:
        ConfigError: no blocks, blocks inside each other, rates that do not fit, or a model that has rules already. The
            model is then unchanged.
    """
    options = {**options, "granularity": granularity, "rescale": rescale}
    inherits = isinstance(survival, str) and survival == "from_model"
    blocks = None if isinstance(blocks, str) and blocks == "auto" else blocks
    given = (frozenset(whole), frozenset(cut)), frozenset(unused), inherits
    found, left, drops = _found(model, survival, blocks, branches)
    if example is None:
        learnt, coarse = Tried(), set[nn.Module]()
    else:
        found, learnt, coarse, wrong = _tried(model, found, given, example, rule, survival, options)
        left += wrong
    todo, alone = _with_rules(model, found, rule, survival, options, coarse)
    left += alone
    left += _stray(model, [one for one, _ in todo], left)
    if blocks is None:
        left += overlooked(model, [one.block for one, _ in todo], [name for name, _ in left])
    unmeasured = coupling == "balanced" and not costs and example is not None
    how = {"seed": seed, "timing": timing, "at_least": at_least, "draw_every": draw_every}
    coupled = {} if unmeasured else {"coupling": coupling, "costs": costs}
    left += _carried_out(model, todo, drops, *given, {**how, **coupled})
    for block, known in learnt.learnt.items():
        block.__dict__.update(known)
    if unmeasured:
        _balance(model, example, how)
    return _reported(model, todo, left, learnt)


def _tried(
    model: nn.Module,
    found: list[Found],
    given: Any,
    example: Any,
    rule: str | Callable[[float], Rule],
    survival: Rates,
    options: dict[str, Any],
) -> tuple[list[Found], Tried, set[nn.Module], list[LeftAlone]]:
    """The blocks that an example shows to fit, what was learnt of them, those of which only the rows do not fit, and
    what there is to know of these and of the others.

    Raises:
        ConfigError: none fits.
    """
    inherits = isinstance(survival, str) and survival == "from_model"

    def attempt(these: list[Found], coarse: set[nn.Module]) -> tuple[Tried, list[Found]]:
        """What is learnt of these blocks, and those that may fit at block level although they do not at row level."""
        nonlocal few
        # rates are for the blocks that fit, so these are tried at any other
        rates = survival if inherits else 1.0 if rule == "constant" else 0.5
        todo, _ = _with_rules(model, these, rule, rates, options, coarse)
        # of whole batches more rows would show no more; later attempts count operations of as many as the first
        few = few or (4 if any(each.granularity == "row" for _, made in todo for each in made) else 2)
        try:
            _put(todo, *given)
            result = tried(model, [one.block for one, _ in todo], example, few)
        finally:
            _take_away(model)
        needed.update(result.needed)
        wrong = [(one, made) for one, made in todo if one.block in result.wrong]
        return result, [one for one, made in wrong if any(each.granularity == "row" for each in made)]

    few = 0  # rows of the example to look at
    needed: set[nn.Module] = set()  # what else could be tried gives as little, but for streams, which are sums
    result, rows = attempt(found, set())
    taken = {one.block: one for one in found if one.block not in result.wrong}
    how: dict[nn.Module, str] = {}
    coarse: set[nn.Module] = set()

    def again(these: list[Found], at_block_level: bool, words: str) -> list[Found]:
        these = [one for one in these if one.block not in taken]
        these = [one for one in these if one.block not in needed or issubclass(one.mixin, StreamBlock)]
        if not these:
            return []
        try:
            found, rows = attempt(these, {one.block for one in these} if at_block_level else set())
        except ConfigError:
            return []  # the model fails
        result.learnt |= found.learnt
        result.flops += found.flops
        for one in these:
            if one.block in found.learnt:
                taken[one.block], how[one.block] = one, words
                coarse.update({one.block} if at_block_level else ())
        return rows

    if isinstance(rule, str):
        again(rows, True, "at block level, not at row level: ")
    entire = [replace(one, mixin=as_whole(one.mixin)) for one in found if issubclass(one.mixin, ReadBlock)]
    streams = result.streams
    entire += [replace(one, mixin=stream_mixin(streams[one.block])) for one in found if one.block in streams]
    rows = again(entire, False, "as a whole, not branch by branch: ")
    if isinstance(rule, str):
        again(rows, True, "as a whole and at block level, not branch by branch: ")
    notes = [
        (one.name, how.get(one.block, "") + result.wrong[one.block])
        for one in found
        if one.block in result.wrong and not (one.block in streams and one.block in taken)
    ]
    if not taken:
        raise ConfigError(f"no block of {type(model).__name__} fits: {notes[0][0]}: {notes[0][1]}")
    return [taken[one.block] for one in found if one.block in taken], result, coarse, notes


def _found(model: nn.Module, survival: Rates, blocks: Any, branches: bool) -> tuple[list[Found], list[LeftAlone], Any]:
    """The blocks, what is left alone, and the model's layer drops; nothing is changed yet."""
    check_bare(model)
    drops = layer_drops(model)
    inherits = isinstance(survival, str) and survival == "from_model"
    found, left = find(model, blocks, branches=branches, drops=drops if inherits else None)
    return found, left, drops


def _with_rules(
    model: nn.Module,
    found: list[Found],
    rule: str | Callable[[float], Rule],
    survival: Rates,
    options: dict[str, Any],
    coarse: set[nn.Module],
) -> tuple[Todo, list[LeftAlone]]:
    """The blocks with their rules (at block level for those that are `coarse`), and those from which no rate can be
    taken."""
    todo: Todo = []
    left: list[LeftAlone] = []
    for one, own in zip(found, _wanted(model, found, survival), strict=True):
        if own is None:
            left.append((one.name, "it has no drop module of its own"))
        else:
            level = {**options, "granularity": "block"} if one.block in coarse else options
            made = [_make(rule, each, level) for each in own]
            if any(each.granularity == "row" for each in made):
                check_batch_first(one.name, one.block)
            todo.append((one, made))
    return todo, left


def _carried_out(
    model: nn.Module,
    todo: Todo,
    drops: Any,
    arguments: tuple[frozenset[str], frozenset[str]],
    unused: frozenset[str],
    inherits: bool,
    how: dict[str, Any],
) -> list[LeftAlone]:
    """Change the model, wholly or not at all; returns what turned out to be left alone. `how` is of `connect`."""
    blocks = [one.block for one, _ in todo]
    try:
        _put(todo, arguments, unused, inherits)
        left = end_layer_drop(model, blocks, drops, inherits)
        watch_routers(model, blocks)
        mark_settled(model, [one for one, _ in todo])
        connect(model, **how)
    except BaseException:
        _take_away(model)
        raise
    return left


def _balance(model: nn.Module, example: Any, how: dict[str, Any]) -> None:
    """Couple the blocks of a changed model by their FLOPs."""
    args, kwargs = called_with(example)
    try:
        connect(model, coupling="balanced", costs=branch_flops(model, *args, **kwargs), **how)
    except BaseException:
        _take_away(model)
        raise


def _reported(model: nn.Module, todo: Todo, left: list[LeftAlone], learnt: Tried) -> Report:
    entries = tuple(
        Entry(one.name, one.kind, tuple(each.branch_rate(each.rates) for each in made), made[0].granularity)
        for one, made in todo
    )
    coins = any(each.rates for _, made in todo for each in made)
    if coins and all(rate == 1.0 for entry in entries for rate in entry.rates):
        warnings.warn(
            f"residrop.apply changed nothing: all {len(entries)} blocks have survival rate 1; give survival=...",
            InactiveWarning,
            stacklevel=3,
        )
    parts = [part for one, _ in todo for _, parts in one.block.residrop_branches() for part in parts]  # pyright: ignore
    own = {id(one): one.numel() for one in parameters_of(parts)}
    share = sum(own.values()) / max(sum(one.numel() for one in model.parameters()), 1)
    # of branches of which some rows were run the operations are an estimate
    operations = min(learnt.flops / learnt.total, 1.0) if learnt.total else None
    return Report(entries, tuple(left), share, operations)


def remove(model: nn.Module) -> None:
    """Take the rules of `apply` away: the model behaves, bit for bit, as before.

    Raises:
        ConfigError: the model has none, or an engine changed its blocks since.
    """
    changed = [module for module in model.modules() if isinstance(module, AppliedBlock)]
    if not changed:
        raise ConfigError(f"{type(model).__name__} has no rules of residrop.apply")
    for block in changed:
        check_unchanged(block)
    _take_away(model)


def _take_away(model: nn.Module) -> None:
    # drop modules that several blocks share were switched off by the first of them
    for block in reversed([module for module in model.modules() if isinstance(module, AppliedBlock)]):
        uninstall_rules(block)
    detach(model)


def _make(rule: str | Callable[[float], Rule], own: Own, options: dict[str, Any]) -> Rule:
    if isinstance(rule, str):
        if rule in ("stochastic-depth", "gaussian-depth"):
            own = own._replace(rescale=own.rescale or "train")
            inherited = {"granularity": own.granularity, "rescale": own.rescale}
            options = {**options, **{name: value for name, value in inherited.items() if options[name] is None}}
        return make_rule(rule, own.survival, **options)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"rule is a function, which does not use {', '.join(given)}; give them inside of it")
    made = rule(own.survival)
    if not isinstance(made, Rule):
        raise ConfigError(f"rule returned a {type(made).__name__}; it has to return a new residrop.Rule")
    return made


def _wanted(model: nn.Module, found: list[Found], survival: Rates) -> list[list[Own] | None]:
    """What every branch of every block is to do; None for blocks from which nothing is inherited."""
    if not (isinstance(survival, str) and survival == "from_model"):
        rates = parse(survival, len(found))
        return [[Own(rate)] * one.branches for one, rate in zip(found, rates, strict=True)]
    owns = [own_drops(one) for one in found]
    if not any(owns):
        raise ConfigError(
            f"{type(model).__name__} has no drop modules of its own to take rates from; give survival=..., such as "
            "survival=0.8 or 'linear_decay(0.5)', or build the model with a drop rate (timm: drop_path_rate=...)"
        )
    # where the rate of drops is 0 models leave the drop module out: in blocks of these classes it is that
    first = {type(one.block): own[0] for one, own in zip(found, owns, strict=True) if own}
    always = {kind: own._replace(survival=1.0) for kind, own in first.items()}
    return [
        own or ([always[type(one.block)]] * one.branches if type(one.block) in always else None)
        for one, own in zip(found, owns, strict=True)
    ]


def _stray(model: nn.Module, found: list[Found], left: list[LeftAlone]) -> list[LeftAlone]:
    """The drop modules that no rule takes the place of, but for those of blocks that are named already."""
    taken = {module for one in found for _, module in drops_of(one)}
    stray: list[LeftAlone] = []
    for name, module in model.named_modules():
        own = own_survival(module)
        if own is None or own.survival == 1.0 or module in taken or any(name.startswith(f"{one}.") for one, _ in left):
            continue
        stray.append(
            (name, f"it is in no block under a rule, so it goes on masking (survival rate {own.survival:.3g})")
        )
    return stray


def _put(
    todo: Todo,
    cutting: tuple[frozenset[str], frozenset[str]],
    unused: frozenset[str],
    inherits: bool,
) -> None:
    for one, made in todo:
        install_rules(one.block, one.mixin, made)
        drops = [(module, made[number]) for number, module in drops_of(one)]
        record_changes(one.block, replaced(drops, inherits and one.drop is None))
        one.block.__dict__["residrop_cutting"] = cutting
        one.block.__dict__["residrop_unused"] = unused
        one.block.__dict__["residrop_forms"] = {}
