"""Row level on blocks of any class: whether the first dimension is the batch, found out at the first forward.

Which dimension is the batch is asked again and again of one well-known family: mlfoundations/open_clip#1037.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import residrop
from residrop.common.errors import ConfigError, PlanError
from residrop.schedule.sampler import Draw, Plan
from residrop.surgery import rowwise

D = 8


class Attention(nn.Module):
    """x + attention(x) over dimension `tokens`, with a mask [tokens, tokens] or [batch, tokens]."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.attend = nn.MultiheadAttention(D, 2, batch_first=tokens == 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, pad: Tensor | None = None, scale: Any = None) -> Tensor:
        y = self.attend(x, x, x, attn_mask=mask, key_padding_mask=pad, need_weights=False)[0]
        return x + self.drop(y) * (1.0 if scale is None else scale)


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, **given)
        return x


def applied(*blocks: nn.Module, **options: Any) -> Model:
    torch.manual_seed(0)
    model = Model(*blocks).train()
    residrop.apply(model, survival=0.5, blocks="blocks.*", granularity="row", **options)
    return model


def has_looked(block: nn.Module) -> bool:
    return block.__dict__["residrop_checked"] == (None, 0)


REFUSED = {
    True: r"gives for some rows of an input of shape \(\d+, \d+, 8\) something else.*first dimension is not the batch",
    False: r"dimension 1 of its input of shape \(\d+, \d+, 8\)",
}
# blocks of which the branches are known, and whole blocks
either = pytest.mark.parametrize("branches", [True, False])


def several(model: nn.Module, forwards: int) -> None:
    for _ in range(forwards):
        model(torch.randn(4, 6, D))


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


@either
@pytest.mark.parametrize("mask", [None, causal(6), causal(6).T])
def test_a_batch_that_is_not_first_is_refused(mask, branches):
    model = applied(Attention(0), branches=branches)
    with pytest.raises(PlanError, match=REFUSED[branches] + ".*granularity='block'"):
        model(torch.randn(6, 4, D), mask=mask)


@either
@pytest.mark.parametrize("mask", [None, causal(6)])
def test_a_batch_that_is_first_is_taken(mask, branches):
    model = applied(Attention(1), whole=["mask"], branches=branches)
    model(torch.randn(4, 6, D), mask=mask, pad=torch.arange(6) > torch.tensor([[2], [5], [3], [4]]))
    assert has_looked(model.blocks[0])


def test_an_argument_that_all_rows_share_is_named():
    x = torch.randn(6, 3, D)
    model = applied(Attention(1))
    table = torch.rand(6, 1, 1)  # one number per sample, or so it seems
    model(x, scale=table)
    model = applied(Shared(), branches=False)
    with pytest.raises(PlanError, match=r"an argument table that all rows share.*first size.*\(6\).*whole=\['table'\]"):
        model(x, table=torch.rand(6, D))
    for options in ({"branches": False, "whole": ["table"]}, {"whole": ["table"]}, {}):
        # of a branch it is found out
        assert_row_wise(applied(Shared(), **options), x, torch.rand(6, D))


def assert_row_wise(model: Model, x: Tensor, table: Tensor) -> None:
    """Rows of branches are those that the block gives."""
    with torch.no_grad():
        block = model.blocks[0]
        whole = block.eval()(x, table)
        block.train()
        for key in range(3):
            draw = Draw((0.5,), key=key)
            with residrop.using(model, Plan((draw,))):
                found = model(x, table=table)
            window = draw.rows(len(x))
            for row in range(len(x)):
                live = (row - window.start) % len(x) < window.live
                expected = x[row] + 2 * (whole[row] - x[row]) if live else x[row]
                torch.testing.assert_close(found[row], expected)


def test_a_table_that_happens_to_be_as_long_as_a_later_batch_stays_whole():
    """Which of its dimensions is the batch is not told by the last, smaller batch of an epoch."""
    for first in (4, 6):
        model, table = applied(Shared()), torch.rand(6, D)
        for rows in (first, 6, 5, 6):
            assert_row_wise(model, torch.randn(rows, 3, D), table)


def test_an_argument_of_every_row_that_comes_later_is_cut():
    model = applied(Attention(1), rescale="none")
    model.blocks[0].drop.p = 0.0
    block, x = model.blocks[0], torch.randn(4, 6, D)
    draw = Draw((0.5,), key=2)
    window = draw.rows(4)
    live = torch.tensor([(row - window.start) % 4 < window.live for row in range(4)]).view(4, 1, 1)
    for scale in (None, torch.rand(1, 1, 1), torch.rand(4, 1, 1), torch.rand(4, 1, 1), torch.rand(6, 1)):
        with residrop.using(model, Plan((draw,))):
            found = model(x, scale=scale)
        y = block.attend(x, x, x, need_weights=False)[0] * (1.0 if scale is None else scale)
        torch.testing.assert_close(found, torch.where(live, x + y, x))


