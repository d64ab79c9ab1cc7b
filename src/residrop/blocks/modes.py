"""Training flags of modules, put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "keeping_modes"]


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in training or eval mode as before."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            if flag != module.training and type(module).train is not nn.Module.train:
                module.train(flag)  # which may do more than set flags: LeViT keeps attention biases until then
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the whole model is in eval mode."""
    with keeping_modes(model):
        model.eval()
        yield
