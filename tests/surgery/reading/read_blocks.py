"""Residual blocks as people write them, each with its sum by hand: the branches times factors m."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, ROWS = 6, 5


@dataclass(frozen=True)
class Case:
    """A block, and what it gives where its branches are multiplied by factors.

    Attributes:
        make: builds the block.
        reference: (block, x, m, **given) to what it returns, with m a factor for every branch (a number, or a Tensor
            that can be multiplied by what the branch gives).
        branches: how many it has.
        shape: of its input, without the batch.
        given: further arguments, each a function of the number of rows.
        by_place: whether they are given by place.
    """

    make: Callable[[], nn.Module]
    reference: Callable[..., Any]
    branches: int = 1
    shape: tuple[int, ...] = (D,)
    given: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)
    by_place: bool = False


class Layers(nn.Module):
    """Layers by their names: norms, activations and linear ones."""

    def __init__(self, names: str, **others: Any) -> None:
        super().__init__()
        for name in names.split():
            kind = {"n": lambda: nn.LayerNorm(D), "r": nn.ReLU}.get(name[0], lambda: nn.Linear(D, D))
            setattr(self, name, kind())
        for name, value in others.items():
            setattr(self, name, value)


# Sums as they are written


class PreNorm(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.norm1(x))
        x = x + self.b(self.norm2(x)).tanh()
        return x  # noqa: RET504


def pre_norm(block: Any, x: Tensor, m: Any) -> Tensor:
    x = x + m[0] * block.a(block.norm1(x))
    return x + m[1] * block.b(block.norm2(x)).tanh()


class PostNorm(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.a(x))
        return self.norm2(x + self.b(x))


def post_norm(block: Any, x: Tensor, m: Any) -> Tensor:
    x = block.norm1(x + m[0] * block.a(x))
    return block.norm2(x + m[1] * block.b(x))


class PostActivation(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.relu(self.a(x)))
        out += x
        return self.relu(out)


def post_activation(block: Any, x: Tensor, m: Any) -> Tensor:
    return (x + m[0] * block.b(block.a(x).relu())).relu()


class Projected(Layers):
    def __init__(self, skip: bool) -> None:
        super().__init__("a", wide=nn.Linear(D, D + 2), skip=nn.Linear(D, D + 2, bias=False) if skip else None)
        if not skip:
            self.wide = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.wide(self.a(x).tanh())
        if self.skip is not None:
            identity = self.skip(x)
        out += identity
        return out


def projected(block: Any, x: Tensor, m: Any) -> Tensor:
    return (x if block.skip is None else block.skip(x)) + m[0] * block.wide(block.a(x).tanh())


class Scaled(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.beta * self.a(x)


def scaled(block: Any, x: Tensor, m: Any) -> Tensor:
    return block.alpha * x + m[0] * block.beta * block.a(x)


class InPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x += self.a(2 * x)  # so that autograd has a copy of what is overwritten
        x += self.b(2 * x)
        return x


def in_place(block: Any, x: Tensor, m: Any) -> Tensor:
    x = x + m[0] * block.a(2 * x)
    return x + m[1] * block.b(2 * x)


class Added(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.a(x))
        return self.b(x).add(x)


def two(block: Any, x: Tensor, m: Any, **given: Any) -> Tensor:
    x = x + m[0] * block.a(x)
    return x + m[1] * block.b(x)


class SideBySide(Layers):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.a(n) + self.b(n)


def side_by_side(block: Any, x: Tensor, m: Any) -> Tensor:
    return x + m[0] * block.a(block.norm(x)) + m[1] * block.b(block.norm(x))


class InBrackets(Layers):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + (self.a(n) + self.b(n))


def in_brackets(block: Any, x: Tensor, m: Any) -> Tensor:
    return x + m[0] * (block.a(block.norm(x)) + block.b(block.norm(x)))


# Conditions


class OnAttributes(Layers):
    """Norm first or last, with a second branch or without."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.norm(x)) if self.first else self.norm(x + self.a(x))
        if self.b is not None:
            x = x + self.b(x)
        return x


