"""Updates of a training step: parameters, their loss, optimiser and averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.common.distributed import average_over_processes
from fewstep.common.rng import KeyedRng
from fewstep.common.sharding import full_on_main, full_tensor, is_sharded
from fewstep.common.tensors import load_tensors
from fewstep.diffusion.time_conditioning import current_names
from fewstep.training import checkpoint
from fewstep.training.config import OptimConfig, learning_rate
from fewstep.training.ema import Ema
from fewstep.training.log_means import LogMeans
from fewstep.training.loss import Loss
from fewstep.training.optim import clip_gradients, make_optimizer

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class EmaTarget:
    """Weights of another role that follow an update's parameters as a moving average (a consistency target)."""

    weights: Mapping[str, Tensor]
    decay: float


@dataclass(frozen=True)
class Update:
    """One entry of an update plan: minimise `loss` over `parameters` every `every` steps.

    Attributes:
        start: share of the run's steps before the first update. The learning rate follows the run, not this update.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    loss: Callable[[Batch, KeyedRng], Loss]
    optim: OptimConfig
    every: int = 1
    ema_target: EmaTarget | None = None
    start: float = 0.0

    def due(self, step: int, steps: int) -> bool:
        """Return whether a run of `steps` steps makes this update at `step`."""
        return step % self.every == 0 and step / steps >= self.start


class UpdateState:
    """An update in a run: its optimiser, its averages and its means for the log."""

    def __init__(self, update: Update, device: torch.device) -> None:
        self.update = update
        self.names = list(update.parameters)
        self.parameters = list(update.parameters.values())
        self.sharded = is_sharded(self.parameters)
        self.optimizer = make_optimizer(self.parameters, update.optim)
        self.averages: dict[str, Ema] = {}  # keys are parts of file names
        if update.optim.ema:
            self.averages["ema"] = Ema(update.parameters, update.optim.ema)
        if update.ema_target:
            target = update.ema_target
            self.averages["follower"] = Ema(update.parameters, target.decay, target.weights, warm_up=False)
        self.means = LogMeans(update.name, device)

    def backward(
        self, batch: Batch, rng: KeyedRng, accelerator: Accelerator, accumulate: int, others: Sequence[nn.Parameter]
    ) -> None:
        """Add one micro-batch's gradients; those of `others`, the parameters of other updates, stay unchanged."""
        with accelerator.autocast():
            loss = self.update.loss(batch, rng)
        if not self.sharded:
            accelerator.backward(loss.value / accumulate, inputs=self.parameters)
        else:  # the graph holds gathered copies of sharded weights, which cannot be named as inputs
            kept = [p.grad for p in others]
            for parameter in others:
                parameter.grad = None
            accelerator.backward(loss.value / accumulate)
            for parameter, grad in zip(others, kept, strict=True):
                parameter.grad = grad
        self.means.add_loss(loss, accumulate)

    def step(self, accelerator: Accelerator, step: int, steps: int) -> None:
        """Average the gradients over processes, clip them, take one optimiser step and update the averages."""
        if not self.sharded:  # gradients of sharded weights are averaged already
            average_over_processes([p.grad for p in self.parameters if p.grad is not None])
        scaler = accelerator.scaler
        if scaler:
            scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.update.optim.clip)
        # the scaler skips a step whose gradients have overflowed, and lowers its scale
        self.means.add("grad_norm", torch.nan_to_num(norm, 0.0, 0.0) if scaler else norm)
        every = self.update.every
        rate = learning_rate(self.update.optim, step // every, -(-steps // every))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if scaler:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages.values():
            average.update(self.update.parameters)

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the averaged weights, or of the last ones without an average.

        Sharded weights are gathered on the CPU of every process (a collective).
        """
        ema = self.averages.get("ema")
        source: Mapping[str, Tensor] = ema.shadow if ema else self.update.parameters
        if self.sharded:
            return {name: full_tensor(tensor.detach()).cpu() for name, tensor in source.items()}
        return {name: tensor.detach().clone() for name, tensor in source.items()}

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Return the full tensors of a checkpoint by file name (a collective); complete in the main process."""
        name = self.update.name
        files: dict[str, Mapping[str, Tensor]] = {
            name: self.update.parameters,
            f"{name}.optimizer": checkpoint.optimizer_tensors(self.optimizer, self.names),
        }
        for kind, average in self.averages.items():
            files[f"{name}.{kind}"] = average.shadow
        return {file: full_on_main(tensors) for file, tensors in files.items()}

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Read a checkpoint folder and its state.json."""
        name = self.update.name

        def read(file: str) -> dict[str, Tensor]:
            return current_names(load_tensors(folder / f"{file}.safetensors"))

        checkpoint.restore_parameters(self.update.parameters, read(name), folder / f"{name}.safetensors")
        checkpoint.restore_optimizer(self.optimizer, self.names, read(f"{name}.optimizer"))
        for kind, average in self.averages.items():
            average.copy_from(read(f"{name}.{kind}"))
            average.updates = state["averages"][name][kind]
        sums = state.get("noted", {}).get(name)  # checkpoints of older versions have none
        if sums:
            self.means.restore(sums)
