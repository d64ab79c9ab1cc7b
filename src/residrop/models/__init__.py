"""The papers' networks, by constructor or by name."""

from residrop.models.cifar import CifarResNet as CifarResNet
from residrop.models.cifar import group_starts as group_starts
from residrop.models.imagenet import ImageNetResNet as ImageNetResNet
from residrop.models.imagenet import reshaping_blocks as reshaping_blocks
from residrop.models.registry import create as create
from residrop.models.registry import list_models as list_models
from residrop.models.registry import num_blocks as num_blocks
from residrop.models.registry import reads_flat_rows as reads_flat_rows
from residrop.models.vanilla import Vanilla as Vanilla

__all__ = [
    "CifarResNet",
    "ImageNetResNet",
    "Vanilla",
    "create",
    "group_starts",
    "list_models",
    "num_blocks",
    "reads_flat_rows",
    "reshaping_blocks",
]
