"""The training loop: it runs an update plan over batches and knows no method.

A method hands over an ordered list of `Update`s: whose parameters, which loss, how often. The loop owns
everything else: order of the data, random draws, accumulation, clipping, averages, logs, checkpoints, resuming.
Nothing in a step waits for the device; numbers are read back where they are logged or saved only.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.common import distributed as processes
from fewstep.common.distributed import (
    DelayedAny,
    average_over_processes,
    fail_together,
    gather_to_main,
    sum_over_processes,
)
from fewstep.common.errors import NotFiniteError, UserError
from fewstep.common.files import sweep
from fewstep.common.rng import KeyedRng, order
from fewstep.common.sharding import full_on_main, full_tensor, is_sharded
from fewstep.common.tensors import load_tensors
from fewstep.diffusion.time_conditioning import current_names
from fewstep.training import checkpoint
from fewstep.training.config import LoopConfig, OptimConfig, check_batch
from fewstep.training.ema import Ema
from fewstep.training.loss import Loss
from fewstep.training.lr_schedule import learning_rate
from fewstep.training.optim import clip_gradients, make_optimizer
from fewstep.training.run_folder import RunLog, checkpoints, last_step
from fewstep.training.stopping import Stop, StoppedError

T_BINS = 10
"""Bins of t/T in which the loss is reported."""

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class EmaTarget:
    """Weights of another role that follow an update's parameters as a moving average (a consistency target)."""

    weights: Mapping[str, Tensor]
    decay: float


@dataclass(frozen=True)
class Update:
    """One line of an update plan: minimise `loss` over `parameters` every `every` steps.

    Attributes:
        start: share of the run's steps before the first one. The learning rate follows the run, not this update.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    loss: Callable[[Batch, KeyedRng], Loss]
    optim: OptimConfig
    every: int = 1
    ema_target: EmaTarget | None = None
    start: float = 0.0

    def due(self, step: int, steps: int) -> bool:
        """Return whether a run of `steps` takes it at a step."""
        return step % self.every == 0 and step / steps >= self.start


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients over all processes; those of split weights are averaged already."""
    if not is_sharded(parameters):
        average_over_processes([p.grad for p in parameters if p.grad is not None])


