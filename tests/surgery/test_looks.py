"""What the one comparison of a block with its own forward leaves behind: nothing."""

import torch
from torch import Tensor, nn

import residrop
from residrop.schedule.sampler import Plan


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
    residrop.apply(model, survival=0.5, blocks=Biased)
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
