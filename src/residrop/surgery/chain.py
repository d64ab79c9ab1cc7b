"""Foreign blocks whose branches are chains of their own attributes, written down as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from residrop.surgery.blocks import ForeignBlock

__all__ = ["Chain", "Step", "chain"]


@dataclass(frozen=True)
class Step:
    """One attribute of a block that its branch goes through: a module or method is called, a parameter is multiplied,
    None or an absent attribute is skipped.

    Attributes:
        name: of the attribute.
        args: names of the block's arguments that it gets by position.
        kwargs: names of those that it gets by name.
    """

    name: str
    args: tuple[str, ...] = ()
    kwargs: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Step":
        """Read "attn", "attn(size)" (by position) or "attn(rope=,mask=)" (by name)."""
        name, _, inside = text.partition("(")
        given = [one for one in inside.rstrip(")").split(",") if one]
        by_name = tuple(one[:-1] for one in given if one.endswith("="))
        return cls(name, tuple(one for one in given if not one.endswith("=")), by_name)


@dataclass(frozen=True)
class Link:
    """One branch of a block.

    Attributes:
        steps: what the branch is made of.
        shortcut: name of the attribute that is its shortcut; the identity if empty, absent or None.
    """

    steps: tuple[Step, ...]
    shortcut: str

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of the block's arguments that the branch is given."""
        return tuple(name for step in self.steps for name in (*step.args, *step.kwargs))


class Chain(ForeignBlock):
    """after(post(links in a row (before(x)))).

    Attributes:
        links: the branches.
        before: what the hidden state goes through first, in every pass.
        post: name of the activation after the sum (of blocks with one branch).
    """

    links: ClassVar[tuple[Link, ...]]
    before: ClassVar[tuple[Step, ...]] = ()
    post: ClassVar[str] = ""

    def residrop_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, given = self.residrop_signature.take(args, kwargs)
        if self.before:
            x = self.residrop_run(self.before, x, **given)
        for number in range(len(self.links)):
            x = self.residrop_link(number, x, given)
        return x

    def residrop_link(self, number: int, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Branch `number` and its shortcut, combined by its rule; `given` are the arguments of the block by name."""
        link = self.links[number]
        run = partial(self.residrop_run, link.steps)
        shortcut: nn.Module | None = getattr(self, link.shortcut, None) if link.shortcut else None
        taken = {name: given[name] for name in link.takes if name in given}  # earlier versions take fewer
        if not self.post:
            return self.through(number, x, run, shortcut=shortcut, **taken)
        post: nn.Module = getattr(self, self.post)
        settled = shortcut is None and "residrop_settled" in self.__dict__
        return self.through(number, x, run, shortcut=shortcut, post=post, settled=settled, **taken)

    def residrop_run(self, steps: Sequence[Step], x: Tensor, **given: Any) -> Tensor:
        """What `steps` make of x."""
        for step in steps:
            part = getattr(self, step.name, None)
            if part is None:
                continue
            if isinstance(part, Tensor):
                x = part * x
            else:
                args = [given[name] for name in step.args if name in given]
                x = part(x, *args, **{name: given[name] for name in step.kwargs if name in given})
        return x


def chain(
    *branches: str,
    shortcut: str | Sequence[str] = "",
    before: str = "",
    post: str = "",
    uses: Mapping[str, Sequence[str]] | None = None,
    batched: Mapping[str, int] | None = None,
    base: type[Chain] = Chain,
) -> type[Chain]:
    """A mixin for blocks of this form.

    Args:
        branches: for every branch its steps, see `Step.parse`, with spaces between. A step whose name contains
            "drop_path" or "stochastic" is the block's own module that drops the branch; it goes on being called.
        shortcut: name of the attribute that is the shortcut, or one name per branch; "" is the identity.
        before: steps before the first branch.
        post: name of the activation after the sum.
        uses: for steps that are methods, the names of the children and parameters they use.
        batched: see `Cutting`.
        base: a class derived from `Chain` with methods of its own.
    """
    options = {"shortcut": shortcut, "before": before, "post": post, "uses": uses, "batched": batched, "base": base}
    key = (branches, repr(options))
    if key in _MADE:
        return _MADE[key]
    steps = [tuple(map(Step.parse, branch.split())) for branch in branches]
    shortcuts = [shortcut] * len(steps) if isinstance(shortcut, str) else shortcut
    inside = uses or {}
    attributes: dict[str, Any] = {
        "links": tuple(Link(*pair) for pair in zip(steps, shortcuts, strict=True)),
        "before": tuple(map(Step.parse, before.split())),
        "post": post,
        "parts": tuple(
            tuple(dict.fromkeys(name for step in one for name in inside.get(step.name, (step.name,)))) for one in steps
        ),
        "drops": tuple(next((step.name for step in one if _drops(step.name)), "") for one in steps),
        "batched": batched or {},
        "residrop_made": (chain, branches, options),
        "__doc__": base.__doc__,
    }
    return _MADE.setdefault(key, type(base.__name__, (base,), attributes))


_MADE: dict[tuple[tuple[str, ...], str], type[Chain]] = {}


def _drops(name: str) -> bool:
    return "drop_path" in name or name.startswith("stochastic")
