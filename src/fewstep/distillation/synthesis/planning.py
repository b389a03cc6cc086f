"""The cost of a synthesis, and its checks from settings, JSON and headers alone. Light: no torch."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.backbones.checks import check_diffusion, check_trajectory
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.errors import UserError
from fewstep.common.files import check_writable
from fewstep.distillation.synthesis.record import (
    CONDITIONS,
    MANIFEST,
    PROMPTS,
    layout,
    read_plan,
    refuse_other,
    shard_name,
)
from fewstep.distillation.synthesis.settings import DrawnSettings, SynthesisConfig

BYTES = {"I64": 8, "F64": 8, "F32": 4, "F16": 2}
"""Bytes of a number by safetensors' name of its type."""


@dataclass(frozen=True)
class SynthesisCost:
    """The cost of a synthesis.

    Attributes:
        samples, shards: of the whole set.
        shard: samples a shard.
        evaluations: of the network for one sample, both branches of a guided call counted.
        sample_bytes: of one sample on disk.
        prompts: number of distinct prompts, whose text states are stored too.
    """

    samples: int
    shards: int
    shard: int
    evaluations: int
    sample_bytes: int
    prompts: int

    def lines(self) -> list[str]:
        """Return the cost as lines of text."""
        total = self.samples * self.evaluations
        return [
            f"samples  {self.samples} of {self.prompts} prompts, in {self.shards} shards of {self.shard}",
            f"calls    {total} network evaluations ({self.evaluations} a sample)",
            f"disk     {in_words(self.samples * self.sample_bytes)} ({in_words(self.sample_bytes)} a sample), "
            f"and the text states of {self.prompts} prompts",
        ]


def in_words(count: float) -> str:
    """Return a number of bytes as text."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and units[1:]:
        count /= 1024
        del units[0]
    return f"{count:.{0 if units[0] == 'bytes' or count >= 100 else 1}f} {units[0]}"


def sample_bytes(settings: DrawnSettings, shape: tuple[int, int, int]) -> int:
    """Return the bytes of one sample in a shard."""
    return sum(math.prod(size) * BYTES[kind] for kind, size in layout(settings, shape, 1).values())


def cost_of(config: SynthesisConfig, lines: Sequence[str], folder: PipelineFolder) -> SynthesisCost:
    """Return the cost of a synthesis of these prompts."""
    samples = len(lines) * config.each
    return SynthesisCost(
        samples,
        -(-samples // config.shard),
        config.shard,
        config.evaluations(from_pure_noise=bool(folder.config("scheduler").get("rescale_betas_zero_snr"))),
        sample_bytes(config, folder.latent_shape),
        len(set(lines)),
    )


def fingerprints(folder: PipelineFolder) -> dict[str, str]:
    """Return the fingerprints of the teacher's denoiser and of its text encoders."""
    return {"teacher": folder.denoising, "encoders": folder.identity(*folder.family.readers)}


def prompt_entries(lines: Sequence[str]) -> dict[str, Any]:
    """Return the entries of a plan that identify the prompts, by the SHA-256 of all, one a line, in their order."""
    digest = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    return {"lines": len(lines), "distinct": len(set(lines)), "prompts": digest}


def check_synthesis(config: SynthesisConfig, lines: Sequence[str], folder: PipelineFolder, out: Path) -> None:
    """Refuse what cannot be drawn, or not into this folder.

    Raises:
        UserError: times off the teacher's schedule, trajectories of a teacher without an unconditional branch, a folder
            that cannot be written to, that holds another set or other files of the same names, or that has no room.
    """
    check_diffusion(folder)
    check_trajectory(config.grid, config.end, folder)
    if config.kind == "trajectories" and folder.takes_guidance:
        raise UserError(
            f"kind = 'trajectories' needs outputs without a prompt, {folder.path} has no unconditional branch; use "
            "'latents'"
        )
    check_writable(out)
    held = read_plan(out)
    if held is None:
        check_free(out)
    else:
        wanted = {"settings": config.drawn.model_dump(mode="json"), **prompt_entries(lines)}
        refuse_other(out, held, wanted)
        refuse_other(out, held, fingerprints(folder))
    _check_room(cost_of(config, lines, folder), out)


def check_free(out: Path) -> None:
    """Refuse a folder without a set that holds files of the same names: they would be lost."""
    for name in (PROMPTS, CONDITIONS, MANIFEST, shard_name(0)):
        if (out / name).exists():
            raise UserError(f"out = {str(out)!r} holds {name}, which would be lost; use a new folder")


def _check_room(cost: SynthesisCost, out: Path) -> None:
    place = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    held = sum(file.stat().st_size for file in out.glob("shard-*.safetensors"))
    wanted, free = cost.samples * cost.sample_bytes - held, shutil.disk_usage(place).free
    if wanted > free:
        fit = max(0, (free + held) // cost.sample_bytes)
        raise UserError(
            f"the set takes {in_words(wanted)} more, {out} has {in_words(free)} free: room for {fit} of "
            f"{cost.samples} samples; use fewer prompts, a smaller each or grid, or another --out",
            field="out",
        )
