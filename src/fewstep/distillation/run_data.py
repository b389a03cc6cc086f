"""The data of a run: found before any network is loaded, and then encoded as far as the run uses it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fewstep.backbones.base import Backbone
from fewstep.backbones.lengths import CutPrompts
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.distributed import print_once
from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.common.rng import order
from fewstep.common.run_inputs import PARTS
from fewstep.data.buckets import BucketedFiles, bucketed, shape_order
from fewstep.data.images import Captioned, from_prompts
from fewstep.data.latents import (
    ALL,
    DataIdentity,
    LatentSet,
    Wanted,
    identify,
    lacking_captions,
    lacking_pictures,
    latent_set,
    used,
)
from fewstep.data.prompts import is_prompt_file
from fewstep.data.sources import CaptionedSource, WorldData, read_captioned, read_named_prompts
from fewstep.distillation.checks import Source
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.synthesis.reader import training_set
from fewstep.distillation.synthesis.record import SynthesizedSet
from fewstep.distillation.trajectory import Trajectories, drawn_prompts
from fewstep.evaluation.limits import KID_FEWEST
from fewstep.scorers.registry import check_scorer
from fewstep.students.lora_file import find_lora


class EncodedData(NamedTuple):
    """The training data of a run, encoded.

    Attributes:
        source: where they come from.
        captioned: the pictures and captions, or prompts alone.
        latents: latents and text states.
        trajectories: stored ones of the teacher, if the recipe starts on them.
    """

    source: Source
    captioned: Captioned
    latents: LatentSet
    trajectories: Trajectories | None = None


@dataclass(frozen=True)
class CaptionedData:
    """Pictures and captions, or prompts alone, and which of them the remaining steps of a run use.

    Attributes:
        wanted: those that are used.
        inputs: fingerprints of the run's inputs, as far as they are known without networks.
    """

    source: CaptionedSource
    captioned: Captioned
    identity: DataIdentity
    wanted: Wanted
    inputs: Mapping[str, Any]

    def lacking(self, cache: Path) -> tuple[int, int]:
        """Count the used pictures and captions that the cache lacks."""
        return (
            lacking_pictures(self.captioned, self.identity, cache, self.wanted.pictures),
            lacking_captions(self.identity, cache, self.wanted.captions),
        )

    def encode(self, backbone: Backbone, cache: Path, quiet: bool) -> EncodedData:
        """Encode what is used and not in the cache. All processes of a launch must call it.

        Args:
            quiet: do not print what of the source is used, and how many captions the text encoders cut.

        Raises:
            UserError: an encoder or a picture cannot be read.
        """
        print_once([] if quiet else [self.captioned.line()])
        backbone.load_encoders()  # a broken text encoder is refused before pictures are encoded
        cut = CutPrompts(backbone)
        data = latent_set(
            self.captioned,
            backbone,
            self.identity.parts["encoders"],
            cache,
            backbone.latent_shape,
            identity=self.identity,
            wanted=self.wanted,
            on_encoded=cut,
        )
        cut.add_up()
        print_once([] if quiet else cut.lines("caption"))
        return EncodedData(self.source, self.captioned, data)


def encode_set(config: DistillConfig, files: SynthesizedSet, backbone: Backbone) -> EncodedData:
    """Map a synthesised set from disk, which holds latents or trajectories and text states.

    Raises:
        UserError: as `training_set`.
    """
    data, trajectories = training_set(files, config.method, backbone)
    return EncodedData(files, from_prompts(data.prompts), data, trajectories)


def open_data(
    config: DistillConfig, source: CaptionedSource, folder: PipelineFolder, cache: Path, done: int | None = 0
) -> CaptionedData:
    """Find the captioned data of a run, and which of them its steps use.

    Args:
        folder: the teacher's.
        cache: folder for lists of what shards hold.
        done: steps that are made already; None to use all data.

    Raises:
        UserError: as `find_captioned`; or an encoder's files cannot be read.
    """
    captioned = find_captioned(config, source, folder, cache)
    of = identify(captioned, encoders_fingerprint(config, folder))
    inputs: dict[str, Any] = {"teacher": folder.denoising, PARTS: dict(of.parts), **validation_inputs(config)}
    if config.method.start != "trajectory":
        inputs["data"] = of.key
    return CaptionedData(source, captioned, of, ALL if done is None else _used(config, captioned, of, done), inputs)


def _used(config: DistillConfig, captioned: Captioned, of: DataIdentity, done: int) -> Wanted:
    """Return the pictures and captions that the steps after `done` use."""
    if config.method.start == "trajectory":
        drawn = torch.unique(drawn_prompts(config, len(of.prompts))[0]).numpy()
        return Wanted(np.zeros(0, dtype=np.int64), drawn[drawn < len(of.prompts)])
    loop, held = config.loop, captioned.pictures
    visits: Callable[[int, int], np.ndarray] = partial(order, loop.seed, len(captioned))
    if isinstance(held, BucketedFiles):
        visits = shape_order(held.groups(), loop.seed, loop.batch)
    return used(of, visits, range(done, loop.steps), loop.batch, loop.seed, config.data.empty_prompts)


def find_captioned(config: DistillConfig, source: CaptionedSource, folder: PipelineFolder, cache: Path) -> Captioned:
    """Return the captioned pictures of a source, of the teacher's size or in buckets around it, or its prompts.

    Args:
        folder: the teacher's.
        cache: folder for lists of what shards hold.

    Raises:
        UserError: they cannot be read, or are too few for validation.
    """
    size = config.data.size or folder.picture_size
    captioned = read_captioned(source, size, config.data.captions, config.loop.seed, cache)
    if captioned.pictures is None:
        return captioned
    if config.loop.validate_every and len(captioned) < KID_FEWEST:
        raise UserError(
            f"loop.validate_every needs at least {KID_FEWEST} pictures for KID, data.source has {len(captioned)}; "
            "give more, or loop.validate_every=null",
            field="loop.validate_every",
        )
    return bucketed(captioned, size, folder.unit, config.loop.batch) if config.data.buckets else captioned


def encoders_fingerprint(config: DistillConfig, folder: PipelineFolder) -> str:
    """Return the fingerprint of what makes latents and text states."""
    narrow = "" if config.data.encoder_precision == "fp32" else f" {config.data.encoder_precision}"
    return folder.identity("vae", *folder.family.readers) + narrow


def validation_inputs(config: DistillConfig) -> dict[str, str]:
    """Return the fingerprints of the validation's prompt file, student beside and scorer, where there are such."""
    named, beside = config.validation.prompts, config.validation.beside
    if not config.loop.validate_every:
        return {}
    found = {"beside": sha256(find_lora(Path(beside)))} if beside else {}
    name, _, place = config.validation.scorer.partition(":")
    if place:
        found["held-out scorer"] = " ".join(sha256(file) for file in check_scorer(name, Path(place)).weights)
    if named and is_prompt_file(named):
        prompts = json.dumps(list(read_named_prompts(named)))
        found["watched prompts"] = hashlib.sha256(prompts.encode()).hexdigest()
    return found


def validation_prompts(config: DistillConfig, source: Source, captions: Sequence[str]) -> list[str]:
    """Return the fixed prompts of validation: its list, then captions of the training data, repeated if they are few.

    If no list is named, the bundled world's data come with one, and other data have their captions alone.
    """
    named = config.validation.prompts or ("validation" if isinstance(source, WorldData) else "")
    listed = read_named_prompts(named) if named else ()
    pool = [*listed, *dict.fromkeys(caption for caption in captions if caption.strip() and caption not in listed)]
    return [pool[i % len(pool)] for i in range(config.validation.count)]
