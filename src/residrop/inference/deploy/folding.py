"""Graph passes that fold factors and batch norms of a traced network into its weights; all arithmetic in float64."""

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["SCALE", "fold_graph", "graph_module", "without_hooks"]

SCALE = "residrop_scale"  # marks, in the meta of a node, a multiplication by a positive constant that is to be folded

# as long as a product of factors stays in this range, it is carried on; half precision then has bits to spare
_SMALLEST, _LARGEST = 2.0**-8, 2.0**8

_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = {nn.BatchNorm1d: nn.Conv1d, nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm3d: nn.Conv3d}

# f(c x) = c f(x) for c > 0
_HOMOGENEOUS_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_HOMOGENEOUS_FUNCTIONS = (
    *(F.relu, torch.relu, torch.flatten, F.avg_pool2d, F.adaptive_avg_pool2d),
    *(operator.getitem, torch.Tensor.flatten),
)
_HOMOGENEOUS_METHODS = ("flatten", "view", "reshape", "contiguous", "relu", "mean", "permute", "transpose", "clone")


def without_hooks(model: nn.Module) -> None:
    """Take hooks of residrop off every module: they belong to training."""
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = getattr(module, name)
            for key in [key for key, hook in hooks.items() if _origin(hook).startswith("residrop")]:
                del hooks[key]
                for more in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
                    getattr(module, more).pop(key, None)


def _origin(hook: Any) -> str:
    return getattr(hook, "__module__", None) or type(hook).__module__


