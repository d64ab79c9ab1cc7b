"""Connecting a model to its draws: `attach` once, then `using` and `sampling` as contexts."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from residrop.blocks.inactive import EvalWatch, warn_if_certain
from residrop.blocks.modes import evaluating
from residrop.blocks.skippable import Skippable, fewest_rows, forget_blocks
from residrop.common.errors import ConfigError, EmptyStepWarning, PlanError
from residrop.functional.static_draws import StaticDraws
from residrop.rules.base import Rule
from residrop.schedule.coupling import Coupling
from residrop.schedule.sampler import DepthSampler, Plan
from residrop.schedule.survival import explicit
from residrop.schedule.timing import Schedule, Timing

__all__ = [
    "attach",
    "depth_of",
    "detach",
    "expected_depth_of",
    "in_expectation",
    "one_draw",
    "rules_of",
    "sampler_of",
    "sampling",
    "set_survival",
    "using",
]


def rules_of(model: nn.Module) -> list[Rule]:
    """All rules of a model, in module order (input to output); a shared rule counts once."""
    return [module for module in model.modules() if isinstance(module, Rule)]


def attach(
    model: nn.Module,
    *,
    seed: int = 0,
    timing: Timing | str = "constant",
    rank: int | None = None,
    coupling: Coupling = "independent",
    costs: Sequence[float] = (),
    at_least: int = 0,
    draw_every: int = 1,
) -> DepthSampler:
    """Number the rules of `model` and make it draw a fresh plan at each training forward.

    `model` becomes the root: calling it in training mode draws the plan of the next step. Attaching again replaces the
    sampler. Networks from `residrop.create` are attached already.

    Args:
        model: any module that contains rules; it is changed in place, its `state_dict` is not.
        seed: seed of all draws; equal on all ranks of a distributed run.
        timing: the share of every drop that is in force at a step: a `Timing`, or a string such as "warmup(1000)" that
            `residrop.schedule.timing.parse` reads. Times are training steps.
        rank: rank of this process (default: at every draw, what torch.distributed says then, or 0).
        coupling: how the presence of a block depends on that of others in the same step, as `DepthSampler` has it:
            `independent`, `systematic`, `balanced` or `apart`.
        costs: for `balanced`, a number for every rule, such as `theory.costs_of(model, "flops", x).branches`.
        at_least: 1 if every step is to have one block with a coin at least, as where all that is trained lies in blocks
            (a frozen backbone): block l is then present with probability p_l / (1 - prod_j (1 - p_j)), while rescaling
            and expectation stay those of p_l.
        draw_every: for how many training steps the coins of blocks stay as they are (rows and units never do).

    Raises:
        ConfigError: the model has no rules, one that does not suit its branch, or a coupling that they cannot have.

    Warns:
        InactiveWarning: all rates are 1.
    """
    how = {"coupling": coupling, "costs": costs, "at_least": at_least, "draw_every": draw_every}
    sampler = connect(model, seed=seed, timing=timing, rank=rank, **how)
    warn_if_certain(sampler, "residrop.attach")
    return sampler


def connect(
    model: nn.Module,
    *,
    seed: int = 0,
    timing: Timing | str = "constant",
    rank: int | None = None,
    coupling: Coupling = "independent",
    **how: Any,
) -> DepthSampler:
    """`attach` for callers that warn of inactive rules themselves; `how` is handed on to `DepthSampler`."""
    rules = rules_of(model)
    if not rules:
        raise ConfigError(
            f"{type(model).__name__} has no rules; build its blocks with residrop.Residual(..., rule=...)"
        )
    if coupling != "independent" and any(rule.granularity == "row" and rule.rows == "bernoulli" for rule in rules):
        raise ConfigError(
            f"coupling is {coupling!r}, and with rows='bernoulli' every row has a coin of its own; use rows='window'"
        )
    blocks = [module for module in model.modules() if isinstance(module, Skippable)]
    _look_at_parts(rules, blocks)
    sampler = DepthSampler(
        [rule.site for rule in rules],
        seed=seed,
        timing=timing,
        rank=_current_rank if rank is None else rank,
        coupling=coupling,
        **how,
    )
    detach(model)  # an earlier sampler must not go on drawing
    for index, rule in enumerate(rules):
        rule.join(sampler, index)
    before = _BeforeRoot(sampler, rules)
    before.checks = tuple(dict.fromkeys(check for block in blocks for check in block.residrop_checks))
    after = _AfterRoot(before)
    before.handle = model.register_forward_pre_hook(before, with_kwargs=True)
    after.handle = model.register_forward_hook(after, always_call=True)
    return sampler


def _look_at_parts(rules: Sequence[Rule], blocks: Sequence[Skippable]) -> None:
    branches = [branch for block in blocks for branch in block.residrop_branches()]
    for rule, parts in branches:
        rule.check_parts(parts)
    for rule in rules:
        rule.fewest = 1
    for rule, parts in branches:
        if rule.granularity == "row" and rule.rows == "window":
            rule.fewest = max(rule.fewest, fewest_rows(parts))


def _current_rank() -> int:
    # asked at every draw: models are often built before their process joins a group
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def detach(model: nn.Module) -> None:
    """Undo `attach`: the model no longer draws plans. Its rules, if it still has some, need `attach` again to train."""
    forget_blocks(model)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _AtRoot):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)
        if isinstance(module, Rule):
            module.leave()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _AtRoot:
    """A hook of the root; an object, so that it is found again, copied and pickled with its sampler.

    Where `torch.compile` traces it, it is run by Python between two graphs, and not at all in a pass without coins.
    """

    # loading it moves torch's count of hooks past its number, so that no hook of the process comes to replace this one
    handle: RemovableHandle

    def __init__(self, sampler: DepthSampler, rules: list[Rule]) -> None:
        self.sampler, self.rules = sampler, rules

    def deferred(self, module: nn.Module) -> bool | None:
        """Whether Python has to run it later; None if nobody has to."""
        if not torch.compiler.is_compiling():
            return False
        if torch.compiler.is_exporting():
            self.refuse_freezing(module, "torch.export")
        return True if module.training or self.sampler.in_force.always else None

    def refuse_freezing(self, module: nn.Module, what: str) -> None:
        """PlanError where one draw would be frozen into what is made of a pass for good."""
        force = self.sampler.in_force
        if not force.given and (module.training or force.always):
            raise PlanError(
                f"{what} would freeze one draw of {type(module).__name__} for good; call model.eval() first, or give a "
                "plan with residrop.using(model, plan) to have just that"
            )


class _BeforeRoot(_AtRoot):
    feeds_graph = False  # whether a graph comes next
    static_draws: StaticDraws | None = None  # where its draws are to lie, if it is a CUDA graph
    checks: tuple[Callable[..., None], ...] = ()  # see `Skippable.residrop_checks`
    handled = id(None)  # the error that is being handled when a pass begins: the caller's own
    rows: int | None = None  # of the batch, for observers
    learning = True  # whether gradients are recorded, be it in a checkpoint's backward

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        deferred = self.deferred(module)
        if deferred:
            from residrop.rules import tracing

            tracing.in_python(self.begin, module, (args, kwargs), True)
        elif deferred is not None:
            self.begin(module, (args, kwargs), self.feeds_graph)

    def begin(self, module: nn.Module, args: tuple[Any, Any], feeds_graph: bool) -> None:
        backward = _in_backward()  # a checkpointed root is run again there, and is no new step
        if not backward:
            self.handled = id(sys.exc_info()[1])
            if torch._C._is_tracing():
                self.refuse_freezing(module, "torch.jit.trace")
            force = self.sampler.in_force
            if module.training or force.always:
                for check in self.checks:
                    check(module, *args, force.given)
            # in eval mode nobody asks, and looking for checkpoints takes a walk through the stack
            self.learning = torch.is_grad_enabled() or (module.training and bool(_reentrant_checkpoints()[0]))
            nested = self.sampler.running and _calls_itself(module)
            self.sampler.before_forward(module.training, nested=nested, learning=self.learning)
            self.rows = _batch_size(args) if self.sampler.observers else None
        if backward or not torch.is_grad_enabled():
            self.remember()
        self.sampler.graph_draws = None
        if feeds_graph:
            from residrop.rules import tracing

            self.sampler.graph_draws = tracing.graph_draws(self.rules, args, self.static_draws)

    def remember(self) -> None:
        """Tie the plan to the reentrant checkpoints around this call, and in their backward passes find it again.

        They run the root without gradients, so its outputs know nothing of the backward pass that will recompute them.
        """
        inside, again = _reentrant_checkpoints()
        force = self.sampler.in_force
        if again is not None and (forces := _forces_of(again, self.sampler)):
            force = forces.pop(0)
            forces.append(force)  # for another backward pass through the same graph
            self.sampler.recall(force)
        for node in inside:
            _forces_of(node, self.sampler).append(force)


def _calls_itself(module: nn.Module) -> bool:
    """Whether a module is called from inside a call of it. (A forward that Ctrl-C has ended runs no hooks.)"""
    found, frame = 0, sys._getframe(1)
    while frame is not None and found < 2:
        found += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back
    return found == 2


def _reentrant_checkpoints() -> tuple[list[Any], Any]:
    """The autograd nodes of the reentrant checkpoints that run this call, up to one that recomputes it; and that one.

    The node of a `torch.utils.checkpoint.CheckpointFunction` is known nowhere but in its own two methods.
    """
    found: list[Any] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            found.append(frame.f_locals["ctx"])
        elif frame.f_code is CheckpointFunction.backward.__code__:
            return found, frame.f_locals["ctx"]
        frame = frame.f_back
    return found, None


def _forces_of(node: Any, sampler: DepthSampler) -> list[Any]:
    """What calls of a root obeyed inside a reentrant checkpoint, in their order."""
    return node.__dict__.setdefault("residrop_forces", {}).setdefault(sampler, [])


def before_root(model: nn.Module) -> _BeforeRoot | None:
    """The hook that makes the plans of `model`; None if it is no attached root."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _BeforeRoot)), None)


