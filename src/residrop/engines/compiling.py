"""Compiling models with rules: branch by branch, or as a whole.

`torch.compile(model)` is right for every rule, too: draws are made outside of its graphs (`residrop.rules.tracing`).
What is here costs less in every pass, and makes one full graph of a row-level or unit-level model.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from residrop.blocks.attach import before_root, rules_of, sampler_of
from residrop.blocks.skippable import Skippable
from residrop.common.errors import ConfigError
from residrop.engines.decompositions import inductor
from residrop.functional.static_draws import StaticDraws
from residrop.rules.base import Rule

__all__ = ["compile", "compile_branches", "replays", "with_forward"]


def compile(model: nn.Module, **options: Any) -> nn.Module:
    """Compile an attached model in place, in the way that suits its rules.

    - Row-level windows and unit-level rules (and blocks at constant depth) only: the whole model is one graph, also
      with `fullgraph=True`. Its draw is made before the graph and enters it as data, so no draw and no rate is
      compiled in. The number of live rows is static where p * n is whole and the timing constant, and symbolic
      elsewhere. Unit masks are arithmetic of the graph. Forward hooks of the model itself stay outside.
    - Any block-level rule, rows by one coin each, or presence in backward only: as `compile_branches`.

    Parameters keep their names. Copies and pickles of the model are not compiled.

    Args:
        model: the attached model itself (not a wrapper such as DDP), which is called directly.
        options: of `torch.compile` (backend, mode, fullgraph, dynamic, ...). On the CPU, where no backend, mode or
            options of one are given, the backend is `residrop.engines.decompositions.inductor`.

    Returns:
        The same model.

    Raises:
        ConfigError: the model is not attached, or `fullgraph` is asked for with rules that do not fit into one graph.
    """
    _check_module(model)
    hook = before_root(model)
    if hook is None:
        raise ConfigError(
            f"{type(model).__name__} is not attached; call residrop.attach(model, seed=...) first, and compile the "
            "attached model itself rather than a wrapper around it"
        )
    options = _with_backend(model, options)
    random = [rule for rule in rules_of(model) if rule.rates]
    if all(_fits_one_graph(rule) for rule in random):
        hook.feeds_graph = True
        if options.get("mode") in ("reduce-overhead", "max-autotune"):
            hook.static_draws = StaticDraws()  # these record CUDA graphs, anew whenever such a tensor has moved
        unchecked = [one for one in model.modules() if isinstance(one, Skippable) and one.residrop_unchecked()]
        model._compiled_call_impl = partial(_called, model, torch.compile(model.forward, **options), unchecked)
    elif options.get("fullgraph"):
        raise ConfigError(
            f"{type(model).__name__} has rules that Python decides between graphs; leave out fullgraph=True, or use "
            "unit-level rules, or stochastic depth with granularity='row' and rows='window'"
        )
    else:
        compile_branches(model, **options)
    return model


def _fits_one_graph(rule: Rule) -> bool:
    return rule.granularity == "unit" or (rule.rows == "window" and rule.granularity == "row" and not rule.runs_absent)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{type(model).__name__} is no model (residrop.attach(model) returns the sampler of its draws, and changes "
            "the model in place); compile the model itself"
        )


def _with_backend(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    first = next(model.parameters(), None)
    chosen = any(options.get(name) is not None for name in ("backend", "mode", "options"))
    if chosen or first is None or first.device.type != "cpu":
        return options
    return {**options, "backend": inductor}


def _called(model: nn.Module, compiled: Any, unchecked: list[Skippable], *args: Any, **kwargs: Any) -> Any:
    """The compiled model; uncompiled as long as blocks have to look at a first batch with coins."""
    if unchecked:
        unchecked[:] = [block for block in unchecked if block.residrop_unchecked()]
        if unchecked and (model.training or sampler_of(model).in_force.always):
            return model._call_impl(*args, **kwargs)
    return with_forward(model, compiled, *args, **kwargs)


def replays(model: nn.Module) -> bool:
    """Whether one CUDA graph of the compiled model is right for every draw.

    A recorded graph repeats the same kernels on the same sizes, and reads its inputs anew. So it fits where draws are
    tensors of one size: rules of units, whose key and thetas enter as data, and blocks at constant depth. Block-level
    coins decide which kernels run, and live rows how many rows they see: each draw would be recorded by itself.

    Args:
        model: the attached model.

    Returns:
        True if all its rules are of these kinds.
    """
    return all(rule.granularity == "unit" for rule in rules_of(model) if rule.rates)


def with_forward(model: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """The call of a module with all its hooks, but another forward."""
    own = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    try:
        return model._call_impl(*args, **kwargs)
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


def compile_branches(model: nn.Module, **options: Any) -> int:
    """Compile the branches of all blocks in place; Python goes on deciding which of them run, and on which rows.

    Blocks of one structure share their code, and no draw, rate or timing is compiled in. A block that is present as a
    whole is compiled with its shortcut and activation; elsewhere (live rows, unit-level rules) it is the branch alone.
    The number of live rows is static where p * n is whole and the timing constant, and symbolic elsewhere. Parameters
    keep their names. Copies and pickles of the model are not compiled.

    Args:
        model: a model of residrop, or one that `residrop.apply` has put under rules.
        options: as in `compile`.

    Returns:
        The number of different structures among the branches.

    Raises:
        ConfigError: the model has no blocks with rules.
    """
    from residrop.rules import tracing

    _check_module(model)
    options = _with_backend(model, options)
    compiled: dict[Any, tracing.CompiledParts] = {}
    for block in model.modules():
        for number, (rule, _) in enumerate(block.residrop_branches() if isinstance(block, Skippable) else ()):
            kind = tracing.structure(block), number
            if kind not in compiled:
                own = tracing.compiled_parts(kind)
                compiled[kind] = replace(
                    own, whole=torch.compile(own.whole, **options), alone=torch.compile(own.alone, **options)
                )
            rule.executor = compiled[kind]
    if not compiled:
        raise ConfigError(f"{type(model).__name__} has no blocks with rules; use torch.compile, or apply rules first")
    return len(compiled)
