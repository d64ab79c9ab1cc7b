"""Rules: what a block does with its shortcut and its branch, under a draw."""

from residrop.rules.backward import BackwardDepth as BackwardDepth
from residrop.rules.base import Rule as Rule
from residrop.rules.depth import ConstantDepth as ConstantDepth
from residrop.rules.depth import DepthDropout as DepthDropout
from residrop.rules.depth import StochasticDepth as StochasticDepth
from residrop.rules.gaussian import GaussianDepth as GaussianDepth
from residrop.rules.units import Mix as Mix
from residrop.rules.units import SkipForward as SkipForward
from residrop.rules.units import Swapout as Swapout
from residrop.rules.units import UnitDropout as UnitDropout
