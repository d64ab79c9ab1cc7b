"""What the names of fields do not tell of transformers' configurations and batches."""

from collections.abc import Callable
from typing import Any

import torch

# by model type: fields that are given as they are; "first" names those that a configuration must have from the start,
# "without" those that are left as they are by default
SPECIAL: dict[str, dict[str, Any]] = {}
# by name of an argument: what it is for a model
GIVEN: dict[str, Callable[[Any], Any]] = {
    "bbox": lambda model: torch.randint(0, 90, (3, 9, 4)).sort(-1)[0],
}
# by model type: the whole batch
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {}
