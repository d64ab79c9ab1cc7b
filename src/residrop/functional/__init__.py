"""Tensors in, tensors out: unit masks from a stateless hash, windows of rows, memory formats."""

from residrop.functional.units import coins_of as coins_of
from residrop.functional.units import mix as mix
from residrop.functional.units import row_mask as row_mask
from residrop.functional.units import row_normal as row_normal
from residrop.functional.units import skip_forward as skip_forward
from residrop.functional.units import swapout as swapout
from residrop.functional.units import unit_dropout as unit_dropout
from residrop.functional.units import unit_mask as unit_mask
from residrop.functional.units import use_compiler as use_compiler