def _batch_size(args: object) -> int | None:
    """The first dimension of the first tensor among a forward's arguments; None if there is none."""
    return next((leaf.shape[0] for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.ndim), None)


class _AfterRoot(_AtRoot):
    """Ties a forward's plan to its outputs, so that recomputation in their backward finds it, whatever ran since.

    It is also called after a forward that raised an error, of which nothing may stay behind.
    """

    def __init__(self, before: _BeforeRoot) -> None:
        super().__init__(before.sampler, before.rules)
        self.before = before
        self.watch = EvalWatch(before.sampler)
        self.told = False

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        deferred = self.deferred(module)
        if deferred:
            from residrop.rules import tracing

            tracing.in_python(self.end, module, output)
        elif deferred is not None:
            self.end(module, output)

    def _tell_of_nothing(self, module: nn.Module, plan: Plan, output: object) -> None:
        """Warn where absent blocks leave nothing that is trained, before backward says that in other words."""
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors or any(leaf.requires_grad for leaf in tensors):
            return
        if not any(draw.alive is False for draw in plan.draws):
            return
        if any(parameter.requires_grad for parameter in module.parameters()):
            self.told = True
            alone = self.sampler.coupling == "independent" and not self.sampler.at_least
            what = "attach or apply it with at_least=1" if alone else "raise the rates of blocks that are trained"
            warnings.warn(
                f"in step {plan.step} no block of {type(module).__name__} is present that is trained, so its output "
                f"needs no gradient (backward says 'does not require grad'); {what}",
                EmptyStepWarning,
                stacklevel=2,
            )

    def end(self, module: nn.Module, output: object) -> None:
        self.sampler.graph_draws = None
        if _in_backward():
            return
        failed = id(sys.exc_info()[1]) != self.before.handled
        force = self.sampler.in_force
        self.sampler.after_forward(failed=failed)
        if failed:
            return
        if module.training and force.plan is not None and self.before.learning:
            for tell in self.sampler.observers:
                tell(force.plan, self.before.rows)
        if not torch.is_grad_enabled():
            return
        if not (module.training or force.always):
            self.watch.after_forward(module, output)
        elif module.training and force.plan is not None and not force.given and not self.told:
            self._tell_of_nothing(module, force.plan, output)
        if force.plan is None:
            return
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(lambda grads: self.sampler.recall(force))