class _Running:
    """An update with its optimiser, its average and its sums since the last log line."""

    def __init__(self, update: Update, device: torch.device) -> None:
        self.update = update
        self.names = list(update.parameters)
        self.parameters = list(update.parameters.values())
        self.split = is_sharded(self.parameters)
        self.optimizer = make_optimizer(self.parameters, update.optim)
        self.averages: dict[str, Ema] = {}
        if update.optim.ema:
            self.averages["ema"] = Ema(update.parameters, update.optim.ema)
        if update.ema_target:
            followed = update.ema_target
            self.averages["follower"] = Ema(update.parameters, followed.decay, followed.weights, warm_up=False)
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weighed: dict[str, float] = {}
        self.bin_sum = torch.zeros(T_BINS, device=self.device)
        self.bin_count = torch.zeros(T_BINS, device=self.device)

    def note(self, name: str, value: Tensor, parts: int = 1) -> None:
        """Add to the next log line: one of so many parts of a step in each process. A step weighs 1, however split."""
        weight = 1 / (parts * processes.world_size())
        self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + weight * value.detach().float()
        self.weighed[name] = self.weighed.get(name, 0.0) + weight

    def note_bins(self, loss: Loss) -> None:
        if loss.per_sample is None or loss.t is None:
            return
        index = (loss.t * T_BINS).long().clamp(0, T_BINS - 1).to(self.device, non_blocking=True)
        self.bin_sum.index_add_(0, index, loss.per_sample.detach().float())
        self.bin_count.index_add_(0, index, torch.ones_like(loss.per_sample, dtype=torch.float32))

    def backward(
        self, batch: Batch, rng: KeyedRng, accelerator: Accelerator, accumulate: int, others: Sequence[nn.Parameter]
    ) -> None:
        """Add one micro-batch's gradients, and none to `others`, the parameters of other updates."""
        with accelerator.autocast():
            loss = self.update.loss(batch, rng)
        # only into its own parameters: a loss may run through those of another update
        if not self.split:
            accelerator.backward(loss.value / accumulate, inputs=self.parameters)
        else:  # what the graph holds of split weights is their gathered selves, which cannot be named
            kept = [p.grad for p in others]
            for parameter in others:
                parameter.grad = None
            accelerator.backward(loss.value / accumulate)
            for parameter, grad in zip(others, kept, strict=True):
                parameter.grad = grad
        self.note("loss", loss.value, accumulate)
        self.note_bins(loss)
        for name, value in loss.scalars.items():
            self.note(name, value, accumulate)

    def step(self, accelerator: Accelerator, step: int, steps: int) -> None:
        """Take one optimiser step with the gathered gradients, and let the averages follow."""
        _average_gradients(self.parameters)
        scaler = accelerator.scaler
        if scaler:
            scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.update.optim.clip)
        # the scaler skips a step whose gradients have overflowed, and lowers its scale
        self.note("grad_norm", torch.nan_to_num(norm, 0.0, 0.0) if scaler else norm)
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

    def _message(self) -> Tensor:
        """Sums since the last `read` in this process, by name and by bin, and how many are in each bin."""
        return torch.cat([*(value.reshape(1) for value in self.sums.values()), self.bin_sum, self.bin_count])

    def _totals(self) -> tuple[dict[str, tuple[float, float]], list[tuple[float, float]]]:
        """Sums and weights since the last `read`, by name and by bin, over all processes; waits for the device."""
        weights = torch.tensor(list(self.weighed.values()), device=self.device)
        numbers = sum_over_processes(torch.cat([weights, self._message()])).tolist()  # one message
        names = len(weights)
        bins = numbers[2 * names :]
        by_name = dict(zip(self.sums, zip(numbers[names : 2 * names], numbers[:names], strict=True), strict=True))
        return by_name, list(zip(bins[:T_BINS], bins[T_BINS:], strict=True))

    def bad(self) -> list[str]:
        """Which sums since the last `read` are not finite in any process; all must ask."""
        return [f"{self.update.name}/{k}" for k, (v, _) in self._totals()[0].items() if not math.isfinite(v)]

    def read(self) -> dict[str, float]:
        """Means since the last call over all processes, which all must ask; waits for the device."""
        by_name, bins = self._totals()
        result = {f"{self.update.name}/{k}": value / weight for k, (value, weight) in by_name.items()}
        for index, (value, count) in enumerate(bins):
            if count:
                result[f"{self.update.name}/loss_t{index / T_BINS:.1f}"] = value / count
        self.reset()
        return result

    def files(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of it, whole; every process must ask, the main one alone gets all."""
        name = self.update.name
        files: dict[str, Mapping[str, Tensor]] = {
            name: self.update.parameters,
            f"{name}.optimizer": checkpoint.optimizer_tensors(self.optimizer, self.names),
        }
        for kind, average in self.averages.items():
            files[f"{name}.{kind}"] = average.shadow
        return {file: full_on_main(tensors) for file, tensors in files.items()}

    def state(self) -> dict[str, int]:
        """What of the averages is no tensor."""
        return {kind: average.updates for kind, average in self.averages.items()}

    def noted(self) -> dict[str, Any]:
        """What the next log line is to say of the steps since the last, by process: a resumed run says the same.

        Every process must ask, the main one alone gets all.
        """
        if not self.sums:
            return {}
        return {
            "weighed": self.weighed,
            "processes": gather_to_main(self._message()[None], processes.world_size()).tolist(),
        }

    def note_again(self, noted: Mapping[str, Any]) -> None:
        """Put back what `noted` said; another number of processes shares it out."""
        before, now = noted["processes"], processes.world_size()
        numbers = torch.tensor([*before[processes.rank() :: now], [0.0] * len(before[0])]).sum(0).to(self.device)
        sums, self.bin_sum, self.bin_count = torch.split(numbers, [len(noted["weighed"]), T_BINS, T_BINS])
        self.sums = dict(zip(noted["weighed"], sums, strict=True))
        self.weighed = {name: weight * len(before) / now for name, weight in noted["weighed"].items()}

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, or else the last ones; copies. Of split weights the whole, on the CPU; all must ask."""
        ema = self.averages.get("ema")
        source: Mapping[str, Tensor] = ema.shadow if ema else self.update.parameters
        if self.split:
            return {name: full_tensor(tensor.detach()).cpu() for name, tensor in source.items()}
        return {name: tensor.detach().clone() for name, tensor in source.items()}

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        name = self.update.name
        path = folder / f"{name}.safetensors"
        checkpoint.restore_parameters(self.update.parameters, current_names(load_tensors(path)), path)
        tensors = current_names(load_tensors(folder / f"{name}.optimizer.safetensors"))
        checkpoint.restore_optimizer(self.optimizer, self.names, tensors)
        for kind, average in self.averages.items():
            average.copy_from(current_names(load_tensors(folder / f"{name}.{kind}.safetensors")))
            average.updates = state["averages"][name][kind]
        noted = state.get("noted", {}).get(name)  # older checkpoints have none
        if noted:
            self.note_again(noted)


@dataclass
class Trained:
    """What a finished run hands on: the averaged (or else the last) weights of each update."""

    weights: dict[str, dict[str, Tensor]]
    step: int


def check_split(config: LoopConfig, accelerator: Accelerator) -> None:
    """Refuse a batch that cannot be split over processes and micro-batches.

    Raises:
        UserError: naming the nearest legal batch.
    """
    try:
        check_batch(config.batch, config.accumulate, accelerator.num_processes)
    except ValueError as error:
        raise UserError(f"loop.{error}") from error


def train(
    plan: Sequence[Update],
    fetch: Callable[[np.ndarray, KeyedRng], Batch],
    count: int,
    config: LoopConfig,
    log: RunLog,
    accelerator: Accelerator,
    validate: Callable[[int, dict[str, dict[str, Tensor]]], Mapping[str, float]] | None = None,
    beside: Callable[[int], Mapping[str, Any]] | None = None,
    visits: Callable[[int, int], np.ndarray] | None = None,
) -> Trained:
    """Run `plan` for `config.steps` steps, resuming from the newest checkpoint of the run folder.

    Args:
        fetch: item numbers (int64 [b], below `count`), the draws of their step -> batch on the device of `accelerator`;
            called beside the step before it, in a thread of its own.
        count: number of items; they are visited in a fresh order each epoch.
        watch: called every `config.validate_every` steps with the step and the weights to judge; its figures
            are logged. It must leave the parameters as they were. Every process calls it: what one of them should do
            alone stands in `processes.on_main`.
        visits: (start, stop) -> the items at these positions of an endless pass; a fresh shuffle each epoch by default.
        beside: what the caller wants kept with the checkpoint of a step, as `beside` in its state.json.

    Returns:
        the averaged weights, and the step they are of: a run that has gone further is not taken back.

    Raises:
        UserError: the batch cannot be split over processes and micro-batches, or a loss or gradient is not
            finite, in all processes at the same step (what is not finite is never saved); or the run that is to
            be resumed was computed in another precision or on another kind of device.
        StoppedError: SIGINT or SIGTERM came in any process; all have stopped after the same step, which is saved. A
            second signal goes to the handlers that were there before.
    """
    check_split(config, accelerator)
    share = config.accumulate * accelerator.num_processes
    device = accelerator.device
    running = [_Running(update, device) for update in plan]
    scaler = accelerator.scaler  # fp16 alone: its small gradients would vanish unscaled
    computing = f"{accelerator.mixed_precision.replace('no', 'fp32')} on {device.type}"
    folder = log.folder / "checkpoints"
    done, unwatched = 0, False
    found = checkpoints(folder)
    if found:
        state = checkpoint.read_state(found[-1], whole=True)
        before = state.get("computing", computing)
        if before != computing:
            raise UserError(
                f"run folder {log.folder} holds a run in {before}, this is {computing}: its steps would not be the "
                "same; set loop.precision and device as they were, or give another --out"
            )
        done, unwatched = int(state["step"]), bool(state.get("unwatched"))
        for r in running:
            r.restore(found[-1], state)
        if scaler:
            scaler.load_state_dict(state["scaler"])
    if accelerator.is_main_process:
        sweep(folder)
    log.truncate(done)  # with no checkpoint yet, what a killed run logged
    micro = config.batch // share

    def positions(step: int, part: int) -> np.ndarray:
        start = step * config.batch + (part * accelerator.num_processes + accelerator.process_index) * micro
        return np.arange(start, start + micro)

    def load(step: int, part: int) -> tuple[KeyedRng, Batch]:
        where = positions(step, part)
        start, stop = int(where[0]), int(where[-1]) + 1
        rng = KeyedRng(config.seed, step, tuple(int(i) for i in where), device, config.steps)
        return rng, fetch(visits(start, stop) if visits else order(config.seed, count, start, stop), rng)

    def refuse(step: int, bad: Sequence[str]) -> None:
        if bad:
            last = last_step(folder)
            kept = f"the checkpoint at step {last} is finite" if last else "no checkpoint was saved before it"
            raise NotFiniteError(
                f"{bad[0]} is not finite at step {step}; {kept}. Start another run with a lower optim.lr "
                f"(now {plan[0].optim.lr:g}) or loop.precision = fp32"
            )

    def save(step: int, files: Mapping[str, Mapping[str, Tensor]], noted: Mapping[str, Any], unwatched: bool) -> None:
        averages = {r.update.name: r.state() for r in running}
        state: dict[str, Any] = {"computing": computing, "averages": averages, "noted": dict(noted)}
        if unwatched:
            state["unwatched"] = True
        if scaler:
            state["scaler"] = scaler.state_dict()
        if beside:
            state["beside"] = dict(beside(step))
        checkpoint.save(folder, step, files, state, config.keep)

    def judge(step: int) -> None:
        if validate:
            log.figures(step, dict(validate(step, {r.update.name: r.weights() for r in running})))

    def keep(step: int, unwatched: bool = False) -> None:
        files = {name: tensors for r in running for name, tensors in r.files().items()}
        noted = {r.update.name: r.noted() for r in running}
        with fail_together():
            if accelerator.is_main_process:
                save(step, files, noted, unwatched)

    def stopped(step: int) -> StoppedError:
        text = f"{log.title}: stopped at step {step}, checkpoint at step {step}; run the same command again to go on"
        return StoppedError(stop.number or signal.SIGTERM, text)

    if unwatched:  # stopped before its quality check
        judge(done)
        keep(done)
    coming = ((step, part) for step in range(done, config.steps) for part in range(config.accumulate))
    stop, vote = Stop(launched=accelerator.num_processes > 1), DelayedAny()
    with stop, ThreadPoolExecutor(max_workers=1) as pool, log.progress(done, config.steps) as bar:

        def read_ahead() -> tuple[int, int, Future[tuple[KeyedRng, Batch]]] | None:
            piece = next(coming, None)
            return (*piece, pool.submit(load, *piece)) if piece else None

        ahead = read_ahead()
        while ahead:
            step, part, reading = ahead
            rng, batch = reading.result()
            ahead = read_ahead()
            last = part == config.accumulate - 1
            due = [r for r in running if r.update.due(step, config.steps)]
            for r in due:
                others = [p for other in running if other is not r for p in other.parameters]
                r.backward(batch, rng, accelerator, config.accumulate, others)
            if not last:
                continue
            # only now: with all gradients at the weights of the step's start, the split into micro-batches is no choice
            for r in due:
                r.step(accelerator, step, config.steps)
            if scaler and due:
                scaler.update()
            now = step + 1
            ends = now == config.steps
            if now % config.log_every == 0 or ends:
                figures = {key: value for r in running for key, value in r.read().items()}
                refuse(now, [key for key, value in figures.items() if not math.isfinite(value)])
                log.figures(now, figures)
                bar.note(figures)
            bar.step()
            stops = vote.update(bool(stop.number))
            # of the config alone: every process must come to the same answer, and only the main one needs a watch
            watches = bool(config.validate_every) and (now % (config.validate_every or 1) == 0 or ends)
            if not (watches or stops or now % config.save_every == 0 or ends):
                continue
            refuse(now, [name for r in running for name in r.bad()])
            pending = watches and validate is not None
            if pending and not stops:
                with suppress(StoppedError), stop.raising():
                    judge(now)
                    pending = False
            stops = stops or pending  # the check is made when the run is resumed
            if stops or now % config.save_every == 0 or ends:
                keep(now, pending)
            if stops:
                raise stopped(now)
        if vote.result():
            raise stopped(config.steps)
    return Trained({r.update.name: r.weights() for r in running}, max(done, config.steps))
