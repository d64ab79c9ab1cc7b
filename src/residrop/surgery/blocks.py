"""Foreign blocks under rules: the class that `apply` puts in front of a block's own, and how it is taken away again.

A block keeps its identity, parameters, hooks and names; only its class changes, to one made of a mixin (which knows the
branches) and the block's own class. The rules become a child module without parameters, so `state_dict` is unchanged.
"""

import copyreg
import warnings
from collections.abc import Callable, Mapping, Sequence
from pickle import PicklingError
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from residrop.blocks.skippable import Skippable, left_whole
from residrop.common.errors import ConfigError, SharedBlockWarning
from residrop.functional.layout import relu_by_signs
from residrop.rules.base import Rule
from residrop.surgery.arguments import Cutting, Signature, call, pack, refuse_caches, settle_caches, without_new_caches
from residrop.surgery.containers import RULES, Container
from residrop.surgery.forms import form_of

__all__ = [
    "AppliedBlock",
    "Branch",
    "Change",
    "ForeignBlock",
    "Hooked",
    "check_unchanged",
    "install_rules",
    "record_changes",
    "uninstall_rules",
]

_IDENTITY = nn.Identity()


class Change(Protocol):
    """Something that was changed in a model while rules are applied."""

    def undo(self) -> None:
        """Put it back."""
        ...


class Hooked:
    """A forward hook (or, with `before`, a pre-forward hook that is given named arguments, too) that a module has while
    rules are applied."""

    def __init__(self, module: nn.Module, hook: Callable[..., Any], *, before: bool = False) -> None:
        self.handle = (
            module.register_forward_pre_hook(hook, with_kwargs=True) if before else module.register_forward_hook(hook)
        )

    def undo(self) -> None:
        self.handle.remove()


