"""What a model computes where residual branches are absent, from the plain model's own forward.

A block is run as it is, while the functions that it calls are recorded. All paths from its hidden state to its output
go through some values, and between two such values that are joined by a sum lies a residual branch: one operand is the
earlier value itself (or its projection), the others are functions of it. A masked branch is multiplied by its mask
where it enters the sum. Blocks that are taken as a whole are x + mask * (block(x) - x), by hooks.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Mask = float | Callable[[int], Tensor]  # a factor, or one for every row, Tensor[N], by the number of rows N


class NoReferenceError(Exception):
    """Why there is nothing to compare a block with."""


_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__"}
# what hands its input on: nothing but places, types and known factors change
_HANDED_ON = re.compile(
    r"view|view_as|reshape|permute|transpose|swapaxes|movedim|moveaxis|contiguous|clone|flatten|unflatten|squeeze|unsqueeze"
    r"|to|type|type_as|float|double|dropout|dropout\dd|feature_dropout|alpha_dropout|__getitem__|pad|roll|mul|mul_|__mul__"
    r"|__rmul__|__imul__|div|__truediv__|identity|expand|masked_fill|T|mT|channel_shuffle|flip|narrow|select|rearrange"
)
# children of blocks that stand on the shortcut
_PROJECTION = re.compile(r"(downsample|shortcut|proj|projection|skip|residual|conv_skip|identity|conv_s|res)\d*")


class _Node(NamedTuple):
    """A function that was called: which values that depend on the hidden state it had as operands (with their places
    among the leaves of its arguments), inside which modules of the block, and the how manyth there. (Functions inside a
    mixture of experts may be more or fewer where a branch is masked; those around it are not.)"""

    name: str
    operands: tuple[tuple[int, int], ...]  # (place, node)
    inside: tuple[str, ...]
    count: int = 0

    @property
    def key(self) -> tuple[tuple[str, ...], int]:
        return self.inside, self.count


@dataclass
class _Call:
    """One call of a block while it is recorded, or repeated with masks."""

    nodes: list[_Node] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)  # id of a tensor to its node
    written: dict[int, int] = field(default_factory=dict)  # storage to the node that wrote it last
    kept: list[Any] = field(default_factory=list)  # so that no id comes twice
    inside: list[str] = field(default_factory=list)
    counts: dict[tuple[str, ...], int] = field(default_factory=dict)  # of functions so far, by `inside`
    masks: Mapping[Any, tuple[int, Mask]] | None = None  # by key of a function: place of its operand, and its factor
    rows: int = 0

    def node_of(self, value: Tensor) -> int | None:
        made, wrote = self.known.get(id(value)), self.written.get(_storage(value))
        return wrote if made is None or (wrote is not None and wrote > made) else made


class Term(NamedTuple):
    """A branch: operand `place` of the function with this key in a block's call; `join` tells branches of one sum,
    `inside` are the modules that computed it."""

    key: Any
    place: int
    join: int
    inside: frozenset[str]


class _Recorder(TorchFunctionMode):
    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call, name = self.call, _name(func)
        leaves, spec = tree_flatten((args, kwargs))
        before = [(i, call.node_of(leaf)) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        operands = tuple((i, node) for i, node in before if node is not None)
        number = -1
        if operands:
            number = len(call.nodes)
            inside = tuple(call.inside)
            call.counts[inside] = call.counts.get(inside, -1) + 1
            call.nodes.append(_Node(name, operands, inside, call.counts[inside]))
        if operands and call.masks and (key := call.nodes[number].key) in call.masks:
            place, mask = call.masks[key]
            if name not in _SUMS or not isinstance(leaves[place] if place < len(leaves) else None, Tensor):
                raise NoReferenceError("it calls other functions where a branch is masked, as mixtures of experts may")
            if name in ("add_", "__iadd__") and place == 0:
                leaves[0].mul_(_shaped(mask, leaves[0], call.rows))
            else:
                leaves[place] = leaves[place] * _shaped(mask, leaves[place], call.rows)
            args, kwargs = tree_unflatten(leaves, spec)
        out = func(*args, **kwargs)
        if operands:
            first = leaves[0] if leaves and isinstance(leaves[0], Tensor) else None
            if first is not None and _writes(name):
                call.known[id(first)] = number
                call.written[_storage(first)] = number
                call.kept.append(first)
            for one in tree_leaves(out):
                if isinstance(one, Tensor) and (id(one) not in call.known or one is not first or _writes(name)):
                    call.known[id(one)] = number
                    call.kept.append(one)
        return out


def _name(func: Any) -> str:
    owner = getattr(func, "__self__", None)
    name = getattr(func, "__name__", str(func))
    return getattr(owner, "__name__", name) if name == "__get__" else name


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        in_place
        or name == "__setitem__"
        or (name.startswith("__i") and name not in ("__int__", "__invert__", "__index__"))
    )


def _storage(value: Tensor) -> int:
    try:
        return value.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return -id(value)


def _shaped(mask: Mask, value: Tensor, rows: int) -> float | Tensor:
    if not callable(mask):
        return mask
    if not value.ndim or not rows or len(value) % rows:
        raise NoReferenceError(f"a branch of shape {tuple(value.shape)} has no rows of a batch of {rows}")
    # windows of an image stand one after the other
    each = mask(rows).to(value.dtype).repeat_interleave(len(value) // rows)
    return each.reshape(-1, *[1] * (value.ndim - 1))


def hidden_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden state among a block's arguments: the first tensor."""
    found = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
    if found is None:
        raise NoReferenceError("a block takes no tensor")
    return found


