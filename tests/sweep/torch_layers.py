"""torch.nn's own transformer layers, of which most own code is built."""

from itertools import product

import torch
from torch import nn

from sweep.sources import ROWS, Built

_STACKS = [
    f"{kind}{', norm first' if first else ''}{', batch first' if batch else ''}"
    for kind, first, batch in product(("TransformerEncoder", "TransformerDecoder", "Transformer"), (0, 1), (0, 1))
]


def names() -> list[str]:
    return _STACKS


def build(name: str) -> Built:
    kind = name.partition(",")[0]
    options = {"norm_first": "norm first" in name, "batch_first": "batch first" in name, "dropout": 0.0}

    def tokens(length: int) -> torch.Tensor:
        x = torch.randn(ROWS, length, 16)
        return x if options["batch_first"] else x.transpose(0, 1).contiguous()

    if kind == "TransformerEncoder":
        layer = nn.TransformerEncoderLayer(16, 2, 24, **options)
        return Built(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), (tokens(5),), family=kind)
    if kind == "TransformerDecoder":
        layer = nn.TransformerDecoderLayer(16, 2, 24, **options)
        return Built(nn.TransformerDecoder(layer, 3), (tokens(5), tokens(7)), family=kind)
    model = nn.Transformer(16, 2, 2, 2, 24, **options)
    return Built(model, (tokens(7), tokens(5)), family=kind)
