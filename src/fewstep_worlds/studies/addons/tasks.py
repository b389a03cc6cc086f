"""The add-ons and uses of the figure: how each is made, sampled and measured.

An effect is a number for each picture, larger where the add-on has more of its intended effect: the measure with the
add-on minus the measure without it. A student keeps (its effect) / (the base's), of means over the same prompts and
noise. A side effect is measured beside it, because a picture that ignores the prompt or its source may follow an add-on
well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.common.tensors import digest
from fewstep.evaluation.metric import Array, Pictures
from fewstep.training.run_folder import check_same_run
from fewstep_worlds.studies.addons import measures, scenes
from fewstep_worlds.studies.addons.ip_adapter import initial_projection, read_ip_adapter, train_ip_adapter
from fewstep_worlds.studies.addons.pipelines import Model, call_arguments, draw_pictures, images, pipeline
from fewstep_worlds.studies.addons.scenes import Kind, Prompt
from fewstep_worlds.studies.addons.training import (
    AddOnTraining,
    Examples,
    train_checkpoint,
    train_controlnet,
)
from fewstep_worlds.studies.settings import VersatilityConfig

EMPTY = 0.1
"""Share of empty prompts in training, for guidance."""
ALONE = 0.9
"""The same where the picture is the condition."""
FITTED = 1000
"""Pictures that features are centred by and an IP-Adapter's first projection is fitted to."""
ACCURACY = "scene accuracy"

NamedMeasure = tuple[str, Callable[[Pictures], Array]]
Maps = Callable[[Pictures, Sequence[Prompt]], np.ndarray]


@dataclass(frozen=True)
class Task:
    """One row of the figure.

    Attributes:
        name: of the row.
        prompts: of its pictures.
        given: source or target pictures, for the figure.
        effect, beside: names and measures of the effect and of the side effect.
        add_on: its file or folder; None for a use of the base alone.
        kind, parts, load: class of the pipeline, its components beside the base's, and how the add-on is loaded.
        checkpoint: pipeline folder in place of the base's.
        rows, features: as in `draw_pictures`.
        strength: of img2img and inpainting pipelines.
        gamma: of students; None for their own.
        from_given: whether the effect is relative to the given pictures, not to pictures without the add-on.
    """

    name: str
    prompts: Sequence[Prompt]
    given: Pictures
    effect: NamedMeasure
    beside: NamedMeasure
    add_on: Path | None = None
    kind: str = "StableDiffusionPipeline"
    parts: Mapping[str, Any] = field(default_factory=dict)
    load: Callable[[Any], None] = lambda pipe: None
    checkpoint: Path | None = None
    rows: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    features: Tensor | None = None
    strength: float | None = None
    gamma: float | None = None
    from_given: bool = False


