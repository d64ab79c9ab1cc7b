"""A randomly present network as a plain one: the expectation, with everything foldable folded away.

The network is traced by `torch.fx`; at every rule the expectation is written into the graph as a sum with two factors,
which are then folded (`residrop.inference.deploy.folding`). Nothing of residrop is left in the result.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from residrop.blocks.attach import detach, in_expectation, rules_of
from residrop.blocks.modes import evaluating
from residrop.blocks.residual import Chain, Residual
from residrop.common.errors import ConfigError
from residrop.inference.deploy.folding import SCALE, fold_graph, without_hooks
from residrop.models.blocks import Scale
from residrop.models.checks import check_images
from residrop.models.vanilla import Vanilla
from residrop.rules.base import Rule
from residrop.surgery.blocks import AppliedBlock, uninstall_rules
from residrop.surgery.generic import GenericBlock

__all__ = ["Tracer", "coefficients", "fold", "repeated"]

_TOLERANCE = 1e-4  # relative to the largest output: far above rounding, far below a mistake


def fold(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A plain torch module that predicts as `model` does in expectation; `model` is left as it is.

    - Survival rates and thetas, `rescale="test"`, the 1 / sqrt(L) of Stable nets: pushed through the graph into weights
      of convolutions, linear layers and batch norms. A factor stays, as a multiplication, only where its neighbours can
      not take it, or where products of many would leave the range of half precision.
    - Batch norm behind a convolution is folded into it. Batch norm in front of a ReLU (pre-activation networks) stays a
      `torch.nn.BatchNorm2d` in eval mode, which is one multiplication and addition per channel.
    - Branches that are never present are left out.

    The result is a `torch.fx.GraphModule` of `torch.nn` modules, in eval mode, without hooks: it is saved, loaded,
    traced and exported without residrop. It is meant to predict; training it on would not be training the original.

    Models of other libraries under `residrop.apply` are folded likewise where `torch.fx` can trace them (their modules
    without batch norm stay as they are). Where it can not, or has nothing to fold, and all factors are 1 (as with the
    default rescale="train"), the result is a copy of the model without its rules.

    Args:
        model: of `residrop.create`, or any model that contains residual blocks or rules; in any mode.
        example: an input, Tensor[n, ...]; with it the outputs of both are compared.

    Raises:
        ConfigError: the model cannot be traced, has a rule whose expectation is no weighted sum, or (with `example`)
            its folded form computes something else.
    """
    with in_expectation(model):  # a copy knows the draws in force
        plain = copy.deepcopy(model)
    factors = {rule: coefficients(rule) for rule in rules_of(plain)}
    generic = _plain_again(plain, factors)
    detach(plain)
    without_hooks(plain)
    certain = not generic and not rules_of(plain) and not type(plain).__module__.startswith("residrop.")
    if certain and not any(isinstance(module, _BatchNorm) for module in plain.modules()):
        return _checked(plain, model, example)
    try:
        graph = Tracer(factors, generic).graph_of(plain)
    except Exception as error:
        if certain:
            return _checked(plain, model, example)
        raise ConfigError(
            f"{type(plain).__name__} cannot be traced by torch.fx ({_first_line(error)}), so there is no graph to fold "
            "its factors into; use rescale='train' (whose expectation is the plain model) and residrop.remove"
        ) from error
    folded = fold_graph(plain, graph)
    return _checked(folded, model, example)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def _checked(folded: nn.Module, model: nn.Module, example: Tensor | None) -> nn.Module:
    if example is None:
        return folded
    with torch.no_grad(), evaluating(model):
        wanted, found = model(example), folded(example)
    if not isinstance(wanted, Tensor):
        raise ConfigError(
            f"{type(model).__name__} returns a {type(wanted).__name__}; compared are models that return one tensor: "
            "put it into a module that returns the logits"
        )
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not error <= _TOLERANCE:
        raise ConfigError(
            f"{type(model).__name__} folded differs from the original by {error:.1e} of its largest output; its "
            "forward has something that tracing does not see: report it, and use residrop.remove meanwhile"
        )
    return folded


def coefficients(rule: Rule) -> tuple[float, ...]:
    """(a, b, ...) of the expectation a shortcut(x) + b branch(x) + ... of a rule in eval mode, found by asking it.

    Of rules that repeat the branch or take earlier outputs (`residrop.Mix`) these follow, in that order.

    Raises:
        ConfigError: the expectation is no such sum.
    """
    repeat = rule.repeat
    count = 1 + repeat + rule.earlier

    def at(*values: float) -> float:
        x, *others = (torch.tensor([[value]], dtype=torch.float64) for value in values)
        uses = iter(others[:repeat])
        return float(rule(x, lambda _: x, lambda _, *along: next(uses), *others[repeat:]))

    flag = rule.training
    rule.eval()
    try:
        found = tuple(at(*(float(i == j) for j in range(count))) for i in range(count))
        point = tuple(1.5 - 2.0 * i for i in range(count))
        wanted = sum(a * value for a, value in zip(found, point, strict=True))
        linear = abs(at(*point) - wanted) < 1e-9 and at(*[0.0] * count) == 0.0
    finally:
        rule.train(flag)
    if not linear:
        raise ConfigError(
            f"the expectation of {rule} is no weighted sum of shortcut and branch, so it cannot be folded"
        )
    return found


