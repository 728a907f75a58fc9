"""Make the small checkpoints in `fixtures/` with the libraries whose formats they are in, and what these compute.

    pip install transformers torchvision
    python -m tests.weights.make_fixtures

Each folder has the checkpoint as the library saves it, `state_dict.safetensors` where it has other names in memory, and
`expected.safetensors`: the library's output for
`images(size)`, computed in float64. Every weight is drawn at random and away from its initial value, so that none can
be lost unseen. Pictures are not square wherever the library is right there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import timm
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "fixtures"
SIZE = (32, 48)
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": SIZE, "patch_size": 8}
SQUARE = {**VIT, "image_size": 32}
SWIN = {
    "image_size": (32, 64),
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 2,
    "mlp_ratio": 2.0,
}
HIERA = {"image_size": (64, 96), "embed_dim": 4, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "mlp_ratio": 2.0}
EPS = {"layer_norm_eps": 1e-6}  # timm's; the default of transformers is 1e-12


def images(size):
    return (torch.arange(2 * 3 * size[0] * size[1]) * 0.37).sin().view(2, 3, *size).double()


def randomise(model):
    """Draw every parameter at random: around one for scales of norms and of layers, else around zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.ndim == 1 and ("norm" in name or "ln" in name) and name.endswith("weight")
            parameter.copy_(float(scale) + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(name, expected, config=None, weights=None):
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({key: value.detach().contiguous() for key, value in expected.items()}, folder / "expected.safetensors")


def save_pretrained(model, folder):
    model.save_pretrained(folder)
    memory = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    if set(memory) != set(load_file(folder / "model.safetensors")):
        save_file(memory, folder / "state_dict.safetensors")


def hugging_face():
    import transformers as hf

    cases = {
        "hf_vit": (hf.ViTForImageClassification, hf.ViTConfig(**VIT, **EPS, num_labels=5), "logits"),
        "hf_deit": (hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig(**VIT, **EPS, num_labels=5), "logits"),
        "hf_dinov2": (hf.Dinov2Model, hf.Dinov2Config(**SQUARE, mlp_ratio=2), "last_hidden_state"),
        "hf_dinov2_registers": (
            hf.Dinov2WithRegistersModel,
            hf.Dinov2WithRegistersConfig(**SQUARE, mlp_ratio=2, num_register_tokens=4),
            "last_hidden_state",
        ),
        "hf_dinov2_giant": (
            hf.Dinov2Model,
            hf.Dinov2Config(**SQUARE, mlp_ratio=2, use_swiglu_ffn=True),
            "last_hidden_state",
        ),
        "hf_dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**SQUARE, num_register_tokens=4), "last_hidden_state"),
        "hf_dinov3_gated": (
            hf.DINOv3ViTModel,
            hf.DINOv3ViTConfig(**SQUARE, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
            "last_hidden_state",
        ),
        "hf_swin": (hf.SwinForImageClassification, hf.SwinConfig(**SWIN, num_labels=5), "logits"),
        "hf_swinv2": (hf.Swinv2ForImageClassification, hf.Swinv2Config(**SWIN, num_labels=5), "logits"),
        "hf_beit": (
            hf.BeitForImageClassification,
            hf.BeitConfig(**SQUARE, **EPS, num_labels=5, use_relative_position_bias=True),
            "logits",
        ),
        "hf_siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**SQUARE), "pooler_output"),
        "hf_ijepa": (hf.IJepaModel, hf.IJepaConfig(**VIT, **EPS), "last_hidden_state"),
        "hf_hiera": (hf.HieraForImageClassification, hf.HieraConfig(**HIERA, num_labels=5), "logits"),
    }
    for name, (cls, config, output) in cases.items():
        if name != "hf_siglip":
            config._attn_implementation = "eager"
        model = randomise(cls(config))
        save_pretrained(model, FOLDER / name)
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        size = (32, 48) if name.startswith("hf_dinov3") else size  # its positions are a formula of any grid
        x = images(size)
        save(name, {"size": torch.tensor(x.shape[-2:]), "output": getattr(model.double()(x), output)})

    from visionpos import sincos_2d

    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = hf.ViTMAEConfig(**SQUARE, **EPS, **decoder, decoder_intermediate_size=16, norm_pix_loss=True)
    model = randomise(hf.ViTMAEForPreTraining(config))
    with torch.no_grad():  # the tables of the paper's checkpoints
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table[0, 0], table[0, 1:] = 0, sincos_2d((4, 4), table.shape[-1])
    save_pretrained(model, FOLDER / "hf_mae")
    x, noise = images((32, 32)), images((32, 32)).flatten(1)[:, :16]
    result = model.double()(x, noise=noise)
    expected = {
        "size": torch.tensor(x.shape[-2:]),
        "noise": noise,
        "output": result.logits,
        "loss": result.loss,
        "hidden": result.mask,
    }
    save("hf_mae", expected)


def torchvision():
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
    from torchvision.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    options = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4], "window_size": [2, 2]}
    options |= {"mlp_ratio": 2.0, "num_classes": 5}
    swin = SwinTransformer(**options)
    swin_v2 = SwinTransformer(**options, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
    for name, model, size in (("vit", vit, (32, 32)), ("swin", swin, (32, 64)), ("swin_v2", swin_v2, (32, 64))):
        weights, x = randomise(model).state_dict(), images(size)
        weights = {key: value.clone() for key, value in weights.items()}
        save(f"torchvision_{name}", {"size": torch.tensor(x.shape[-2:]), "output": model.double()(x)}, weights=weights)


def flax():
    """The names and shapes of the paper's checkpoints, read by timm's own loader."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )
    shapes = {"cls": (1, 1, 16), "embedding/kernel": (8, 8, 3, 16), "embedding/bias": (16,)}
    shapes |= {"Transformer/posembed_input/pos_embedding": (1, 17, 16)}
    for i in range(2):
        block, attention = (
            f"Transformer/encoderblock_{i}",
            f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1",
        )
        shapes |= {f"{block}/LayerNorm_{j}/{part}": (16,) for j in (0, 2) for part in ("scale", "bias")}
        shapes |= {f"{attention}/{name}/kernel": (16, 2, 8) for name in ("query", "key", "value")}
        shapes |= {f"{attention}/{name}/bias": (2, 8) for name in ("query", "key", "value")}
        shapes |= {f"{attention}/out/kernel": (2, 8, 16), f"{attention}/out/bias": (16,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_0/kernel": (16, 64), f"{block}/MlpBlock_3/Dense_0/bias": (64,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_1/kernel": (64, 16), f"{block}/MlpBlock_3/Dense_1/bias": (16,)}
    shapes |= {"Transformer/encoder_norm/scale": (16,), "Transformer/encoder_norm/bias": (16,)}
    shapes |= {"head/kernel": (16, 5), "head/bias": (5,), "pre_logits/kernel": (16, 16), "pre_logits/bias": (16,)}
    draw = numpy.random.default_rng(0)
    arrays = {key: draw.normal(scale=0.2, size=shape).astype("float32") for key, shape in shapes.items()}
    (FOLDER / "flax_vit").mkdir(parents=True, exist_ok=True)
    numpy.savez(FOLDER / "flax_vit" / "model.npz", **arrays)
    model.load_pretrained(str(FOLDER / "flax_vit" / "model.npz"))
    x = images((32, 32))
    save("flax_vit", {"size": torch.tensor(x.shape[-2:]), "output": model.eval().double()(x)})


if __name__ == "__main__":
    flax()
    torchvision()
    hugging_face()