class Shared(nn.Module):
    """Looks its table up by a hash of the row."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + self.body(x + table[(x.sum((1, 2)) > 0).long() + 1][:, None])


class Contrast(nn.Linear):
    """A block whose rows see each other."""

    def __init__(self) -> None:
        super().__init__(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x - x.mean(0))


def test_rows_that_see_each_other_are_refused():
    with pytest.raises(PlanError, match="depends on the other rows"):
        applied(Contrast())(torch.randn(5, D))


class Noisy(nn.Module):
    """Batch norm and dropout, whose statistics and numbers the comparison must not move."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.calls = nn.BatchNorm1d(D), nn.Dropout(0.5), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.drop(self.norm(x))


def test_it_is_done_once_and_leaves_nothing_behind():
    model = applied(Noisy(), Noisy())
    x = torch.randn(4, D)
    torch.manual_seed(5)
    with residrop.using(model, Plan((Draw((0.0,), key=1),) * 2)):
        model(x[:1])  # one row cannot be compared; the block has been run once, to see what it returns
        assert [block.calls for block in model.blocks] == [1, 1]
        before = torch.get_rng_state()
        model(x)
        assert [block.calls for block in model.blocks] == [3, 3]
        assert torch.equal(torch.get_rng_state(), before)
        model(x)
    assert [block.calls for block in model.blocks] == [3, 3]
    assert [int(block.norm.num_batches_tracked) for block in model.blocks] == [0, 0]
    assert all(module.training for module in model.modules())


def test_torch_layers_are_told_by_their_flag():
    layer = nn.TransformerEncoderLayer(D, 2, D)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=r"'layers.0' takes \[tokens, batch, width\] \(batch_first=False\)"):
        residrop.apply(model, survival=0.5, blocks="layers.*", granularity="row")
    assert {name: type(module) for name, module in model.named_modules()} == before
    residrop.apply(model, survival=0.5, blocks="layers.*")  # whole layers may go
    model.train()(torch.randn(5, 2, D))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_no_difference(dtype):
    model = applied(Attention(1), Attention(1)).to(dtype)
    for scale in (1.0, 10.0):
        model(scale * torch.randn(16, 12, D, dtype=dtype))
        for block in model.blocks:
            assert block.__dict__.pop("residrop_checked") == (None, 0)


def test_what_is_not_finite_is_no_difference_either():
    for branches in (True, False):
        model = applied(Attention(0), branches=branches)
        model(torch.full((4, 6, D), float("inf")))
        with pytest.raises(PlanError, match=REFUSED[branches]):  # another batch tells
            several(model, 2)


@either
def test_a_branch_that_is_nearly_zero_is_looked_at_again(branches, monkeypatch):
    model = applied(Attention(0), branches=branches)
    looks: list[nn.Module] = []
    where, name = ("read_block", "seen_alike") if branches else ("generic", "check_rows")
    look = getattr(rowwise, name)
    monkeypatch.setattr(
        f"residrop.surgery.{where}.{name}", lambda block, *given: looks.append(block) or look(block, *given)
    )
    weight = model.blocks[0].attend.out_proj.weight
    saved = weight.detach().clone()
    for scale in (0.0, 1e-6):
        with torch.no_grad():
            weight.copy_(scale * saved)
        for _ in range(8):
            model(torch.randn(4, 6, D))
    assert len(looks) == 4  # at the forwards 1, 3, 6 and 11, not at each
    with torch.no_grad():
        weight.copy_(saved)
    with pytest.raises(PlanError, match=REFUSED[branches]):
        several(model, 16)


def test_memory_that_runs_out_is_not_taken_for_a_difference():
    class Full(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 4:
                raise torch.OutOfMemoryError("no more")
            return x + super().forward(x)

    with pytest.raises(torch.OutOfMemoryError):
        applied(Full(D, D))(torch.randn(4, D))


def test_autocast_is_no_difference_and_hides_none():
    model = applied(Attention(1), Attention(1))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(16, 12, D))
        for branches in (True, False):
            with pytest.raises(PlanError, match=REFUSED[branches]):
                applied(Attention(0), branches=branches)(torch.randn(64, 12, D))
    assert all(map(has_looked, model.blocks))


def test_compiled_models_are_compiled_where_a_rate_is_1():
    model = Model(Attention(1), Attention(1)).train()
    residrop.apply(model, survival=[1.0, 0.5], blocks="blocks.*", granularity="row")
    residrop.compile(model, fullgraph=True, backend="eager")
    model(torch.randn(6, 4, D))
    assert all(map(has_looked, model.blocks))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, of a graph's inputs
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # its own, in torch 2.9
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_look_at_their_first_batch_too(whole):
    good, bad = applied(Attention(1)), applied(Attention(0))
    for model, fails in ((good, False), (bad, True)):
        if whole:
            residrop.compile(model, fullgraph=True, backend="eager")
            call = model
        else:
            call = torch.compile(model, backend="eager")
        if fails:
            with pytest.raises(PlanError, match=REFUSED[True]):
                call(torch.randn(6, 4, D))
        else:
            for _ in range(3):
                call(torch.randn(6, 4, D)).sum().backward()