def sampler_of(model: nn.Module) -> DepthSampler:
    """The sampler of a model (or of a wrapper around it, such as DDP); ConfigError if it was never attached."""
    root = before_root(model)
    if root is not None and all(rule.sampler is root.sampler for rule in root.rules):
        return root.sampler  # without a walk through all modules, which every step of a loop may ask for
    samplers = {id(rule.sampler): rule.sampler for rule in rules_of(model) if rule.sampler is not None}
    if len(samplers) != 1:
        found = "several samplers" if samplers else "no sampler"
        raise ConfigError(
            f"{type(model).__name__} has {found}; call residrop.attach(model, seed=...) on the whole model"
        )
    return next(iter(samplers.values()))


def set_survival(model: nn.Module, rates: Sequence[float]) -> None:
    """Give the blocks of an attached model other survival rates, at any time of a training.

    Seed, step and timing go on as they were. A block's word of a step does not depend on its rate, so where a rate
    stays, its coins do, and where it rises, the block lives in all steps in which it would have lived.

    Args:
        model: attached; on a distributed run every rank must be given the same rates.
        rates: p_l in [0, 1], one per rule from input to output. Rules without coins (`ConstantDepth`) take 1 only.

    Raises:
        ConfigError: a number of rates other than that of the rules, a rate outside [0, 1], rules of several rates
            (Swapout's), or neighbours that cannot be apart with these. Nothing is changed then.
    """
    sampler, rules = sampler_of(model), rules_of(model)
    given = explicit(len(rules), rates)
    for number, (rule, rate) in enumerate(zip(rules, given, strict=True), start=1):
        if len(rule.rates) > 1 or (not rule.rates and rate != 1.0):
            has = f"{len(rule.rates)} rates" if rule.rates else "no coins"
            raise ConfigError(
                f"rule {number} ({type(rule).__name__}) has {has} and cannot be given survival rate {rate}; "
                "build the model with a rule of one rate per block, such as stochastic-depth"
            )
    pairs = list(zip(rules, given, strict=True))
    sampler.change([replace(rule.site, rates=(rate,) if rule.rates else ()) for rule, rate in pairs])
    for rule, rate in pairs:
        rule.rates = (rate,) if rule.rates else ()