class AppliedBlock(Skippable):
    """Base of all that stands in front of a foreign class. Its names begin with `residrop`: a block of any class has
    attributes of its own, which must not be hidden."""

    residrop_rules: nn.ModuleList
    # for mixins made at run time, which pickle cannot find by name: the function that makes them and its arguments
    residrop_made: ClassVar[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None] = None
    residrop_checks = (refuse_caches,)
    residrop_signature: ClassVar[Signature]  # of the forward of the block's own class

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "residrop_trying" in self.__dict__:
            return self.__dict__["residrop_trying"](super().forward, args, kwargs)
        if self.training and not torch.compiler.is_compiling():
            if (node := left_whole(self, self.residrop_rules, args, kwargs)) is not None:
                return node
            self._residrop_count()
        args, kwargs = settle_caches(self, self.residrop_rules, args, kwargs)
        if any(rule.tosses() for rule in self.residrop_rules) and self.residrop_unchecked(args, kwargs):  # pyright: ignore
            if torch.compiler.is_compiling():
                from residrop.rules import tracing

                tracing.in_python(self._residrop_checked, args, kwargs)
            else:
                self._residrop_checked(args, kwargs)
        for rule in self.residrop_rules:
            if not rule.is_plain_sum():  # pyright: ignore[reportCallIssue]
                return self.residrop_forward(*args, **kwargs)
        return super().forward(*args, **kwargs)  # to the last bit, and with whatever else the class does in eval

    def residrop_unchecked(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}) -> bool:
        """Whether the block is still to be compared with what it was taken for, for such arguments."""
        return self.__dict__.get("residrop_checked", (0, 1))[0] is not None

    def residrop_check(self, args: tuple[Any, ...], kwargs: dict[str, Any], own: Any = None) -> bool | None:
        """Compare the block with what it was taken for, on the arguments of a forward, of which its own forward has
        given `own`, or has still to be called.

        Returns:
            Whether it could be seen; None if there was nothing to compare.

        Raises:
            PlanError: it is something else.
        """
        return True

    def _residrop_checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where it could not be seen, twice as many forwards go by until the next attempt as did before the last."""
        wait, gap = self.__dict__.get("residrop_checked", (0, 1))
        if wait is None:
            wait, gap = 0, 1  # compared already, for other arguments
        if torch._C._get_tracing_state() is not None:
            return
        if wait:
            self.__dict__["residrop_checked"] = (wait - 1, gap)
        elif torch._C._current_graph_task_id() == -1:  # in backward it is a recomputation
            # a block whose rate is 1 keeps its cache, which the comparison must not fill
            seen = self.residrop_check(*without_new_caches(self, args, kwargs))
            if seen is not None:
                self.__dict__["residrop_checked"] = (None, 0) if seen else (gap, 2 * gap)

    def _residrop_count(self) -> None:
        sampler: Any = self.residrop_rules[0].sampler
        rates = [rate for rule in self.residrop_rules for rate in rule.rates]  # pyright: ignore
        if sampler is None or min(rates, default=1.0) == 1.0 or torch._C._current_graph_task_id() != -1:
            return  # in backward it is a recomputation
        if sampler.called_again(id(self)):
            warnings.warn(
                f"a {type(self).__name__} is called several times in one forward: all these calls have one coin, so "
                "they are present or absent together; where layers share weights (as ALBERT's do) that is another law "
                "than stochastic depth's, and a survival rate near 1 is advised",
                SharedBlockWarning,
                stacklevel=2,
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied by the block's own class and its mixin, of which the class is made again."""
        if type(self) not in _CLASSES.values():  # an engine's
            return super().__reduce_ex__(protocol)
        new, args, *rest = super().__reduce_ex__(max(int(protocol), 2))
        own: type[nn.Module] = self.__dict__["_residrop_class"]
        if new is not copyreg.__newobj__ or args != (type(self),):  # pyright: ignore[reportAttributeAccessIssue]
            raise PicklingError(
                f"{own.__name__} has a way of its own to be pickled and copied, which knows nothing of its rules; call "
                "residrop.remove(model) first, and residrop.apply afterwards"
            )
        mixin = next(one for one, of in _CLASSES if _CLASSES[one, of] is type(self))
        form = form_of(own.forward) if issubclass(mixin, ForeignBlock) else ""
        return (_new_block, (vars(mixin).get("residrop_made") or mixin, own, form), *rest)

    def residrop_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, written anew around its rules."""
        raise NotImplementedError

    def residrop_along(self, rule: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        """The arguments of a branch as `Rule.forward` takes them; PlanError if rows of them cannot be cut."""
        if not args and not kwargs:
            return ()
        if rule.cuts_rows():
            return (self.residrop_cut(x, args, kwargs),)
        return ((args, kwargs),)

    def residrop_cut(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`pack` with what is known of the arguments."""
        where = f"{type(self).__name__} with row-level presence"
        cutting = Cutting(*self.__dict__.get("residrop_cutting", ((), ())))
        return pack(x, where, cutting, args, kwargs, self.residrop_signature.names[1:])


