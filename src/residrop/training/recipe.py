"""A training run as data: every choice is a field of `Recipe`, and the command line is generated from it.

Points in time (learning-rate drops, warm-ups, the timing of survival rates) are shares of the training, so that
changing `epochs` keeps the shape of a schedule. The protocols of the four papers are recipes, see `presets.py`.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.data import augmentation, sources
from residrop.data.transforms import check_policy
from residrop.schedule.timing import parse as parse_timing
from residrop.theory.costs import read_budget

__all__ = ["Recipe"]

_LATER = {"weights", "freeze", "without", "optimizer", "warmup_form", "decay_vectors", "layer_decay", "clip_grad"}
_LATER |= {
    "label_smoothing",
    "ema",
    "flips",
    "crop_area",
    "policy",
    "erasing",
    "mixup",
    "cutmix",
    "coupling",
    "at_least",
    "draw_every",
}
_MIXING = ("mixup", "cutmix")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what, and how. Every field can be overridden on the command line."""

    # --- network ---
    network: str = "resnet-20"
    """Name of the network; `residrop recipes --networks` lists ours. Or an image classifier of another library:
    timm:NAME, torchvision:NAME, or transformers:PATH of a folder that save_pretrained wrote; options of the model
    follow a question mark (timm:resnet18?drop_path_rate=0.1). Its head gets as many outputs as the data have
    classes."""
    weights: str | None = None
    """What the training starts from: a file of weights (safetensors, or a state dict that torch saved), the directory
    of a run, or pretrained for those that the library has (None: random weights, and those in a transformers
    folder)."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: patterns of names of modules or parameters, such as conv1 layer1 "*.bn?"."""
    without: tuple[str, ...] = ()
    """Residual blocks that are left out for good, by name (blocks.block3), as `residrop shrink` chooses them. The
    others keep the survival rates of their places (in other libraries' models: get those of as many blocks)."""
    width: int | None = None
    """Width multiple of the network (None: its own default)."""
    block: Literal["v1", "v2"] | None = None
    """Post-activation (v1) or pre-activation (v2) blocks (None: the network's default)."""
    bn_gamma_init: Literal["ones", "uniform"] | None = None
    """Start of batch norm's gamma: ones, or uniform in (0, 1) as the Torch7 release of Stochastic Depth had it."""

    # --- presence of the blocks ---
    rule: str = "stochastic-depth"
    """How shortcut and branch are combined. One of: constant, stochastic-depth, layer-dropout, depth-dropout,
    backward-depth (whole forwards, absent in backward only), gaussian-depth, Swapout's rules swapout, skipforward,
    dropout (no skip), dropout-residual, dropout-sum."""
    survival: str | None = None
    """Survival rates: a number, one number per block (1,0.9,0.8), "uniform(0.5)", "blocks(6)" (6 of L),
    "linear_decay(0.5)", "linear(1, 0.5)" or "exponential(0.5)", or from_model for those of another library's own drop
    path (None: the schedule of the rule's paper). Theta_1 and theta_2 of swapout."""
    theta_2: str | None = None
    """Swapout only: rates of the branch if they differ from those of the shortcut. Same forms as survival."""
    granularity: Literal["block", "row"] | None = None
    """Stochastic and backward depth only: one coin per mini-batch (block) or per image (row)."""
    rescale: Literal["test", "train", "none"] | None = None
    """Stochastic depth only: multiply the branch by p at test, divide it by p in training, or neither. Backward depth:
    divide its gradient by p in training, or not."""
    rows: Literal["window", "bernoulli"] | None = None
    """Stochastic depth per row only: live rows as one random window, or by one coin each."""
    of: Literal["branch", "shortcut"] | None = None
    """Skipforward only: whether survival is the probability of the branch (default) or of the shortcut."""
    survival_timing: str = "constant"
    """How much of every drop is in force over the training: constant, warmup(0.1), early(0.5), early(0.5, 0.1) with a
    fade, late(0.5), plateau(0.7, 0.1), progressive(5), exponential(1) or points(0:0, 0.1:1). Times are shares of the
    training; gamma of progressive is per training."""

    coupling: Literal["independent", "systematic", "balanced", "apart"] = "independent"
    """How the presence of a block depends on that of others in the same step: not at all; systematic: as many blocks
    are present as the rates add up to, rounded up or down; balanced: their FLOPs add up to the mean, within one block;
    apart: of two neighbours one is present at least. Every rate stays exact. For rules of blocks and rows."""
    at_least: int = 0
    """1: one block is present in every step at least, as where all else is frozen; steps without are drawn again."""
    draw_every: int = 1
    """Updates for which the coins of blocks stay as they are. With backward-depth and systematic coupling, so many
    blocks are trained for that long, and then others (LISA)."""

    budget: str | None = None
    """Find the survival rates instead: share of a full step's work that a step may do on average, such as 0.6,
    "0.6 of flops" or "0.6 of time" (measured here). Takes the place of survival."""
    spend: Literal["uniform", "linear", "sensitivity", "max_regularization"] = "uniform"
    """Which blocks get the budget: all alike, fewer with depth, those the loss needs (SenseMode), or those whose
    absence regularises most."""
    per_cost: bool = False
    """Sensitivity only: count what the loss needs per unit of a block's cost."""
    least: float = 0.0
    """Sensitivity only: the smallest survival rate a block may get."""
    refresh: int = 0
    """Sensitivity and max_regularization: epochs after which the rates are measured anew (0: only before the first)."""

    # --- data ---
    data: str = "digits"
    """digits, cifar10, cifar100, svhn, folder:PATH, imagenet:PATH, parquet:PATH, or the PATH of a folder. Images of a
    folder are resized and cut to 32x32 pixels; folder:PATH?size=N (or parquet:PATH?size=N) makes them NxN."""
    split: float | None = None
    """Folders and parquet without a test part only: share of every class to hold out for testing, such as 0.2; the same
    images for every seed."""
    on_error: Literal["stop", "skip"] = "stop"
    """At an image of a folder or parquet shard that cannot be read: stop, or skip all such images, which are counted
    and named (of images too large to keep in memory, all are decoded once for that)."""
    validation: int = 0
    """Number of training images held out for validation."""
    limit: int | None = None
    """Train on this many images only (balanced over the classes)."""
    normalization: Literal["channel", "pixel-mean", "pixel-mean-only", "unit", "imagenet", "model"] | None = None
    """How pixels are normalised: by statistics of the training images, or as the network of another library was trained
    (model). None: model for those, else channel."""
    augmentation: Literal["none", "flip", "crop", "batch-crop", "shift", "resized-crop"] = "none"
    """Random changes of training images. flip: half of them mirrored. crop: flip and a pad-4 crop per image.
    batch-crop: flip and one crop per mini-batch (Swapout). shift: by a pixel, no flip. resized-crop: ImageNet's, flip
    and a part of random area and shape."""
    flips: Literal["random", "alternating"] = "random"
    """random: each image is mirrored or not anew in every epoch; alternating: in every other epoch."""
    crop_area: float = 0.08
    """Smallest share of an image that a resized crop takes."""
    policy: str | None = None
    """Random changes of colour and shape by torchvision: rand-augment, rand-augment(OPERATIONS, MAGNITUDE) with 2 and 9
    by default, or trivial-augment. They are made image by image, which takes time of the training's own process but
    for images too large to keep in memory."""
    erasing: float = 0.0
    """Probability that a rectangle of an image is overwritten with noise (random erasing)."""
    mixup: float = 0.0
    """Mix each image and its label with another's: parameter of the Beta distribution of the share, such as 0.2 (0:
    none)."""
    cutmix: float = 0.0
    """Paste a rectangle of another image into each: parameter as of mixup, such as 1. With both, each batch has one of
    them. Training errors then count the class of the larger share."""

    # --- optimisation ---
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 128
    """Images per update."""
    micro_batches: int = 1
    """Parts an update's batch is cut into to save memory; they share the block draws of the update."""
    optimizer: Literal["sgd", "adamw", "lion", "muon"] = "sgd"
    """sgd and adamw are torch's, lion and muon timm's."""
    lr: float = 0.1
    """Learning rate at the start (after the warm-up). All optimizers but sgd want one of their own, such as 0.001."""
    lr_schedule: Literal["steps", "cosine", "triangular"] = "steps"
    """steps: multiply by lr_factor at every point of lr_drops; cosine: to zero along half a cosine; triangular: up in a
    straight line during the warm-up, then down to zero in another."""
    lr_drops: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training at which the learning rate drops."""
    lr_factor: float = 0.1
    """Factor of each drop."""
    warmup: float = 0.0
    """Share of the training spent on the warm-up."""
    warmup_lr: float = 0.01
    """Learning rate of the warm-up phase, or at its start."""
    warmup_form: Literal["constant", "linear"] = "constant"
    """constant: at warmup_lr, as in He et al.; linear: in a straight line from warmup_lr to lr."""
    momentum: float = 0.9
    """Momentum of SGD and Muon."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = 1e-4
    """Weight decay: the L2 penalty of SGD, decoupled in the other optimizers."""
    decay_vectors: bool | None = None
    """Decay norms, biases and other parameters of one dimension, too (None: sgd does, as in the papers; else no)."""
    layer_decay: float = 1.0
    """Multiply the learning rate by this factor at each block from the last to the first, for fine-tuning."""
    clip_grad: float | None = None
    """Scale gradients down to this norm over all parameters, where it is larger."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    decay_dropped: bool = False
    """Let weight decay and momentum move the parameters of dropped blocks (zero gradients instead of none), as the
    released Torch code of Stochastic Depth does."""
    ema: float | None = None
    """Report on a moving average of the weights, which keeps this share of itself at each update (less in the first
    updates), such as 0.999. Batch norm's statistics are then measured anew on training images."""
    select: Literal["last", "best"] = "last"
    """Weights to report on: of the last epoch, or of the epoch with the lowest validation error."""

    # --- run ---
    seed: int = 0
    """Seed of weights, order of images, augmentation and draws."""
    samples: int = 30
    """Sampled passes of stochastic inference in the final evaluation."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network; auto takes bf16 autocast where the device computes it in hardware."""
    compile: bool = False
    """Compile the network (as a whole where its rules allow, else its branches) and augmentation as one kernel: half a
    minute or more at the start, other roundings. On the CPU it needs a C++ compiler."""
    graphs: Literal["none", "passes", "updates"] = "updates"
    """What a GPU replays as CUDA graphs. updates: whole updates at constant depth and, with compile, under unit-level
    rules, else the passes of every block that is present. passes: at most whole passes. Nothing is recorded in several
    processes, with micro_batches, or beside budget and watch."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    channels_last: bool = True
    """Memory format of images and weights."""
    workers: int = 2
    """Processes that decode images too large to keep in memory."""
    watch: tuple[Literal["sensitivity", "discrepancy"], ...] = ()
    """Measure along the training, too, for residrop analyze: what the loss needs of every block, what absence does."""
    eval_every: int = 1
    """Epochs between evaluations (and measurements of watch) along training; the last epoch always has them."""
    checkpoint_minutes: float = 10.0
    """Save a resumable state at least this often, besides after every epoch."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batches", "eval_every"):
            check_whole(name, getattr(self, name), least=1)
        for name in ("validation", "samples", "workers", "refresh"):
            check_whole(name, getattr(self, name), least=0)
        check_whole("seed", self.seed)
        check_whole("draw_every", self.draw_every, least=1)
        if self.limit is not None:
            check_whole("limit", self.limit, least=1)
        for name, kind in get_type_hints(type(self)).items():
            self._check_kind(name, kind)
        names = ("warmup", "momentum", "least", "layer_decay", "label_smoothing", "crop_area", "erasing")
        shares = [(name, getattr(self, name)) for name in names]
        for name, value in [*shares, *((f"lr_drops[{i}]", drop) for i, drop in enumerate(self.lr_drops))]:
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}; it is a share (rate, momentum) and lies in [0, 1]")
        if self.split is not None and not 0.0 < self.split < 1.0:
            raise ConfigError(f"split is {self.split}; it is the share of every class to test on, between 0 and 1")
        parse_timing(self.survival_timing, training=1)
        if self.at_least not in (0, 1):
            raise ConfigError(f"at_least is {self.at_least}; give 1 to have one block present in every step, or 0")
        self._check_budget()
        if self.compile and (self.budget is not None or self.watch):
            raise ConfigError(
                "compile is on, and what a budget or watch measures needs branches as they are; leave one out"
            )
        if self.crop_area == 0.0:
            raise ConfigError("crop_area is 0.0; it is the smallest share of an image that a crop takes, such as 0.08")
        check_policy(self.policy)
        if self.flips == "alternating" and not augmentation(self.augmentation).flip:
            raise ConfigError(f"flips are 'alternating', and augmentation {self.augmentation!r} mirrors no image")
        if self.crop_area != 0.08 and self.augmentation != "resized-crop":
            raise ConfigError(f"crop_area is {self.crop_area}; it is of augmentation 'resized-crop'")
        for name in ("lr", "warmup_lr", "lr_factor", "weight_decay", "checkpoint_minutes", "clip_grad", *_MIXING):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value}; give a finite number of at least 0")
        if self.optimizer != "sgd" and self.lr == 0.1:
            raise ConfigError(f"lr is 0.1, which suits sgd; {self.optimizer} needs its own, such as lr 0.001")
        if self.optimizer != "sgd" and self.decay_dropped:
            raise ConfigError(
                f"decay_dropped is on, which is a property of SGD in one paper; {self.optimizer} has none"
            )
        if list(self.lr_drops) != sorted(self.lr_drops):
            raise ConfigError(f"lr_drops are {self.lr_drops}; give them in rising order")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ConfigError(f"ema is {self.ema}; it is a share between 0 and 1, such as 0.999")
        if self.ema is not None and self.select == "best":
            raise ConfigError("ema is given and select is 'best', which are two choices of weights; leave one out")
        if self.select == "best" and self.validation == 0:
            raise ConfigError("select is 'best', which needs held-out images; set validation to their number")
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be cut into {self.micro_batches} equal micro_batches"
            )

    def _check_budget(self) -> None:
        if self.budget is not None:
            read_budget(self.budget)
        measured = self.budget is not None and self.spend in ("sensitivity", "max_regularization")
        for name, given, allowed in (
            ("spend", self.spend != "uniform", self.budget is not None),
            ("refresh", self.refresh > 0, measured),
            ("per_cost", self.per_cost, measured and self.spend == "sensitivity"),
            ("least", self.least != 0.0, measured and self.spend == "sensitivity"),
        ):
            if given and not allowed:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, and budget {self.budget!r} is spent {self.spend!r}; it needs "
                    "a budget, such as --budget 0.6 --spend sensitivity"
                )

    def _check_kind(self, name: str, kind: Any) -> None:
        """Refuse a value of another type than the field's; dataclasses do not look, and run files are hand-edited."""
        value, options = getattr(self, name), get_args(kind)
        literals = [word for option in (kind, *options) if get_origin(option) is Literal for word in get_args(option)]
        if get_origin(kind) is tuple and literals:
            if not isinstance(value, tuple) or not set(value) <= set(literals):
                raise ConfigError(f"{name} is {value!r}; choose among {', '.join(map(repr, literals))}")
            return
        if literals:
            if value not in literals and not (value is None and NoneType in options):
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(repr, literals))}")
            return
        if get_origin(kind) is tuple:
            parts = str if str in options else (int, float)
            if not isinstance(value, tuple) or not all(isinstance(part, parts) for part in value):
                raise ConfigError(f"{name} is {value!r}; give {'words' if parts is str else 'numbers'}")
            return
        allowed = tuple(option for option in options if isinstance(option, type)) or (kind,)
        if float in allowed:
            allowed = (*allowed, int)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = ("None" if one is NoneType else one.__name__ for one in allowed)
            raise ConfigError(f"{name} is {value!r}; give {' or '.join(names)}")

    def lr_at(self, progress: float) -> float:
        """Learning rate at `progress` in [0, 1), the share of the training that is done."""
        if progress < self.warmup:
            share = (
                0.0 if self.warmup_form == "constant" and self.lr_schedule != "triangular" else progress / self.warmup
            )
            return self.warmup_lr + (self.lr - self.warmup_lr) * share
        if self.lr_schedule == "triangular":
            return self.lr * (1.0 - progress) / (1.0 - self.warmup)
        if self.lr_schedule == "cosine":
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * (progress - self.warmup) / (1.0 - self.warmup)))
        return self.lr * self.lr_factor ** sum(progress >= drop for drop in self.lr_drops)

    def depends_on_length(self) -> str:
        """What the number of epochs decides of the training that was done with it, in words; "" for nothing."""
        constant = self.lr_schedule == "steps" and (not self.lr_drops or self.lr_factor == 1.0)
        shares = {
            "learning rates": not constant or (self.warmup > 0.0 and self.warmup_lr != self.lr),
            "survival rates (survival_timing)": self.survival_timing != "constant",
            # the last one is evaluated in any case
            "epochs to select from": self.select == "best" and self.epochs % self.eval_every > 0,
        }
        return " and ".join(name for name, has in shares.items() if has)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict` back; unknown fields are refused by name."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"recipe has unknown fields {', '.join(unknown)}; it was written by another version")
        listed = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **listed})

    def decisive(self) -> dict[str, Any]:
        """The fields that decide the outcome of the run.

        Of `data` only the kind counts, since folders move; what is in them is compared by `data_digest`.
        """
        free = {"samples", "workers", "watch", "checkpoint_minutes", "data", "device", "graphs", "on_error"}
        # recipes are known by hashes that are older than these fields
        free.update(one.name for one in dataclasses.fields(self) if one.name in _LATER and self._is_default(one))
        if self.split is None:
            free.add("split")
        if not self.compile:
            free.add("compile")
        if self.select == "last":  # with "best", evaluated epochs are the candidates
            free.add("eval_every")
        fields = {key: value for key, value in self.to_dict().items() if key not in free}
        fields["normalization"] = self.normalization or "channel"
        if self.weights is not None:
            fields["weights"] = Path(self.weights).name  # files move
        kind = self.data.partition(":")[0]
        return {**fields, "data": kind if kind in sources() else "a folder"}

    def _is_default(self, one: dataclasses.Field[Any]) -> bool:
        return getattr(self, one.name) == one.default

    def fingerprint(self) -> str:
        """Hash of `decisive`: runs of one fingerprint on one kind of device are the same run."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()[:16]
