"""The rule for blocks nobody knows: x + b (block(x) - x), for any module with input and output of one shape."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_structure, tree_unflatten

from residrop.blocks.skippable import Part
from residrop.common.errors import ConfigError, PlanError
from residrop.rules.base import Rule
from residrop.surgery.blocks import AppliedBlock, Branch
from residrop.surgery.containers import RULES
from residrop.surgery.rowwise import check_rows, looking_on

__all__ = ["Call", "GenericBlock", "Taken"]


class GenericBlock(AppliedBlock):
    """A whole block as one branch: where it is absent, its first argument is its output.

    A block that returns more than a tensor (a tuple, a dict) returns the same structure when absent, with its input in
    place of the hidden state (the first tensor of its shape). What else it returns must be what the model would have
    had from the block: an argument handed on, None, or a constant. Otherwise the block is refused.

    Attributes:
        residrop_lenient: whether anything else may be None where the block is absent, for models that expect that.
    """

    residrop_lenient: ClassVar[bool] = False

    def residrop_branches(self) -> Sequence[tuple[Rule, Sequence[Part]]]:
        rule = self.residrop_rules[0]
        assert isinstance(rule, Rule)
        children = [child for name, child in self._modules.items() if child is not None and name != RULES]
        return [(rule, [*children, *(one for one in self._parameters.values() if one is not None)])]

    def residrop_absent(self) -> bool:
        # what else the block returns is found out by running it once, for which its parameters must be there
        return bool(self.__dict__["residrop_forms"]) and super().residrop_absent()

    def residrop_unchecked(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}) -> bool:
        rule = self.residrop_rules[0]
        return rule.granularity == "row" and super().residrop_unchecked(args, kwargs)

    def residrop_forward(self, *args: Any, **kwargs: Any) -> Any:
        rule = self.residrop_branches()[0][0]
        rowwise = rule.cuts_rows()
        (x, args, kwargs, name, forward), restored = self.residrop_take(args, kwargs)
        call = Call(self, forward, name, rowwise, (x, args, kwargs))
        along = self.residrop_along(rule, x, args, kwargs)
        return restored(call.result(rule.forward_block(x, Branch(self, call), along), x, args, kwargs))

    def residrop_check(self, args: tuple[Any, ...], kwargs: dict[str, Any], own: Any = None) -> bool | None:
        """Compare what rows give by themselves with what they give in a batch of two rows or more."""
        (x, args, kwargs, name, forward), _ = self.residrop_take(args, kwargs)
        rowwise = self.residrop_rules[0].granularity == "row"
        call = Call(self, forward, name, rowwise, (x, args, kwargs))
        if own is not None and not call.knows():  # on an example
            with looking_on(self, x):
                call(x.clone(), *args, **kwargs)
        if not rowwise or len(x) < 2:
            return None if rowwise else True
        along = (self.residrop_cut(x, args, kwargs),) if args or kwargs else ()
        return check_rows(self, call.hidden, x, (args, kwargs), along, self.residrop_signature.names[1:])

    def residrop_take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "tuple[Taken, Callable[[Any], Any]]":
        """A call's arguments, and what makes the block's output of that of `Taken.forward`."""
        return Taken(*self._residrop_hidden(args, kwargs), super(AppliedBlock, self).forward), lambda out: out

    def _residrop_hidden(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any], str | None]:
        """The hidden state among a call's arguments (the first of the forward), the others, and its name if it came
        by name."""
        if args and isinstance(args[0], Tensor):
            return args[0], args[1:], kwargs, None
        first = self.residrop_signature.names[:1]
        for name in (*first, *kwargs):  # of a forward(**kwargs) nobody knows which is the first
            if not args and isinstance(kwargs.get(name), Tensor):
                return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}, name
        raise ConfigError(
            f"{type(self).__name__} was called without a tensor as its first argument, so it is no block x + F(x); "
            "leave it out of `blocks`"
        )

    def residrop_bare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output with its own hidden state, and with what else it returns as where it is absent."""
        (x, args, kwargs, name, forward), restored = self.residrop_take(args, kwargs)
        call = Call(self, forward, name, False, (x, args, kwargs))
        with looking_on(self, x):
            y = call(x.clone(), *args, **kwargs)
        call.others = None
        return restored(call.result(y, x, args, kwargs))


