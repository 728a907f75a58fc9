"""`load_weights` refuses what does not fit before it writes anything: other networks, damaged files, odd tensors."""

import numpy
import pytest
import timm
import torch
from safetensors.torch import save_file

import visionpos as vp
from tests.small import swin, vit

SMALL = {"img_size": (32, 64), "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
HOSTS = {
    "deit_tiny_distilled_patch16_224": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "beit_base_patch16_224": SMALL,
    "vit_relpos_small_patch16_224": SMALL,
    "cait_xxs24_224": SMALL,
    "samvit_base_patch16_224": SMALL,
    "swinv2_tiny_window8_256": {"img_size": (32, 64), "window_size": 4, "embed_dim": 24, "depths": (1, 1)}
    | {"num_heads": (2, 4), "num_classes": 5},
    "hiera_tiny_224": {"img_size": (64, 96), "stages": (1, 1, 1, 1), "num_classes": 5},
}
MODELS = [
    lambda: vit("learned+rope_mixed+relative_table"),
    lambda: swin("learned+relative_table"),
    *(lambda n=name, o=options: vp.create_model(n, "learned", **o) for name, options in HOSTS.items()),
]


def refused(model, weights, match, **options):
    """Nothing is written, and the error is one line."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        vp.load_weights(model, weights, **options)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


VALUES = {
    "meta": (lambda x: x.to("meta"), "is on the meta device"),
    "complex": (lambda x: x.to(torch.complex64), "is torch.complex64"),
    "integer": (lambda x: x.long(), "is torch.int64"),
    "boolean": (lambda x: x > 0, "is torch.bool"),
    "sparse": (lambda x: x.to_sparse(), "torch.sparse_coo"),
    "list": (lambda x: x.tolist(), "is of type list"),
    "numpy": (lambda x: x.numpy(), "is of type ndarray"),
    "none": (lambda x: None, "is of type NoneType"),
    "longer": (lambda x: torch.cat([x, x]), "in the weights and .* in the model"),
    "scalar": (lambda x: x.sum(), "in the weights and .* in the model"),
}


@pytest.mark.unhooked
@pytest.mark.parametrize("make", MODELS, ids=["vit", "swin", *HOSTS])
def test_one_tensor_of_another_kind_changes_nothing(make):
    """In the first and in the last tensor, and in a position table, which may be resized."""
    model = make()
    fine = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
    table = next(key for key in fine if "pos_embed" in key)
    for key in (table, next(iter(fine)), list(fine)[-1]):
        for change, match in VALUES.values():
            for strict in (True, False):
                refused(model, fine | {key: change(fine[key])}, match, strict=strict)
    refused(model, {key: value for key, value in fine.items() if key != table}, table)
    vp.load_weights(model, fine)
    assert all(torch.equal(value, fine[key]) for key, value in model.state_dict().items())


def test_tables_that_cannot_be_resized_change_nothing():
    for spec in ("learned", *({"name": "relative_table", "preset": preset} for preset in ("swin", "beit", "levit"))):
        model = vit(spec)
        fine = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
        table = next(key for key in reversed(fine) if "pos_embed" in key or "relative_position" in key)
        for rows in (0, 1, 2, 7):
            short = fine[table].narrow(-2, 0, rows)
            for resize in (True, (2, 3), (40, 1)):
                if spec != "learned" or (rows, resize) not in ((1, True), (2, True), (7, (2, 3))):
                    refused(model, fine | {table: short}, "table|in the weights and", resize=resize)
        refused(model, fine | {table: torch.zeros(())}, "table|in the weights and", resize=(2, 3))


@pytest.mark.unhooked
@pytest.mark.parametrize("resize", [3, 2.0, "7", (2,), (2, 3, 4), (0, 3), (-2, 3), (2.0, 3), (True, 3), None])
def test_a_grid_that_is_none(resize):
    refused(vit("rope_axial"), vit("rope_axial").state_dict(), "resize must be True, False or a grid", resize=resize)


FOREIGN = {
    "Hugging Face": [
        "vit.encoder.layer.0.attention.attention.query.weight",
        "swin.encoder.layers.0.blocks.0.attention.self.key.weight",
        "layer.0.attention.q_proj.weight",
        "vision_model.encoder.layers.0.self_attn.v_proj.weight",
        "vision_model.embeddings.class_embedding",
        "bert.embeddings.word_embeddings.weight",
    ],
    "torchvision": ["features.1.0.block.0.weight", "features.3.weight", "features.2.1.conv.weight"],
    "a ResNet": ["layer1.0.conv1.weight"],
    "JAX": ["root/block1/unit01/conv1/kernel", "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias"],
}


@pytest.mark.parametrize(("origin", "name"), [(origin, name) for origin, names in FOREIGN.items() for name in names])
def test_names_of_other_networks(origin, name):
    """And parts of layers, with a tensor that fits by chance, as the last norm does."""
    model = vit("rope_axial")
    for weights in ({name: torch.zeros(48)}, {"norm.weight": torch.zeros(48), name: torch.zeros(48)}):
        for strict in (True, False):
            refused(model, weights, f"(names of {origin}.*{name}|of {origin}.*: a part of a layer)", strict=strict)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mixer_s32_224", "regnetx_002", "mobilenetv3_small_050"])
def test_other_networks(name):
    options = {"num_classes": 5}
    weights = timm.create_model(name, **options).state_dict()
    for model in (swin("rope_axial"), vit("rope_axial")):  # the mixer has some names of a ViT's layers: shapes tell
        refused(
            model,
            weights,
            "in the weights and .* in the model|do not fit .*, nothing of them|names of|is torch.int64",
            strict=False,
        )


def test_nothing_at_all():
    refused(vit("rope_axial"), {}, "do not fit", strict=False)
    refused(vit("rope_axial"), {"model": {}}, "do not fit", strict=False)


def test_a_part_still_loads():
    """Only a head, or the first layers of a deeper model."""
    model = vit("rope_axial")
    vp.load_weights(model, {"head.weight": torch.ones(5, 48)}, strict=False)
    assert (model.head.weight == 1).all()
    deeper = vit("rope_axial", depth=6).state_dict()
    vp.load_weights(model, deeper, strict=False)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, deeper["blocks.1.mlp.fc1.weight"])


@pytest.mark.unhooked
def test_files_of_other_kinds(tmp_path):
    model = vit("rope_axial")
    fine = tmp_path / "fine.safetensors"
    save_file(model.state_dict(), fine)
    data = fine.read_bytes()
    damaged = {"empty": b"", "seven": b"\0" * 7, "cut": data[:-5], "header": data[:40], "pickle": b"\x80\x02}" + data}
    for name, content in damaged.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        refused(model, path, f"{name}.safetensors' cannot be read as safetensors")
    numpy.savez(tmp_path / "jax.npz", x=numpy.zeros(3))
    refused(model, tmp_path / "jax.npz", "x is torch.float64|nothing of them")
    numpy.savez(tmp_path / "objects.npz", x=numpy.array([{}], dtype=object))
    refused(model, tmp_path / "objects.npz", "objects.npz' cannot be read as npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "jax.npz").read_bytes()[:-9])
    refused(model, tmp_path / "cut.npz", "cut.npz' cannot be read as npz")
    refused(model, str(tmp_path), "is a directory without model.safetensors")
    refused(model, tmp_path / "model.pth", "a pickle can run code")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    refused(model, tmp_path, "gone.safetensors' cannot be read")
    (tmp_path / "model.safetensors.index.json").write_text("[1")
    refused(model, tmp_path, "index.json' cannot be read as JSON")
    (tmp_path / "folder.safetensors").mkdir()
    refused(model, tmp_path / "folder.safetensors", "folder.safetensors' is a directory")
    refused(model, tmp_path / "gone.safetensors", "gone.safetensors' cannot be read")
    for wrong in (3, None, [1]):
        refused(model, wrong, "weights must be a path or a state dict, got")


def test_a_model_without_memory():
    weights = vit("rope_axial").state_dict()
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=4, embed_dim=48, depth=2)
    model = vp.set_encoding(model, "rope_axial")
    with pytest.raises(ValueError, match=r"on the meta device; call model.to_empty|in the weights and"):
        vp.load_weights(model, weights, strict=False)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (2, 2, 25), (2, 1, 24), (3, 2, 24)])
def test_frequencies_of_other_shapes(shape):
    model = vit("rope_mixed")
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith("freqs")}
    refused(model, {**weights, "freqs": torch.zeros(shape)}, "freqs has the frequencies of")
