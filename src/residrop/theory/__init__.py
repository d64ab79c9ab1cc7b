"""What random presence does to a network: the lemmas of Hayou & Ayed (2021) as instruments."""

from residrop.theory.depth import Law as Law
from residrop.theory.depth import cost_law as cost_law
from residrop.theory.depth import depth_bound as depth_bound
from residrop.theory.depth import depth_bound_probability as depth_bound_probability
from residrop.theory.depth import depth_law as depth_law