class ForeignBlock(AppliedBlock):
    """Base of the mixins of blocks whose branches are known: a rule for every branch."""

    def residrop_through(
        self,
        number: int,
        x: Tensor,
        branch: Callable[..., Tensor],
        *args: Any,
        shortcut: nn.Module | None = None,
        post: nn.Module | None = None,
        settled: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Rule `number` of the block, applied to branch(x, *args, **kwargs) and a shortcut (None: the identity).

        Args:
            number: of the rule, from 0.
            x: the hidden state.
            branch: the costly function.
            args: its further arguments, see `residrop_along`.
            shortcut: the always-present path.
            post: applied to the result.
            settled: whether what the shortcut gives is a fixed point of `post`, which then may be left out where the
                branch is absent.
            kwargs: further arguments of the branch by name.
        """
        rule: Any = self.residrop_rules[number]
        options: dict[str, Any] = {"along": self.residrop_along(rule, x, args, kwargs)}
        if settled:
            options["post"] = post
        y = rule(x, _IDENTITY if shortcut is None else shortcut, Branch(self, branch), **options)
        if settled or post is None:
            return y
        if rule.cuts_rows() and (z := relu_by_signs(post, y)) is not None:
            return z
        # an absent branch gives the block's input back, which is not ours to overwrite (compilers drop needless copies)
        if _in_place(post) and (torch.compiler.is_compiling() or y is x or y._base is not None):
            y = y.clone()
        return post(y)


def _in_place(module: nn.Module) -> bool:
    return any(getattr(one, "inplace", False) for one in module.modules())


class Branch:
    """A function of a block as a branch; knows the block, whose batch norms it runs."""

    def __init__(self, block: nn.Module, function: Callable[..., Tensor]) -> None:
        self.__self__ = block
        self.function = function

    def __call__(self, x: Tensor, packed: Any = None) -> Tensor:
        return self.function(x) if packed is None else call(self.function, x, packed)


_CLASSES: dict[tuple[type, type], type] = {}


def install_rules(block: nn.Module, mixin: type[AppliedBlock], rules: Sequence[Rule]) -> None:
    """Put `mixin` in front of the class of `block`, with these rules for its branches.

    Raises:
        ConfigError: the block has attributes that the mixin would hide.
    """
    own = type(block)
    names = {name for one in mixin.__mro__ if issubclass(one, AppliedBlock) for name in vars(one)} - {"forward"}
    hidden = [name for name in sorted(names) if "residrop" not in name and name[0] != "_" and hasattr(block, name)]
    if hidden or RULES in block._modules:
        raise ConfigError(
            f"{own.__name__} has an attribute {(hidden or [RULES])[0]!r}, which residrop.apply would hide"
        )
    changed = _class_of(mixin, own)
    block.add_module(RULES, nn.ModuleList(rules).train(block.training))
    block.__dict__["_residrop_undo"] = []
    block.__dict__["_residrop_class"] = own
    block.__class__ = changed


def _class_of(mixin: type[AppliedBlock], own: type[nn.Module]) -> type[nn.Module]:
    key = (mixin, own)
    if key not in _CLASSES:
        bases = (mixin, Container, own) if issubclass(own, (nn.Sequential, nn.ModuleList)) else (mixin, own)
        # the same name: wrapping policies of engines name classes of blocks
        attributes: dict[str, Any] = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        attributes["__doc__"] = own.__doc__
        signature = Signature.of(own.forward)
        attributes["residrop_signature"] = property(lambda self: signature)  # strict export wants no objects on classes
        _CLASSES[key] = type(own.__name__, bases, attributes)
    return _CLASSES[key]


def _new_block(mixin: Any, own: type[nn.Module], form: str) -> nn.Module:
    """A block without its state, which whoever loads or copies it puts in."""
    if form and form != form_of(own.forward):
        raise ConfigError(
            f"{own.__module__}.{own.__name__} has another forward here than where this model was saved; load it with "
            f"that version of {own.__module__.partition('.')[0]}, or load a state_dict into a model built here"
        )
    if not isinstance(mixin, type):
        function, args, options = mixin
        mixin = function(*args, **options)
    cls = _class_of(mixin, own)
    return cls.__new__(cls)


def record_changes(block: nn.Module, changes: Sequence[Change]) -> None:
    """Changes that `uninstall_rules` is to undo."""
    block.__dict__["_residrop_undo"].extend(changes)


def check_unchanged(block: nn.Module) -> None:
    """ConfigError if an engine has changed a block since `install_rules`."""
    if type(block) not in _CLASSES.values() or "forward" in block.__dict__:
        raise ConfigError(
            f"{type(block).__name__} was changed since residrop.apply (by fully_shard?); remove the rules before that"
        )


def uninstall_rules(block: nn.Module) -> None:
    """Undo `install_rules`."""
    check_unchanged(block)
    block.__class__ = block.__dict__["_residrop_class"]
    del block._modules[RULES]
    for change in reversed(block.__dict__["_residrop_undo"]):
        change.undo()
    for name in [name for name in block.__dict__ if name.startswith(("residrop_", "_residrop_"))]:
        del block.__dict__[name]
