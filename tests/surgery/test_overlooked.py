"""Models of which only a part can be read: the report names the rest."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import residrop
from residrop.common.errors import SharedBlockWarning
from residrop.schedule.sampler import Plan


class Mine(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Hidden(Mine):
    """A block whose sum cannot be seen."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Stage(nn.Module):
    def __init__(self, count: int, kind: type[nn.Module] = Hidden) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[kind() for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Hybrid(nn.Module):
    """Blocks that are found, and lists of others."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.known = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def left_alone(model: nn.Module, **options: object) -> list[tuple[str, str]]:
    report = residrop.apply(model, survival=0.5, **options)
    assert [entry.name for entry in report.blocks] == ["known.0", "known.1"]
    return [(name, why.partition(",")[0]) for name, why in report.left_alone]


def test_lists_of_blocks_that_cannot_be_read_are_named_with_their_share():
    model = Hybrid(more=nn.Sequential(*[Hidden() for _ in range(3)]))
    report = residrop.apply(model, survival=0.5)
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for parameter in model.more.parameters()) / total
    assert report.left_alone == (
        (
            "more.*",
            f"3 x Hidden, {share:.1%} of the model's parameters, no residual blocks as far as can be read (its forward "
            "calls that of a base class); if they are, name them in `blocks` for the generic rule",
        ),
    )
    assert "left alone: more.*: 3 x Hidden" in str(report)
    residrop.remove(model)
    report = residrop.apply(model, survival=0.5, blocks=["known.*", "more.*"])  # the name is a pattern
    assert [entry.kind for entry in report.blocks] == ["torchvision BasicBlock"] * 2 + ["tests Hidden, whole"] * 3


def test_stages_are_looked_into():
    model = Hybrid(stages=nn.ModuleList([Stage(2), Stage(3)]))
    assert left_alone(model) == [("stages.0.blocks.*", "2 x Hidden"), ("stages.1.blocks.*", "3 x Hidden")]


def test_hidden_blocks_between_others():
    model = Hybrid()
    for _ in range(5):
        model.known.append(Hidden())
    assert left_alone(model) == [("known.2, known.3, ..., known.6", "5 x Hidden")]


def test_blocks_of_unknown_classes_are_found_wherever_they_stand():
    model = Hybrid(stages=nn.ModuleList([Stage(2, Mine)]), head=nn.Sequential(Mine()), alone=Mine())
    for _ in range(2):
        model.known.append(Mine())
    report = residrop.apply(model, survival=0.5)
    names = [f"known.{place}" for place in range(4)] + ["stages.0.blocks.0", "stages.0.blocks.1", "head.0", "alone"]
    assert [entry.name for entry in report.blocks] == names
    assert {entry.kind for entry in report.blocks[2:]} <= {"tests Mine", "tests Mine, whole"}
    assert report.left_alone == ()


def test_nothing_else_is_named():
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    assert left_alone(Hybrid(stem=plain, pair=nn.Sequential(plain, plain), head=nn.Sequential(Hidden()))) == []
    tiny = nn.Sequential(Hidden(1), Hidden(1))  # 0.8% of the parameters
    assert left_alone(Hybrid(tiny=tiny)) == []


def test_blocks_that_were_chosen_are_the_users_affair():
    model = Hybrid(more=nn.Sequential(*[Hidden() for _ in range(3)]))
    assert left_alone(model, blocks="known.*") == []


# One block called several times


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Mine(), Mine()

    def forward(self, x: Tensor, times: int = 3) -> Tensor:
        for _ in range(times):
            x = self.block(x)
        return self.other(x)


def test_calls_with_one_coin_are_told_of_once():
    model = Looped().train()
    residrop.apply(model, survival=0.5, blocks=Mine)
    x = torch.randn(2, 8, 4, 4)
    for _ in range(3):
        model(x, 1)  # several forwards are several draws
    model.eval()(x)
    with residrop.using(model, Plan.of([True, True])):
        model.train()(x)
    with pytest.warns(SharedBlockWarning, match="a Mine is called several times in one forward.*one coin"):
        model(x)
    model(x)


def test_blocks_that_are_always_present_may_be_shared():
    model = Looped().train()
    residrop.apply(model, survival=[1.0, 0.5], blocks=Mine)
    model(torch.randn(2, 8, 4, 4))
    assert residrop.sampler_of(model).step == 1


def test_recomputation_is_no_second_call():
    from torch.utils.checkpoint import checkpoint

    for reentrant in (True, False):
        model = Looped().train()
        residrop.apply(model, survival=1.0 - 1e-9, blocks=Mine)
        x = torch.randn(2, 8, 4, 4, requires_grad=True)
        checkpoint(model, x, 1, use_reentrant=reentrant).sum().backward()
        assert x.grad is not None
