"""residrop on one model, and what must hold then."""

import copy
import inspect
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import residrop
from residrop.schedule.sampler import Draw, Plan, Site
from sweep.reference import NoReferenceError, Place, Reference
from sweep.sources import Built, NotBuilt, build

ALMOST = 1.0 - 1e-12  # a rate below 1, so that coins are tossed, of which none will ever be heads
MOST_SITES = 12  # are left out one at a time
SUBSETS = 3
# relative difference from the reference, by granularity and whether everything is computed in float64
ALLOWED = {("block", True): 1e-9, ("row", True): 1e-9, ("block", False): 1e-6, ("row", False): 1e-5}
LARGEST = 9e7  # parameters
LARGEST_IN_DOUBLE = 2e7
PATIENCE = 1.5  # seconds for the passes of one granularity, if these are not fewer than three cases


@dataclass
class Found:
    """What was found of one model: a row of the results.

    Attributes:
        status: "wholly", "in part", "refused", "not built".
        error_block: largest relative difference of outputs and gradients from the reference at block level.
        error_row: the same at row level.
        compared: "" or why there was no comparison.
        problems: faults, one line each; none is as it should be.
    """

    library: str
    model: str
    family: str = ""
    model_class: str = ""
    parameters: int = 0
    status: str = ""
    blocks: int = 0
    branches: int = 0
    whole: int = 0
    share: float = 0.0
    left_alone: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    mode: str = ""
    error_block: float | None = None
    error_row: float | None = None
    compared: str = ""
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def examine(name: str, *, quick: bool = False) -> Found:
    """Everything about the model of this "library/model"; `quick` leaves out fewer branches."""
    library, _, model = name.partition("/")
    found = Found(library, model)
    start = time.perf_counter()
    with warnings.catch_warnings(), _fixed():
        warnings.simplefilter("ignore")
        try:
            built = prepared(build(name))
        except NotBuilt as error:
            found.status, found.refused = "not built", {"": _short(error)}
        except Exception as error:  # of a library: not every model type can be made by its configuration
            found.status, found.refused = "not built", {"": f"{type(error).__name__} {_short(error)}"}
        else:
            found.family = built.family
            _Examination(built, found, quick).run()
    found.seconds = round(time.perf_counter() - start, 2)
    return found


