"""The training loop: runs an update plan over batches, for any method.

A method provides an ordered list of `Update`s: parameters, loss, optimiser, how often. The loop owns everything else:
order of the data, random numbers, accumulation, clipping, averages, logs, checkpoints, resuming. Nothing in a step
waits for the device; numbers are read back where they are logged or saved.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from fewstep.common.distributed import DelayedAny, fail_together
from fewstep.common.errors import NotFiniteError, UserError
from fewstep.common.files import sweep
from fewstep.common.rng import KeyedRng, order
from fewstep.training import checkpoint
from fewstep.training.config import LoopConfig, check_batch
from fewstep.training.run_folder import RunLog, checkpoints, last_step
from fewstep.training.stopping import Stop, StoppedError
from fewstep.training.update import Batch, Update, UpdateState

Fetch = Callable[[np.ndarray, KeyedRng], Batch]
Weights = dict[str, dict[str, Tensor]]


@dataclass
class Trained:
    """Result of a run: the averaged (or else the last) weights of each update, and their step."""

    weights: Weights
    step: int


def check_split(config: LoopConfig, accelerator: Accelerator) -> None:
    """Refuse a batch that cannot be split over processes and micro-batches.

    Raises:
        UserError: loop.batch is not a multiple of both.
    """
    try:
        check_batch(config.batch, config.accumulate, accelerator.num_processes)
    except ValueError as error:
        raise UserError(f"loop.{error}", field="loop.batch") from error


def train(
    plan: Sequence[Update],
    fetch: Fetch,
    count: int,
    config: LoopConfig,
    log: RunLog,
    accelerator: Accelerator,
    validate: Callable[[int, Weights], Mapping[str, float]] | None = None,
    beside: Callable[[int], Mapping[str, Any]] | None = None,
    visits: Callable[[int, int], np.ndarray] | None = None,
) -> Trained:
    """Run `plan` for `config.steps` steps, resuming from the newest checkpoint of the run folder.

    Args:
        fetch: (item numbers int64 [b] below `count`, random numbers of their step) -> batch on the device of
            `accelerator`; called during the previous step in a thread of its own.
        count: number of items; they are visited in a fresh order each epoch.
        validate: called every `config.validate_every` steps with the step and the weights; its figures are logged. It
            must leave the parameters unchanged. Every process calls it; wrap it in `distributed.on_main_process` to
            run it in the main process alone.
        beside: (step) -> notes of the caller, kept as `beside` in the state.json of that step's checkpoint.
        visits: (start, stop) -> the items at these positions of an endless pass; by default a fresh shuffle each epoch.

    Returns:
        the averaged weights and their step; a run that has gone further than `config.steps` is not taken back.

    Raises:
        UserError: the batch cannot be split over processes and micro-batches; a loss or gradient is not finite, in
            all processes at the same step (such weights are never saved); or the run to resume was computed in another
            precision or on another kind of device.
        StoppedError: SIGINT or SIGTERM arrived in any process; all have stopped after the same step, which is saved. A
            second signal is passed to the previous handlers.
    """
    check_split(config, accelerator)
    updates = [UpdateState(update, accelerator.device) for update in plan]
    run = _Checkpoints(updates, config, log, accelerator, beside)
    done, unvalidated = run.resume()

    def evaluate(step: int) -> None:
        if validate:
            log.figures(step, dict(validate(step, {u.update.name: u.weights() for u in updates})))

    if unvalidated:  # the run was stopped before its validation
        evaluate(done)
        run.save(done)
    stop, stopping = Stop(launched=accelerator.num_processes > 1), DelayedAny()

    def stopped(step: int) -> StoppedError:
        text = f"{log.title}: stopped at step {step}, checkpoint at step {step}; run the same command again to go on"
        return StoppedError(stop.number or signal.SIGTERM, text)

    micro_batches = _prefetched(done, fetch, count, config, accelerator, visits)
    with stop, closing(micro_batches), log.progress(done, config.steps) as bar:
        for step in range(done, config.steps):
            due = [u for u in updates if u.update.due(step, config.steps)]
            for rng, batch in islice(micro_batches, config.accumulate):
                for u in due:
                    others = [p for other in updates if other is not u for p in other.parameters]
                    u.backward(batch, rng, accelerator, config.accumulate, others)
            # all gradients are taken at the weights of the step's start, so that micro-batches change nothing
            for u in due:
                u.step(accelerator, step, config.steps)
            if accelerator.scaler and due:
                accelerator.scaler.update()

            now, last = step + 1, step + 1 == config.steps
            if now % config.log_every == 0 or last:
                figures = {key: value for u in updates for key, value in u.means.read().items()}
                run.check_finite(now, [key for key, value in figures.items() if not math.isfinite(value)])
                log.figures(now, figures)
            bar.update()

            stops = stopping.update(bool(stop.number))
            saves = now % config.save_every == 0 or last
            # of the config alone: all processes must agree, and only the main one may have `validate`
            validates = bool(config.validate_every) and (now % (config.validate_every or 1) == 0 or last)
            if not (validates or saves or stops):
                continue
            run.check_finite(now, [name for u in updates for name in u.means.not_finite()])
            pending = validates and validate is not None
            if pending and not stops:
                with suppress(StoppedError), stop.raising():
                    evaluate(now)
                    pending = False
            stops = stops or pending  # a validation that was interrupted is made when the run is resumed
            if saves or stops:
                run.save(now, pending)
            if stops:
                raise stopped(now)
        if stopping.result():
            raise stopped(config.steps)
    return Trained({u.update.name: u.weights() for u in updates}, max(done, config.steps))


def _prefetched(
    done: int,
    fetch: Fetch,
    count: int,
    config: LoopConfig,
    accelerator: Accelerator,
    visits: Callable[[int, int], np.ndarray] | None,
) -> Generator[tuple[KeyedRng, Batch]]:
    """Yield this process's micro-batches from step `done` on; a thread reads the next one while one is in use."""
    micro = config.batch // (config.accumulate * accelerator.num_processes)

    def load(step: int, part: int) -> tuple[KeyedRng, Batch]:
        start = step * config.batch + (part * accelerator.num_processes + accelerator.process_index) * micro
        stop = start + micro
        rng = KeyedRng(config.seed, step, tuple(range(start, stop)), accelerator.device, config.steps)
        return rng, fetch(visits(start, stop) if visits else order(config.seed, count, start, stop), rng)

    with ThreadPoolExecutor(max_workers=1) as pool:
        # lazy: a micro-batch is submitted when it is the next one
        coming = (pool.submit(load, s, part) for s in range(done, config.steps) for part in range(config.accumulate))
        ahead = next(coming, None)
        while ahead:
            ready = ahead.result()
            ahead = next(coming, None)
            yield ready


