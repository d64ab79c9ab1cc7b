"""Connecting a model to its draws: `attach` once, then `using` and `sampling` as contexts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

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
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _BeforeRoot):
                del module._forward_pre_hooks[key]
    for index, rule in enumerate(rules):
        rule.join(sampler, index)
    model.register_forward_pre_hook(_BeforeRoot(sampler))
    return sampler


class _BeforeRoot:
    """The root's forward pre-hook; an object, so that it is found again, copied and pickled with its sampler."""

    def __init__(self, sampler: DepthSampler) -> None:
        self.sampler = sampler

    def __call__(self, module: nn.Module, args: object) -> None:
        self.sampler.before_forward(module.training)


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
    return sum(rule.presence(draw) for rule, draw in zip(rules_of(model), plan.draws, strict=True))


@contextmanager
def using(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Inside, every forward of `model` obeys `plan`, in training and eval mode alike; steps do not advance.

    Raises PlanError if the plan was made for another number of rules.
    """
    sampler = sampler_of(model)
    before = sampler.give(plan)
    try:
        yield
    finally:
        sampler.restore(before)


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
    before = sampler.start_sampling(first)
    model.eval()
    try:
        yield
    finally:
        sampler.start_sampling(before)
        for module, flag in flags.items():
            module.training = flag
