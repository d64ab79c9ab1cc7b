"""Files that predict without residrop: ONNX, `torch.export` archives, plain weights; each is read back and compared."""

import contextlib
import importlib
import io
import json
import logging
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from residrop.common.errors import ConfigError
from residrop.common.files import replacing
from residrop.inference.deploy.fold import fold
from residrop.inference.uncertainty.calibration import check_temperature

__all__ = ["Exported", "export", "format_of"]

Format = Literal["onnx", "pt2", "safetensors"]
_FORMATS: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2", ".safetensors": "safetensors"}
_TOLERANCE = 1e-4  # relative to the largest output
_ROWS = {"images": 0, "alive": 1}  # which dimension of an input is the batch


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how well it agrees with the model.

    Attributes:
        path: the file.
        format: onnx, pt2 or safetensors.
        difference: largest difference between an output of the file and of the model, relative to the largest output,
            over two batch sizes.
        checked_by: what ran the file: onnxruntime, torch.export or torch.
    """

    path: Path
    format: Format
    difference: float
    checked_by: str

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "difference": self.difference,
            "checked_by": self.checked_by,
        }


def export(
    model: nn.Module,
    path: Path | str,
    example: Tensor,
    *,
    metadata: Mapping[str, Any] | None = None,
    sampled: bool = False,
    temperature: float = 1.0,
) -> Exported:
    """Write a model's prediction in expectation to a file that needs no residrop, and check the file.

    The model is folded first (`residrop.fold`); input `images` float32 Tensor[n, ...] of any n, as the network reads
    them (so normalised), output `logits` Tensor[n, classes]. The ending of the name decides:

    - `.onnx`: one file with the weights inside; `metadata` as its metadata properties, every value as JSON.
    - `.pt2`: for `torch.export.load`; `metadata` as the extra file `metadata.json`.
    - `.safetensors`: weights of the folded network; its header has `metadata` as above, and the network itself:
      `modules` (name to constructor of `torch.nn`, as JSON) and `code` (the forward in Python).

    With `sampled` the randomness is a further input of the graph, see `residrop.inference.deploy.sampled_graph`: the
    file is one sampled pass, and who runs it brings the coins.

    Args:
        model: a network, or any model that `residrop.fold` takes; in any mode, left as it is.
        path: file to write; an existing one is kept unless the new one agrees with the model.
        example: an input Tensor[n, ...]; only n may differ later.
        metadata: facts to keep with the weights, such as class names; values that JSON knows.
        sampled: write a sampled pass in place of the expectation (onnx and pt2).
        temperature: divide the logits by it, see `residrop.inference.uncertainty.fit_temperature`. A model that cannot
            be folded, only be freed of its rules, has no graph to hold this in a `.safetensors` file.

    Raises:
        ConfigError: another ending, a missing library, a model that cannot be traced or has draws that no graph can
            hold, or a file whose outputs are not the model's.
        OSError: the file cannot be written.
    """
    path = Path(path)
    kind = format_of(path, example, sampled)
    check_temperature(temperature)
    if sampled:
        from residrop.inference.deploy.sampled_graph import SampledGraph

        graph = SampledGraph.of(model)
        module: nn.Module = graph.module
        coins = {name: x.to(example.device) for name, x in graph.coins(2).items()}
        inputs = {"images": _two_rows(example), **coins}
        facts = {**(metadata or {}), **graph.facts()}
    else:
        module = fold(model, example)
        inputs, facts = {"images": _two_rows(example)}, dict(metadata or {})
    if temperature != 1:
        module = _divided(module, temperature, kind)
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    with replacing(path) as file, _quiet(), torch.no_grad():
        difference = {"onnx": _onnx, "pt2": _pt2, "safetensors": _safetensors}[kind](module, file, inputs, words)
        if not difference <= _TOLERANCE:
            raise ConfigError(
                f"{path} was not kept: its outputs differ from the model's by {difference:.1e} of the "
                "largest one; report it with the versions of torch and onnxruntime"
            )
    checked_by = {"onnx": "onnxruntime", "pt2": "torch.export", "safetensors": "torch"}[kind]
    return Exported(path, kind, difference, checked_by)


def format_of(path: Path, example: Tensor, sampled: bool = False) -> Format:
    """The format that a file's name asks for; ConfigError for what can be told before any work."""
    kind = _FORMATS.get(path.suffix)
    if kind is None:
        raise ConfigError(f"{path} ends in {path.suffix or 'nothing'!r}; choose one of {', '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path} cannot be written: {path.parent} is no directory; make it, or choose another place")
    if sampled and kind == "safetensors":
        raise ConfigError("a sampled pass is a graph, which .safetensors cannot hold; write .onnx or .pt2")
    if example.ndim < 2 or len(example) < 1:
        raise ConfigError(f"example has shape {tuple(example.shape)}; give a batch Tensor[n, ...] of at least one row")
    _check_libraries(kind)
    return kind


