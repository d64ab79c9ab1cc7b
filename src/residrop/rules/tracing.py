"""What rules do while `torch.compile` traces them. Imported only then, as it loads the compiler.

A coin tossed by traced code is tossed once, when the graph is made, and frozen into it (pytorch/pytorch#95425 and
#107587). So draws are made outside of graphs, at every pass, and reach them in one of two ways:

- block: Python tosses the coin between two graphs. Present blocks run one graph, `CompiledParts.whole`, which blocks of
  one structure share.
- row: the window enters the graph as data. Where it starts is a number in a tensor, and how many rows live is the
  length of a tensor, so that the compiler takes it as symbolic: integers would be compiled in, for every draw anew.
  The root's hook makes all windows of a pass before the graph (`graph_draws`); a block that is compiled without its
  root asks for its own (`_ask`), between two graphs.
- unit: key and thetas enter the graph as data, and masks are arithmetic in it.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.decorators import skip
from torch.utils._pytree import tree_leaves

from residrop.functional.backward_only import Piece, recorded
from residrop.functional.call import BranchCall, Map
from residrop.functional.rows import keep_index
from residrop.functional.static_draws import StaticDraws
from residrop.functional.units import coins_of, row_mask
from residrop.functional.windows import Window, keep_window
from residrop.functional.zero_gradients import with_zero_gradients
from residrop.rules.executor import Executor
from residrop.schedule.sampler import Draw, Rows

__all__ = [
    "CompiledParts",
    "GraphDraws",
    "backward_only",
    "compiled_parts",
    "draw",
    "graph_draws",
    "in_python",
    "present",
    "structure",
    "units",
]


_disable: Any = torch.compiler.disable
_REASON = (
    "residrop makes its draws outside of graphs; for one full graph use residrop.compile(model, fullgraph=True) with "
    "row-level or unit-level rules: a block-level coin decides which graphs run"
)


@_disable(reason=_REASON)
def in_python(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), run by Python between two graphs."""
    return function(*args)


def draw(rule: Any) -> Draw:
    """The draw in force, for rules that do not know of compilers: every new value of it is compiled anew."""
    return in_python(_drawn, rule)


def _drawn(rule: Any) -> Draw:
    return rule.draw()


def scalar(factor: float) -> Tensor | None:
    """A factor as data, for graphs to share; None is 1."""
    return None if factor == 1.0 else torch.tensor(factor, dtype=torch.float64)


# Present blocks


@dataclass(frozen=True)
class CompiledParts(Executor):
    """The compiled parts of blocks of one structure; each function belongs to that structure alone.

    The compiler keeps a limited number of graphs per function, and makes sizes symbolic that differ from call to call.

    Attributes:
        whole: (x, shortcut, branch, scale, includes_input, post, along) to the result of a block that is present.
        absent: (x, shortcut) to that of a block that is absent.
        alone: (branch, x, along) to branch(x, *along).
    """

    whole: Map
    absent: Map
    alone: Map

    def present(self, x: Tensor, call: BranchCall, scale: float) -> Tensor:
        return self.whole(x, call.shortcut, call.branch, scalar(scale), call.includes_input, call.post, call.along)

    def part(self, branch: Map, x: Tensor, along: Sequence[Any]) -> Tensor:
        return self.alone(branch, x, along)

    def on_rows(self, branch: Map, fixed: bool) -> Map:
        def call(x: Tensor, *along: Any) -> Tensor:
            if not fixed:
                maybe_mark_dynamic(x, 0)
            return self.alone(branch, x, along)

        return call


def _whole(
    x: Tensor,
    shortcut: Map,
    branch: Map,
    scale: Tensor | None,
    includes_input: bool,
    post: Map | None,
    along: Sequence[Any],
) -> Tensor:
    return BranchCall(shortcut, branch, post, along, includes_input).whole(x, 1.0 if scale is None else scale)


def _absent(x: Tensor, shortcut: Map) -> Tensor:
    return shortcut(x)


def _alone(branch: Map, x: Tensor, along: Sequence[Any]) -> Tensor:
    return branch(x, *along)


@cache
def compiled_parts(structure: Hashable) -> CompiledParts:
    """Functions of their own for blocks of one structure."""
    number = compiled_parts.cache_info().currsize

    def copy(function: Any) -> Any:
        name = f"{function.__name__}_{number}"
        code = function.__code__.replace(co_name=name, co_qualname=name)
        return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)

    return CompiledParts(copy(_whole), copy(_absent), copy(_alone))


def structure(*parts: object) -> Hashable:
    """Equal for blocks whose modules have the same classes, and parameters of the same kind."""
    return tuple(_kind(part) for part in parts)


