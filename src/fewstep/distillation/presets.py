"""Settings for a known model and a GPU's memory, chosen on paper. Light: no torch.

Each phase of a run holds its own things on the GPU: encoders while data are encoded, networks and activations in a
step, the autoencoder while pictures are drawn. A plan fits if its largest phase does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from fewstep.common.text import read_table

GIB = 2**30
MEMORY = (8, 12, 16, 24, 48, 80)
"""Memory of GPUs, in GB."""
ASIDE = 1.5
"""GiB for the CUDA context and workspaces."""
BYTES_4BIT = 0.56
"""Bytes of a weight in 4 bits, with its scales."""
ENCODER_LAYER = 32128 * 4096
"""Weights of the largest layer of a text encoder, which is there alone where blocks are in main memory: T5's tokens."""
LEARNS = 4 + 4 + 8 + 4
"""Bytes of a learned weight: itself, its gradient, AdamW's moments and its average, all fp32."""
AUTOENCODER = {"encode": 2.51, "decode": 3.0}
"""GiB of activations of Stable Diffusion's autoencoder on 2^20 pixels, fp32 (`backbones.autoencoder.MOST_PIXELS`)."""
BATCH = 32
"""Samples of an optimiser step."""
DRAWN_AT_ONCE = 2**16
"""Latent points of the pictures that are drawn at once (`inference.generator.MOST_LATENT_POINTS`)."""
SYNTHESIZED_AT_ONCE = 2
"""Samples that `synthesize` draws at once in these plans."""

Source = Literal["pictures", "set", "rollout"]
"""What is learned from: pictures; a set that the teacher has drawn from prompts before; or its steps from noise to each
sample's time, for prompts alone where the teacher in bf16 does not fit."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Model:
    """A known model; presets.yaml explains each number."""

    name: str
    teacher: str
    size: int
    guidance: tuple[float, float]
    weights: int
    matrices: int
    largest: int
    outside: int
    adapter: int
    held: float
    recomputed: float
    drawn: float
    encoders: int
    encoding: float
    autoencoder: int
    latent: int
    embedded: bool = False

    @property
    def branches(self) -> int:
        """Rows of the network for one guided sample."""
        return 1 if self.embedded else 2


Base = Literal["bf16", "4bit"]
EncoderPrecision = Literal["fp32", "bf16"]
Sizes = list[tuple[int, bool, int, bool]]
"""Rank, whether activations are recomputed, samples of a micro-batch, and whether blocks are in main memory."""


class Plan(NamedTuple):
    """The settings of a run that decide its memory."""

    source: Source
    base: Base
    offload: bool
    rank: int
    checkpointing: bool
    micro_batch: int
    encoder_precision: EncoderPrecision
    validates: bool


_ROWS: dict[str, dict[str, Any]] = read_table(__file__)
MODELS = {name: TypeAdapter(Model).validate_python(row) for name, row in _ROWS.items()}
"""Name -> model."""


def base_bytes(model: Model, base: Base, offload: bool) -> float:
    """Return the bytes of frozen weights on the GPU; with `offload` two blocks and what is outside of them."""
    if base == "bf16":
        return 2 * (2 * model.largest + model.outside if offload else model.weights)
    return BYTES_4BIT * model.matrices + 4 * (model.weights - model.matrices)


def phases(model: Model, plan: Plan) -> dict[str, float]:
    """Return the GiB that each phase of a plan holds on the GPU, by the phase's name."""
    bf16 = 2 * model.weights / GIB
    base = base_bytes(model, plan.base, plan.offload) / GIB
    adapter = plan.rank * model.adapter / GIB
    encoders = (
        (ENCODER_LAYER if plan.offload else model.encoders) * (4 if plan.encoder_precision == "fp32" else 2) / GIB
    )
    autoencoder = 4 * model.autoencoder / GIB
    sample = model.recomputed if plan.checkpointing else model.held
    rows = max(1, DRAWN_AT_ONCE // model.latent**2) * model.branches
    found = {"step": base + LEARNS * adapter + plan.micro_batch * sample}
    if plan.source == "set":
        drawn = SYNTHESIZED_AT_ONCE * model.branches * model.drawn
        found["encoding"] = 4 * model.encoders / GIB + model.encoding  # of `synthesize`, in fp32
        found["synthesis"] = bf16 + drawn
    else:
        picture = AUTOENCODER["encode"] if plan.source == "pictures" else 0.0
        found["encoding"] = encoders + autoencoder + max(model.encoding, picture)
    if plan.validates:
        found["validation prompts"] = base + LEARNS * adapter + encoders + autoencoder + model.encoding
        drawn = max(AUTOENCODER["decode"], rows * model.drawn)
        found["validation pictures"] = base + LEARNS * adapter + autoencoder + drawn
    return {name: ASIDE + held for name, held in found.items()}


def drawing(model: Model) -> float:
    """Return the GiB that `fewstep sample --precision bf16` holds: its encoders stay, in fp32."""
    held = (2 * model.weights + 4 * model.encoders + 4 * model.autoencoder) / GIB
    return ASIDE + held + max(AUTOENCODER["decode"], model.encoding, model.drawn)


def fits(model: Model, plan: Plan, memory: int) -> bool:
    """Return whether a plan fits into a GPU of `memory` GB."""
    return max(phases(model, plan).values()) * GIB <= memory * 1e9


def plans(pictures: bool) -> Iterator[Plan]:
    """Yield plans, the best one first: what saves memory costs time, then rank, then validation.

    Args:
        pictures: whether there are pictures; else prompts alone.
    """
    sources: tuple[Source, ...] = ("pictures",) if pictures else ("set", "rollout")
    whole: Sizes = [(64, False, size, False) for size in (BATCH, 16, 8)]
    recomputed: Sizes = [
        (rank, True, size, offload)
        for rank in (64, 32, 16)
        for size in (BATCH, 16, 8, 4, 2)
        for offload in ((False, True) if size <= 4 else (False,))
    ]
    last: Sizes = [(rank, True, 1, True) for rank in (64, 32, 16, 8)]
    precisions: tuple[EncoderPrecision, ...] = ("fp32", "bf16")
    for source in sources:
        for sizes, validates in product(([*whole, *recomputed], last), (True, False)):
            for (rank, checkpointing, size, offload), encoders in product(sizes, precisions):
                yield Plan(source, "bf16", offload, rank, checkpointing, size, encoders, validates)


def choose(model: Model, memory: int, pictures: bool) -> Plan | None:
    """Return the best plan that fits into a GPU of `memory` GB; None if none does.

    Args:
        pictures: whether there are pictures; else prompts alone.
    """
    return next((plan for plan in plans(pictures) if fits(model, plan, memory)), None)
