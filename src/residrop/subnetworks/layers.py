"""Layers of transformers' models that leave their list: the numbers in layers and configurations follow."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

__all__ = ["renumbered"]

_INDEX = ("layer_idx", "layer_id", "layer_index", "layer_number")
_COUNT = re.compile(r"(num_hidden_layers|num_layers|n_layers?|n_blocks|(num_)?(encoder|decoder)_layers)")
_NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "global_attn_indexes", "fullatt_block_indexes")
_LEADING = ("first_k_dense_replace", "num_first_full_attention_layers", "max_window_layers")


def renumbered(model: nn.Module, name: str, left: Sequence[int]) -> None:
    """Keep only some layers of a module list.

    Modules inside of them that know the number of their layer get the new one. In the configuration of the module
    around the list, or of the model, counts of so many layers, lists with an entry for each and lists of their numbers
    follow, so that `from_pretrained` builds just these.

    Args:
        model: changed in place.
        name: of the module list.
        left: numbers of the layers that stay, rising.
    """
    parent, _, own = name.rpartition(".")
    holder = model.get_submodule(parent)
    layers: Any = model.get_submodule(name)
    before = len(layers)
    for new, old in enumerate(left):
        for module in layers[old].modules():
            for attribute in _INDEX:
                if type(vars(module).get(attribute)) is int and vars(module)[attribute] == old:
                    setattr(module, attribute, new)
    setattr(holder, own, nn.ModuleList(layers[old] for old in left))
    side = next((one for one in ("encoder", "decoder") if one in type(holder).__name__.lower() or one in name), "")
    for config in _configurations(model, holder):
        alone = config is not getattr(model, "config", None)  # of the stack around the list
        _follow(config, before, left, side, alone)


def _configurations(model: nn.Module, holder: nn.Module) -> Iterator[Any]:
    """Those of the module around a list and of the model; each once."""
    seen: set[int] = set()
    for module in (holder, model):
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            yield config


def _follow(config: Any, before: int, left: Sequence[int], side: str, alone: bool) -> None:
    """Counts of `before` layers, lists of as many entries, lists of their numbers and counts of the first ones."""
    aliases = getattr(type(config), "attribute_map", {})
    names = sorted({aliases.get(name, name) for name in (*vars(config), *aliases)})
    counts = [name for name in names if vars(config).get(name) == before and _COUNT.fullmatch(name)]
    own = [name for name in counts if side and side in name]
    plain = [name for name in counts if not re.search("encoder|decoder", name)]
    for name in (*own, *plain) if alone or not own else own:
        setattr(config, name, len(left))
    for name in names:
        value = vars(config).get(name)
        if name in _NUMBERS and isinstance(value, (list, tuple)):
            setattr(config, name, type(value)(new for new, old in enumerate(left) if old in value))
        elif name in _LEADING and type(value) is int and value < before:
            setattr(config, name, sum(number < value for number in left))
        elif isinstance(value, (list, tuple)) and len(value) == before and "layer" in name:
            setattr(config, name, type(value)(value[number] for number in left))