@dataclass(frozen=True)
class Study:
    """What all tasks share.

    Attributes:
        out: folder of runs and finished add-ons.
        reader: network that finds the facts of pictures; it trains nothing here.
        features: pictures -> features [N, width], the IP-Adapter's input; None where no task needs them.
    """

    config: VersatilityConfig
    out: Path
    base: Backbone
    reader: scenes.Reader
    features: Callable[[Pictures], Tensor] | None

    @cached_property
    def _level(self) -> tuple[Tensor, Tensor]:
        """Mean of the features of training pictures, and their deviation from it."""
        assert self.features is not None
        raw = self.features(scenes.pictures_of(scenes.training_prompts("open", range(FITTED))))
        return raw.mean(0), (raw - raw.mean(0)).std()

    def encoded(self, pictures: Pictures) -> Tensor:
        """Return features of pictures minus the mean of training pictures', at unit size on average, [N, width]."""
        mean, spread = self._level
        assert self.features is not None
        return (self.features(pictures) - mean) / spread

    def restore(self, pictures: Pictures) -> Pictures:
        """Return pictures through the base's autoencoder."""
        return self.base.to_pictures(self.base.to_latents(pictures))

    def draw(self, task: Task, model: Model) -> Pictures:
        """Draw a task's pictures."""
        folder = task.checkpoint or self.base.folder.path
        pipe = pipeline(task.kind, folder, model, task.gamma, **task.parts)
        task.load(pipe)
        call = call_arguments(model, task.strength or 1.0)
        call |= {} if task.strength is None else {"strength": task.strength}
        texts = [prompt.text for prompt in task.prompts]
        return draw_pictures(pipe, texts, self.config.seed, task.rows, task.features, **call)

    def made(
        self,
        name: str,
        kind: Kind,
        train: Callable[[AddOnTraining, Path], None],
        condition: Callable[[Pictures, Sequence[Prompt]], Tensor] = lambda pictures, _: torch.zeros(len(pictures), 0),
        empty: float = EMPTY,
    ) -> Path:
        """Return the place of a finished add-on, trained now on scenes of a kind if it is not.

        Args:
            condition: (pictures, prompts) -> what the add-on gets beside the prompt.
            empty: share of empty prompts.

        Raises:
            UserError: its run folder holds a training with other settings or inputs.
        """

        def examples(items: np.ndarray) -> Examples:
            prompts = scenes.training_prompts(kind, items.tolist())
            pictures = scenes.pictures_of(prompts)
            return pictures, [prompt.text for prompt in prompts], condition(pictures, prompts)

        pictures, texts, shown = examples(np.arange(16))
        first = digest({"pictures": torch.from_numpy(pictures), "condition": shown})
        inputs = {"base": self.base.folder.fingerprint("unet"), "examples": f"{first} {texts}"}
        place, run, config = self.out / name, self.out / "runs" / name, getattr(self.config, name)
        check_same_run(run, config, inputs, whole=False)
        if not place.is_dir():
            train(AddOnTraining(self.base, config, examples, run, inputs, empty), place)
        return place

    def by_reader(self, name: str, measure: scenes.Measure, prompts: Sequence[Prompt]) -> NamedMeasure:
        """Return a measure by the reader with its name in tables."""
        return name, scenes.by_reader(self.reader, measure, prompts)

    def task(self, name: str, prompts: Sequence[Prompt], effect: NamedMeasure, **fields: Any) -> Task:
        """Return a task. Unless `fields` has others, the prompts' scenes are given and scene accuracy is beside."""
        usual: dict[str, Any] = {
            "given": scenes.pictures_of(prompts),
            "beside": self.by_reader(ACCURACY, scenes.agrees, prompts),
        }
        return Task(name, prompts, effect=effect, **(usual | fields))

    def prompts(self, kind: Kind = "open") -> list[Prompt]:
        """Return prompts about unseen scenes of a kind."""
        return scenes.unseen_prompts(kind, self.config.prompts)


def bare(task: Task) -> Task:
    """Return a task without its add-on: plain sampling of its prompts."""
    return Task("", task.prompts, task.given[:0], task.effect, task.beside)


def community(study: Study) -> Task:
    """Make a checkpoint fine-tuned on arrangements (rows, columns, rings), which are new to the base."""
    place, prompts = study.made("community", "arranged", train_checkpoint), study.prompts("arranged")
    effect = study.by_reader("stated arrangement", scenes.is_arranged, prompts)
    return study.task("community checkpoint", prompts, effect, checkpoint=place, add_on=place)


def style(study: Study) -> Task:
    """Make a LoRA of the held-out style from a folder of captioned pictures, by `fewstep train-style`."""
    from fewstep.commands.train_style import train_style

    prompts, config = study.prompts("style"), study.config.style
    folder = study.out / "style-pictures"
    if not folder.is_dir():
        scenes.write_captioned(folder, scenes.training_prompts("style", range(FITTED)))
    settings = {
        "loop": config.loop.model_dump(exclude_unset=True) | {"validate_every": None},
        "optim": config.optim.model_dump(exclude_unset=True),
    }
    place = train_style(folder, lora=None, teacher=study.base.folder.path, out=study.out / "style", overrides=settings)

    def load(pipe: Any) -> None:
        pipe.load_lora_weights(str(place.parent), weight_name=place.name, adapter_name="style")
        pipe.set_adapters(pipe.get_list_adapters()["unet"])

    reader = scenes.train_style_reader(study.reader, study.config.style_reader, study.out / "runs" / "style-reader")
    effect = "read as the style", scenes.by_reader(reader, scenes.same_style, prompts)
    beside = ACCURACY, scenes.by_reader(reader, scenes.agrees, prompts)
    return study.task("style LoRA", prompts, effect, beside=beside, load=load, add_on=place)


