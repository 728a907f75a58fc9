"""The public names: what `visionpos` hands out, imported when the first of them is used."""

from . import layers
from .analysis.plots import plot_encoding
from .augment import CoordinateAugmentation
from .bias.alibi import alibi_slopes
from .convert import get_encoding, set_encoding
from .create import create_model
from .description import describe
from .encoding import PositionEncoding
from .hosts.host import supported_hosts
from .input.sincos2d import sincos_2d
from .input.sinusoidal import sincos_1d
from .masked.mae import MaskedAutoencoder
from .masked.masks import draw_mask
from .masked.simmim import SimMIM
from .places import BiasEncoding, ConditionalEncoding, ContextualBias, InputEncoding, RotaryEncoding
from .positions import Positions
from .registry import create_encoding, discover, encoding_info, list_encodings, register_encoding
from .resize import resize_position_table, resize_relative_table
from .rotary.dialects import rope_angles_axial
from .rotation import apply_rotary, convert_qk_layout
from .testing import check_encoding
from .weights.load import load_weights
from .weights.save import export_state_dict
from .windows import relative_position_index, shifted_window_mask

discover()

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
