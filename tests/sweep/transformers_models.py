"""Every model type of transformers that can be built small, with a batch as it takes it."""

import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sweep.sources import ROWS, Built, NotBuilt
from sweep.transformers_configs import parts, place_tokens, small
from sweep.transformers_special import INPUTS

LARGEST = 2.5e7  # parameters
TRIES = 24  # batches of different shapes


def names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def build(name: str) -> Built:
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind, model_class = _classes(name)
        try:
            config = small(kind)
            place_tokens(config)
        except Exception as error:
            raise NotBuilt(f"small configuration: {type(error).__name__} {error}") from error
        why = ""
        for _ in range(4):
            try:
                model = _made(model_class, config)
            except NotBuilt:
                raise
            except Exception as error:
                raise NotBuilt(f"small model: {type(error).__name__} {error}") from error
            for batch in itertools.islice(batches(name, model), TRIES):
                error = _fails(model, batch)
                if error is None:
                    return Built(model, (), batch, family=_family(name, model))
                if not why or (_missing(why) and not _missing(error)):
                    why = error
            if not _mended(config, why):
                break
        raise NotBuilt(f"no batch fits: {why}")


def _missing(error: str) -> bool:
    """Whether a batch lacked something, which tells less than another error."""
    return "NoneType" in error or "missing" in error or "have to specify" in error


