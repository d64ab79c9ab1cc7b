"""What random presence does to a network: the lemmas of Hayou & Ayed (2021) as instruments."""

from residrop.theory.costs import Costs as Costs
from residrop.theory.costs import costs_of as costs_of
from residrop.theory.costs import survival_for as survival_for
from residrop.theory.depth import Law as Law
from residrop.theory.depth import cost_law as cost_law
from residrop.theory.depth import depth_bound as depth_bound
from residrop.theory.depth import depth_bound_probability as depth_bound_probability
from residrop.theory.depth import depth_law as depth_law
from residrop.theory.discrepancy import Discrepancy as Discrepancy
from residrop.theory.discrepancy import discrepancy as discrepancy
from residrop.theory.discrepancy import flat_discrepancy as flat_discrepancy
from residrop.theory.discrepancy import regularizer as regularizer
from residrop.theory.gates import gated as gated
from residrop.theory.sensitivity import Sensitivity as Sensitivity
from residrop.theory.sensitivity import removal_losses as removal_losses
from residrop.theory.sensitivity import sensitivity as sensitivity