class _Checkpoints:
    """Checkpoints of one run: `step-*` folders below its run folder."""

    def __init__(
        self,
        updates: Sequence[UpdateState],
        config: LoopConfig,
        log: RunLog,
        accelerator: Accelerator,
        beside: Callable[[int], Mapping[str, Any]] | None,
    ) -> None:
        self._updates = updates
        self._keep = config.keep
        self._log = log
        self._folder = log.folder / "checkpoints"
        self._main = accelerator.is_main_process
        self._scaler = accelerator.scaler  # fp16 alone
        self._computing = f"{accelerator.mixed_precision.replace('no', 'fp32')} on {accelerator.device.type}"
        self._beside = beside

    def resume(self) -> tuple[int, bool]:
        """Restore the newest checkpoint, if any, and drop what was logged after it.

        Returns:
            the steps done, and whether the validation of the last one is missing.
        """
        step, unvalidated = 0, False
        found = checkpoints(self._folder)
        if found:
            state = checkpoint.read_state(found[-1], whole=True)
            before = state.get("computing", self._computing)
            if before != self._computing:
                raise UserError(
                    f"run folder {self._log.folder} holds a run in {before}, this is {self._computing}: its steps "
                    "would differ; set loop.precision and device as they were, or give another --out",
                    field="loop.precision",
                )
            step, unvalidated = int(state["step"]), bool(state.get("unwatched"))
            for u in self._updates:
                u.restore(found[-1], state)
            if self._scaler:
                self._scaler.load_state_dict(state["scaler"])
        if self._main:
            sweep(self._folder)
        self._log.truncate(step)
        return step, unvalidated

    def save(self, step: int, unvalidated: bool = False) -> None:
        """Write a checkpoint in the main process (a collective).

        Args:
            unvalidated: the step's validation is to be made when the run is resumed.
        """
        files = {name: tensors for u in self._updates for name, tensors in u.files().items()}
        state: dict[str, Any] = {
            "computing": self._computing,
            "averages": {
                u.update.name: {kind: average.updates for kind, average in u.averages.items()} for u in self._updates
            },
            "noted": {u.update.name: u.means.state() for u in self._updates},
        }
        with fail_together():
            if not self._main:
                return
            if unvalidated:
                state["unwatched"] = True
            if self._scaler:
                state["scaler"] = self._scaler.state_dict()
            if self._beside:
                state["beside"] = dict(self._beside(step))
            checkpoint.save(self._folder, step, files, state, self._keep)

    def check_finite(self, step: int, bad: Sequence[str]) -> None:
        """Refuse to go on with figures that are not finite.

        Raises:
            NotFiniteError: naming the first of `bad`.
        """
        if bad:
            last = last_step(self._folder)
            kept = f"the checkpoint at step {last} is finite" if last else "no checkpoint was saved before it"
            raise NotFiniteError(
                f"{bad[0]} is not finite at step {step}; {kept}. Start another run with a lower optim.lr "
                f"(now {self._updates[0].update.optim.lr:g}) or loop.precision = fp32",
                field="optim.lr",
            )
