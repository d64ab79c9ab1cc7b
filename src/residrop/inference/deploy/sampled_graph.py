"""A sampled pass as a graph whose randomness is an input, for files that are run where residrop is not.

Whether a branch is called cannot depend on data in such a graph, so every branch is computed: nothing is skipped.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from residrop.blocks.attach import detach, rules_of, sampler_of
from residrop.common.errors import ConfigError
from residrop.functional.kernels import signed
from residrop.functional.units import row_mask
from residrop.inference.deploy.fold import Tracer, repeated
from residrop.inference.deploy.folding import fold_graph, without_hooks
from residrop.rules.base import Rule
from residrop.rules.depth import StochasticDepth
from residrop.rules.units import Mix, SkipForward, Swapout, UnitDropout
from residrop.schedule.sampler import Draw, Plan, derive_key
from residrop.surgery.blocks import AppliedBlock
from residrop.surgery.generic import GenericBlock

__all__ = ["SampledGraph"]


@dataclass(frozen=True)
class SampledGraph:
    """A network whose draws are inputs. Call `module(images, *inputs)` in the order of `coins`.

    - `alive`, float32 Tensor[rules, n], where the network has block-level or row-level rules: 1 where the branch of a
      rule is present for an image, 0 where it is absent. Toss 1 with the rule's probability (`rates`): at block level
      one coin for all images of a pass, at row level one each.
    - `keys`, int32 Tensor[rules, words], where it has unit-level rules: random 32-bit integers, new ones for every
      pass. Masks are the hash of these and of the unit's index, as in `residrop.functional`.

    Attributes:
        module: the graph.
        alive: the rules of `alive` in their order.
        keys: the rules of `keys`.
        places: the number of each rule in a plan.
        rates: survival rates and thetas of each rule.
        coupling: how the draws of `alive` depend on one another (`residrop.attach`).
    """

    module: nn.Module
    alive: tuple[Rule, ...]
    keys: tuple[Rule, ...]
    places: dict[Rule, int]
    rates: dict[Rule, tuple[float, ...]]
    coupling: str

    @classmethod
    def of(cls, model: nn.Module) -> "SampledGraph":
        """The graph of an attached model, which is left as it is.

        Raises:
            ConfigError: it has rules of a kind unknown here, nothing to draw, or cannot be traced.
        """
        plain = copy.deepcopy(model).eval()
        sampler = sampler_of(plain)
        places = {rule: rule.index for rule in rules_of(plain)}
        final = sampler.plan(0, stream="sample").draws
        rates = {rule: final[place].rates or rule.rates for rule, place in places.items()}
        drawn = [rule for rule in rules_of(plain) if rule.rates and not rule.runs_absent]
        alive = tuple(rule for rule in drawn if isinstance(rule, StochasticDepth))
        keys = tuple(rule for rule in drawn if isinstance(rule, Mix | SkipForward | Swapout | UnitDropout))
        if not drawn or len(alive) + len(keys) < len(drawn):
            other = next((rule for rule in drawn if rule not in alive and rule not in keys), None)
            ours = type(other).__module__.startswith("residrop.")
            kind = "whose numbers are no coins" if ours else "a rule of your own"
            what = "no rule that draws" if other is None else f"a {type(other).__name__}, {kind}"
            raise ConfigError(
                f"{type(model).__name__} has {what}, so there is no graph of a sampled pass; leave sampled out"
            )
        detach(plain)
        without_hooks(plain)
        tracer = _Sampling(plain, alive, keys, rates)
        try:
            graph = tracer.graph_of(plain, _Root(plain, tracer))
        except Exception as error:
            raise ConfigError(
                f"{type(plain).__name__} cannot be traced by torch.fx ({error}); leave sampled out"
            ) from error
        return cls(fold_graph(plain, _with_used_inputs(graph)), alive, keys, places, rates, sampler.coupling)

    def coins(self, rows: int) -> dict[str, Tensor]:
        """Inputs of a pass in which every branch and unit has the same draw again and again; for tracing and checks."""
        found: dict[str, Tensor] = {}
        if self.alive:
            found["alive"] = (torch.arange(len(self.alive))[:, None] % 3 != 1).float().expand(-1, rows).clone()
        if self.keys:
            words = [[signed(derive_key(i, j)) for j in range(self._words)] for i in range(len(self.keys))]
            found["keys"] = torch.tensor(words, dtype=torch.int32)
        return found

    def coins_of(self, plan: Plan, rows: int) -> dict[str, Tensor]:
        """The inputs with which the graph computes what the model does under a plan with a batch of `rows` images."""
        found: dict[str, Tensor] = {}
        if self.alive:
            masks = [_row_mask(rule, plan.draws[self.places[rule]], self.rates[rule], rows) for rule in self.alive]
            found["alive"] = torch.stack(masks).float()
        if self.keys:
            keys = [plan.draws[self.places[rule]].key or 0 for rule in self.keys]
            pairs = self._words // 2
            words = [[half for pair in range(pairs) for half in _halves(derive_key(key, pair))] for key in keys]
            found["keys"] = torch.tensor([[signed(word) for word in row] for row in words], dtype=torch.int32)
        return found

    def facts(self) -> dict[str, Any]:
        """What who runs the graph has to know, as JSON values."""
        facts: dict[str, Any] = {}
        if self.alive:
            facts["alive"] = {
                "meaning": "float32 [rules, images]: 1 where a branch is present, with the probability of its rule",
                "probabilities": [self.rates[rule][0] for rule in self.alive],
                "coupling": self.coupling,
                "one_coin_per": ["pass" if rule.granularity == "block" else "image" for rule in self.alive],
            }
        if self.keys:
            facts["keys"] = {"meaning": "int32 [rules, words]: random integers, new ones for every pass"}
        return {"sampled_inputs": facts}

    @property
    def _words(self) -> int:
        return 2 * max((len(self.rates[rule]) + 1) // 2 for rule in self.keys)


def _halves(key: int) -> tuple[int, int]:
    return key & 0xFFFFFFFF, key >> 32


def _row_mask(rule: Rule, draw: Draw, rates: tuple[float, ...], rows: int) -> Tensor:
    if draw.alive is not None:
        return torch.full((rows,), draw.alive)
    assert draw.key is not None
    if rule.rows == "bernoulli":
        return row_mask(rows, rates[0], draw.key)
    window = draw.rows(rows)
    return (torch.arange(rows) - window.start) % rows < window.live


class _Rows(nn.Module):
    """shortcut + alive * scale * branch; `less` where the branch contains the shortcut."""

    def __init__(self, place: int, scale: float, less: bool) -> None:
        super().__init__()
        self.place, self.scale, self.less = place, scale, less

    def forward(self, alive: Tensor, skip: Tensor, f: Tensor) -> Tensor:
        weight = (alive[self.place] * self.scale).to(f.dtype).view(-1, *[1] * (f.ndim - 1))
        return skip + weight * (f - skip if self.less else f)


class _Units(nn.Module):
    """The sum of a unit-level rule, under keys that are data."""

    thresholds: Tensor

    def __init__(self, place: int, rule: Any, rates: tuple[float, ...], less: bool) -> None:
        super().__init__()
        self.place, self.rule, self.rates, self.less = place, rule, rates, less
        thresholds = torch.tensor([round(rate * 65536) for rate in rates], dtype=torch.int32)
        self.register_buffer("thresholds", thresholds)

    def forward(self, keys: Tensor, skip: Tensor, f: Tensor, *earlier: Tensor) -> Tensor:
        words = keys[self.place, : (len(self.rates) + 1) // 2 * 2]
        data: Any = torch.cat([words, self.thresholds.to(words.device)])  # as `functional.coins_of`
        return self.rule.combine(Draw(self.rates, None, data), skip, f - skip if self.less else f, *earlier)


class _Root(nn.Module):
    def __init__(self, model: nn.Module, tracer: "_Sampling") -> None:
        super().__init__()
        self.model = model
        self.__dict__["tracer"] = tracer

    def forward(self, images: Tensor, alive: Tensor, keys: Tensor) -> Any:
        self.__dict__["tracer"].inputs = {_Rows: alive, _Units: keys}
        return self.model(images)


class _Sampling(Tracer):
    """Writes every rule into the graph as a module that reads its coins."""

    def __init__(
        self, model: nn.Module, alive: Sequence[Rule], keys: Sequence[Rule], rates: dict[Rule, tuple[float, ...]]
    ) -> None:
        blocks = [one for one in model.modules() if isinstance(one, GenericBlock)]
        owners = {rule: block for block in blocks for rule in block.residrop_rules}
        super().__init__({}, {})
        self.inputs: dict[type, Any] = {}
        self.parts: dict[nn.Module, tuple[str, nn.Module]] = {}
        self.blocks: dict[nn.Module, nn.Module] = {block: rule for rule, block in owners.items()}
        for place, rule in enumerate((*alive, *keys)):
            less = rule in owners
            if isinstance(rule, StochasticDepth):
                part: nn.Module = _Rows(place, rule.scale(Draw(rates[rule], True)), less)
            else:
                part = _Units(place - len(alive), rule, rates[rule], less)
            model.add_module(f"residrop_rule_{place}", part)
            self.parts[rule] = f"model.residrop_rule_{place}", part

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if m in self.blocks:
            own: Any = m.__dict__["_residrop_class"]
            return self._tossed(self.blocks[m], args[0], own.forward(m, *args, **kwargs))
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, AppliedBlock):
            return False
        return super().is_leaf_module(m, module_qualified_name)

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
        uses = repeated(branch, x, along, rule.repeat)
        y = self._tossed(rule, shortcut(x), *uses, *earlier) if rule in self.parts else shortcut(x) + uses[0]
        return y if post is None else post(y)

    def _tossed(self, rule: nn.Module, *tensors: Any) -> Any:
        name, part = self.parts[rule]
        return self.create_proxy("call_module", name, (self.inputs[type(part)], *tensors), {})


def _with_used_inputs(graph: fx.Graph) -> fx.Graph:
    for node in reversed(graph.nodes):
        if node.op == "placeholder" and not node.users and node.name != "images":
            graph.erase_node(node)
    return graph
