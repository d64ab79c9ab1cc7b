"""What the mixins for layers of transformers share: the meaning of arguments, and branches as chains of children."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

from torch import Tensor, nn

from residrop.blocks.skippable import Part
from residrop.common.errors import PlanError
from residrop.rules.base import Rule
from residrop.surgery.arguments import Whole
from residrop.surgery.blocks import ForeignBlock
from residrop.surgery.forms import form_of

__all__ = ["CrossAttention", "Layer", "PreNorm"]

# Dimensions a tensor of this name may have, with the rows of the batch (or 1 for all of them) first.
_ROWS_FIRST: Mapping[str, Collection[int]] = {
    "attention_mask": (2, 4),
    "encoder_attention_mask": (2, 4),
    "encoder_hidden_states": (3,),
    "key_value_states": (3,),
    "position_embeddings": (3,),
    "position_ids": (2,),
}


# transformers 5.24 renamed one argument of its layers; mixins use the older name, the layer's children get their own.
_OLDER, _NEWER = "past_key_values", "cache"


class Layer(ForeignBlock):
    """Base of the mixins.

    Attributes:
        forms: the forms (`surgery.forms.form_of`) of forward that the mixin writes anew.
        inner: (dotted name, forms) of other methods that it knows the inside of.
        shared: names of arguments that all rows share in this layer.
    """

    forms: ClassVar[tuple[str, ...]] = ()
    inner: ClassVar[tuple[tuple[str, ...], ...]] = ()
    shared: ClassVar[Collection[str]] = ()

    @classmethod
    def suits(cls, block: nn.Module) -> bool:
        """Whether a block with this forward is in all else as the mixin expects."""
        return all(form_of(_method(block, path)) in forms for path, *forms in cls.inner)

    def residrop_branches(self) -> Sequence[tuple[Rule, Sequence[Part]]]:
        found: list[tuple[Rule, Sequence[Part]]] = []
        for rule, names in zip(self.residrop_rules, self.parts, strict=True):
            parts = [reduce(lambda one, name: getattr(one, name, None), name.split("."), self) for name in names]
            assert isinstance(rule, Rule)
            found.append((rule, [part for part in parts if isinstance(part, (nn.Module, nn.Parameter))]))
        return found

    def residrop_named(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {_OLDER if name == _NEWER else name: value for name, value in kwargs.items()}

    def through(self, number: int, x: Tensor, branch: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if _OLDER in kwargs and _NEWER in self.residrop_signature.names:
            kwargs[_NEWER] = kwargs.pop(_OLDER)
        return super().through(number, x, branch, *args, **kwargs)

    def residrop_cut(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments are known by name: no tensor is cut because its size happens to be that of the batch."""
        whole, cut = self.__dict__.get("residrop_cutting", ((), ()))
        whole = {*self.shared, *whole}
        return args, {
            name: value if name in cut else self._residrop_marked(name, value, x.shape[0], whole)
            for name, value in kwargs.items()
        }

    def _residrop_marked(self, name: str, value: Any, rows: int, whole: Collection[str]) -> Any:
        if name in whole or value is None or isinstance(value, (bool, int, float, str)):
            return Whole(value)
        if isinstance(value, (tuple, list)):
            return tuple(self._residrop_marked(name, one, rows, whole) for one in value)
        if isinstance(value, Tensor):
            if value.ndim == 0:
                return Whole(value)
            if value.ndim in _ROWS_FIRST.get(name, ()) and value.shape[0] in (1, rows):
                return value if value.shape[0] == rows else Whole(value)
            what = f"a tensor of shape {tuple(value.shape)}"
        else:
            what = f"a {type(value).__name__}"
        raise PlanError(
            f"{type(self).__name__} with row-level presence got {what} as argument {name}, of which it does not know "
            f"the live rows of a batch of {rows}; name it in residrop.apply(..., whole=[...]) if all rows share it, in "
            "cut=[...] if its first dimension is the batch, or use granularity='block'"
        )

    def chain(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """x through some children, one after the other."""
        for name in names:
            x = getattr(self, name)(x)
        return x


def _method(block: Any, path: str) -> Any:
    *inner, name = path.split(".")
    return getattr(type(reduce(lambda one, child: getattr(one, child, None), inner, block)), name, None)


class PreNorm(Layer):
    """x + attention(norm(x)), then x + mlp(norm(x)); `parts` names the children in the order of their calls.

    Attributes:
        by_name: whether the layer gives the hidden state to its attention by name (hooks see the difference).
    """

    by_name: ClassVar[bool] = False

    def attention_branch(self, x: Tensor, **kwargs: Any) -> Tensor:
        norm, attention, *after = self.parts[0]
        x = getattr(self, norm)(x)
        attend = getattr(self, attention)
        return self.chain((attend(hidden_states=x, **kwargs) if self.by_name else attend(x, **kwargs))[0], after)

    def feed_forward_branch(self, x: Tensor) -> Tensor:
        return self.chain(x, self.parts[-1])


class CrossAttention(Layer):
    """Of two mixins for one form, that for layers with cross-attention; names the child that makes the difference."""

    cross: ClassVar[str] = "crossattention"

    @classmethod
    def suits(cls, block: nn.Module) -> bool:
        return hasattr(block, cls.cross) and super().suits(block)
