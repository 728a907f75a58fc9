"""The trainer: one training loop for every model, encoding and source of data.

A `Trainer` holds everything that training changes; its `step` counter is also the position in the data and in the
schedule. Inside a step nothing waits for the device: losses stay there until `advance` has done its steps.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.profiler import record_function

from visionpos.training.config.schema import Config
from visionpos.training.errors import CheckpointError, ConfigError, NonFiniteError
from visionpos.training.run.checkpoint import Checkpoint
from visionpos.training.run.distributed import Distributed, Stop, full_tensor, shard_like
from visionpos.training.run.objective import Objective
from visionpos.training.run.optimizer import cosine_schedule, make_optimizer
from visionpos.training.run.source import stream

__all__ = ["Trainer", "mixed_precision", "pick_device"]


def pick_device(name: str) -> torch.device:
    """Return the device of that name, if this machine has it; 'auto' is a GPU, Apple's too, if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = ["cpu", *(["mps"] if torch.backends.mps.is_available() else []), *(["cuda"] if count else [])]
    if name == "auto":
        return torch.device(present[-1])
    present = ["auto", *present, *(f"cuda:{index}" for index in range(count))]
    if name not in present:
        raise ConfigError(f"device: {name!r} given; accepted here: {', '.join(present)}")
    return torch.device(name)


def mixed_precision(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context of bf16 autocast, or of nothing for fp32; 'auto' is bf16 on a GPU."""
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def compile_mode(config: Config, device: torch.device) -> str | None:
    """Return torch.compile's mode, None for eager.

    On a GPU 'auto' takes CUDA graphs for small batches, which cannot fill it otherwise.
    """
    if config.compile == "graphs" and device.type != "cuda":
        raise ConfigError(f"compile: graphs given; accepted on this device ({device.type}): auto, on, off")
    if config.compile == "auto":
        on_gpu = "graphs" if config.recipe.batch_size <= GRAPHS_MAX_BATCH else "on"
        return COMPILE_MODES[on_gpu if device.type == "cuda" else "off"]
    return COMPILE_MODES[config.compile]


# On an H200 a step of the 2.7M ViT at batch 512 has 6.4 ms of kernels; without graphs it took 31 ms, with them 12.
GRAPHS_MAX_BATCH = 2048
COMPILE_MODES = {"on": "default", "graphs": "reduce-overhead", "off": None}


def maybe_compile(model: nn.Module, mode: str | None) -> nn.Module:
    """Return the model, compiled for the shapes it meets unless the mode is None."""
    return model if mode is None else torch.compile(model, mode=mode, dynamic=False)


def seed_layers(device: torch.device, seed: int) -> None:
    """Seed what dropout and stochastic depth draw from, on the CPU and on the device.

    As `torch.manual_seed` does, but without the other back ends, whose part takes a third of a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "mps":
        torch.mps.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ].manual_seed(seed)


