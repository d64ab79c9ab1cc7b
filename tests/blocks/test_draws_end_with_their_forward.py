"""A draw belongs to one forward of the root: methods and inner modules that are called later have none."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import residrop
from residrop.common.errors import PlanError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        residual = lambda: residrop.Residual(nn.Linear(4, 4), rule=residrop.StochasticDepth(0.5))  # noqa: E731
        self.encoder = nn.Sequential(residual(), residual())

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        return checkpoint(self.encoder, x, use_reentrant=False) if checkpointed else self.features(x)


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net().train()
    residrop.attach(model)
    return model, torch.randn(3, 4)


def test_training_calls_of_inner_parts_are_refused_before_and_after_a_forward():
    model, x = net()
    for _ in range(2):
        for part in (model.features, model.encoder, model.encoder[1]):
            with pytest.raises(PlanError, match="outside of a forward of its root"):
                part(x)
        model(x)
    assert residrop.sampler_of(model).step == 2


def test_in_eval_mode_they_are_expectations_as_ever():
    model, x = net()
    model(x)
    torch.testing.assert_close(model.eval().features(x), model(x))


def test_inner_parts_under_a_plan_or_sampling():
    model, x = net()
    plan = residrop.sampler_of(model).plan(0)
    with residrop.using(model, plan):
        torch.testing.assert_close(model.features(x), model(x))
        torch.testing.assert_close(model.features(x), model(x))
    with residrop.sampling(model):
        for _ in range(2):
            with pytest.raises(PlanError, match="outside of a forward of its root"):
                model.features(x)
            model(x)


def test_training_parts_of_a_root_in_eval_mode_have_no_stale_draw():
    model, x = net()
    model(x)
    model.training = False
    with pytest.raises(PlanError, match="outside of a forward of its root"):
        model(x)


class Stopping(Net):
    """Ends with Ctrl-C once, and may call itself."""

    stops = False

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        if times > 1:
            x = self(x, times - 1)
        x = self.features(x)
        if self.stops:
            raise KeyboardInterrupt
        return x


def test_a_forward_that_was_interrupted_leaves_no_draw():
    model = Stopping().train()
    residrop.attach(model)
    x = torch.randn(3, 4)
    model.stops = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.stops = False
    for _ in range(2):
        model(x)
        with pytest.raises(PlanError, match="outside of a forward of its root"):
            model.features(x)


def test_a_root_that_calls_itself_draws_for_each_call():
    model = Stopping().train()
    residrop.attach(model)
    seen = []
    model.encoder[0].register_forward_hook(lambda *_: seen.append(residrop.sampler_of(model).in_force.plan.step))
    model(torch.randn(3, 4), 3)
    assert seen == [2, 1, 0]
    with pytest.raises(PlanError, match="outside of a forward of its root"):
        model.features(torch.randn(3, 4))
    with residrop.sampling(model, first=5):
        model(torch.randn(3, 4), 2)
        model(torch.randn(3, 4))
    assert residrop.sampler_of(model).step == 3


class Output:
    """An output that no registry knows, so that its graph cannot be tied to the draw."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Wrapped(Net):
    def forward(self, x: Tensor, checkpointed: bool = False) -> Output:  # pyright: ignore
        return Output(super().forward(x, checkpointed))


@pytest.mark.parametrize("kind", [Net, Wrapped])
def test_recomputation_still_finds_its_draw(kind):
    for step in range(6):
        grads = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            model = kind().train()
            residrop.attach(model)
            residrop.sampler_of(model).step = step
            x = torch.randn(3, 4, requires_grad=True)
            out = model(x, checkpointed)
            (out.y if isinstance(out, Output) else out).square().sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
