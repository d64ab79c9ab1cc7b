"""Connecting a model to its draws: `attach` once, then `using` and `sampling` as contexts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from residrop.errors import ConfigError, PlanError
from residrop.rules import Rule
from residrop.sampler import DepthSampler, Plan

__all__ = ["attach", "depth_of", "expected_depth_of", "rules_of", "sampler_of", "sampling", "using"]


def rules_of(model: nn.Module) -> list[Rule]:
    """All rules of a model, in module order (input to output); a shared rule counts once."""
    return [module for module in model.modules() if isinstance(module, Rule)]


def attach(model: nn.Module, *, seed: int = 0, warmup_steps: int = 0, rank: int | None = None) -> DepthSampler:
    """Number the rules of `model` and make it draw a fresh plan at each training forward.

    `model` becomes the root: calling it in training mode draws the plan of the next step. Attaching again replaces the
    sampler. Networks from `residrop.create` are attached already.

    Args:
        model: any module that contains rules; it is changed in place, its `state_dict` is not.
        seed: seed of all draws; equal on all ranks of a distributed run.
        warmup_steps: steps over which all rates fall linearly from 1 to their value.
        rank: rank of this process (default: torch.distributed's, or 0).

    Raises:
        ConfigError: the model has no rules.
    """
    rules = rules_of(model)
    if not rules:
        raise ConfigError(
            f"{type(model).__name__} has no rules; build its blocks with residrop.Residual(..., rule=...)"
        )
    if rank is None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    sampler = DepthSampler([rule.site for rule in rules], seed=seed, warmup_steps=warmup_steps, rank=rank)
    for module in model.modules():  # an earlier sampler must not go on drawing
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _AtRoot):
                    del hooks[key]
    for index, rule in enumerate(rules):
        rule.join(sampler, index)
    model.register_forward_pre_hook(_BeforeRoot(sampler))
    model.register_forward_hook(_AfterRoot(sampler))
    return sampler


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _AtRoot:
    """A hook of the root; an object, so that it is found again, copied and pickled with its sampler."""

    def __init__(self, sampler: DepthSampler) -> None:
        self.sampler = sampler


class _BeforeRoot(_AtRoot):
    def __call__(self, module: nn.Module, args: object) -> None:
        if not _in_backward():  # a checkpointed root is run again there, and is no new step
            self.sampler.before_forward(module.training)


class _AfterRoot(_AtRoot):
    """Ties a forward's plan to its outputs, so that recomputation in their backward finds it, whatever ran since."""

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        force = self.sampler.in_force
        if force.plan is None or not torch.is_grad_enabled() or _in_backward():
            return
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(lambda grads: self.sampler.recall(force))


def sampler_of(model: nn.Module) -> DepthSampler:
    """The sampler of a model (or of a wrapper around it, such as DDP); ConfigError if it was never attached."""
    samplers = {id(rule.sampler): rule.sampler for rule in rules_of(model) if rule.sampler is not None}
    if len(samplers) != 1:
        found = "several samplers" if samplers else "no sampler"
        raise ConfigError(
            f"{type(model).__name__} has {found}; call residrop.attach(model, seed=...) on the whole model"
        )
    return next(iter(samplers.values()))


def expected_depth_of(model: nn.Module) -> float:
    """Expected number of live branches at the final rates, sum of p_l (units count by their share)."""
    return sum(rule.branch_rate(rule.rates) for rule in rules_of(model))


def depth_of(model: nn.Module, plan: Plan) -> float:
    """Number of branches present under a plan (rows and units count by their rate)."""
    rules = rules_of(model)
    if len(rules) != len(plan.draws):
        raise PlanError(f"the plan has {len(plan.draws)} draws, the model {len(rules)} rules; they must agree")
    return sum(rule.presence(draw) for rule, draw in zip(rules, plan.draws, strict=True))


@contextmanager
def using(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Inside, every forward of `model` obeys `plan`, in training and eval mode alike; steps do not advance.

    Raises PlanError if the plan was made for other rules. Of nested contexts the innermost counts.
    """
    sampler = sampler_of(model)
    before = sampler.in_force
    sampler.give(plan)
    try:
        yield
    finally:
        sampler.in_force = before


@contextmanager
def sampling(model: nn.Module, *, first: int = 0) -> Iterator[None]:
    """Stochastic inference: inside, coins are tossed while everything else (batch norm) is in eval mode.

    Every forward of the root is one sampled pass with a draw of its own; pass number k is a function of (seed, k), so
    results repeat. Training steps are not advanced, and each module's training flag is put back at the end.

    Args:
        model: an attached model.
        first: number of the first pass; give another one for other samples.
    """
    sampler = sampler_of(model)
    if first < 0:
        raise PlanError(f"first is {first}; sampled passes are numbered from 0")
    flags = {module: module.training for module in model.modules()}
    before = sampler.in_force
    sampler.start_sampling(first)
    model.eval()
    try:
        yield
    finally:
        sampler.in_force = before
        for module, flag in flags.items():
            module.training = flag