class Taken(NamedTuple):
    """The arguments of a call of a block.

    Attributes:
        x: the hidden state.
        args: the other arguments by position.
        kwargs: and by name.
        name: of the hidden state, if it came by name.
        forward: what is called with them.
    """

    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None
    forward: Callable[..., Any]


class _Constant(NamedTuple):
    """An output that is the same in every call: None, a number, a text; or one that nothing needs (`unused`), which is
    None where the block is absent."""

    value: Any
    unused: bool = False


class _Form(NamedTuple):
    """What a block returns for one kind of call: a tree, at which of its leaves the hidden state is, and what the
    others are: the index of an argument (0 is the hidden state) among the leaves of a call's arguments, or a constant.
    """

    spec: TreeSpec
    place: int
    others: tuple[int | _Constant | None, ...]  # None at `place`


class Call:
    """One call of a block, or of a branch that gives more than a tensor: takes its output apart, and puts the combined
    hidden state in its place.

    Args:
        block: the block.
        forward: its forward, or the branch.
        name: of the hidden state among the arguments, if it comes by name.
        rowwise: whether some rows alone may go through it.
        given: (x, args, kwargs).
        branch: the number of the branch; None for a block.
    """

    def __init__(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        name: str | None,
        rowwise: bool,
        given: Any,
        branch: int | None = None,
    ) -> None:
        self.block, self.forward, self.name, self.rowwise, self.branch = block, forward, name, rowwise, branch
        self.given = tree_flatten(given)[0]
        # calls of one kind have the same arguments, of the same types, and the same flags
        self.kind = (name, branch, *(given and (len(given[1]), *given[2])), *map(_kind, self.given))
        self.others: list[Any] | None = None

    def knows(self) -> bool:
        """Whether it is known what the block returns for such arguments."""
        return self.kind in self.block.__dict__["residrop_forms"]

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.forward(x, *args, **kwargs) if self.name is None else self.forward(**{self.name: x}, **kwargs)

    def hidden(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden state that the block itself gives."""
        leaves, _ = tree_flatten(self.run(x, *args, **kwargs))
        return leaves[self.place(x, leaves)]

    def place(self, x: Tensor, leaves: list[Any]) -> int:
        """At which leaf of the output the hidden state is; ConfigError if there is none."""
        return _place(self.block, x, leaves) if self.branch is None else 0

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
        out = self.run(x, *args, **kwargs)
        leaves, spec = tree_flatten(out)
        got = tree_flatten((x, args, kwargs))[0]
        forms: dict[Any, _Form] = self.block.__dict__["residrop_forms"]
        form = forms.get(self.kind)
        if form is None or form.spec != spec or not _still(form, leaves, got):
            form = forms[self.kind] = self.learn(x, out, leaves, got, form)
            if version is not None and x._version != version:
                raise ConfigError(
                    f"{type(self.block).__name__} overwrites its input, which x + b (block(x) - x) needs; make its "
                    "first operation one that is not in place"
                )
        self.others = leaves
        return leaves[form.place]

    def learn(self, x: Tensor, out: Any, leaves: list[Any], got: list[Any], earlier: _Form | None) -> _Form:
        """What the block returns: ConfigError if there is no hidden state, PlanError if there is more than an absent
        block can return."""
        place = self.place(x, leaves)
        others: list[int | _Constant | None] = []
        for number, leaf in enumerate(leaves):
            if number == place:
                others.append(None)
                continue
            source = self._source(leaf, got, _where(out, number))
            known = source if earlier is None or number >= len(earlier.others) else earlier.others[number]
            if isinstance(source, _Constant) and source != known:
                raise PlanError(
                    f"{type(self.block).__name__} returns {leaf!r} at {_where(out, number)!r} where it returned "
                    "something else before: nobody knows what the model should have there where the block is absent; "
                    "leave it out of `blocks`"
                )
            others.append(source)
        return _Form(tree_structure(out), place, tuple(others))

    def _source(self, leaf: Any, got: list[Any], where: str) -> int | _Constant:
        if where in self.block.__dict__.get("residrop_unused", ()):
            return _Constant(None, unused=True)
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return _Constant(leaf)
        for number, argument in enumerate(got):
            if leaf is argument:
                return number
        if getattr(self.block, "residrop_lenient", False) and not self.rowwise:
            return _Constant(None, unused=True)
        error = self._unknown(leaf, got, where)
        unknown: dict[str, PlanError] | None = self.block.__dict__.get("residrop_unknown")
        if unknown is None:
            raise error
        unknown[where] = error  # an example will tell whether anything needs it
        return _Constant(None, unused=True)

    def _unknown(self, leaf: Any, got: list[Any], where: str) -> PlanError:
        what = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        found = f"{type(self.block).__name__} returns, besides the hidden state, {what} at {where!r}"
        if isinstance(leaf, Tensor) and any(isinstance(one, Tensor) and one.shape == leaf.shape for one in got):
            return PlanError(
                f"{found}, the shape of an argument: it seems to be a block of two streams, of which "
                "x + b (block(x) - x) knows one; leave it out of `blocks`"
            )
        return PlanError(
            f"{found} that is none of its arguments: where the block is absent nobody knows what the model should have "
            "there; leave it out of `blocks`, give residrop.apply(..., example=batch), which finds out whether "
            f"anything needs it, or name {where!r} in unused=[...] if nothing does"
        )

    def result(self, y: Tensor, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output, with y as its hidden state, for these arguments."""
        if self.others is None and not self.knows():  # absent at its first call
            with looking_on(self.block, x):
                self(x, *args, **kwargs)
            self.others = None
        form: _Form = self.block.__dict__["residrop_forms"][self.kind]
        if self.others is None or self.rowwise:
            leaves = [one.value if isinstance(one, _Constant) else self.given[one or 0] for one in form.others]
        else:
            leaves = self.others
        leaves[form.place] = y
        return tree_unflatten(leaves, form.spec)


def _kind(leaf: Any) -> Any:
    return leaf if leaf is None or isinstance(leaf, (bool, int, str)) else type(leaf)


def _place(block: nn.Module, x: Tensor, leaves: list[Any]) -> int:
    """At which leaf of the output the hidden state is; ConfigError if there is none."""
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    place = next((i for i in places if leaves[i].shape == x.shape), None)
    if place is None:
        got = ", ".join(str(tuple(leaves[i].shape)) for i in places) or f"a {type(leaves[0]).__name__}"
        raise ConfigError(
            f"{type(block).__name__} turns {tuple(x.shape)} into {got}; the generic rule x + b (block(x) - x) needs "
            "input and output of one shape: leave this block out of `blocks`"
        )
    return place


def _still(form: _Form, leaves: list[Any], got: list[Any]) -> bool:
    """Whether what a block returned besides the hidden state is what was learnt of it."""
    for leaf, other in zip(leaves, form.others, strict=True):
        if isinstance(other, _Constant):
            if not other.unused and (type(leaf) is not type(other.value) or leaf != other.value):
                return False
        elif other is not None and leaf is not got[other]:
            return False
    return True


def _where(out: Any, number: int) -> str:
    """Where in the output a leaf is: "1", "attention" or "0.2"."""
    path, _ = tree_flatten_with_path(out)[0][number]
    return ".".join(keystr((one,)).strip("[].'\"") for one in path)