def hidden_out(out: Any, x: Tensor) -> Tensor:
    """The hidden state in a block's output: the first tensor of the input's shape, or else the first tensor."""
    tensors = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
    found = next((one for one in tensors if one.shape == x.shape), tensors[0] if tensors else None)
    if found is None:
        raise NoReferenceError("a block returns no tensor")
    return found


def terms_of(call: _Call, end: int) -> list[Term]:
    """The branches of a block, in the order in which they are added."""
    nodes = call.nodes
    # nodes[0] is the hidden state; what lies on a path from it to the output
    needed = {end}
    for number in range(end, 0, -1):
        if number in needed:
            needed.update(node for _, node in nodes[number].operands)
    # all paths go through a node that no edge passes over
    reach, through = 0, []
    ahead: dict[int, int] = {}
    for number in sorted(needed):
        for _, node in nodes[number].operands:
            ahead[node] = max(ahead.get(node, 0), number)
    for number in sorted(needed):
        if reach <= number:
            through.append(number)
        reach = max(reach, ahead.get(number, number))
    found: list[Term] = []
    for start, stop in pairwise(through):
        if len({node for _, node in nodes[stop].operands}) > 1 or len(nodes[stop].operands) > 1:
            found += _joined(call, start, stop)
    return found


def _joined(call: _Call, start: int, stop: int) -> list[Term]:
    nodes = call.nodes
    if nodes[stop].name not in _SUMS or len(nodes[stop].operands) != 2:
        return []
    pair = nodes[stop].operands
    ways = [_way(call, start, node) for _, node in pair]
    best = max(ways)
    if best == 0 or ways.count(best) > 1:
        return []
    main = ways.index(best)
    side = pair[1 - main]
    inner = []
    node = pair[main][1]
    while node != start:  # x + a + b: the sum x + a is on the shortcut's way
        if nodes[node].name in _SUMS and len(nodes[node].operands) == 2:
            two = nodes[node].operands
            sides = [_way(call, start, one) for _, one in two]
            if max(sides) and sides[0] != sides[1]:
                other = two[1 - sides.index(max(sides))]
                inner.append(Term(nodes[node].key, other[0], stop, _inside(call, start, other[1])))
                node = two[sides.index(max(sides))][1]
                continue
        if not nodes[node].operands:
            break
        node = nodes[node].operands[0][1]
    return [*reversed(inner), Term(nodes[stop].key, side[0], stop, _inside(call, start, side[1]))]