def on_attributes(block: Any, x: Tensor, m: Any) -> Tensor:
    x = x + m[0] * block.a(block.norm(x)) if block.first else block.norm(x + m[0] * block.a(x))
    return x if block.b is None else x + m[1] * block.b(x)


class Crossing(Layers):
    """A branch that is only there with an argument."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.a(x)
        if context is not None:
            x = x + self.b(x * context)
        return x + self.c(x)


def crossing(block: Any, x: Tensor, m: Any, context: Tensor | None = None) -> Tensor:
    x = x + m[0] * block.a(x)
    if context is not None:
        x = x + m[1] * block.b(x * context)
    return x + m[2] * block.c(x)


class EarlyReturn(Layers):
    def forward(self, x: Tensor, both: bool = False) -> Any:
        x = x + self.a(x)
        if both:
            return x, None
        return x


def early_return(block: Any, x: Tensor, m: Any, both: bool = False) -> Any:
    x = x + m[0] * block.a(x)
    return (x, None) if both else x


# What is called


class Attention(Layers):
    """Gives weights, too, if it is asked for them."""

    def forward(self, x: Tensor, weights: bool) -> tuple[Tensor, Tensor | None]:
        w = self.a(x).softmax(-1)
        return w * self.b(x), w if weights else None


class Weighing(Layers):
    def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        hidden, w = self.attend(x, weights)
        return x + hidden, w


def weighing(block: Any, x: Tensor, m: Any, weights: bool = False) -> Any:
    return x + m[0] * block.attend(x, False)[0], None


class Keeping(Layers):
    """As LXMERT's: what else its attention gives is picked before the sum, if it is asked for."""

    def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, ...]:
        out = self.attend(x, weights)
        if weights:
            kept = out[1]
        x = x + out[0]
        return (x, kept) if weights else (x,)


class InOneArm(Layers):
    """As XLNet's: some variables are made in one of several cases only."""

    def forward(self, x: Tensor, context: Tensor | None = None, weights: bool = False) -> tuple[Tensor, ...]:
        if context is not None:
            x = x + context
            if weights:
                kept = context
        else:
            hidden, w = self.attend(x, weights)
            if weights:
                kept = w
            x = x + hidden
        return (x, kept) if weights else (x,)


def keeping(block: Any, x: Tensor, m: Any) -> tuple[Tensor, ...]:
    return (x + m[0] * block.attend(x, False)[0],)


class Output(Layers):
    """As BERT's: the sum is in a child that gets both summands."""

    def forward(self, hidden: Tensor, given: Tensor) -> Tensor:
        hidden = self.a(hidden)
        return self.norm(hidden + given)


class InChild(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.b(x).tanh(), x)


def in_child(block: Any, x: Tensor, m: Any) -> Tensor:
    return block.output.norm(x + m[0] * block.output.a(block.b(x).tanh()))


class InMethods(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.joined(self.a(x), x))

    def joined(self, out: Tensor, x: Tensor) -> Tensor:
        return x + out

    def second(self, x: Tensor) -> Tensor:
        return x + self.b(x)


def dropout_add(x: Tensor, residual: Tensor, p: float, training: bool) -> Tensor:
    return residual + nn.functional.dropout(x, p, training)


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """As GPT-NeoX Japanese's: what is added may be None, as far as its source tells."""
    if bias is not None:
        x = x + bias
    if residual is not None:
        x = residual + x
    return x


class Optional(Layers):
    def forward(self, x: Tensor | None) -> Tensor:
        x = bias_dropout_add(self.a(x), None, x)
        return bias_dropout_add(self.b(x), bias=None, residual=x)