def expected_depth_of(model: nn.Module) -> float:
    """Expected number of live branches at the rates that the timing ends with (units count by their share).

    That is the sum of p_l, unless the timing ends elsewhere: with `early` and `plateau` it is all of them.
    """
    total = 0.0
    for rule in rules_of(model):
        share = 1.0 if rule.sampler is None else rule.sampler.schedule.timing.final
        total += rule.branch_rate(Schedule(rule.rates).under(share))
    return total


def depth_of(model: nn.Module, plan: Plan) -> float:
    """Number of branches present under a plan (rows and units count by their rate)."""
    root = before_root(model)
    rules = rules_of(model) if root is None else root.rules
    if len(rules) != len(plan.draws):
        raise PlanError(f"the plan has {len(plan.draws)} draws, the model {len(rules)} rules; they must agree")
    return sum(rule.presence(draw) for rule, draw in zip(rules, plan.draws, strict=True))


def using(model: nn.Module, plan: Plan) -> AbstractContextManager[None]:
    """Inside, every forward of `model` obeys `plan`, in training and eval mode alike; steps do not advance.

    Raises PlanError if the plan was made for other rules. Of nested contexts the innermost counts.
    """
    return sampler_of(model).giving(plan)


def one_draw(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, all training forwards of `model` obey one plan, that of the step that comes next: for an update of
    several forwards (SAM, LBFGS, the two forwards of a preference loss).

    It has been one step when the context ends without an error. Forwards in eval mode are in expectation, as always.
    """
    return sampler_of(model).one_draw()


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
    with sampler.sampling(first), evaluating(model):
        yield


@contextmanager
def in_expectation(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no draws in force: also inside of `sampling` and `using`, and for models that are not attached."""
    samplers = {rule.sampler for rule in rules_of(model) if rule.sampler is not None}
    with ExitStack() as stack:
        for sampler in samplers:
            stack.enter_context(sampler.in_expectation())
        stack.enter_context(evaluating(model))
        yield
