"""Small models of every family, for whoever tries something in all of them: the table of hosts, and the tests."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from ..hosts.host import timm_is_from

SMALL = {"num_classes": 3, "depth": 1, "embed_dim": 48, "num_heads": 3}
GRID = {"img_size": (16, 24), "patch_size": 4}

# family: a timm model of it, the arguments that make it small, and the size of its pictures
ZOO: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "ViT": ("vit_tiny_patch16_224", {**SMALL, **GRID, "global_pool": "avg"}, (16, 24)),
    "ViT, class token": ("vit_tiny_patch16_224", {**SMALL, **GRID}, (16, 24)),
    "ViT, registers": ("vit_medium_patch16_reg4_gap_256", {**SMALL, **GRID}, (16, 24)),
    "ViT, parallel": ("vit_pwee_patch16_reg1_gap_256", {**SMALL, **GRID}, (16, 24)),
    "ViT, parallel attention": ("vit_small_patch16_18x2_224", {**SMALL, **GRID, "global_pool": "avg"}, (16, 24)),
    "ViT, differential": ("vit_dwee_patch16_reg1_gap_256", {**SMALL, **GRID}, (16, 24)),
    "DeiT-III": ("deit3_small_patch16_224", {**SMALL, **GRID, "global_pool": "avg"}, (16, 24)),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", {**SMALL, **GRID}, (16, 24)),
    "EVA-02": ("eva02_tiny_patch14_224", {**SMALL, **GRID}, (16, 24)),
    "DINOv3": ("vit_small_patch16_dinov3", {**SMALL, **GRID, "global_pool": "avg"}, (16, 24)),
    "RoPE-ViT, axial": ("vit_small_patch16_rope_224", {**SMALL, **GRID, "global_pool": "avg"}, (16, 24)),
    "RoPE-ViT, mixed": ("vit_small_patch16_rope_mixed_224", {**SMALL, **GRID, "global_pool": "avg"}, (16, 24)),
    "BEiT": ("beit_base_patch16_224", {**SMALL, **GRID}, (16, 24)),
    "ViT, relative bias": ("vit_relpos_small_patch16_224", {**SMALL, **GRID}, (16, 24)),
    "CaiT": ("cait_xxs24_224", {**SMALL, **GRID}, (16, 24)),
    "Qwen3-ViT": ("qwen3_vit_88m", {**SMALL, **GRID, "pos_embed_grid_size": 5}, (16, 24)),
    "DeepSeek-ViT": ("deepseek_vit_412m", {**SMALL, **GRID}, (16, 24)),
    "Gemma 4": (
        "gemma4_vit_167m",
        {**SMALL, **GRID, "head_dim": 16, "intermediate_size": 96, "position_embedding_size": 16},
        (16, 24),
    ),
    "NaFlexViT": ("naflexvit_base_patch16_gap", {**SMALL, "patch_size": 4, "pos_embed_grid_size": (4, 6)}, (16, 24)),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"num_classes": 3, "img_size": (32, 48), "window_size": 4, "embed_dim": 48, "depths": (2,), "num_heads": (3,)},
        (32, 48),
    ),
    "Swin v2": (
        "swinv2_tiny_window8_256",
        {"num_classes": 3, "img_size": (32, 48), "window_size": 4, "embed_dim": 48, "depths": (2,), "num_heads": (3,)},
        (32, 48),
    ),
    "Swin v2-CR": (
        "swinv2_cr_tiny_224",
        {"num_classes": 3, "img_size": (32, 48), "window_size": 4, "embed_dim": 48, "depths": (2,), "num_heads": (3,)},
        (32, 48),
    ),
    "Hiera": (
        "hiera_tiny_224",
        {"num_classes": 3, "img_size": (64, 96), "embed_dim": 48, "num_heads": 3, "stages": (1, 1), "q_pool": 1},
        (64, 96),
    ),
    "MaxViT": (
        "maxvit_tiny_tf_224",
        {
            "num_classes": 3,
            "img_size": (64, 96),
            "embed_dim": (24,),
            "depths": (1,),
            "block_type": ("M",),
            "stem_width": 12,
            "transformer_dim_head": 12,
            "transformer_partition_ratio": 32,
        },
        (64, 96),
    ),
    "CoAtNet": (
        "coatnet_rmlp_nano_rw_224",
        {
            "num_classes": 3,
            "img_size": (32, 48),
            "embed_dim": (12, 24),
            "depths": (1, 1),
            "block_type": ("C", "T"),
            "stem_width": 12,
            "transformer_dim_head": 12,
            "head_hidden_size": 24,
        },
        (32, 48),
    ),
    "HieraDet": (
        "sam2_hiera_tiny",
        {
            "num_classes": 3,
            "embed_dim": 24,
            "num_heads": 2,
            "stages": (1, 1),
            "q_pool": 1,
            "window_spec": (4, 2),
            "global_att_blocks": (0,),
            "head_mul": 1,
            "pretrained_cfg_overlay": {"input_size": (3, 64, 96)},
        },
        (64, 96),
    ),
    "XCiT": ("xcit_nano_12_p8_224", {**SMALL, "img_size": (32, 48)}, (32, 48)),
    "PiT": (
        "pit_ti_224",
        {
            "num_classes": 3,
            "img_size": (32, 48),
            "patch_size": 8,
            "stride": 4,
            "base_dims": (16,),
            "depth": (1,),
            "heads": (3,),
        },
        (32, 48),
    ),
    "CrossViT": (
        "crossvit_9_240",
        {
            "num_classes": 3,
            "img_size": (16, 24),
            "img_scale": (1.0, 1.0),
            "patch_size": (4, 8),
            "embed_dim": (48, 96),
            "depth": ((1, 1, 0),),
            "num_heads": (3, 3),
        },
        (16, 24),
    ),
    "ConViT": (  # of square pictures
        "convit_tiny",
        {**SMALL, "img_size": (24, 24), "patch_size": 4, "depth": 2, "embed_dim": 16, "local_up_to_layer": 1},
        (24, 24),
    ),
    "CoaT": (
        "coat_tiny",
        {
            "num_classes": 3,
            "img_size": (64, 96),
            "embed_dims": (64, 64, 64, 64),
            "serial_depths": (1, 1, 1, 1),
            "parallel_depth": 1,
            "mlp_ratios": (2, 2, 2, 2),
        },
        (64, 96),
    ),
    "TNT": (
        "tnt_s_patch16_224",
        {
            **{"num_classes": 3, "img_size": (32, 48), "patch_size": 8, "depth": 1},
            **{"embed_dim": 48, "num_heads_outer": 3, "inner_dim": 16, "num_heads_inner": 2},
        },
        (32, 48),
    ),
    "Visformer": (
        "visformer_tiny",
        {
            "num_classes": 3,
            "img_size": (32, 64),
            "init_channels": 8,
            "embed_dim": 48,
            "depth": (1, 1, 1),
            "num_heads": 3,
            "attn_stage": "010",
        },
        (32, 64),
    ),
    "PVT v2": (
        "pvt_v2_b0",
        {
            "num_classes": 3,
            "embed_dims": (48,),
            "depths": (1,),
            "num_heads": (3,),
            "sr_ratios": (2,),
            "mlp_ratios": (2,),
            "pretrained_cfg_overlay": {"input_size": (3, 32, 48)},
        },
        (32, 48),
    ),
    "Twins": (
        "twins_svt_small",
        {
            "num_classes": 3,
            "img_size": (32, 48),
            "embed_dims": (48,),
            "depths": (1,),
            "num_heads": (3,),
            "wss": (4,),
            "sr_ratios": (2,),
            "mlp_ratios": (2,),
        },
        (32, 48),
    ),
    "DaViT": (
        "davit_tiny",
        {
            "num_classes": 3,
            "embed_dims": (48,),
            "depths": (1,),
            "num_heads": (3,),
            "window_size": 4,
            "pretrained_cfg_overlay": {"input_size": (3, 32, 48)},
        },
        (32, 48),
    ),
    "GCViT": ("gcvit_xxtiny", {"num_classes": 3, "img_size": (64, 96), "embed_dim": 16}, (64, 96)),
    "TinyViT": (
        "tiny_vit_5m_224",
        {
            "num_classes": 3,
            "embed_dims": (12, 48),
            "depths": (1, 1),
            "num_heads": (1, 3),
            "window_sizes": (4, 4),
            "pretrained_cfg_overlay": {"input_size": (3, 64, 96)},
        },
        (64, 96),
    ),
    "EfficientFormer": (  # whose grid is fixed
        "efficientformer_l1",
        {"num_classes": 3, "depths": (1, 1), "embed_dims": (12, 24), "num_vit": 1},
        (56, 56),
    ),
    "EfficientFormerV2": (
        "efficientformerv2_s0",
        {
            "num_classes": 3,
            "img_size": (128, 192),
            "depths": (1, 1, 1),
            "embed_dims": (8, 12, 24),
            "mlp_ratios": 2,
            "num_vit": 1,
        },
        (128, 192),
    ),
    "EfficientViT": (
        "efficientvit_m0",
        {
            "num_classes": 3,
            "img_size": (64, 96),
            "embed_dim": (48,),
            "key_dim": (16,),
            "depth": (1,),
            "num_heads": (3,),
            "window_size": (3,),
            "kernels": (5, 3, 3),
            "down_ops": (("", 1),),
        },
        (64, 96),
    ),
    "LeViT": (
        "levit_128s",
        {
            "num_classes": 3,
            "img_size": (32, 48),
            "stem_type": "s8",
            "embed_dim": (48,),
            "key_dim": 16,
            "depth": (1,),
            "num_heads": 3,
            "attn_ratio": 1,
        },
        (32, 48),
    ),
    "SAM": (
        "samvit_base_patch16",
        {
            **SMALL,
            "img_size": (32, 48),
            "patch_size": 8,
            "num_classes": 3,
            "window_size": 2,
            "global_attn_indexes": (0,),
        },
        (32, 48),
    ),
}
NEWER = {"MaxViT", "CoAtNet", "CrossViT", "GCViT", "EfficientViT", "NaFlexViT"}  # whose hosts ask for timm 1.0.31
ZOO = {  # an older timm has fewer
    family: row
    for family, row in ZOO.items()
    if timm.is_model(row[0]) and (family not in NEWER or timm_is_from("1.0.31"))
}


def build(family: str, **options: Any) -> tuple[nn.Module, tuple[int, int]]:
    """Return a small model of a family, freshly initialised with seed 0, and the size of its images."""
    name, small, size = ZOO[family]
    torch.manual_seed(0)
    return timm.create_model(name, **{**small, **options}), size
