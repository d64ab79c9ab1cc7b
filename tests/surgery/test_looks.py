"""What the one comparison of a block with its own forward leaves behind: nothing."""

import pytest
import torch
from torch import Tensor, nn

import residrop
from residrop.common.errors import ConfigError, UsageError
from residrop.schedule.sampler import Draw, Plan


class Biased(nn.Module):
    """x + linear(x) + a bias that is computed once in eval mode, as LeViT's attention does."""

    kept: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.ones(4))
        self.kept = None

    def train(self, mode: bool = True) -> "Biased":
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        bias = 2 * self.bias
        if not self.training:
            self.kept = bias = bias if self.kept is None else self.kept
        return x + (self.linear(x) + bias)


def test_what_eval_mode_computes_once_is_computed_again_after_the_first_training_forward():
    torch.manual_seed(0)
    model = nn.Sequential(Biased())
    residrop.apply(model, survival=0.5, blocks=Biased, granularity="row")
    x = torch.randn(3, 4)
    model(x)  # looks at the block in eval mode
    with torch.no_grad():
        model[0].bias.fill_(5.0)
    model.eval()
    torch.testing.assert_close(model(x), x + model[0].linear(x) + 10.0)


class Writing(nn.Module):
    """Writes into its sum, also under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.linear(x)
        z = y if self.training else y.clone()
        z[:, 0] += 1.0
        return z


def test_the_input_of_an_absent_block_is_not_written_into():
    model = nn.Sequential(Writing())
    residrop.apply(model, survival=0.5)
    x = torch.randn(3, 4)
    before = x.clone()
    with residrop.using(model, Plan.of([False])):
        y = model(x)
    assert torch.equal(x, before)
    assert torch.equal(y[:, 0], before[:, 0] + 1.0)
    assert torch.equal(y[:, 1:], before[:, 1:])


class Mixing(nn.Module):
    """x + a branch that mixes the rows of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x - x.mean(0))


class Adding(Mixing):
    """x + a branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Counting(Mixing):
    """x + a branch, and a number that nobody has where the branch is absent."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.linear(x)
        return x + h, h[:, :2]


class Chain(nn.Module):
    """Blocks in a row, of which some return more than a tensor."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            out = block(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


class Using(Chain):
    """Adds what blocks return besides the hidden state to the result, as auxiliary losses are added."""

    def forward(self, x: Tensor) -> Tensor:
        others = []
        for block in self.blocks:
            out = block(x)
            x = out[0] if isinstance(out, tuple) else out
            others += [out[1]] if isinstance(out, tuple) else []
        return x + sum(other.mean() for other in others)


class Handing(Chain):
    """Returns what blocks return besides the hidden state."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        others = []
        for block in self.blocks:
            x, other = block(x)
            others.append(other)
        return x, others


def counting(granularity: str, branches: bool, x: Tensor) -> Chain:
    torch.manual_seed(0)
    model = Chain(Counting(), Counting()).double()
    options = {"blocks": Counting, "granularity": granularity, "rescale": "none", "branches": branches}
    report = residrop.apply(model, survival=0.5, example=x, **options)
    assert [(one.name, one.granularity) for one in report.blocks] == [(f"blocks.{i}", granularity) for i in (0, 1)]
    assert not report.left_alone
    return model


@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("branches", [True, False])
def test_what_an_absent_block_cannot_give_is_told_without_an_example(granularity, branches):
    model = Chain(Counting(), Counting())
    residrop.apply(model, survival=0.5, blocks=Counting, branches=branches, granularity=granularity)
    with pytest.raises(UsageError, match=r"example=batch.*finds out whether anything needs it"):
        model.train()(torch.randn(6, 4))


@pytest.mark.parametrize("branches", [True, False])
def test_what_nothing_needs_is_none_where_a_block_is_absent(branches):
    x = torch.randn(6, 4, dtype=torch.float64)
    model = counting("block", branches, x)
    first, second = model.blocks
    with residrop.using(model, Plan.of([False, True])):
        y = model(x)
    assert torch.equal(y, x + second.linear(x))
    with residrop.using(model, Plan.of([False, True])):
        assert first(x)[1] is None


@pytest.mark.parametrize("branches", [True, False])
def test_rows_of_blocks_that_return_what_nothing_needs(branches):
    x = torch.randn(6, 4, dtype=torch.float64)
    model = counting("row", branches, x)
    draws, z = [Draw((0.5,), key=key) for key in (3, 4)], x.clone()
    for draw, block in zip(draws, model.blocks, strict=True):
        window = draw.rows(len(x))
        rows = [(window.start + row) % len(x) for row in range(window.live)]
        z[rows] = z[rows] + block.linear(z[rows])
    with residrop.using(model, Plan(tuple(draws))):
        torch.testing.assert_close(model(x), z)


@pytest.mark.parametrize("kind", [Using, Handing])
@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("granularity", ["block", "row"])
def test_what_the_model_needs_of_a_block_is_never_none(kind, branches, granularity):
    torch.manual_seed(0)
    model = kind(Counting(), Counting())
    x = torch.randn(6, 4)
    before = model(x)
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(
        ConfigError,
        match=r"no block of .* fits: blocks\.0: Counting returns, besides the hidden state, .*, which the model needs",
    ):
        residrop.apply(model, survival=0.5, blocks=Counting, branches=branches, granularity=granularity, example=x)
    handle.remove()
    assert len(passes) == 2  # nothing else is tried
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert not any(name.startswith("residrop") for block in model.blocks for name in block.__dict__)