def _kind(part: object) -> Hashable:
    owner = part if isinstance(part, nn.Module | nn.Parameter) else getattr(part, "__self__", None)
    if isinstance(owner, nn.Parameter):
        return owner.shape, owner.dtype, owner.device, owner.requires_grad
    if not isinstance(owner, nn.Module):
        return None
    classes = tuple((name, type(module)) for name, module in owner.named_modules())
    return classes, tuple((name, _kind(parameter)) for name, parameter in owner.named_parameters())


_OF_RULE: WeakKeyDictionary[Any, CompiledParts] = WeakKeyDictionary()


@_disable(reason=_REASON)
def _coin(rule: Any, call: BranchCall) -> tuple[bool, Tensor | None, CompiledParts]:
    """Whether a block is present, the factor of its branch, and its compiled parts."""
    draw = rule.draw()
    scale = rule.scale(draw)
    present = bool(draw.alive) or (draw.expected and scale != 0.0)
    return present, scalar(scale), _parts_of(rule, call)


def _parts_of(rule: Any, call: BranchCall) -> CompiledParts:
    if rule not in _OF_RULE:
        _OF_RULE[rule] = compiled_parts(structure(call.branch, call.shortcut, call.post))
    return _OF_RULE[rule]


@skip  # runs by itself, and lets the compiler see what it calls; `torch.compiler.disable(recursive=False)` does, too,
def _decided(  # but looks for the frame of its caller at every call, which takes a tenth of a millisecond
    rule: Any, x: Tensor, shortcut: Map, branch: Map, includes_input: bool, post: Map | None, along: Sequence[Any]
) -> Tensor:
    call = BranchCall(shortcut, branch, post, along, includes_input)
    present, scale, parts = _coin(rule, call)
    if present:
        return parts.whole(x, shortcut, branch, scale, includes_input, post, along)
    y = parts.absent(x, shortcut)
    return _with_zero_gradients(rule, x, y, call) if rule.scope == "per_rank" else y


@_disable(reason=_REASON)
def _with_zero_gradients(rule: Any, x: Tensor, skip: Tensor, call: BranchCall) -> Tensor:
    return with_zero_gradients(x, skip, call) if rule.may_live_on_other_ranks() else skip


@_disable(reason=_REASON)
def _pieces(rule: Any, x: Tensor, call: BranchCall) -> tuple[list[Piece] | None, CompiledParts]:
    return rule.pieces(x, call), _parts_of(rule, call)


@_disable(reason=_REASON)
def _joined(rule: Any, x: Tensor, call: BranchCall, pieces: list[Piece], outs: list[Tensor]) -> Tensor:
    return rule.joined(x, call, pieces, outs)


@skip
def _in_pieces(
    rule: Any, x: Tensor, shortcut: Map, branch: Map, includes_input: bool, post: Map | None, along: Sequence[Any]
) -> Tensor:
    call = BranchCall(shortcut, branch, post, along, includes_input)
    pieces, parts = _pieces(rule, x, call)
    if pieces is None:
        return parts.whole(x, shortcut, branch, None, includes_input, post, along)
    outs: list[Tensor] = []
    for piece in pieces:
        if piece.window is not None:
            maybe_mark_dynamic(piece.x, 0)
        with recorded(piece.present):
            outs.append(parts.alone(branch, piece.x, piece.along))
    return _joined(rule, x, call, pieces, outs)


def backward_only(rule: Any, x: Tensor, call: BranchCall) -> Tensor:
    """`BackwardDepth` in a training pass, traced: Python decides between graphs what is differentiated."""
    return _in_pieces(rule, x, call.shortcut, call.branch, call.includes_input, call.post, call.along)


def present(rule: Any, x: Tensor, call: BranchCall) -> Tensor:
    """`StochasticDepth` in a pass with coins, traced."""
    if rule.granularity == "block":
        return _decided(rule, x, call.shortcut, call.branch, call.includes_input, call.post, call.along)
    window = _from_graph_draws(rule, x)
    if window is None:
        window = _ask(rule, x)
    if window is None:
        y = call.shortcut(x)
        return _with_zero_gradients(rule, x, y, call) if rule.may_live_on_other_ranks() else y
    if isinstance(window, Listed):
        return keep_index(x, call, window.rows, 1.0 if window.scale is None else window.scale)
    return keep_window(x, call, window)


def units(rule: Any, *tensors: Tensor) -> Tensor:
    """`rule.combine` of a unit-level rule in a pass with coins, traced."""
    found: GraphDraws | None = None if rule.sampler is None else rule.sampler.graph_draws
    coins = None if found is None else found.coins[rule.index]
    if coins is None:
        coins = _ask_coins(rule, tensors[0])
    if coins is None:
        return in_python(_combined, rule, *tensors)
    return rule.combine(Draw(rule.rates, key=coins), *tensors)


@_disable(reason=_REASON)
def _ask_coins(rule: Any, like: Tensor) -> Tensor | None:
    return _coins(rule, rule.draw(), like.device)


