"""One training loop for every model, encoding and source of data.

A `Trainer` holds everything that training changes; its `step` counter is also the position in the data and in the
schedule. Inside a step nothing waits for the device: losses stay there until `advance` has done its steps.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from train.checkpoint import Checkpoint
from train.config import Config, Recipe
from train.errors import CheckpointError, ConfigError, NonFiniteError
from train.source import Source

__all__ = ["Trainer", "accuracy", "pick_device"]


def pick_device(name: str) -> torch.device:
    """The device of that name, if this machine has it; 'auto' is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in present:
        raise ConfigError(f"device: {name!r} given; accepted here: {', '.join(present)}")
    return torch.device(name)


def mixed_precision(device: torch.device, precision: str) -> AbstractContextManager:
    """bf16 autocast, or nothing for fp32; 'auto' is bf16 on a GPU."""
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: AbstractContextManager) -> float:
    """Share of right answers; the model is left in the mode it was in."""
    was_training, correct, total = model.training, 0, 0
    model.eval()
    with precision:
        for images, labels in batches:
            correct += (model(images).argmax(-1) == labels).sum()
            total += len(labels)
    model.train(was_training)
    return (correct / total).item()


class Trainer:
    """A model in training: optimiser, schedule, averaged weights, and the number of steps done.

    Args:
        model: Any timm model; it is moved to the device.
        source: Where batches come from.
        config: The run; its recipe must fit the source, as `Config.check` sees to.
        device: Where to train.
    """

    def __init__(self, model: nn.Module, source: Source, config: Config, device: torch.device):
        recipe = config.recipe
        self.model, self.source, self.recipe, self.device = model.to(device).train(), source, recipe, device
        self.step, self.total = 0, recipe.steps or recipe.epochs * source.steps_per_epoch
        self.ema = None
        if recipe.ema_decay is not None:
            self.ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
        self.optimizer = torch.optim.AdamW(
            param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()),
            lr=recipe.lr,
            betas=tuple(recipe.betas),
            fused=device.type == "cuda",
        )
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.schedule = cosine_schedule(self.optimizer, recipe, self.total)
        self.precision = mixed_precision(device, config.precision)
        compiled = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
        self.forward = torch.compile(model) if compiled else model

    @property
    def learning_rate(self) -> float:
        """Of the last step done."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def epoch(self) -> float | None:
        """Passes over the data so far; None if the data have no end."""
        return self.step / self.source.steps_per_epoch if self.source.steps_per_epoch else None

    def advance(self, steps: int) -> Tensor:
        """Do that many steps; returns their losses, on the host. Raises NonFiniteError naming the first bad step."""
        losses = torch.stack([self._one_step() for _ in range(steps)]).cpu()
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            raise NonFiniteError(
                f"the loss is {losses[first].item()} at step {self.step - steps + first + 1} of {self.total}; "
                "lower recipe.lr, or clip harder (recipe.clip_grad); the last checkpoint holds finite weights"
            )
        return losses

    def _one_step(self) -> Tensor:
        images, labels = self.source.batch(self.step)
        self.schedule.step_update(self.step)
        with self.precision:
            loss = F.cross_entropy(self.forward(images), labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        if self.recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad)
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        return loss.detach()

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Accuracy on every part of the source, of the raw and of the averaged weights."""
        self._require_finite_weights()
        models = {"raw": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})
        return {
            kind: {part: accuracy(model, self.source.evaluation(part), self.precision) for part in self.source.parts}
            for kind, model in models.items()
        }

    def _require_finite_weights(self) -> None:
        if not torch.stack([tensor.isfinite().all() for tensor in self.model.state_dict().values()]).all():
            raise NonFiniteError(f"weights are not finite after step {self.step} of {self.total}; nothing was saved")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that training changes, for `checkpoint.save`; NonFiniteError if a weight is not finite."""
        self._require_finite_weights()
        moments = self.optimizer.state_dict()["state"]
        state = {f"optimizer.{index}.{key}": value for index, entry in moments.items() for key, value in entry.items()}
        state["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        groups = {"model": self.model.state_dict(), "state": state}
        return groups | ({"ema": self.ema.module.state_dict()} if self.ema is not None else {})

    def scalars(self) -> dict[str, Any]:
        """The rest of what training changes, fit for JSON."""
        return {"step": self.step, "optimizer": self.optimizer.state_dict()["param_groups"]}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same run, bit by bit."""
        try:
            self.model.load_state_dict(checkpoint.tensors["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(checkpoint.tensors["ema"])
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in checkpoint.tensors["state"].items():
                kind, _, key = name.partition(".")
                if kind == "optimizer":
                    index, _, key = key.partition(".")
                    moments.setdefault(int(index), {})[key] = tensor
            self.optimizer.load_state_dict({"state": moments, "param_groups": checkpoint.state["optimizer"]})
            torch.set_rng_state(checkpoint.tensors["state"]["random.cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(checkpoint.tensors["state"]["random.cuda"], self.device)
            self.step = checkpoint.state["step"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint of step {checkpoint.step} does not fit this run: {error}") from None


def cosine_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total: int) -> CosineLRScheduler:
    """Linear warm-up from the first step on, then a cosine down to `min_lr`; set by the number of steps done."""
    warmup = min(math.ceil(recipe.warmup * total), total - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=recipe.min_lr,
        warmup_t=warmup,
        warmup_lr_init=recipe.lr / (warmup + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
