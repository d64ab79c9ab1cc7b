"""Residual networks whose blocks are randomly present: train them, and predict with them."""

from residrop.attach import attach as attach
from residrop.attach import sampler_of as sampler_of
from residrop.attach import sampling as sampling
from residrop.attach import set_survival as set_survival
from residrop.attach import using as using
from residrop.catalogue import RULES as RULES
from residrop.catalogue import make_rule as make_rule
from residrop.compiling import compile as compile
from residrop.compiling import compile_branches as compile_branches
from residrop.errors import InactiveWarning as InactiveWarning
from residrop.errors import UsageError as UsageError
from residrop.gaussian import GaussianDepth as GaussianDepth
from residrop.inference import AdaptivePrediction as AdaptivePrediction
from residrop.inference import Prediction as Prediction
from residrop.inference import Sampled as Sampled
from residrop.inference import evaluate as evaluate
from residrop.inference import export as export
from residrop.inference import fold as fold
from residrop.inference import predict as predict
from residrop.inference import predict_adaptive as predict_adaptive
from residrop.inference import recalibrate as recalibrate
from residrop.models import create as create
from residrop.models import list_models as list_models
from residrop.observe import branch_flops as branch_flops
from residrop.observe import observe as observe
from residrop.residual import Residual as Residual
from residrop.rules import ConstantDepth as ConstantDepth
from residrop.rules import DepthDropout as DepthDropout
from residrop.rules import Rule as Rule
from residrop.rules import StochasticDepth as StochasticDepth
from residrop.sampler import DepthSampler as DepthSampler
from residrop.sampler import Plan as Plan
from residrop.surgery import apply as apply
from residrop.surgery import remove as remove
from residrop.theory import survival_for as survival_for
from residrop.units import Mix as Mix
from residrop.units import SkipForward as SkipForward
from residrop.units import Swapout as Swapout
from residrop.units import UnitDropout as UnitDropout

__version__ = "0.1.0"
