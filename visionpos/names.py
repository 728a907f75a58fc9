"""The names of this package's encodings as types, so that type checkers know what `create_encoding` returns."""

from typing import Literal

InputName = Literal[
    "abs_win", "binary", "factorized", "fourier", "learned", "learned2d", "scalar", "sincos2d", "sinusoidal"
]
RotaryName = Literal[
    "comrope",
    "harope",
    "liere",
    "pope",
    "rope1d",
    "rope_axial",
    "rope_dinov3",
    "rope_eva",
    "rope_golden",
    "rope_mixed",
    "rope_spiral",
    "string",
]
BiasName = Literal[
    "alibi",
    "alibi2d",
    "decomposed",
    "fire",
    "irpe",
    "kerple",
    "log_cpb",
    "lookhere",
    "pape",
    "relative_table",
    "shaw",
    "t5",
]
ConditionalName = Literal["lepe", "peg"]