def _doubled(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@contextmanager
def _fixed() -> Any:
    """The global state of torch as it was."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.backends.mha.set_fastpath_enabled(False)  # in eval mode it computes other bits than the layers do
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def prepared(built: Built) -> Built:
    """The model without randomness, with parameters and statistics as a trained one may have them."""
    model = built.model
    if (size := sum(one.numel() for one in model.parameters())) > LARGEST:
        raise NotBuilt(f"it has {size / 1e6:.0f} million parameters")
    for module in model.modules():
        _calm(module)
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "__dict__"):
            _calm_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _redraw(model)
    model.eval()
    try:
        with torch.no_grad():
            out = outputs(model(*built.args, **built.kwargs))
    except Exception as error:
        raise NotBuilt(f"its forward fails: {type(error).__name__} {_short(error)}") from error
    if not out:
        raise NotBuilt("it returns no tensor of numbers")
    if not all(one.isfinite().all() and one.abs().max() < 1e6 for one in out):
        model.load_state_dict(before)
    return built


def _calm(module: nn.Module) -> None:
    """No dropout of any kind."""
    for name, value in list(vars(module).items()):
        if isinstance(value, float) and ("drop" in name.lower() or (name == "p" and "Drop" in type(module).__name__)):
            with suppress(AttributeError):
                setattr(module, name, 0.0)
    if type(module).__name__ == "StochasticDepth":
        module.p = 0.0


def _calm_config(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in name or name in ("mask_time_prob", "mask_feature_prob")):
            with suppress(Exception):
                setattr(config, name, 0.0)
    with suppress(Exception):
        if getattr(config, "apply_spec_augment", False):
            config.apply_spec_augment = False


def _redraw(model: nn.Module) -> None:
    """Parameters by which a branch weighs as much as its input: scales that begin at zero would hide faults."""
    with torch.no_grad():
        for name, one in model.named_parameters():
            if not one.is_floating_point() or not one.requires_grad:
                continue
            last = name.rpartition(".")[2]
            if (one.ndim >= 2 and min(one.shape) > 1) or (last == "weight" and one.ndim > 2):
                fan = one[0].numel() if one.ndim > 1 else 1
                one.normal_(0.0, min(1.0, 1.2 / math.sqrt(max(fan, 1))))
            elif last == "bias":
                one.normal_(0.0, 0.2)
            elif one.ndim:
                one.uniform_(0.5, 1.5)
        for name, one in model.named_buffers():
            if name.endswith("running_mean"):
                one.normal_(0.0, 0.3)
            elif name.endswith("running_var"):
                one.uniform_(0.5, 1.5)


def outputs(out: Any) -> list[Tensor]:
    """All tensors of numbers in an output."""
    if isinstance(out, Tensor):
        return [out]
    if hasattr(out, "to_tuple"):
        out = out.to_tuple()
    return [one for one in tree_leaves(out) if isinstance(one, Tensor) and one.is_floating_point()]


def _short(error: object, length: int = 160) -> str:
    return " ".join(str(error).split())[:length]


class _Examination:
    def __init__(self, built: Built, found: Found, quick: bool) -> None:
        self.plain, self.args, self.kwargs = built.model, built.args, dict(built.kwargs)
        self.found, self.quick = found, quick
        found.model_class = type(built.model).__name__
        found.parameters = sum(one.numel() for one in built.model.parameters())

    def run(self) -> None:
        reports = {}
        for granularity in ("block", "row"):
            model = copy.deepcopy(self.plain)
            try:
                reports[granularity] = self.apply(model, granularity, ALMOST)
                self.unchanged(model, reports[granularity], granularity)
            except residrop.UsageError as error:
                self.found.refused[granularity] = _short(error)
                reports.pop(granularity, None)
                continue
            del model
        self.describe(reports)
        for granularity, report in reports.items():
            try:
                self.compare(report, granularity)
            except residrop.UsageError as error:
                self.found.refused[granularity] = _short(error)
                if granularity == "block":
                    self.found.status = "refused"

    def apply(self, model: nn.Module, granularity: str, survival: float) -> Any:
        options: dict[str, Any] = {"survival": survival, "granularity": granularity, "rescale": "none"}
        if "example" in inspect.signature(residrop.apply).parameters:
            double = any(one.dtype == torch.float64 for one in model.parameters())
            options["example"] = tree_map(_doubled, self.example()) if double else self.example()
        before = _forms(model)
        try:
            return residrop.apply(model, **options)
        except residrop.UsageError:
            if _forms(model) != before:
                self.problem(f"{granularity}: refused, but the model is changed")
            raise

    def example(self) -> Any:
        if not self.kwargs:
            return self.args[0] if len(self.args) == 1 else self.args
        names = inspect.signature(self.plain.forward).parameters
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}

    def describe(self, reports: dict[str, Any]) -> None:
        found = self.found
        report = reports.get("block") or reports.get("row")
        if report is None:
            found.status = "refused"
            return
        found.blocks = len(report.blocks)
        found.branches = sum(len(one.rates) for one in report.blocks)
        found.whole = sum(_whole(one) for one in report.blocks)
        found.left_alone = [f"{name}: {_short(why, 120)}" for name, why in report.left_alone]
        model = copy.deepcopy(self.plain)
        self.apply(model, "block" if "block" in reports else "row", ALMOST)
        inside = {id(p) for block in _branched(model, report) for _, parts in block for p in _parameters(parts)}
        found.share = round(sum(p.numel() for p in model.parameters() if id(p) in inside) / max(found.parameters, 1), 4)
        counted = [why for _, why in report.left_alone if "no residual sum" not in why]
        found.status = "in part" if counted else "wholly"

    def problem(self, what: str) -> None:
        if what not in self.found.problems:
            self.found.problems.append(what)

    # what must hold whatever is absent

    def unchanged(self, model: nn.Module, report: Any, granularity: str) -> None:
        """Names, predictions, training at survival 1, and `remove`."""
        plain = copy.deepcopy(self.plain)
        if list(model.state_dict()) != list(plain.state_dict()):
            self.problem(f"{granularity}: the keys of state_dict changed")
        for one in (plain, model):
            one.train()  # what is computed once for eval mode is of the weights before they were drawn anew
        expected = self.call(plain.eval())
        if not _same(self.call(model.eval()), expected):
            self.problem(f"{granularity}: eval differs after apply")
        if self.trains(plain.train()):
            if (error := _worst(self.call(model.train()), self.call(plain))) > 1e-5:
                self.problem(f"{granularity}: training at survival 1 differs by {error:.1e}")
        else:
            self.found.mode = "eval"
        residrop.remove(model)
        if _forms(model) != _forms(plain):
            self.problem(f"{granularity}: remove leaves something behind")
        model.load_state_dict(self.plain.state_dict())
        if not _same(self.call(model.eval()), expected):
            self.problem(f"{granularity}: eval differs after remove")

    def trains(self, plain: nn.Module) -> bool:
        """Whether there are training forwards to compare: without targets, and not random whatever is zeroed."""
        try:
            return _same(self.call(plain, 2), self.call(plain, 1))
        except (ValueError, TypeError, RuntimeError):
            return False

    def call(self, model: nn.Module, seed: int = 1) -> list[Tensor]:
        torch.manual_seed(seed)
        with torch.no_grad():
            return outputs(model(*_copied(self.args), **_copied(self.kwargs)))

    # what is computed where something is absent

    def compare(self, report: Any, granularity: str) -> None:
        plain, args, kwargs, around = self.as_double()
        with around:
            self.compared_with(plain, args, kwargs, granularity)

    def compared_with(self, plain: nn.Module, args: Any, kwargs: Any, granularity: str) -> None:
        model = copy.deepcopy(plain)
        report = self.apply(model, granularity, 0.5)
        sites = residrop.sampler_of(model).sites
        places = [
            Place(one.name, len(one.rates), _whole(one), _part_names(model.get_submodule(one.name)))
            for one in report.blocks
        ]
        if sum(one.branches for one in places) != len(sites):
            self.problem(
                f"{granularity}: the report has {sum(p.branches for p in places)} rates, the sampler {len(sites)} rules"
            )
            return
        for one in (plain, model):
            one.train(self.found.mode != "eval")
            if granularity == "row":  # batch norm would see the other rows
                for module in one.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()

        def forward(one: nn.Module) -> Any:
            torch.manual_seed(1)
            return one(*_copied(args), **_copied(kwargs))

        for alive in (False, True):  # the first forward may run what is absent, to learn of it
            with residrop.using(model, Plan(tuple(self.drawn(sites, [alive] * len(sites))[0]))):
                forward(model)
        with residrop.using(model, Plan(tuple(self.drawn(sites, [True] * len(sites))[0]))):
            start = time.perf_counter()
            _graded(model, lambda: forward(model))
            took = time.perf_counter() - start
        reference = Reference(plain, lambda: forward(plain), places)
        worst: float | None = None
        for chosen in self.choices(len(sites), int(PATIENCE / (2 * took + 1e-3))):
            draws, masks = self.drawn(sites, chosen)
            try:
                wanted = _graded(plain, lambda masks=masks: reference.run(masks))
            except NoReferenceError as error:
                self.found.compared = f"not compared: {_short(error, 100)}"
                continue
            with self.watched(model, report, chosen if granularity == "block" else None) as watch:
                with residrop.using(model, Plan(tuple(draws))):
                    got = _graded(model, lambda: forward(model))
                for line in watch(got):
                    self.problem(line)
            error, where = _difference(got, wanted)
            worst = error if worst is None else max(worst, error)
            if not error <= ALLOWED[granularity, self.found.dtype == "float64"]:
                absent = [i for i, alive in enumerate(chosen) if not alive]
                self.problem(f"{granularity}: without {absent} of {len(sites)} branches {where} differs by {error:.1e}")
        if granularity == "block":
            self.found.error_block = worst
        else:
            self.found.error_row = worst

    def as_double(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], AbstractContextManager[Any]]:
        """Model and batch in float64, and what has to be around their passes for that, where the model allows it."""
        if self.found.parameters <= LARGEST_IN_DOUBLE:
            for around in (nullcontext(), _Doubling()):
                with around:
                    model = self.in_double()
                if model is not None and self.found.dtype == "float64":
                    break
            else:
                with (around := nullcontext()):
                    model = self.in_double()
            if model is not None:
                return model, *tree_map(_double, (self.args, self.kwargs)), around
        self.found.dtype = "float32"
        return copy.deepcopy(self.plain), self.args, self.kwargs, nullcontext()

    def in_double(self) -> nn.Module | None:
        """The model in float64, if it can be computed so."""
        args, kwargs = tree_map(_double, (self.args, self.kwargs))
        try:
            model = copy.deepcopy(self.plain).double().train(self.found.mode != "eval")
            with _Types() as types:
                out = outputs(model(*_copied(args), **_copied(kwargs)))
            if not all(one.isfinite().all() for one in out):  # masks that fit into float32 alone
                return None
            sum(one.sum() for one in out if one.requires_grad).backward()
            model.zero_grad(set_to_none=True)
            model.load_state_dict(self.plain.state_dict())
        except Exception:  # whatever a model cannot do in float64
            return None
        self.found.dtype = "float64" if types.found == {torch.float64} else "float64 and float32"
        return model

    def choices(self, number: int, most: int) -> list[list[bool]]:
        """Which branches are present, case by case: one left out, some, all. At least three cases, at most `most`."""
        subsets = 1 if self.quick or most < 8 else SUBSETS
        singles = min(number, 2 if self.quick else MOST_SITES, max(most - subsets - 1, 1))
        single = sorted({round((i + 0.5) * number / singles - 0.5) for i in range(singles)})
        cases = [[i != one for i in range(number)] for one in single]
        generator = torch.Generator().manual_seed(number)
        cases += [(torch.rand(number, generator=generator) < 0.5).tolist() for _ in range(subsets)]
        return [*cases, [False] * number]

    def drawn(self, sites: Sequence[Site], chosen: Sequence[bool]) -> tuple[list[Draw], list[Any]]:
        """The draws of a plan, and the factors of branches that they stand for."""
        draws, masks = [], []
        for number, (site, alive) in enumerate(zip(sites, chosen, strict=True)):
            if site.granularity == "block":
                draws.append(Draw((), alive=alive))
                masks.append(float(alive))
            else:  # "absent" is so for some of the rows
                rate = 1.0 if alive else (0.5 if number % 3 else 0.2)
                draws.append(Draw((rate,), key=1000 + 7 * number, fewest=site.fewest))
                masks.append(1.0 if alive else partial(_live, draws[-1]))
        return draws, masks

    @contextmanager
    def watched(self, model: nn.Module, report: Any, chosen: Sequence[bool] | None) -> Any:
        """Calls of what absent branches own, and their gradients."""
        absent: list[tuple[str, Any]] = []
        if chosen is not None:
            coins = iter(chosen)
            for entry, branches in zip(report.blocks, _branched(model, report), strict=True):
                absent += [(entry.name, parts) for _, parts in branches if not next(coins)]
        called: set[str] = set()
        handles = [
            module.register_forward_pre_hook(
                lambda *_, name=name, module=module: called.add(f"{name} ({type(module).__name__})")
            )
            for name, parts in absent
            for part in parts
            if isinstance(part, nn.Module)
            for module in part.modules()
            # an activation may be of several uses, and a branch may go across a module that has others
            if any(one is not None for one in module._parameters.values())
        ]

        def lines(got: tuple[list[Tensor], dict[str, Tensor | None]]) -> list[str]:
            names = {id(one): name for name, one in model.named_parameters()}
            wrong = [f"block: absent, but called: {name}" for name in sorted(called)[:3]]
            own = {names[id(one)] for _, parts in absent for one in _parameters(parts) if id(one) in names}
            graded = sorted(name for name in own if got[1].get(name) is not None)
            wrong += [f"block: absent, but with a gradient: {name}" for name in graded[:3]]
            return wrong

        try:
            yield lines
        finally:
            for handle in handles:
                handle.remove()


def _live(draw: Draw, rows: int) -> Tensor:
    """Which rows live, as numbers."""
    start, live = draw.rows(rows)
    return torch.tensor([float((row - start) % rows < live) for row in range(rows)])


def _part_names(block: nn.Module) -> tuple[tuple[str, ...], ...]:
    names = {module: name for name, module in block.named_modules()}
    return tuple(tuple(names[part] for part in parts if part in names) for _, parts in block.residrop_branches())


class _Doubling(TorchFunctionMode):
    """float64 wherever float32 is asked for, as some models do for positions, softmax or routers."""

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = tree_map(lambda one: torch.float64 if one is torch.float32 else one, (args, kwargs or {}))
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            func = _grouped  # torch has none for float64
        return func(*args, **kwargs)


def _grouped(a: Tensor, b: Tensor, *, offs: Tensor, bias: None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Rows of a Tensor[N, K] times the matrix of their group, of a Tensor[G, K, M]; groups end at these offsets."""
    assert bias is None
    assert out_dtype in (None, a.dtype)
    ends = offs.tolist()
    parts = [a[start:end] @ one for start, end, one in zip([0, *ends], ends, b, strict=False)]
    return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[2])])


