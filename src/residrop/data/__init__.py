"""Images from a source to normalised, augmented batches on a device.

`load` finds and decodes, `fit` computes the normalisation of the training images, `augmentation` names the random
crops and flips, `Loader` gives the batches.
"""

from residrop.common.extras import extra

with extra("train"):
    from residrop.data.augment import Augmentation, augmentation, augmentations
    from residrop.data.checking import Checked, check
    from residrop.data.loader import Loader
    from residrop.data.normalize import Normalization, NormalizationMode, fit
    from residrop.data.sources import in_colour, load, load_test, sized, sources
    from residrop.data.splits import Files, Images, Splits

__all__ = [
    "Augmentation",
    "Checked",
    "Files",
    "Images",
    "Loader",
    "Normalization",
    "NormalizationMode",
    "Splits",
    "augmentation",
    "augmentations",
    "check",
    "fit",
    "in_colour",
    "load",
    "load_test",
    "sized",
    "sources",
]
