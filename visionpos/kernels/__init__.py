"""Fused kernels, each beside the plain PyTorch version that defines it, and the choice between the two.

| operation | reference and predicate | kernel |
| --- | --- | --- |
| `rotate_qkv` | `rotation.py` | `rotation_triton.py` |
| `window_attention` | `window.py` | `window_triton.py` |
| `coordinate_attention` | `coordinates.py` | FlexAttention |

`rotate_qkv(...)` runs the version that `rotate_qkv.runs(...)` says for the same arguments.
"""

from .choose import mode, report, use
from .coordinates import coordinate_attention, takes_coordinates
from .rotation import rotate_qkv
from .window import window_attention

__all__ = ["coordinate_attention", "mode", "report", "rotate_qkv", "takes_coordinates", "use", "window_attention"]
