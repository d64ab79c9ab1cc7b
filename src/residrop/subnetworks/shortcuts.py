"""What is left of a block whose branches are all absent."""

from typing import Any

from torch import fx, nn

from residrop.blocks.attach import rules_of
from residrop.inference.deploy.fold import Tracer
from residrop.inference.deploy.folding import graph_module
from residrop.surgery.read_block import ReadBlock

__all__ = ["shortcut_of", "traced"]


def traced(model: nn.Module, factors: dict[Any, tuple[float, ...]]) -> fx.GraphModule | None:
    """A model or block with these factors of its branches as a graph; None if it cannot be traced."""
    try:
        graph = Tracer(factors, {}).graph_of(model)
    except Exception:  # whatever the code of a model may raise on a proxy
        return None
    return graph_module(model, graph)


def shortcut_of(block: nn.Module) -> nn.Module | None:
    """What a block in eval mode is where all its branches are absent; None if it cannot be traced, and so not told."""
    if not isinstance(block, ReadBlock):
        return nn.Identity()
    found = traced(block, dict.fromkeys(rules_of(block), (1.0, 0.0)))
    if found is None:
        return None
    if all(node.op in ("placeholder", "output") for node in found.graph.nodes):
        return nn.Identity()
    return found