class Remembering(nn.Module):
    """Hands its blocks a cache in eval mode and in training, as language models do."""

    class Cache:
        def __init__(self) -> None:
            self.kept: list[Tensor] = []

        def get_seq_length(self, layer: int = 0) -> int:
            return len(self.kept)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, cache: "Remembering.Cache | None" = None) -> Tensor:
            if cache is not None:
                cache.kept.append(x)
            return x + self.linear(x - x.mean(0))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x: Tensor) -> Tensor:
        cache = self.Cache()
        for block in self.blocks:
            x = block(x, cache=cache)
        return x


def test_blocks_are_looked_at_on_an_example_without_the_caches_that_training_leaves_out():
    torch.manual_seed(0)
    model = Remembering()
    report = residrop.apply(model, survival=0.5, granularity="row", example=torch.randn(6, 4))
    assert [one.granularity for one in report.blocks] == ["block", "block"]  # rows depend on one another
    model.train()(torch.randn(6, 4)).sum().backward()


def test_rates_are_for_the_blocks_that_an_example_shows_to_fit():
    torch.manual_seed(0)
    model = Using(Adding(), Counting(), Adding())
    report = residrop.apply(model, survival=[0.9, 0.7], example=torch.randn(6, 4))
    assert [(one.name, one.rates) for one in report.blocks] == [("blocks.0", (0.9,)), ("blocks.2", (0.7,))]
    assert [name for name, _ in report.left_alone] == ["blocks.1"]


def test_a_block_of_which_only_the_rows_do_not_fit_has_block_level():
    torch.manual_seed(0)
    model = Chain(Adding(), Mixing())
    report = residrop.apply(model, survival=[0.9, 0.7], granularity="row", example=torch.randn(6, 4))
    assert [(one.granularity, one.rates) for one in report.blocks] == [("row", (0.9,)), ("block", (0.7,))]
    assert [why.partition(":")[0] for _, why in report.left_alone] == ["at block level, not at row level"]
    assert report.parameters == 1.0
    assert report.flops == 1.0
    model.train()(torch.randn(6, 4)).sum().backward()


class Odd(Mixing):
    """x + a branch, in another way at every second call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x + self.linear(x) * (1.0 if self.calls % 2 else 2.0)


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_a_block_of_which_the_branches_do_not_fit_is_taken_whole(granularity):
    torch.manual_seed(0)
    model = Chain(Adding(), Odd())
    report = residrop.apply(model, survival=0.5, granularity=granularity, rescale="none", example=torch.randn(6, 4))
    assert [one.kind.partition(" ")[2] for one in report.blocks] == ["Adding", "Odd, whole"]
    # by itself a row gets what the next call gives
    assert [one.granularity for one in report.blocks] == [granularity, "block"]
    ((name, why),) = report.left_alone
    level = " and at block level" if granularity == "row" else ""
    assert (name, why.partition(":")[0]) == ("blocks.1", f"as a whole{level}, not branch by branch")
    odd = model.blocks[1]
    x = torch.randn(6, 4)
    with residrop.using(
        model, Plan((Draw((), key=1) if granularity == "row" else Draw((), alive=True), Draw((), alive=False)))
    ):
        assert torch.equal(odd(x), x)


class Shaping(nn.Module):
    """Two branches that use the shape of the input, which is read once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        x = x + self.a(x.reshape(rows * tokens, width)).reshape(rows, tokens, width)
        return x + self.b(x.reshape(rows * tokens, width)).reshape(rows, tokens, width)


def test_sizes_that_branches_share_are_those_of_the_rows_that_each_gets():
    torch.manual_seed(0)
    model = Chain(Shaping())
    x = torch.randn(6, 3, 4)
    report = residrop.apply(model, survival=0.5, granularity="row", rescale="none", example=x)
    assert [(one.granularity, len(one.rates)) for one in report.blocks] == [("row", 2)]
    wanted = x
    draws = (Draw((0.5,), key=1), Draw((0.5,), key=2))
    for draw, branch in zip(draws, (model.blocks[0].a, model.blocks[0].b), strict=True):
        start, live = draw.rows(6)
        present = (torch.arange(6) - start) % 6 < live
        wanted = wanted + present.view(6, 1, 1) * branch(wanted)
    with residrop.using(model, Plan(draws)):
        torch.testing.assert_close(model(x), wanted)


class PatchEmbeddings(nn.Module):
    """Adds positions to what it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.positions = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x + self.interpolated(x)

    def interpolated(self, x: Tensor) -> Tensor:
        return self.positions[0, : x.shape[1]]


class Table(nn.Module):
    """Positions from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(torch.arange(x.shape[1]))


class Tabled(nn.Module):
    """As Florence-2's projector: the positions are added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), Table()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.table(x))


def test_positions_that_are_added_to_an_embedding_are_no_branch():
    model = nn.Module()
    model.embeddings = PatchEmbeddings()
    model.tables = nn.ModuleList([Tabled()])
    model.layers = nn.ModuleList([Adding(), Adding()])
    report = residrop.apply(model, survival=0.5)
    assert [one.name for one in report.blocks] == ["layers.0", "layers.1"]