class TwoStates(Layers):
    """As LUKE's: words and entities attend to each other, and are added side by side."""

    def forward(self, words: Tensor, entities: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        mixed = self.a(words), None if entities is None else self.a(entities) + words.mean(1, keepdim=True)
        if entities is None:
            update = mixed[0]
            both = words
        else:
            update = torch.cat(mixed[:2], dim=1)
            both = torch.cat([words, entities], dim=1)
        both = self.output(update, both)
        return both[:, : words.size(1)], None if entities is None else both[:, words.size(1) :]


def two_states(block: Any, words: Tensor, m: Any, entities: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    update = block.a(words)
    if entities is None:
        return block.output.norm(words + m[0] * block.output.a(update)), None
    update = torch.cat([update, block.a(entities) + words.mean(1, keepdim=True)], 1)
    both = block.output.norm(torch.cat([words, entities], 1) + m[0] * block.output.a(update))
    return both.split([words.size(1), entities.size(1)], 1)


class InFunction(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = dropout_add(self.a(x), x, 0.0, self.training)
        return dropout_add(self.b(x), residual=x, p=0.0, training=self.training)


class LocalFunctions(Layers):
    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

        if self.use_checkpoint and x.requires_grad:
            return x + checkpoint(run, x, use_reentrant=False)
        x = x + run(x)
        return x  # noqa: RET504


class LocalFunction(Layers):
    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

        return x + run(x)


def local_function(block: Any, x: Tensor, m: Any) -> Tensor:
    return x + m[0] * block.b(block.a(x).tanh())


class Looping(Layers):
    """Loops and blocks of `with` inside of a branch."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        for layer in (self.a, self.b):
            h = layer(h).tanh()
        with torch.autocast("cpu", enabled=False):
            h = self.c(h)
        return x + h


def looping(block: Any, x: Tensor, m: Any) -> Tensor:
    return x + m[0] * block.c(block.b(block.a(block.norm(x)).tanh()).tanh())


class Juggling(Layers):
    """[N, T, D] to [N T, D] and back."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        x = x.reshape(n * t, d)
        x = x + self.a(x)
        x = x.reshape(n, t, d)
        return x + self.b(x)


class Shared(Layers):
    """A value with weights that two branches use."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        s = self.c(time)
        x = x + self.a(x * s)
        return x + self.b(x + s)


def shared(block: Any, x: Tensor, m: Any, time: Tensor) -> Tensor:
    s = block.c(time)
    x = x + m[0] * block.a(x * s)
    return x + m[1] * block.b(x + s)


# Arguments


class Arguments(Layers):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *more: Tensor, scale: float = 1.0, **others: Any
    ) -> Tensor:
        x = x + self.a(x * mask) * scale
        return x + self.b(x) * self.sized(*more, **others)

    def sized(self, *more: Tensor, **others: Any) -> Any:
        return sum(more) + others.get("size", 1.0)


def arguments(block: Any, x: Tensor, m: Any, mask: Tensor, *more: Tensor, scale: float = 1.0, **others: Any) -> Tensor:
    x = x + m[0] * block.a(x * mask) * scale
    return x + m[1] * block.b(x) * (sum(more) + others.get("size", 1.0))


class Named(Layers):
    def forward(self, x: Tensor, mask: Tensor | None = None, **others: Any) -> Tensor:
        x = x + self.attended(x, mask=mask, **others)
        return x + self.b(x)

    def attended(self, x: Tensor, mask: Tensor | None = None, **others: Any) -> Tensor:
        y = self.a(x if mask is None else x * mask)
        return y * others["scale"] + others["size"] if others else y


def by_name(block: Any, x: Tensor, m: Any, mask: Any = 1.0, scale: Any = 1.0, size: Any = 0.0) -> Tensor:
    x = x + m[0] * (block.a(x * mask) * scale + size)
    return x + m[1] * block.b(x)


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that does something itself."""

    @functools.wraps(function)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        return 2 * function(self, x)

    return wrapper


class Decorated(Layers):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


def random(*shape: int) -> Callable[[int], Tensor]:
    """Makes a Tensor[N, *shape]."""
    return lambda rows: torch.rand(rows, *shape, dtype=torch.float64) + 0.5


MASK = {"mask": random(1)}
CASES = {
    "pre-norm": Case(lambda: PreNorm("norm1 norm2 a b"), pre_norm, 2),
    "post-norm": Case(lambda: PostNorm("norm1 norm2 a b"), post_norm, 2),
    "post-activation": Case(lambda: PostActivation("a b relu"), post_activation),
    "projected": Case(lambda: Projected(True), projected),
    "not projected": Case(lambda: Projected(False), projected),
    "scaled by numbers": Case(lambda: Scaled("a", alpha=0.5, beta=2.0), scaled),
    "scaled by a parameter": Case(lambda: Scaled("a", alpha=nn.Parameter(torch.rand(D)), beta=2.0), scaled),
    "in place": Case(lambda: InPlace("a b"), in_place, 2),
    "add": Case(lambda: Added("a b"), two, 2),
    "side by side": Case(lambda: SideBySide("norm a b"), side_by_side, 2),
    "in brackets": Case(lambda: InBrackets("norm a b"), in_brackets),
    "norm first": Case(lambda: OnAttributes("norm a b", first=True), on_attributes, 2),
    "norm last": Case(lambda: OnAttributes("norm a b", first=False), on_attributes, 2),
    "no second": Case(lambda: OnAttributes("norm a", first=True, b=None), on_attributes),
    "context": Case(lambda: Crossing("a b c"), crossing, 3, given={"context": random(D)}),
    "context by place": Case(lambda: Crossing("a b c"), crossing, 3, given={"context": random(1)}, by_place=True),
    "no context": Case(lambda: Crossing("a b c"), crossing, 3),
    "returned early": Case(lambda: EarlyReturn("a"), early_return, given={"both": lambda rows: True}),
    "returned late": Case(lambda: EarlyReturn("a"), early_return),
    "no weights": Case(lambda: Weighing("", attend=Attention("a b")), weighing),
    "kept before the sum": Case(lambda: Keeping("", attend=Attention("a b")), keeping),
    "in one arm": Case(lambda: InOneArm("", attend=Attention("a b")), keeping),
    "in a child": Case(lambda: InChild("b", output=Output("a norm")), in_child),
    "in methods": Case(lambda: InMethods("a b"), two, 2),
    "in a function": Case(lambda: InFunction("a b"), two, 2),
    "of two states, one given": Case(lambda: TwoStates("a", output=Output("a norm")), two_states, 1, (2, D)),
    "of two states": Case(
        lambda: TwoStates("a", output=Output("a norm")), two_states, 1, (2, D), given={"entities": random(3, D)}
    ),
    "perhaps None": Case(lambda: Optional("a b"), two, 2),
    "local function": Case(lambda: LocalFunction("a b"), local_function),
    "not checkpointed": Case(lambda: LocalFunctions("a b", use_checkpoint=False), local_function),
    "loops": Case(lambda: Looping("norm a b c"), looping),
    "juggling": Case(lambda: Juggling("a b"), two, 2, (3, D)),
    "shared": Case(lambda: Shared("a b c"), shared, 2, given={"time": random(D)}),
    "no arguments": Case(lambda: Named("a b"), by_name, 2),
    "by name": Case(lambda: Named("a b"), by_name, 2, given=MASK),
    "by place": Case(lambda: Named("a b"), by_name, 2, given=MASK, by_place=True),
    "further names": Case(
        lambda: Named("a b"), by_name, 2, given={**MASK, "scale": lambda rows: 2.0, "size": random(1)}
    ),
    "decorated": Case(lambda: Decorated("a"), lambda block, x, m: 2 * (x + m[0] * block.a(x))),
}