class Trainer:
    """Train a model: hold it with its optimiser, schedule and averaged weights, and count the steps done.

    All that is random in a step (its batch, augmentation, masks, dropout) is a function of the seed and of the step.

    Args:
        model: Any timm model, or one around it; it is moved to the device.
        objective: What it learns, and from where.
        config: The run; its recipe must fit the source (`Config.check`) and the processes (`Distributed.check`).
        distributed: The processes that train it together, and where.
    """

    def __init__(self, model: nn.Module, objective: Objective, config: Config, distributed: Distributed):
        recipe, self.objective, self.source = config.recipe, objective, objective.source
        self.distributed, self.device = distributed, distributed.device
        self.model, self.recipe = model.to(self.device).train(), recipe
        self.seed, self.stop = config.seed, Stop()
        self.step, self.total = 0, recipe.steps or recipe.epochs * self.source.steps_per_epoch
        self.ema = None
        if recipe.ema_decay is not None:
            self.ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
        if config.parallel == "fsdp":
            for each in (model, self.ema.module) if self.ema is not None else (model,):
                distributed.fully_shard(each)
        if self.ema is not None:
            self.averaged, self.copied = corresponding(self.ema.module, model)
        self.optimizer = make_optimizer(model, recipe)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.schedule = cosine_schedule(self.optimizer, recipe, self.total)
        self.precision = mixed_precision(self.device, config.precision)
        mode = compile_mode(config, self.device)
        self.graphs = mode == COMPILE_MODES["graphs"]
        self.forward = maybe_compile(distributed.wrap(model) if config.parallel == "ddp" else model, mode)
        averaged = {} if self.ema is None else {"ema": self.ema.module}
        self.models = {kind: maybe_compile(each, mode) for kind, each in ({"raw": model} | averaged).items()}
        self.first_bad = torch.full((), torch.inf, device=self.device)  # step whose loss or gradient is not finite

    @property
    def learning_rate(self) -> float:
        """Return the rate of the last step done, at the top of the model."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def final(self) -> str:
        """Return which of the models counts in the end: `ema`, or `raw` if no weights are averaged."""
        return "raw" if self.ema is None else "ema"

    @property
    def epoch(self) -> float | None:
        """Return the passes over the data so far; None if the data have no end."""
        return self.step / self.source.steps_per_epoch if self.source.steps_per_epoch else None

    def advance(self, steps: int) -> Tensor:
        """Do that many steps, fewer if a signal asks to stop, and return their losses, on the host.

        Raises:
            NonFiniteError: names the first step whose loss or gradient is not finite; it has changed no weight.
        """
        losses = []
        while len(losses) < steps and not (losses and self._should_stop()):
            losses.append(self._one_step())
        losses = torch.stack(losses).cpu()
        if self.first_bad.isfinite():
            step = int(self.first_bad)
            raise NonFiniteError(
                f"the loss or its gradient is not finite at step {step + 1} of {self.total} "
                f"({self.source.describe(step)}); it has changed no weight, and the last checkpoint is good; "
                "lower recipe.lr, or clip harder (recipe.clip_grad)"
            )
        return losses

    def _should_stop(self) -> bool:
        """Return whether to end a stretch early: alike in all processes, never waiting for a device that runs ahead."""
        if self.device.type == "cpu":
            return bool(self.first_bad.isfinite() or self.distributed.all_reduce_max(self.stop.signal))
        return self.distributed.size == 1 and bool(self.stop.signal)

    def _one_step(self) -> Tensor:
        """Do a step and return its loss, on the device."""
        seed_layers(self.device, stream("dropout", self.seed, self.step, self.distributed.rank))
        if self.graphs:  # a second of imports, where it is not needed
            torch.compiler.cudagraph_mark_step_begin()
        with record_function("batch"):
            batch = self.source.batch(self.step)
            self.schedule.step_update(self.step)
        with record_function("forward"), self.precision:
            loss = self.objective.loss(self.forward, batch, self.step, self.distributed)
        with record_function("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with record_function("update"):
            loss = self.distributed.all_reduce_mean(loss.detach().clone())
            self._update(loss)
        return loss

    def _update(self, loss: Tensor) -> None:
        """Change the weights, unless the loss or the gradient of this or an earlier step is not finite."""
        limit = torch.inf if self.recipe.clip_grad is None else self.recipe.clip_grad
        norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, limit))
        good = (loss + norm).isfinite() | self.first_bad.isfinite()
        self.first_bad = torch.where(good, self.first_bad, float(self.step))
        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.found_inf = self.first_bad.isfinite().float()  # the fused update looks at it on the device
            self.optimizer.step()
        elif not self.first_bad.isfinite():
            self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self._average(self.ema.get_decay(self.step))

    def _average(self, decay: float) -> None:
        """Do what `update` of the averaged weights does, which looks all tensors up by name every time."""
        torch._foreach_lerp_(*self.averaged, weight=1 - decay)
        if self.copied[0]:
            torch._foreach_copy_(*self.copied)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return the objective's measure on every split of the source, of the raw and of the averaged weights."""
        self._require_finite_weights()
        with self.evaluating():
            return {kind: self.objective.evaluate(model) for kind, model in self.models.items()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put all models into evaluation mode and the run's precision, and back."""
        for model in self.models.values():
            model.eval()
        with self.precision:
            yield
        self.model.train()

    def _require_finite_weights(self) -> None:
        """Raise NonFiniteError if a weight is not finite."""
        if not torch.stack([full_tensor(tensor).isfinite().all() for tensor in self.model.state_dict().values()]).all():
            raise NonFiniteError(f"weights are not finite after step {self.step} of {self.total}; nothing was saved")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors that training changes, for `checkpoint.save`, in full; every process must ask.

        Raises:
            NonFiniteError: a weight is not finite.
        """
        self._require_finite_weights()
        moments = self.optimizer.state_dict()["state"]
        state = {f"{index}.{key}": value for index, entry in moments.items() for key, value in entry.items()}
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}  # Muon's routes are not
        groups = {"model": self.model.state_dict(), "optimizer": state}
        groups |= {"ema": self.ema.module.state_dict()} if self.ema is not None else {}
        return {kind: {name: full_tensor(value) for name, value in group.items()} for kind, group in groups.items()}

    def scalars(self) -> dict[str, Any]:
        """Return the rest of what training changes, fit for JSON."""
        return {"step": self.step, "optimizer": self.optimizer.state_dict()["param_groups"]}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same run, bit by bit."""
        try:
            load(self.model, checkpoint.tensors["model"])
            if self.ema is not None:
                load(self.ema.module, checkpoint.tensors["ema"])
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in checkpoint.tensors["optimizer"].items():
                index, _, key = name.partition(".")
                moments.setdefault(int(index), {})[key] = shard_like(tensor, self.parameters[int(index)])
            self.optimizer.load_state_dict({"state": moments, "param_groups": checkpoint.state["optimizer"]})
            self.step = checkpoint.state["step"]
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint of step {checkpoint.step} does not fit this run: {error}") from None


def load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state dict that is in full into a model that may be shared out; RuntimeError if it does not fit."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(value, own.get(name)) for name, value in tensors.items()})


def corresponding(ema: nn.Module, model: nn.Module) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return the tensors of both in the same order: those that are averaged, then whole numbers, which are copied."""
    pairs = list(zip(ema.state_dict().values(), model.state_dict().values(), strict=True))
    parts = [[pair for pair in pairs if pair[0].is_floating_point() == averaged] for averaged in (True, False)]
    return [([own for own, _ in part], [other for _, other in part]) for part in parts]