def _plain_again(model: nn.Module, factors: dict[Rule, tuple[float, ...]]) -> dict[nn.Module, tuple[float, ...]]:
    """Give applied blocks their own class back where the tracer can do the rule's work from outside.

    Returns the factors of blocks under the generic rule, unless they are 1.
    """
    generic: dict[nn.Module, tuple[float, ...]] = {}
    for block in reversed([module for module in model.modules() if isinstance(module, AppliedBlock)]):
        own = [factors[rule] for rule in block.residrop_rules if isinstance(rule, Rule)]
        certain = all(each == (1.0, 1.0) for each in own)
        if certain or isinstance(block, GenericBlock):
            uninstall_rules(block)
            if not certain:
                generic[block] = own[0]
    return generic


def repeated(branch: Callable[..., Any], x: Any, along: Sequence[Any], times: int) -> list[Any]:
    """branch(x), branch(branch(x)), ... as `residrop.Mix` uses them."""
    uses: list[Any] = []
    while len(uses) < times:
        uses.append(branch(uses[-1] if uses else x, *along))
    return uses


class _Root(nn.Module):
    """Calls the model, so that the tracer sees that call, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class Tracer(fx.Tracer):
    """Writes the expectation of every rule into the graph.

    Args:
        factors: `coefficients` of the rules.
        generic: the same of blocks that are branches as a whole, x + (block(x) - x).
    """

    def __init__(self, factors: dict[Rule, tuple[float, ...]], generic: dict[nn.Module, tuple[float, ...]]) -> None:
        super().__init__(autowrap_functions=(check_images,))
        self.factors, self.generic = factors, generic
        self.direct: set[int] = set()

    def graph_of(self, model: nn.Module, root: nn.Module | None = None) -> fx.Graph:
        """The graph of model(images), or of a root that has it as `model`, with names as the model has them."""
        root = _Root(model) if root is None else root
        # adapters ask what an attribute of their block is, and get it; where it is used it becomes part of the graph
        self.direct = {
            id(one)
            for block in model.modules()
            if isinstance(block, AppliedBlock)
            for one in block._parameters.values()
            if one is not None
        }
        graph = self.trace(root)
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                if not node.target.startswith("model."):  # a tensor that its forward makes
                    model.register_buffer(node.target, getattr(root, node.target))
                node.target = node.target.removeprefix("model.")
        for node in reversed(graph.nodes):
            if node.target is check_images:  # what cannot be read fails in the first layer
                graph.erase_node(node)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m.__module__.startswith("residrop.") or isinstance(m, AppliedBlock):
            return False
        inside = list(m.modules())
        if any(isinstance(one, Rule | AppliedBlock) or one in self.generic for one in inside if one is not m):
            return False
        if super().is_leaf_module(m, module_qualified_name):
            return True
        foreign = not m.__module__.startswith("torch.nn") and m is not getattr(self.root, "model", None)
        return foreign and not any(isinstance(one, _BatchNorm) for one in inside)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if id(attr_val) in self.direct:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if isinstance(m, Rule):
            return self._combined(m, *args, **kwargs)
        if m in self.generic:
            a, b = self.generic[m]
            return self._sum([(a - b, args[0]), (b, super().call_module(m, forward, args, kwargs))])
        if type(m) is nn.Identity:
            return args[0]
        if type(m) is Scale:
            return self._scaled(args[0], m.factor)
        if type(m) is Vanilla:
            return m.tail(m.blocks(m.stem(args[0].flatten(1))))
        if type(m) is Chain and not any(isinstance(one, Rule) and one.earlier for one in m.modules()):
            x = args[0]
            for block in m:
                x = block(x)
            return x
        if type(m) is Residual:
            return m.post(m.rule(args[0], m.shortcut, m.branch, *args[1:]))
        return super().call_module(m, forward, args, kwargs)

    def _combined(
        self,
        rule: Rule,
        x: Any,
        shortcut: Callable[..., Any],
        branch: Callable[..., Any],
        *earlier: Any,
        post: Callable[..., Any] | None = None,
        along: Sequence[Any] = (),
    ) -> Any:
        factors = self.factors[rule]
        end = 1 + rule.repeat
        needed = max((i for i in range(1, end) if factors[i]), default=0)
        uses = repeated(branch, x, along, needed)
        terms = list(zip(factors[1 : 1 + needed], uses, strict=True)) + list(zip(factors[end:], earlier, strict=True))
        if factors[0] or not any(factor for factor, _ in terms):
            terms.insert(0, (factors[0], shortcut(x)))
        y = self._sum(terms)
        return y if post is None else post(y)

    def _sum(self, terms: Sequence[tuple[float, Any]]) -> Any:
        y = None
        for factor, x in terms:
            if factor or len(terms) == 1:  # nothing present at all is zeros
                part = self._scaled(x, factor)
                y = part if y is None else y + part
        return y

    def _scaled(self, x: Any, factor: float) -> Any:
        if factor == 1.0:
            return x
        y = self.create_proxy("call_function", operator.mul, (x, factor), {})
        if factor > 0.0:
            y.node.meta[SCALE] = factor
        return y