def _made(model_class: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        size = sum(one.numel() for one in model_class(config).parameters())
    if size > LARGEST:
        raise NotBuilt(f"small configuration: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return model_class(config).eval().float()


def _mended(config: Any, why: str) -> bool:
    """Change a configuration as an error tells; False if nobody knows how."""
    sections = re.search(r"split_sizes to sum exactly to (\d+) .*?split_sizes=\[\d+, \d+, \d+\]", why)
    if sections and int(sections[1]) > 2:
        third = int(sections[1]) // 4
        for part in parts(config):
            rope = vars(part).get("rope_parameters")
            if isinstance(rope, dict):
                rope["mrope_section"] = [int(sections[1]) - 2 * third, third, third]
        return True
    return False


def _classes(name: str) -> tuple[Any, Any]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    model = MODEL_MAPPING_NAMES[name]
    model = model if isinstance(model, str) else model[0]
    try:
        return getattr(transformers, CONFIG_MAPPING_NAMES[name]), getattr(transformers, model)
    except (AttributeError, KeyError) as error:
        raise NotBuilt(f"no class: {error}") from error


@cache
def _tasks() -> dict[str, frozenset[str]]:
    from transformers.models.auto import modeling_auto as auto

    return {
        "causal": frozenset(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "masked": frozenset(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    }


def _family(name: str, model: nn.Module) -> str:
    config: Any = model.config
    main = getattr(model, "main_input_name", "")
    inner = {one for one in vars(config) if one.endswith("_config") and vars(config)[one] is not None}
    if len(inner & {"text_config", "vision_config", "audio_config", "llm_config"}) > 1:
        return "several modalities"
    if main == "pixel_values" or "pixel_values" in main:
        return "vision"
    if main in ("input_values", "input_features") or "audio" in name or "speech" in name:
        return "sound"
    if getattr(config, "is_encoder_decoder", False):
        return "sequence to sequence"
    return next((task for task, members in _tasks().items() if name in members), "other")


# batches


def _fails(model: nn.Module, batch: dict[str, Any]) -> str | None:
    """What goes wrong with a batch; None if nothing does. Tokens for images are counted as the model says."""
    from sweep.checks import outputs

    each: list[int] = []  # numbers of tokens for one image that may be right
    while True:
        copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        try:
            with torch.no_grad():
                out = model(**copied)
        except Exception as error:
            text = f"{type(error).__name__} {' '.join(str(error).split())}"
        else:
            return None if outputs(out) else "it returns no tensor of numbers"
        token = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
        if not each:  # "... tokens: 0, features: 12", where numbers of elements may be meant
            numbers = re.search(r"tokens:? ?(\d+)\D*?features:? ?(\d+)", text)
            count = int(numbers[2]) // ROWS if numbers and isinstance(token, int) and "input_ids" in batch else 0
            each = [number for number in (count, count // _width(model)) if number]
        if not each or each[0] < 0:
            return text
        ids = torch.cat([_ids(2), torch.full((ROWS, each[0]), token), _ids(5)], 1)
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        each = each[1:] or [-1]


def _ids(length: int = 9) -> Tensor:
    return torch.randint(3, 60, (ROWS, length))


def _mask(length: int = 9) -> Tensor:
    return (torch.arange(length) < torch.tensor([[length], [length - 3], [length - 2]])).long()


def batches(name: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Batches that a model may take, the fullest first."""
    if name in INPUTS:
        yield INPUTS[name](model)
        return
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(one.kind == one.VAR_KEYWORD for one in parameters.values())
    main = getattr(model, "main_input_name", "input_ids")
    required = [
        one.name
        for one in parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    least = dict.fromkeys([*required, *([main] if main in parameters or open_ended else [])])
    more = [one for one in ("input_ids", "pixel_values", "bbox", "qformer_input_ids") if one in parameters]
    sets = [dict.fromkeys([*least, *more]), least]
    if "inputs" in parameters:
        sets.append({"inputs": None})
    for wanted in sets:
        kept = [one for one in wanted if one in SHAPES]
        for combination in itertools.product(*(SHAPES[one] for one in kept)):
            torch.manual_seed(0)
            batch: dict[str, Any] = {}
            for one, make in zip(kept, combination, strict=True):
                made = make(model)
                if made is not None:
                    batch[one] = made
            if "input_ids" in batch and "attention_mask" in parameters:
                batch["attention_mask"] = _mask(batch["input_ids"].shape[1])
            if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
                batch["decoder_input_ids"] = _ids(5)
            if "use_cache" in parameters or (
                open_ended and "input_ids" in batch and hasattr(model.config, "use_cache")
            ):
                yield {**batch, "use_cache": False}
            yield batch


def _read(model: nn.Module, *wanted: str, default: Any = None) -> Any:
    """The first of these fields of a model's configuration, or of one inside of it, that is a whole number."""
    for name, part in itertools.product(wanted, parts(model.config)):
        value = getattr(part, name, None) if name in vars(part) or hasattr(type(part), name) else None
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def _images(*shape: int, side: int | None = None) -> Callable[[nn.Module], Tensor]:
    def made(model: nn.Module) -> Tensor:
        size = side or _read(model, "image_size", "img_size", default=64)
        return torch.randn(ROWS, *shape, _read(model, "num_channels", "in_channels", "in_chans", default=3), size, size)

    return made


def _frames(model: nn.Module) -> Tensor:
    return _images(_read(model, "num_frames", "frames_per_clip", default=4))(model)


def _patches(model: nn.Module) -> Tensor:
    """Patches of three images of 4 x 4, one after the other."""
    side = _read(model, "patch_size", default=8)
    channels = _read(model, "in_channels", "num_channels", "in_chans", default=3)
    return torch.randn(ROWS * 16, channels * _read(model, "temporal_patch_size", default=1) * side * side)


def _grid(model: nn.Module) -> Tensor:
    return torch.tensor([[1, 4, 4]] * ROWS)


def _bins(model: nn.Module) -> int:
    wanted = ("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")
    return _read(model, *wanted, "input_dim", default=16)


def _width(model: nn.Module) -> int:
    return _read(model, "hidden_size", "d_model", "embed_dim", default=64)


def _spectra(model: nn.Module) -> Tensor:
    return torch.randn(ROWS, _bins(model), 2 * _read(model, "max_source_positions", default=20))


# by name of an argument: in what forms a model may want it
SHAPES: dict[str, tuple[Callable[[nn.Module], Any], ...]] = {
    "input_ids": (lambda model: _ids(),),
    "qformer_input_ids": (lambda model: _ids(4),),
    "query_embeds": (lambda model: torch.randn(ROWS, 6, _width(model)),),
    "attention_mask": (lambda model: _mask(),),
    "bbox": (lambda model: torch.randint(0, 90, (ROWS, 9, 4)).sort(-1)[0],),
    "pixel_values": (_images(), _patches, _frames, _images(2), _images(1), _images(side=64), _images(side=128)),
    "pixel_values_videos": (_frames,),
    "hidden_states": (_patches, lambda model: torch.randn(ROWS, 9, _width(model))),
    "grid_thw": (_grid,),
    "image_grid_thw": (_grid,),
    "inputs_embeds": (lambda model: torch.randn(ROWS, 9, _width(model)),),
    "input_values": (
        lambda model: torch.randn(ROWS, 400),
        lambda model: torch.randn(ROWS, 1, 400),
        lambda model: torch.randn(ROWS, 40, _bins(model)),
        lambda model: torch.randn(ROWS, 1, 1600),
        lambda model: torch.randn(ROWS, 1600),
        lambda model: torch.randn(ROWS, 100, _bins(model)),
    ),
    "input_features": (
        lambda model: torch.randn(ROWS, 40, _bins(model)),
        _spectra,
        lambda model: torch.randn(ROWS, _bins(model), 40),
        lambda model: torch.randn(ROWS, 40, 2 * _bins(model)),
    ),
    "input_features_mask": (lambda model: torch.ones(ROWS, 40, dtype=torch.bool),),
    "past_values": (
        lambda model: torch.randn(
            ROWS,
            _read(model, "context_length", default=32),
            _read(model, "num_input_channels", default=1),
        ),
        lambda model: list(torch.randn(ROWS, 64)),
    ),
    "inputs": (lambda model: _ids(),),
}
