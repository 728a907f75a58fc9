"""The names that other people's code relies on."""

import inspect
import subprocess
import sys

import visionpos as vp

SIGNATURES = {
    "sincos_1d": ["positions", "dim", "temperature", "layout"],
    "sincos_2d": ["feat_shape", "dim", "temperature", "preset"],
    "rope_angles_axial": ["feat_shape", "head_dim", "temperature"],
    "apply_rotary": ["x", "angles", "layout"],
    "alibi_slopes": ["num_heads"],
    "relative_position_index": ["window_size"],
    "shifted_window_mask": ["feat_shape", "window_size", "shift"],
    "resize_position_table": ["table", "new_size", "old_size", "num_prefix_tokens", "mode", "antialias"],
    "resize_relative_table": ["table", "new_window", "old_window", "mode"],
}


def test_signatures():
    for name, parameters in SIGNATURES.items():
        assert list(inspect.signature(getattr(vp, name)).parameters)[: len(parameters)] == parameters, name


def test_all_is_importable_and_documented():
    for name in vp.__all__:
        assert getattr(vp, name).__doc__, name


def test_import_stays_light():
    heavy = ("matplotlib", "accelerate", "torchmetrics", "optuna")
    code = f"import sys, visionpos; visionpos.Positions; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
