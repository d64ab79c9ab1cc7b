"""Residual networks whose blocks are randomly present: train them, and predict with them."""

import importlib
from typing import TYPE_CHECKING, Any

from residrop.common.version import __version__ as __version__

if TYPE_CHECKING:
    from residrop.blocks.attach import attach as attach
    from residrop.blocks.attach import one_draw as one_draw
    from residrop.blocks.attach import sampler_of as sampler_of
    from residrop.blocks.attach import sampling as sampling
    from residrop.blocks.attach import set_survival as set_survival
    from residrop.blocks.attach import using as using
    from residrop.blocks.observe import branch_flops as branch_flops
    from residrop.blocks.observe import observe as observe
    from residrop.blocks.residual import Residual as Residual
    from residrop.common.errors import EmptyStepWarning as EmptyStepWarning
    from residrop.common.errors import InactiveWarning as InactiveWarning
    from residrop.common.errors import NotFiniteWarning as NotFiniteWarning
    from residrop.common.errors import SharedBlockWarning as SharedBlockWarning
    from residrop.common.errors import UsageError as UsageError
    from residrop.engines.compiling import compile as compile
    from residrop.engines.compiling import compile_branches as compile_branches
    from residrop.inference.deploy.export import export as export
    from residrop.inference.deploy.fold import fold as fold
    from residrop.inference.deploy.recalibrate import recalibrate as recalibrate
    from residrop.inference.evaluate import evaluate as evaluate
    from residrop.inference.sampled.adaptive import AdaptivePrediction as AdaptivePrediction
    from residrop.inference.sampled.adaptive import predict_adaptive as predict_adaptive
    from residrop.inference.sampled.predict import Sampled as Sampled
    from residrop.inference.sampled.predict import predict as predict
    from residrop.inference.sampled.predictions import DetectionPrediction as DetectionPrediction
    from residrop.inference.sampled.predictions import NumberPrediction as NumberPrediction
    from residrop.inference.sampled.predictions import Prediction as Prediction
    from residrop.models.registry import create as create
    from residrop.models.registry import list_models as list_models
    from residrop.rules.backward import BackwardDepth as BackwardDepth
    from residrop.rules.base import Rule as Rule
    from residrop.rules.catalogue import RULES as RULES
    from residrop.rules.catalogue import make_rule as make_rule
    from residrop.rules.depth import ConstantDepth as ConstantDepth
    from residrop.rules.depth import DepthDropout as DepthDropout
    from residrop.rules.depth import StochasticDepth as StochasticDepth
    from residrop.rules.gaussian import GaussianDepth as GaussianDepth
    from residrop.rules.units import Mix as Mix
    from residrop.rules.units import SkipForward as SkipForward
    from residrop.rules.units import Swapout as Swapout
    from residrop.rules.units import UnitDropout as UnitDropout
    from residrop.schedule.methods import METHODS as METHODS
    from residrop.schedule.methods import method as method
    from residrop.schedule.sampler import DepthSampler as DepthSampler
    from residrop.schedule.sampler import Plan as Plan
    from residrop.subnetworks.frontier import frontier as frontier
    from residrop.subnetworks.shrink import shrink as shrink
    from residrop.surgery.apply import apply as apply
    from residrop.surgery.apply import remove as remove
    from residrop.theory.costs import survival_for as survival_for
    from residrop.training.checkpoint import load_run as load_run

_PACKAGES = (
    "blocks",
    "common",
    "data",
    "engines",
    "functional",
    "inference",
    "models",
    "research",
    "rules",
    "schedule",
)
_PACKAGES += ("subnetworks", "surgery", "theory", "training")
_NAMES = {
    "residrop.blocks.attach": ("attach", "one_draw", "sampler_of", "sampling", "set_survival", "using"),
    "residrop.blocks.observe": ("branch_flops", "observe"),
    "residrop.blocks.residual": ("Residual",),
    "residrop.common.errors": (
        "EmptyStepWarning",
        "InactiveWarning",
        "NotFiniteWarning",
        "SharedBlockWarning",
        "UsageError",
    ),
    "residrop.engines.compiling": ("compile", "compile_branches"),
    "residrop.inference.deploy.export": ("export",),
    "residrop.inference.deploy.fold": ("fold",),
    "residrop.inference.deploy.recalibrate": ("recalibrate",),
    "residrop.inference.evaluate": ("evaluate",),
    "residrop.inference.sampled.adaptive": ("AdaptivePrediction", "predict_adaptive"),
    "residrop.inference.sampled.predict": ("Sampled", "predict"),
    "residrop.inference.sampled.predictions": ("DetectionPrediction", "NumberPrediction", "Prediction"),
    "residrop.models.registry": ("create", "list_models"),
    "residrop.rules.backward": ("BackwardDepth",),
    "residrop.rules.base": ("Rule",),
    "residrop.rules.catalogue": ("RULES", "make_rule"),
    "residrop.rules.depth": ("ConstantDepth", "DepthDropout", "StochasticDepth"),
    "residrop.rules.gaussian": ("GaussianDepth",),
    "residrop.rules.units": ("Mix", "SkipForward", "Swapout", "UnitDropout"),
    "residrop.schedule.methods": ("METHODS", "method"),
    "residrop.schedule.sampler": ("DepthSampler", "Plan"),
    "residrop.subnetworks.frontier": ("frontier",),
    "residrop.subnetworks.shrink": ("shrink",),
    "residrop.surgery.apply": ("apply", "remove"),
    "residrop.theory.costs": ("survival_for",),
    "residrop.training.checkpoint": ("load_run",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import names and packages when they are first asked for: `residrop --help` need not wait for torch."""
    if name in _PACKAGES:
        return importlib.import_module(f"residrop.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'residrop' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_HOME})