class _Divided(nn.Module):
    """A model whose logits are divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) / self.temperature


def _divided(module: nn.Module, temperature: float, kind: Format) -> nn.Module:
    """The module with its output divided; in its graph where it has one, as `.safetensors` keeps that."""
    if not isinstance(module, fx.GraphModule):
        if kind == "safetensors":
            raise ConfigError(
                f"{type(module).__name__} has no graph in which .safetensors could hold a temperature; write .onnx or "
                ".pt2, or take temperature 1"
            )
        return _Divided(module, temperature)
    graph = module.graph
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    with graph.inserting_before(output):
        output.args = (graph.call_function(operator.truediv, (output.args[0], temperature)),)
    module.recompile()
    return module


def _check_libraries(kind: Format) -> None:
    missing: list[str] = []
    for name in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ():
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ConfigError(f"ONNX files need {', '.join(missing)}: pip install 'residrop[export]', or write a .pt2 file")


@contextlib.contextmanager
def _quiet() -> Any:
    """Exporters tell their own developers a lot."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _two_rows(x: Tensor) -> Tensor:
    """Exporters take a batch of one for a constant."""
    return x[:2] if len(x) > 1 else x.expand(2, *x.shape[1:]).clone()


def _more_rows(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs for five rows."""
    rows = torch.tensor([0, 1, 0, 1, 1])
    return {name: x.index_select(_ROWS[name], rows.to(x.device)) if name in _ROWS else x for name, x in inputs.items()}


def _program(module: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """The module as an exported program with any number of rows."""
    batch = torch.export.Dim("batch", min=1)
    shapes = [{_ROWS[name]: batch} if name in _ROWS else None for name in inputs]
    return torch.export.export(module, tuple(inputs.values()), dynamic_shapes=tuple(shapes), strict=False)


def _differences(module: nn.Module, inputs: Mapping[str, Tensor], run: Any) -> float:
    """The largest relative difference between `run` and the module, for two batch sizes."""
    found = 0.0
    for given in (inputs, _more_rows(inputs)):
        wanted = module(*given.values())
        off = (run(given).to(wanted.device) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)
        found = max(found, float(off))
    return found


def _pt2(module: nn.Module, path: Path, inputs: Mapping[str, Tensor], words: Mapping[str, str]) -> float:
    program = _program(module, inputs)
    content = io.BytesIO()  # torch's writer of files aborts the process where a disk is full
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(dict(words))})
    path.write_bytes(content.getbuffer())
    loaded = torch.export.load(path).module()
    return _differences(module, inputs, lambda given: loaded(*given.values()))


def _onnx(module: nn.Module, path: Path, inputs: Mapping[str, Tensor], words: Mapping[str, str]) -> float:
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):
        program: Any = torch.onnx.export(
            _program(module, inputs),
            input_names=list(inputs),
            output_names=["logits"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    program.model.metadata_props.update(words)
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(given: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.cpu().numpy() for name, x in given.items()})[0])

    return _differences(module, inputs, run)


def _safetensors(module: nn.Module, path: Path, inputs: Mapping[str, Tensor], words: Mapping[str, str]) -> float:
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    layers = {name: repr(one) for name, one in module.named_modules() if name and type(one) is not nn.Module}
    structure = {"modules": json.dumps(layers), "code": str(getattr(module, "code", ""))}
    save_file(state, path, metadata={**structure, **words})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wanted = {len(given["images"]): module(*given.values()) for given in (inputs, _more_rows(inputs))}
    try:
        module.load_state_dict(load_file(path))
        return _differences(lambda x: wanted[len(x)], inputs, lambda given: module(*given.values()))  # pyright: ignore
    finally:
        module.load_state_dict(before)