def controlnet(study: Study, name: str, maps_of: Maps, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Make a ControlNet on maps [N, H, W] in [0, 1] of pictures and prompts; return its fields of a task."""
    from diffusers import ControlNetModel

    def condition(pictures: Pictures, prompts: Sequence[Prompt]) -> Tensor:
        return torch.from_numpy(maps_of(pictures, prompts).astype(np.float32))[:, None].expand(-1, 3, -1, -1)

    place = study.made(name, "open", train_controlnet, condition)
    maps = maps_of(scenes.pictures_of(prompts), prompts)
    given = np.repeat((maps * 255.0).round().astype(np.uint8)[..., None], 3, axis=3)
    parts = {"controlnet": ControlNetModel.from_pretrained(place, use_safetensors=True)}
    kind, rows = "StableDiffusionControlNetPipeline", {"image": images(given)}
    return {"kind": kind, "parts": parts, "rows": rows, "given": given, "add_on": place}


def edges(study: Study) -> Task:
    """Make a ControlNet on edges."""
    prompts = study.prompts()
    maps = measures.edges(scenes.pictures_of(prompts))
    effect = "correlation of edges", lambda pictures: measures.edge_likeness(pictures, maps)
    fields = controlnet(study, "edges", lambda pictures, _: measures.edges(pictures), prompts)
    return study.task("ControlNet, edges", prompts, effect, **fields)


def shapes(study: Study) -> Task:
    """Make a ControlNet on the silhouettes of stickers."""
    prompts = study.prompts()
    effect = study.by_reader("stickers in place", scenes.same_places, prompts)
    fields = controlnet(study, "shapes", scenes.silhouettes, prompts)
    return study.task("ControlNet, silhouettes", prompts, effect, **fields)


def picture(study: Study) -> Task:
    """Make an IP-Adapter on the preference scorer's features, used with an empty prompt."""

    def train(spec: AddOnTraining, place: Path) -> None:
        fitted = scenes.training_prompts("open", range(FITTED))
        states = study.base.encode([scenes.in_words(prompt.scene) for prompt in fitted])["text"]
        train_ip_adapter(spec, place, initial_projection(study.encoded(scenes.pictures_of(fitted)), states))

    place = study.made("picture", "open", train, lambda pictures, _: study.encoded(pictures), ALONE)
    prompts = [replace(prompt, text="") for prompt in study.prompts()]

    def load(pipe: Any) -> None:
        pipe.load_ip_adapter([read_ip_adapter(place)], subfolder="", weight_name="", image_encoder_folder=None)

    effect = study.by_reader("stickers in common", scenes.same_stickers, prompts)
    features = study.encoded(scenes.pictures_of(prompts))
    return study.task("IP-Adapter", prompts, effect, load=load, features=features, add_on=place)


IMG2IMG = "StableDiffusionImg2ImgPipeline"


def img2img(study: Study) -> Task:
    """Redraw a picture by a prompt about it; its stickers should stay in place."""
    prompts = study.prompts()
    rows = {"image": images(scenes.pictures_of(prompts))}
    effect = study.by_reader("stickers in place", scenes.same_places, prompts)
    return study.task("img2img", prompts, effect, kind=IMG2IMG, rows=rows, strength=0.5)


def inpainting(study: Study) -> Task:
    """Draw the missing one of two stickers; the other and the background should stay."""
    prompts, given, masks = scenes.incomplete(study.config.prompts)
    return study.task(
        "inpainting", prompts, study.by_reader(ACCURACY, scenes.agrees, prompts),
        beside=("closeness outside the mask", lambda pictures: measures.kept(pictures, given, masks)),
        kind="StableDiffusionInpaintPipeline", rows={"image": images(given), "mask_image": images(masks)},
        strength=1.0, given=given, from_given=True,
    )  # fmt: skip


def super_resolution(study: Study) -> Task:
    """Redraw a picture of 16 x 16 pixels at 64 x 64; the added detail should be right."""
    prompts = study.prompts()
    sharp = scenes.pictures_of(prompts)
    given = measures.blurred(sharp)
    effect = "right detail", lambda pictures: measures.detail_likeness(pictures, given, sharp)
    return study.task(
        "super-resolution", prompts, effect,
        kind=IMG2IMG, rows={"image": images(given)}, strength=0.3,
        gamma=0.0,  # without added noise the given picture is preserved
        given=given, from_given=True,
    )  # fmt: skip


TASKS: Mapping[str, Callable[[Study], Task]] = {
    "community": community,
    "style": style,
    "edges": edges,
    "shapes": shapes,
    "picture": picture,
    "img2img": img2img,
    "inpainting": inpainting,
    "super-resolution": super_resolution,
}
