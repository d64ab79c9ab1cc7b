"""Single image files in the form a trained network expects, for prediction."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from residrop.common.errors import DataError
from residrop.data.decode import DecodingError, open_rgb, shrink_and_crop, to_chw, without_warnings

__all__ = ["read_images"]


def read_images(paths: Sequence[Path], size: int, channels: int) -> Tensor:
    """Decode image files to uint8 `Tensor[n, channels, size, size]`: shorter edge resized, centre cropped.

    Args:
        paths: any format Pillow reads.
        size: side in pixels.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        DataError: a file is missing or no image; names the file.
    """
    arrays: list[np.ndarray] = []
    for path in paths:
        if not os.path.isfile(path):  # noqa: PTH113 (False, too, for what is too long to be a name)
            raise DataError(f"{path} is no file; give an image file")
        try:
            with without_warnings():
                image = shrink_and_crop(open_rgb(path)[0], size)
        except DecodingError as error:
            raise DataError(f"{path} {error}; give an image that Pillow can read") from None
        arrays.append(np.asarray(image.convert("L"))[None] if channels == 1 else to_chw(image))
    return torch.from_numpy(np.stack(arrays))
