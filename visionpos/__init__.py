"""visionpos: any position encoding in any timm vision transformer, exact, in one line.

The first use of a public name imports them all, by `public.py`; until then, `--help` and mistakes on a command line can
be told without torch and timm. timm learns the models visionpos_* once both are imported, in either order.
"""
# ruff: noqa: F405

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .late import call_after_import

if TYPE_CHECKING:
    from .public import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "BiasEncoding",
    "ConditionalEncoding",
    "ContextualBias",
    "CoordinateAugmentation",
    "InputEncoding",
    "MaskedAutoencoder",
    "PositionEncoding",
    "Positions",
    "RotaryEncoding",
    "SimMIM",
    "alibi_slopes",
    "apply_rotary",
    "check_encoding",
    "convert_qk_layout",
    "create_encoding",
    "create_model",
    "describe",
    "draw_mask",
    "encoding_info",
    "export_state_dict",
    "get_encoding",
    "layers",
    "list_encodings",
    "load_weights",
    "plot_encoding",
    "register_encoding",
    "relative_position_index",
    "resize_position_table",
    "resize_relative_table",
    "rope_angles_axial",
    "set_encoding",
    "shifted_window_mask",
    "sincos_1d",
    "sincos_2d",
    "supported_hosts",
]


def __getattr__(name: str) -> Any:
    """Return a public name, all of which are imported when the first is asked for, or a module of this package."""
    if name in __all__:
        public = importlib.import_module(f"{__name__}.public")
        globals().update((each, getattr(public, each)) for each in __all__)
        return globals()[name]
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    """Return the public names, whether they are imported already or not."""
    return [*__all__, "__version__"]


call_after_import("timm", lambda: importlib.import_module(f"{__name__}.timm_models"))
