"""One training of networks in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from fewstep.common.config import Config
from fewstep.common.distributed import on_main_process
from fewstep.common.rng import KeyedRng
from fewstep.training.config import LoopConfig
from fewstep.training.loop import train
from fewstep.training.run_folder import RunLog
from fewstep.training.update import Batch, Update

ENDLESS = 2**62
"""Number of samples of a data source that draws them as they are needed."""
Weights = Mapping[str, dict[str, Tensor]]
"""Update -> name -> weight."""


def fit(
    title: str,
    plan: Sequence[Update],
    fetch: Callable[[np.ndarray, KeyedRng], Batch],
    count: int,
    folder: Path,
    config: Config,
    loop: LoopConfig,
    accelerator: Accelerator,
    inputs: Mapping[str, Any] | None = None,
    evaluate: Callable[[Weights], Mapping[str, float]] | None = None,
    *,
    quiet: bool = False,
) -> Weights:
    """Run an update plan in a run folder, resuming what is there; return the averaged weights.

    Args:
        title: of the run, for its progress bar.
        count: samples, visited in a fresh order each epoch; those of an `ENDLESS` source are visited in order.
        config: what the folder records and a resumed run must repeat.
        inputs: fingerprints of what the training reads, which a resumed run must repeat.
        evaluate: averaged weights -> figures for the log.

    Raises:
        UserError: the folder holds another run or cannot be written to, or the loss is not finite.
    """
    validate = None if evaluate is None else on_main_process(lambda _, weights: evaluate(weights))
    visits = np.arange if count == ENDLESS else None
    with RunLog(folder, config, title=title, inputs=inputs, main=accelerator.is_main_process, quiet=quiet) as log:
        return train(plan, fetch, count, loop, log, accelerator, validate, visits=visits).weights
