"""A batch of inputs as a model takes it: one tensor, a tuple of arguments, or arguments by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from residrop.common.errors import ConfigError

__all__ = ["Batch"]


def _is_list(value: object) -> bool:
    return isinstance(value, list)


class Batch:
    """Inputs of n rows.

    Args:
        x: one argument (a Tensor[n, ...], or a list of n inputs, as torchvision's detectors take it), a tuple of
            arguments, or a mapping of arguments by name; or a `Batch`.
    """

    def __init__(self, x: Any) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        if isinstance(x, Batch):
            self.args, self.kwargs = x.args, x.kwargs
        elif isinstance(x, Mapping):
            self.kwargs = dict(x)
        else:
            self.args = x if isinstance(x, tuple) else (x,)

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Batch":
        """The arguments of a call."""
        batch = cls(args)
        batch.kwargs = kwargs
        return batch

    @property
    def tensor(self) -> Tensor | None:
        """The input, if it is one tensor and nothing else."""
        only = len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Tensor)
        return self.args[0] if only else None

    def mirrored(self) -> "Batch":
        """The mirror images (left and right) of images Tensor[n, C, H, W].

        Raises:
            ConfigError: it is something else.
        """
        if self.tensor is None or self.tensor.ndim != 4 or not self.tensor.is_floating_point():
            raise ConfigError("flips=True needs images, one tensor [n, channels, height, width]; leave it out")
        return Batch(self.tensor.flip(-1).contiguous(memory_format=torch.preserve_format))

    @property
    def shapes(self) -> list[torch.Size]:
        """Of all its tensors."""
        return [leaf.shape for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def copied(self) -> "Batch":
        """With tensors of its own, for a model that may write into them."""
        args, kwargs = tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Batch.of_call(args, kwargs)

    @property
    def device(self) -> torch.device:
        """Where its first tensor lies."""
        tensors = (leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor))
        return next((leaf.device for leaf in tensors), torch.device("cpu"))

    def __len__(self) -> int:
        """n.

        Raises:
            ConfigError: there is nothing with rows, or not all of it has as many.
        """
        leaves = tree_leaves((self.args, self.kwargs), is_leaf=_is_list)
        sizes = {len(leaf) for leaf in leaves if isinstance(leaf, list) or (isinstance(leaf, Tensor) and leaf.ndim)}
        if len(sizes) != 1:
            raise ConfigError(
                f"the inputs have {' and '.join(map(str, sorted(sizes))) or 'no'} rows; "
                "give every tensor with the batch first"
            )
        return next(iter(sizes))

    def called(self, model: nn.Module, rows: Tensor | None = None) -> Any:
        """What the model returns for these rows (int64 Tensor[m]; None is all)."""
        if rows is None:
            return model(*self.args, **self.kwargs)
        len(self)  # whether rows can be told

        def cut(leaf: Any) -> Any:
            if isinstance(leaf, list):
                return [leaf[row] for row in rows.tolist()]
            return leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.ndim else leaf

        args, kwargs = tree_map(cut, (self.args, self.kwargs), is_leaf=_is_list)
        return model(*args, **kwargs)