def _inside(call: _Call, start: int, node: int) -> frozenset[str]:
    """The modules in which a value was computed from an earlier one."""
    needed = {node}
    for number in range(node, start, -1):
        if number in needed:
            needed.update(one for _, one in call.nodes[number].operands if one > start)
    return frozenset(call.nodes[one].inside[-1] for one in needed if call.nodes[one].inside)


def _way(call: _Call, start: int, node: int) -> int:
    """How an operand comes from an earlier value: 3 is it handed on, 2 a sum of it, 1 its projection, or 0."""
    nodes, result = call.nodes, 3
    while node != start:
        if node < start:
            return 0
        if nodes[node].inside and _PROJECTION.fullmatch(nodes[node].inside[0].partition(".")[0]):
            return 1
        operands = nodes[node].operands
        if len(operands) == 1 and _HANDED_ON.fullmatch(nodes[node].name):
            node = operands[0][1]
        elif nodes[node].name in _SUMS and len(operands) == 2:
            ways = [_way(call, start, one) for _, one in operands]
            if max(ways) < 2 or ways[0] == ways[1]:
                return 0
            result = 2
            node = operands[ways.index(max(ways))][1]
        else:
            return 0
    return result


@dataclass(frozen=True)
class Place:
    """A block as a report names it: its name, number of branches, and whether it is taken as a whole; `parts` are the
    names of the modules of each branch, which tell what is meant where there are more sums than branches."""

    name: str
    branches: int
    whole: bool
    parts: tuple[tuple[str, ...], ...] = ()


