"""Residual networks whose blocks are randomly present: train them, and predict with them."""

from residrop.attach import attach as attach
from residrop.attach import sampler_of as sampler_of
from residrop.attach import sampling as sampling
from residrop.attach import using as using
from residrop.catalogue import RULES as RULES
from residrop.catalogue import make_rule as make_rule
from residrop.errors import UsageError as UsageError
from residrop.inference import Prediction as Prediction
from residrop.inference import evaluate as evaluate
from residrop.inference import predict as predict
from residrop.models import create as create
from residrop.models import list_models as list_models
from residrop.residual import Residual as Residual
from residrop.rules import ConstantDepth as ConstantDepth
from residrop.rules import DepthDropout as DepthDropout
from residrop.rules import Mix as Mix
from residrop.rules import Rule as Rule
from residrop.rules import SkipForward as SkipForward
from residrop.rules import StochasticDepth as StochasticDepth
from residrop.rules import Swapout as Swapout
from residrop.rules import UnitDropout as UnitDropout
from residrop.sampler import DepthSampler as DepthSampler
from residrop.sampler import Plan as Plan

__version__ = "0.1.0"
