"""What changes the weights: the optimiser, its groups of parameters, and its learning rate by step."""

import math
import re
from typing import Any

import torch
from timm.optim import Muon, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from visionpos.training.config.schema import Recipe

__all__ = ["cosine_schedule", "make_optimizer", "parameter_groups"]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW, or Muon for the matrices of the blocks and NAdamW for the rest.

    Muon and NAdamW both have Nesterov's momentum.
    """
    groups, options = parameter_groups(model, recipe), {"lr": recipe.lr, "betas": tuple(recipe.betas)}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)  # on CPU, CUDA and MPS
    optimizer = Muon(groups, **options, nesterov=True)
    optimizer.register_step_pre_hook(one_rate)
    return optimizer


def one_rate(optimizer: Muon, *_: Any) -> None:
    """Give NAdamW the rate of the schedule before every step.

    timm 1.0.26 keeps it apart, later versions a factor to it.
    """
    for group in optimizer.param_groups:
        group.update(adamw_lr=group["lr"], fallback_lr_scale=1.0)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return timm's groups: no decay for norms, biases and what the model names; smaller rates for lower layers.

    For Muon those apart that NAdamW has: all but the matrices inside blocks, and what the model names.
    """
    options: dict[str, Any] = {"weight_decay": recipe.weight_decay, "no_weight_decay_list": model.no_weight_decay()}
    if recipe.optimizer == "muon":
        inside = re.compile(r"(blocks|layers)\.")
        rest = {name for name, p in model.named_parameters() if p.ndim != 2 or not inside.search(name)}
        options |= {"fallback_list": rest, "fallback_no_weight_decay": True}
    if recipe.layer_decay is None:
        return param_groups_weight_decay(model, **options)
    return param_groups_layer_decay(model, layer_decay=recipe.layer_decay, **options)


def cosine_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total: int) -> CosineLRScheduler:
    """Return a linear warm-up from the first step on, then a cosine down to `min_lr`.

    It is set by the number of steps done.
    """
    warmup = min(math.ceil(recipe.warmup * total), total - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(total - warmup, 2),  # a course of one step is its first rate, and timm warns of it
        lr_min=recipe.min_lr,
        warmup_t=warmup,
        warmup_lr_init=recipe.lr / (warmup + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