class Reference:
    """A plain model whose branches can be masked.

    Args:
        model: the plain model; hooks stand on it only during `run`.
        forward: calls it.
        places: the blocks whose branches have masks, in the order of the masks.
    """

    def __init__(self, model: nn.Module, forward: Callable[[], Any], places: Sequence[Place]) -> None:
        self.model, self.forward, self.places = model, forward, places
        self.terms: dict[tuple[str, int], list[list[Term]]] = {}  # by block and number of its call
        self.why_not: dict[str, str] = {}
        self.reached: set[nn.Module] = set()
        with self._hooked(None), _called([model.get_submodule(place.name) for place in places]) as called:
            forward()
        for place in places:
            if model.get_submodule(place.name) in called - self.reached:
                self.why_not[place.name] = "the model calls its forward, past the hooks"

    def run(self, masks: Sequence[Mask]) -> Any:
        """The output of the model where every branch is multiplied by its mask; NoReferenceError if none is known."""
        with self._hooked(masks):
            return self.forward()

    @contextmanager
    def _hooked(self, masks: Sequence[Mask] | None) -> Iterator[None]:
        first = 0
        with ExitStack() as stack:
            for place in self.places:
                block = self.model.get_submodule(place.name)
                own = None if masks is None else masks[first : first + place.branches]
                first += place.branches
                if own is not None and all(not callable(one) and one == 1.0 for one in own):
                    continue
                if own is None:
                    stack.callback(block.register_forward_pre_hook(lambda it, _: self.reached.add(it)).remove)
                if place.name not in self.why_not:
                    if not place.whole:
                        self._inside(stack, block, place, own)
                    elif own is not None:
                        self._whole(stack, block, own[0])
                elif own is not None:
                    raise NoReferenceError(f"{place.name}: {self.why_not[place.name]}")
            yield

    def _whole(self, stack: ExitStack, block: nn.Module, mask: Mask) -> None:
        given: list[Tensor] = []
        others: list[list[Tensor]] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = hidden_in(args, kwargs)
            given.append(x.clone())
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one is not x]
            others.append(tensors)

        def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            x, rest = given.pop(), others.pop()
            y = hidden_out(out, x)
            if y.shape != x.shape:
                raise NoReferenceError("a block changes the shape of its input")
            leaves, spec = tree_flatten(out)
            place = next(i for i, leaf in enumerate(leaves) if leaf is y)
            leaves[place] = x + (y - x) * _shaped(mask, y, len(x))
            for number, one in enumerate(leaves):
                if number == place or not isinstance(one, Tensor):
                    continue
                streams = [other for other in (x, *rest) if other.shape == one.shape]
                if any(one is other for other in streams) or not streams:
                    continue  # handed on, or nothing that goes through the blocks
                if len(streams) > 1 or streams[0] is x:
                    raise NoReferenceError("a block of several streams, for which there is test_streams.py")
                leaves[number] = streams[0] + (one - streams[0]) * _shaped(mask, one, len(one))
            return tree_unflatten(leaves, spec)

        stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)

    def _inside(self, stack: ExitStack, block: nn.Module, place: Place, own: Sequence[Mask] | None) -> None:
        calls = 0
        open_calls: list[tuple[_Call, _Recorder, Tensor]] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal calls
            x = hidden_in(args, kwargs)
            call = _Call([_Node("input", (), ())], {id(x): 0}, kept=[x], rows=len(x) if x.ndim else 0)
            if own is not None:
                call.masks = {
                    term.key: (term.place, mask)
                    for mask, group in zip(own, self.terms[place.name, calls], strict=True)
                    for term in group
                }
            calls += 1
            recorder = _Recorder(call)
            recorder.__enter__()
            open_calls.append((call, recorder, x))

        def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            call, recorder, x = open_calls.pop()
            recorder.__exit__(None, None, None)
            if own is None:
                end = call.node_of(hidden_out(out, x))
                terms = [] if end is None else terms_of(call, end)
                self._record(place, calls - 1, terms)

        stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        # a forward that fails leaves its recorder
        stack.callback(lambda: [recorder.__exit__(None, None, None) for _, recorder, _ in reversed(open_calls)])
        stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        for name, module in block.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(_enter(open_calls, name)).remove)
                stack.callback(module.register_forward_hook(_leave(open_calls)).remove)

    def _record(self, place: Place, number: int, terms: list[Term]) -> None:
        joins = list(dict.fromkeys(term.join for term in terms))
        by_parts: list[list[Term]] = []
        for parts in place.parts:
            others = [name for own in place.parts for name in own if name not in parts]
            by_parts.append([term for term in terms if _belongs(term, parts, others)])
        if len(terms) == place.branches:
            groups = [[term] for term in terms]
        elif len(joins) == place.branches:
            groups = [[term for term in terms if term.join == join] for join in joins]
        elif any(by_parts) and all(group or not parts for group, parts in zip(by_parts, place.parts, strict=True)):
            groups = by_parts  # a rule without parts is of a branch that the block does not have
        else:
            kind = type(self.model.get_submodule(place.name)).__name__
            self.why_not[place.name] = f"{kind} has {len(terms)} sums of its input, and {place.branches} rules"
            groups = [[] for _ in range(place.branches)]
        self.terms[place.name, number] = groups


@contextmanager
def _called(blocks: Sequence[nn.Module]) -> Iterator[set[nn.Module]]:
    """Those of these blocks whose forward is called meanwhile."""
    called: set[nn.Module] = set()

    def noting(block: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            called.add(block)
            return own(*args, **kwargs)

        return forward

    for block in blocks:
        block.forward = noting(block, block.forward)
    try:
        yield called
    finally:
        for block in blocks:
            del block.forward


def _belongs(term: Term, parts: Sequence[str], others: Sequence[str]) -> bool:
    """Whether a branch is computed in some of these modules, and in none of the others."""

    def within(names: Sequence[str]) -> bool:
        return any(one == name or one.startswith(f"{name}.") for one in term.inside for name in names)

    return within(parts) and not within(others)


def _enter(calls: list[tuple[_Call, _Recorder, Tensor]], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if calls:
            calls[-1][0].inside.append(name)

    return hook


def _leave(calls: list[tuple[_Call, _Recorder, Tensor]]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if calls and calls[-1][0].inside:
            calls[-1][0].inside.pop()

    return hook