def fold_graph(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph of a network in eval mode as a module, with batch norms and marked factors folded."""
    module = fx.GraphModule(root, graph, class_name="Folded")
    _not_in_place(module)
    _fold_norms(module)
    _Factors(module).fold()
    return _cleaned(module, "Folded").eval()


def graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph of a network as a module, which computes just what it says."""
    module = fx.GraphModule(root, graph, class_name="Plain")
    _not_in_place(module)
    return _cleaned(module, "Plain")


def _cleaned(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Without dead code, and without a trace of the tracer."""
    graph = module.graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta.clear()
        node.type = None  # annotations, whose names the code would need
    graph._tracer_cls = None  # else files would name ours
    module = fx.GraphModule(module, graph, class_name=name)
    module._tracer_cls = None
    return module


def _not_in_place(module: fx.GraphModule) -> None:
    """Write in-place operations as others: without the factors between them, tensors are shared that were not.

    Who read the overwritten tensor later reads the result.
    """
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in order:
        if _out_of_place(module, node):
            source: Any = node.args[0]
            for user in [user for user in source.users if order[user] > order[node]]:
                user.replace_input_with(source, node)
    for one in module.modules():
        if getattr(one, "inplace", False):
            one.inplace = False  # pyright: ignore[reportArgumentType]


def _out_of_place(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node wrote to its first argument; it no longer does (modules are changed by the caller)."""
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    if node.op == "call_module":
        return bool(getattr(_module_of(module, node), "inplace", False))
    if node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
    elif node.op == "call_method" and _plain_method(str(node.target)):
        node.target = str(node.target)[:-1]
    else:
        return False
    return True


def _plain_method(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and hasattr(torch.Tensor, name[:-1])


# Weights


def _module_of(module: fx.GraphModule, node: Any) -> Any:
    return module.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _hooked(one: nn.Module) -> bool:
    return bool(one._forward_hooks or one._forward_pre_hooks)


def _own(module: fx.GraphModule, node: fx.Node) -> Any:
    """A copy of the node's module that only this node calls; parameters to be replaced, never written."""
    taken = copy.copy(module.get_submodule(str(node.target)))
    taken._parameters, taken._buffers = dict(taken._parameters), dict(taken._buffers)
    others = [one for one in module.graph.nodes if one.op == "call_module" and one.target == node.target]
    if len(others) > 1:
        number = 2
        while _exists(module, f"{node.target}_{number}"):
            number += 1
        node.target = f"{node.target}_{number}"
    parent, _, name = str(node.target).rpartition(".")
    module.get_submodule(parent).add_module(name, taken)
    return taken


def _exists(module: nn.Module, name: str) -> bool:
    return any(name == one for one, _ in module.named_modules())


def _set(one: Any, name: str, value: Tensor, like: Tensor) -> None:
    value = value.to(like.dtype)
    if name in one._buffers:
        one._buffers[name] = value
    else:
        one._parameters[name] = nn.Parameter(value, requires_grad=like.requires_grad)


def _per_output(factor: Tensor, weight: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (weight.ndim - 1))


# Batch norm


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(w, b), float64 Tensor[C], of the map x to w x + b that a batch norm in eval mode is."""
    w = (norm.running_var.double() + norm.eps).rsqrt()
    w = w if norm.weight is None else w * norm.weight.double()
    b = -norm.running_mean.double() * w
    return w, b if norm.bias is None else b + norm.bias.double()


def _is_fixed_norm(one: Any) -> bool:
    return type(one) in _NORMS and one.running_mean is not None and not _hooked(one)


@torch.no_grad()
def _fold_norms(module: fx.GraphModule) -> None:
    """Every batch norm right behind a convolution that nobody else reads."""
    for node in list(module.graph.nodes):
        norm = _module_of(module, node)
        if not _is_fixed_norm(norm):
            continue
        source = node.args[0] if node.args else node.kwargs["input"]
        conv = _module_of(module, source)
        if type(conv) is not _NORMS[type(norm)] or _hooked(conv) or len(source.users) != 1:
            continue
        conv, (w, b) = _own(module, source), _affine(norm)
        bias = b if conv.bias is None else b + w * conv.bias.double()
        like = conv.weight
        _set(conv, "weight", like.double() * _per_output(w, like), like)
        _set(conv, "bias", bias, like)
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    module.recompile()


# Factors


class _Factors:
    """Carries marked factors through the graph until something takes them.

    `scale[node]` is the factor that the tensor of a node still lacks: what the original has there is scale times what
    is computed. Nodes that nobody else but a marked multiplication reads take its factor over; others are read through
    it.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.scale: dict[fx.Node, float] = {}
        self.seen: dict[
            fx.Node, tuple[fx.Node, float]
        ] = {}  # marked nodes that stay for now: what they multiply, by what

    @torch.no_grad()
    def fold(self) -> None:
        for node in list(self.graph.nodes):
            if node.meta.get(SCALE, 0.0) > 0.0:
                self._marked(node)
            elif node.target in (operator.add, torch.add) and self._adds_two(node):
                self._sum(node)
            elif self._homogeneous(node):
                source, scale = self._read(node.args[0])
                node.args = (source, *node.args[1:])
                self.scale[node] = scale
            elif self._takes_factors(node):
                source, scale = self._read(node.args[0])
                node.args = (source, *node.args[1:])
                if scale != 1.0:
                    self._times_input(node, scale)
            else:
                self._settle(node)
        self.module.recompile()

    def _read(self, node: fx.Node) -> tuple[fx.Node, float]:
        """The node to read in place of this one, and the factor that it lacks."""
        return self.seen.get(node, (node, self.scale.get(node, 1.0)))

    def _marked(self, node: fx.Node) -> None:
        source, scale = self._read(node.args[0])  # pyright: ignore[reportArgumentType]
        scale *= node.meta[SCALE]
        if len(source.users) == 1 and source is node.args[0]:
            self.scale[source] = scale
            node.replace_all_uses_with(source)
            self.graph.erase_node(node)
        else:
            self.seen[node] = source, scale

    def _adds_two(self, node: fx.Node) -> bool:
        return len(node.args) == 2 and not node.kwargs and all(isinstance(one, fx.Node) for one in node.args)

    def _sum(self, node: fx.Node) -> None:
        """Both summands have to lack the same factor. Where one can take its own, the other's is carried on."""
        sides: list[Any] = list(node.args)
        (_, first), (_, second) = (self._read(one) for one in sides)
        twice = sides[0] is sides[1]
        ends = [None if twice else self._end(one) for one in sides]
        total = 1.0
        if ends[0] is None or (ends[1] is None and second != 1.0):
            carried = first if ends[0] is None and (ends[1] is not None or second != 1.0) else second
            total = carried if _SMALLEST <= carried <= _LARGEST else 1.0
        for i, (side, end) in enumerate(zip(sides, ends, strict=True)):
            source, scale = self._read(side)
            if scale == total:
                sides[i] = source
            elif end is not None:
                self._times_output(end, scale / total)
                sides[i] = source
            else:
                sides[i] = self._product(source, scale / total, node)
        node.args = tuple(sides)
        self.scale[node] = total

    def _end(self, node: fx.Node) -> fx.Node | None:
        """The layer whose weights can take a factor of what a node lacks, if the node shows it to one reader only."""
        while len(node.users) == 1 and node not in self.seen:
            if self._takes_factors(node):
                return node
            if not self._homogeneous(node):
                return None
            node = node.args[0]  # pyright: ignore[reportAssignmentType]
        return None

    def _homogeneous(self, node: fx.Node) -> bool:
        if not node.args or not isinstance(node.args[0], fx.Node) or any(map(_is_node, _others(node))):
            return False
        if node.op == "call_module":
            one = _module_of(self.module, node)
            return type(one) in _HOMOGENEOUS_MODULES and not _hooked(one) and not getattr(one, "return_indices", False)
        if node.op == "call_method":
            return node.target in _HOMOGENEOUS_METHODS
        if node.target is F.pad:
            options: dict[str, Any] = dict(zip(("mode", "value"), node.args[2:], strict=False)) | node.kwargs
            return options.get("mode", "constant") == "constant" and str(options.get("value")) in ("None", "0", "0.0")
        return node.op == "call_function" and node.target in _HOMOGENEOUS_FUNCTIONS

    def _takes_factors(self, node: fx.Node) -> bool:
        one = _module_of(self.module, node)
        known = type(one) in _LINEAR or _is_fixed_norm(one)
        return known and not _hooked(one) and len(node.args) == 1

    def _times_input(self, node: fx.Node, scale: float) -> None:
        """Let a layer take scale times its input."""
        one = _own(self.module, node)
        if type(one) in _LINEAR:
            _set(one, "weight", one.weight.double() * scale, one.weight)
        else:
            self._set_norm(one, scale, 1.0)

    def _times_output(self, node: fx.Node, scale: float) -> None:
        """Let a layer give scale times its output."""
        one = _own(self.module, node)
        if type(one) not in _LINEAR:
            self._set_norm(one, 1.0, scale)
            return
        _set(one, "weight", one.weight.double() * scale, one.weight)
        if one.bias is not None:
            _set(one, "bias", one.bias.double() * scale, one.bias)

    def _set_norm(self, norm: Any, in_scale: float, out_scale: float) -> None:
        """out_scale times a batch norm of in_scale times its input: the mean in units of the input, gamma in both."""
        mean = norm.running_mean
        gamma = torch.ones_like(mean) if norm.weight is None else norm.weight
        beta = torch.zeros_like(mean) if norm.bias is None else norm.bias
        _set(norm, "running_mean", mean.double() / in_scale, mean)
        _set(norm, "weight", gamma.double() * (in_scale * out_scale), gamma)
        _set(norm, "bias", beta.double() * out_scale, beta)
        norm.affine = True

    def _settle(self, node: fx.Node) -> None:
        """Give a node that knows nothing of factors what it is to read."""
        for source in list(node.all_input_nodes):
            read, scale = self._read(source)
            if read is source and scale == 1.0:
                continue
            end = self._end(source) if source not in self.seen else None
            if scale == 1.0:
                node.replace_input_with(source, read)
            elif end is not None:
                self._times_output(end, scale)
                self.scale[source] = 1.0
            else:
                node.replace_input_with(source, self._product(read, scale, node))

    def _product(self, source: fx.Node, scale: float, before: fx.Node) -> fx.Node:
        if scale == 1.0:
            return source
        with self.graph.inserting_before(before):
            return self.graph.call_function(operator.mul, (source, scale))


def _others(node: fx.Node) -> Iterator[Any]:
    yield from node.args[1:]
    yield from node.kwargs.values()


def _is_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)