def _coins(rule: Any, draw: Draw, device: torch.device) -> Tensor | None:
    """What a unit-level rule draws, as data; None if its draw is no key."""
    return None if draw.key is None else coins_of(draw.rates or rule.rates, draw.key, device)


def _combined(rule: Any, *tensors: Tensor) -> Tensor:
    return rule.combine(rule.draw(), *tensors)


# Rows as data


class Listed(NamedTuple):
    """Live rows that are no window: int64 Tensor[live], and the factor of the branch (None is 1)."""

    rows: Tensor
    scale: Tensor | None


class GraphDraws(NamedTuple):
    """The draws of all row-level and unit-level rules in one pass of the root.

    Attributes:
        total: Tensor[n] without values, for the size of the batch.
        starts: int64 Tensor[rules].
        scales: float Tensor[rules]; None if all factors are 1.
        sizes: for every rule what `Window.size` and `Window.all` are; None if it has no window here.
        coins: for every rule its key and thetas; None if it has no units.
    """

    total: Tensor
    starts: Tensor
    scales: Tensor | None
    sizes: tuple[tuple[Tensor, bool] | None, ...]
    coins: tuple[Tensor | None, ...]


def _length(rows: int, fixed: bool) -> Tensor:
    carrier = torch.zeros(1, dtype=torch.bool).expand(rows)
    if not fixed:
        maybe_mark_dynamic(carrier, 0)
    return carrier


def _rows(rule: Any, total: int) -> tuple[Rows, float]:
    draw = rule.draw()
    rows = Rows(0, total) if draw.expected else draw.rows(total)
    return (Rows(0, total) if rows.live == total else rows), rule.scale(draw)


def graph_draws(rules: Sequence[Any], args: Any, static: StaticDraws | None = None) -> GraphDraws | None:
    """The windows and unit masks of a pass for the graph that comes next.

    Args:
        rules: all rules of the model.
        args: arguments of the root, the first tensor of which is the batch.
        static: where the draws of unit-level rules are put, if their place matters.
    """
    batch = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.ndim > 0), None)
    windows = [rule.rows == "window" and rule.granularity == "row" for rule in rules]
    units = [rule.granularity == "unit" and rule.tosses() for rule in rules]
    if batch is None or (not any(windows) and not any(units)):
        return None
    device = batch.device
    where = device if static is None else torch.device("cpu")
    coins = [_coins(r, r.draw(), where) if unit else None for r, unit in zip(rules, units, strict=True)]
    if static is not None and any(units):
        coins = static.take(rules, coins, device)
    total, starts, scales = batch.shape[0], [0] * len(rules), [1.0] * len(rules)
    sizes: list[tuple[Tensor, bool] | None] = [None] * len(rules)
    for index, rule in enumerate(rules):
        if not (windows[index] and rule.tosses()):
            continue
        rows, scales[index] = _rows(rule, total)
        fixed = rule.fixed(total)
        # the compiler tells 0 and 1 rows from more; rather than once for all mixtures of them it does so block by block
        if rows.live >= 1 and (fixed or int(rule.rates[0] * total) >= 2):
            starts[index] = rows.start
            sizes[index] = _length(rows.live, fixed), fixed and rows.live == total
    factors = None if all(scale == 1.0 for scale in scales) else _to(torch.tensor(scales, dtype=torch.float64), batch)
    return GraphDraws(_length(total, True), _to(torch.tensor(starts), batch), factors, tuple(sizes), tuple(coins))


def _to(values: Tensor, batch: Tensor) -> Tensor:
    """On the device of the batch, without waiting for it."""
    if batch.device.type == "cpu":
        return values
    values = values.pin_memory() if batch.device.type == "cuda" else values
    return values.to(batch.device, non_blocking=True)


def _from_graph_draws(rule: Any, x: Tensor) -> Window | None:
    found: GraphDraws | None = None if rule.sampler is None else rule.sampler.graph_draws
    if found is None or found.total.shape[0] != x.shape[0]:
        return None
    size = found.sizes[rule.index]
    if size is None:
        return None
    scale = None if found.scales is None else found.scales[rule.index]
    return Window(size[0], found.starts[rule.index], scale, size[1])


@_disable(reason=_REASON)
def _ask(rule: Any, x: Tensor) -> Window | Listed | None:
    """The live rows of one rule; None if there are none."""
    total, draw = x.shape[0], rule.draw()
    if rule.rows == "bernoulli" and draw.key is not None:
        live = row_mask(total, draw.rates[0], draw.key).nonzero().squeeze(1).to(x.device)
        maybe_mark_dynamic(live, 0)
        return Listed(live, scalar(rule.scale(draw))) if live.numel() else None
    rows, scale = _rows(rule, total)
    if rows.live == 0:
        return None
    fixed = rule.fixed(total)
    start = _to(torch.tensor(rows.start), x)
    return Window(_length(rows.live, fixed), start, scalar(scale), fixed and rows.live == total)
