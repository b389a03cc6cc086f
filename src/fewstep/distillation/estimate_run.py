"""The estimate of a run before it starts: its networks loaded, one batch encoded, one step timed."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from fewstep.common.device import pick_device
from fewstep.data.images import Captioned
from fewstep.data.latents import latent_set
from fewstep.distillation.checks import Inputs, read_inputs
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.estimate import Estimated, estimate, kept_bytes
from fewstep.distillation.frozen_networks import latent_lpips_folder
from fewstep.distillation.prepare import lay_out, load_teacher, with_trajectories
from fewstep.distillation.run_data import EncodedData, encode_set, encoders_fingerprint, find_captioned
from fewstep.distillation.synthesis.record import SynthesizedSet

FEW = 64
"""Most samples that are encoded for an estimate."""


def estimate_run(config: DistillConfig, inputs: Inputs | None = None) -> list[Estimated]:
    """Return what a run takes, stage by stage. Nothing is written.

    Args:
        inputs: what the config names, if it was read already.

    Raises:
        UserError: the teacher or the data cannot be read.
    """
    inputs = inputs or read_inputs(config)
    names = [stage.name for stage in config.stages] or [""]
    stages = zip(names, config.each_stage(), strict=True)
    return [replace(estimate_stage(stage, inputs), name=name) for name, stage in stages]


def estimate_stage(
    config: DistillConfig,
    inputs: Inputs,
    captioned: Captioned | None = None,
    lacking: tuple[int, int] | None = None,
    place: Path | None = None,
) -> Estimated:
    """Return what one stage takes. A distance that would be trained first is timed as L2, which takes less.

    Args:
        captioned: its pictures and captions, if they are found already.
        lacking: how many pictures and captions are to be encoded; all that its steps can use, if left out.
        place: folder for what is encoded here, of which nothing is kept; a temporary one if left out.
    """
    method = config.method
    if method.distance == "latent_lpips" and not config.latent_lpips.folder:
        config = config.model_copy(update={"method": method.model_copy(update={"distance": "l2"})})
    source, backbone = inputs.source, load_teacher(config, inputs.teacher, pick_device(config.device))
    latent_lpips = latent_lpips_folder(config, source, backbone, (), Path())  # a named one, or none
    if isinstance(source, SynthesizedSet):
        run = lay_out(config, backbone, encode_set(config, source, backbone), latent_lpips)
        return estimate(run, run.update_plan())
    with nullcontext(place) if place else tempfile.TemporaryDirectory() as cache:
        every = captioned or find_captioned(config, source, backbone.folder, Path(cache))
        backbone.load_encoders()
        few = every.take(range(min(max(2, config.loop.batch), len(every), FEW)))
        fingerprint = encoders_fingerprint(
            config, backbone.folder
        )  # before the clock: hashed once for any number of pictures
        started = time.perf_counter()
        data = latent_set(few, backbone, fingerprint, Path(cache), backbone.latent_shape)
        needed = min(len(every), config.loop.steps * config.loop.batch) if lacking is None else max(lacking)
        encoding = (time.perf_counter() - started) / len(few) * needed
        share = captions_share = needed / len(few)
        drawn = min(config.data.trajectories, config.loop.batch, FEW)
        shortened = config.model_copy(update={"data": config.data.model_copy(update={"trajectories": drawn})})
        run = lay_out(shortened, backbone, EncodedData(source, few, data), latent_lpips)
        if config.method.start == "trajectory":
            started = time.perf_counter()
            run, share = with_trajectories(run, Path(cache)), config.data.trajectories / drawn
            encoding += (time.perf_counter() - started) * share
        estimated = estimate(run, run.update_plan())
    text_states = sum(kept_bytes(rows) for rows in run.data.table.values())
    held = share * kept_bytes(run.data.latents) + captions_share * text_states
    return replace(estimated, encoding_seconds=encoding, data_bytes=round(held), data=every.line())