class _Types(TorchFunctionMode):
    """Which types of numbers a pass computes gradients in: some models make part of it in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= {one.dtype for one in tree_leaves(out) if isinstance(one, Tensor) and one.requires_grad}
        return out


def _whole(entry: Any) -> bool:
    return entry.kind.endswith(", whole")


def _branched(model: nn.Module, report: Any) -> list[Any]:
    """For every block of a report its branches: pairs of a rule and its modules and parameters."""
    return [model.get_submodule(one.name).residrop_branches() for one in report.blocks]


def _parameters(parts: Sequence[Any]) -> list[nn.Parameter]:
    return [one for part in parts for one in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


def _forms(model: nn.Module) -> dict[str, Any]:
    """What `remove` must restore."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        name: (type(module), sorted(vars(module)), [len(getattr(module, one)) for one in hooks], list(module._modules))
        for name, module in model.named_modules()
    }


def _copied(value: Any) -> Any:
    return tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, value)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _same(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(got) == len(wanted) and all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(got, wanted, strict=True)
    )


def _relative(got: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    if got.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    finite = wanted.isfinite()
    if not got.isfinite()[finite].all():  # a masked branch may give 0 * inf, an absent one gives nothing
        return math.inf
    got, wanted = got[finite], wanted[finite]
    if not wanted.numel():
        return 0.0
    difference = (got - wanted).abs().max().item()
    return difference / max(wanted.abs().max().item(), least, 1e-30) if difference else 0.0


def _worst(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if len(got) != len(wanted):
        return math.inf
    return max((_relative(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)


Graded = tuple[list[Tensor], dict[str, Tensor | None]]


def _graded(model: nn.Module, forward: Callable[[], Any]) -> Graded:
    """Outputs of a pass and the gradients of a sum of them."""
    model.zero_grad(set_to_none=True)
    out = outputs(forward())
    generator = torch.Generator().manual_seed(0)
    total: Any = 0.0
    for one in out:
        weights = torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one.dtype)
        if one.requires_grad:
            total = total + (torch.where(one.isfinite(), one, 0.0) * weights).sum()
    if isinstance(total, Tensor):
        total.backward()
    return [one.detach() for one in out], {name: one.grad for name, one in model.named_parameters()}


def _difference(got: Graded, wanted: Graded) -> tuple[float, str]:
    """The largest relative difference, and of what. Gradients that are zero but for rounding are held against a
    hundredth of the model's largest one."""
    worst, where = _worst(got[0], wanted[0]), "the output"
    finite = [one[one.isfinite()] for one in wanted[1].values() if one is not None]
    largest = max((one.abs().max().item() for one in finite if one.numel()), default=0.0)
    for name, expected in wanted[1].items():
        grad = got[1][name]
        if expected is None and grad is None:
            continue
        shape = expected if expected is not None else grad
        zero = torch.zeros_like(shape)
        error = _relative(zero if grad is None else grad, zero if expected is None else expected, largest / 100)
        if not error <= worst:
            worst, where = error, f"the gradient of {name}"
    return worst, where
