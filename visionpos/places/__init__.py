"""The base classes of the four places where an encoding can act: input, rotary, bias, conditional.

An encoding derives from one of them. What is here knows no encoding by name, and no model.
"""

from .bias import BORDER, HIDDEN, BiasEncoding, ContextualBias
from .conditional import ConditionalEncoding
from .input import InputEncoding
from .rotary import RotaryEncoding, take_tokens

__all__ = [
    "BORDER",
    "HIDDEN",
    "BiasEncoding",
    "ConditionalEncoding",
    "ContextualBias",
    "InputEncoding",
    "RotaryEncoding",
    "take_tokens",
]
