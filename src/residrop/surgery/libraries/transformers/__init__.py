"""Layers of Hugging Face transformers, and its layer drop.

transformers repeats its layers in every model's file and alters some between versions, so a name says little: layers
are told by the forms of their methods alone (`surgery.forms`), and a mixin serves all that have its form.
"""

from residrop.surgery.adapters import Adapter
from residrop.surgery.libraries.transformers.audio import MIXINS as _AUDIO
from residrop.surgery.libraries.transformers.text import MIXINS as _TEXT
from residrop.surgery.libraries.transformers.vision import MIXINS as _VISION

__all__ = ["ADAPTERS"]

ADAPTERS = tuple(
    Adapter("transformers", mixin, when=mixin.suits, forms=mixin.forms) for mixin in (*_TEXT, *_VISION, *_AUDIO)
)
