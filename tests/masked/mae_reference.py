"""Masked autoencoders as their paper's equations say, step by step in float64, on weights under its code's names."""

import math

import torch


def sincos_table(height, width, dim):
    """(1 + H W, dim): a row of zeros, then sin x w, cos x w, sin y w, cos y w."""
    rows = [[0.0] * dim]
    omega = [10000 ** (-4 * i / dim) for i in range(dim // 4)]
    for y in range(height):
        for x in range(width):
            rows.append([f(place * w) for place in (x, y) for f in (math.sin, math.cos) for w in omega])
    return torch.tensor(rows, dtype=torch.float64)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x, weights, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def block(x, weights, name, heads):
    """x + attention(norm(x)), then x + mlp(norm(x)); one sample (T, C)."""
    q, k, v = linear(layer_norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn.qkv").chunk(3, dim=-1)
    out = []
    for i in range(heads):
        part = slice(i * x.shape[1] // heads, (i + 1) * x.shape[1] // heads)
        scores = q[:, part] @ k[:, part].T / math.sqrt(x.shape[1] // heads)
        scores = scores.exp() / scores.exp().sum(1, keepdim=True)
        out.append(scores @ v[:, part])
    x = x + linear(torch.cat(out, dim=1), weights, f"{name}.attn.proj")
    hidden = linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + linear(hidden, weights, f"{name}.mlp.fc2")


def cut(image, patch):
    """(C, H, W) -> (N, C, p, p), row by row."""
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    cells = [(y * patch, x * patch) for y in range(rows) for x in range(columns)]
    return torch.stack([image[:, y : y + patch, x : x + patch] for y, x in cells])


def mae(weights, image, keep, patch, heads, decoder_heads, norm_pix_loss):
    """One picture (C, H, W) and the indices of its visible patches -> prediction (N, p p C), loss of hidden patches."""
    shape = image.shape[1] // patch, image.shape[2] // patch
    depth, decoder_depth = (
        sum(name.startswith(blocks) and name.endswith("norm1.bias") for name in weights)
        for blocks in ("blocks.", "decoder_blocks.")
    )
    patches = cut(image, patch)

    kernel = weights["patch_embed.proj.weight"]
    x = patches.flatten(1) @ kernel.flatten(1).T + weights["patch_embed.proj.bias"]
    table = sincos_table(*shape, x.shape[1])
    x = torch.cat([weights["cls_token"][0] + table[:1], (x + table[1:])[keep]])
    for i in range(depth):
        x = block(x, weights, f"blocks.{i}", heads)
    x = linear(layer_norm(x, weights, "norm"), weights, "decoder_embed")

    full = weights["mask_token"][0].repeat(len(patches), 1)
    for token, place in zip(x[1:], keep.tolist(), strict=True):
        full[place] = token
    x = torch.cat([x[:1], full])
    x = x + sincos_table(*shape, x.shape[1])
    for i in range(decoder_depth):
        x = block(x, weights, f"decoder_blocks.{i}", decoder_heads)
    prediction = linear(layer_norm(x, weights, "decoder_norm"), weights, "decoder_pred")[1:]

    errors = []
    for i, pixels in enumerate(patches):
        target = pixels.permute(1, 2, 0).flatten()  # channels last
        if norm_pix_loss:
            variance = (target - target.mean()).square().sum() / (len(target) - 1)
            target = (target - target.mean()) / (variance + 1e-6).sqrt()
        if i not in keep.tolist():
            errors.append((prediction[i] - target).square().mean())
    return prediction, torch.stack(errors).mean()
