"""The add-ons and uses of the figure: how each is made, sampled and measured.

An effect is a number for each picture, larger where the add-on has more of its intended effect: the measure with the
add-on minus the measure without it. A student keeps (its effect) / (the base's), of means over the same prompts and
noise. A side effect is measured beside it, because a picture that ignores the prompt or its source may follow an add-on
well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fewstep.common.tensors import digest
from fewstep.data.images import Captioned, HeldPictures
from fewstep.evaluation.metric import Array
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.studies.addons import image_effects as effects
from fewstep_worlds.studies.addons import training
from fewstep_worlds.studies.addons.context import CAPTIONS, Context
from fewstep_worlds.studies.addons.pipelines import (
    Model,
    call_arguments,
    draw_from_features,
    draw_pictures,
    images,
    pipeline,
)
from fewstep_worlds.studies.settings import AddOnConfig

PEOPLE = ("people-body", "smileys-emotion")
"""Groups of concepts that have a skin."""
SKIN = 0.08
"""Least share of skin pixels in a picture of skin."""
STRENGTHS = {"img2img": 0.5, "style transfer": 0.75, "super-resolution": 0.3}
GAMMAS = {"super-resolution": 0.0}
"""Students' gamma where it is not their own. Without added noise the given picture is preserved."""
PICTURE_TASKS = ("inpainting", "style transfer", "super-resolution")
"""Tasks whose effect is relative to the given picture."""
NEW_STYLE = "fluent 3d style"

Sampler = Callable[[Model], np.ndarray]


@dataclass(frozen=True)
class Task:
    """One row of the figure.

    Attributes:
        name: of the row.
        effect_name: the effect's measure.
        beside_name: the side effect's measure.
        given: source or target pictures, for the figure.
        draw: model -> pictures, with the add-on.
        without: model -> pictures without it, or the given ones.
        effect: pictures -> a number each.
        beside: pictures -> a number each.
        add_on: its file or folder; None for a use of the base alone.
    """

    name: str
    effect_name: str
    beside_name: str
    given: np.ndarray
    prompts: Sequence[str]
    draw: Sampler
    without: Sampler
    effect: Callable[[np.ndarray], Array]
    beside: Callable[[np.ndarray], Array]
    add_on: Path | None = None


AGREEMENT = "agreement with the prompt"
OVERLAP = "overlap with the picture's silhouette"


def sample(
    context: Context,
    model: Model,
    pipe: Any,
    prompts: Sequence[str],
    rows: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    strength: float | None = None,
    **more: Any,
) -> np.ndarray:
    """Draw a task's prompts with the model's settings.

    Args:
        rows: arguments of the pipeline with a row for each prompt.
        strength: of img2img and inpainting pipelines.
        more: further arguments.
    """
    given = call_arguments(model, strength or 1.0) | ({} if strength is None else {"strength": strength}) | more
    return draw_pictures(pipe, prompts, context.config.seed, rows, **given)


def draw_without(context: Context, prompts: Sequence[str]) -> Sampler:
    """Return a function that samples the base without an add-on."""

    def draw(model: Model) -> np.ndarray:
        pipe = pipeline("StableDiffusionPipeline", context.folder, model)
        return sample(context, model, pipe, prompts)

    return draw


def people_of(world: emoji8.Emoji8) -> list[int]:
    """Return the pictures of people and faces with visible skin."""
    share = effects.skin(world.pictures).mean((1, 2))
    return [row for row, record in enumerate(world.records) if share[row] >= SKIN and record.group in PEOPLE]


def community(context: Context) -> Task:
    """Make a checkpoint fine-tuned on people with skin tones, which are new to the base."""
    people = people_of(context.data)
    place, run = context.out / "community", context.out / "runs" / "community"
    tones = list(effects.TONES)
    some = context.training_rows("community", people, 1 + len(tones))
    if not context.is_made("community", context.config.community):
        own = context.data.pictures[some]
        pictures = [own, *(effects.with_tone(own, tone) for tone in tones)]
        captions = context.own_captions(some, context.config.community.seed)
        captions += [[f"{context.data.records[row].name}, {tone}"] * CAPTIONS for tone in tones for row in some]
        source = Captioned(HeldPictures(np.concatenate(pictures)), captions)
        spec = context.training_spec("community checkpoint", source, context.config.community, training.EMPTY)
        pipe = pipeline("StableDiffusionPipeline", context.folder, Model("base", None, 1))
        training.fine_tune(spec, context.unet(), pipe, run, place)
    rows = context.rows("community", people_of(context.shown))
    wanted = [tones[i % len(tones)] for i in range(len(rows))]
    prompts = [f"{name}, {tone}" for name, tone in zip(context.names(rows), wanted, strict=True)]
    own = context.shown.pictures
    given = np.concatenate([effects.with_tone(own[[row]], tone) for row, tone in zip(rows, wanted, strict=True)])

    def draw(model: Model) -> np.ndarray:
        return sample(context, model, pipeline("StableDiffusionPipeline", place, model), prompts)

    return Task(
        "community checkpoint", "share with the requested skin tone", AGREEMENT, given, prompts, draw,
        draw_without(context, prompts), lambda pictures: effects.tone_share(pictures, wanted),
        context.agreement_with(context.names(rows)), place,
    )  # fmt: skip


def style(context: Context) -> Task:
    """Make a style LoRA: blueprints."""
    place, run = context.out / "style", context.out / "runs" / "style"
    some = context.training_rows("style")
    if not context.is_made("style", context.config.style):
        own = context.own_captions(some, context.config.style.seed)
        captions = [[f"{caption}, blueprint style" for caption in row] for row in own]
        source = Captioned(HeldPictures(effects.blueprint(context.data.pictures[some])), captions)
        spec = context.training_spec("style LoRA", source, context.config.style, training.EMPTY)
        training.train_style(spec, context.unet(), run, place)
    rows = context.rows("style")
    prompts = [f"{name}, blueprint style" for name in context.names(rows)]

    def draw(model: Model) -> np.ndarray:
        pipe = pipeline("StableDiffusionPipeline", context.folder, model)
        pipe.load_lora_weights(str(place), adapter_name="style")
        pipe.set_adapters([name for name in ("student", "style") if name != "student" or model.lora is not None])
        return sample(context, model, pipe, prompts)

    given = effects.blueprint(context.shown.pictures[rows])
    return Task(
        "style LoRA", "share of blueprint blue", AGREEMENT, given, prompts, draw, draw_without(context, prompts),
        effects.blueprint_share, context.agreement_with(context.names(rows)), place,
    )  # fmt: skip


def make_controlnet(context: Context, name: str, maps: Callable[[np.ndarray], np.ndarray], config: AddOnConfig) -> Path:
    """Make a ControlNet on maps of pictures, [N, H, W] in [0, 1]; return its folder."""
    place, run = context.out / name, context.out / "runs" / name
    some = context.training_rows("controlnet")
    if not context.is_made(name, config):
        drawn_maps = maps(context.data.pictures[some]).astype(np.float32)
        control = torch.from_numpy(drawn_maps).half()[:, None].expand(-1, 3, -1, -1)
        source = Captioned(HeldPictures(context.data.pictures[some]), context.own_captions(some, config.seed))
        spec = context.training_spec(
            f"ControlNet, {name}", source, config, training.EMPTY, maps=digest({"maps": control[:64]})
        )
        training.train_controlnet(spec, context.unet(), control, run, place)
    return place


def control_task(
    context: Context,
    title: str,
    place: Path,
    rows: Sequence[int],
    maps: np.ndarray,
    effect_name: str,
    effect: Callable[[np.ndarray], Array],
) -> Task:
    """Return the row of a ControlNet on maps of the pictures `rows`."""
    from diffusers import ControlNetModel

    given = np.repeat((maps * 255).round().astype(np.uint8)[..., None], 3, axis=3)
    prompts = context.names(rows)

    def draw(model: Model) -> np.ndarray:
        controlnet = ControlNetModel.from_pretrained(place, use_safetensors=True)
        pipe = pipeline("StableDiffusionControlNetPipeline", context.folder, model, {"controlnet": controlnet})
        return sample(context, model, pipe, prompts, {"image": images(given)})

    return Task(
        title, effect_name, AGREEMENT, given, prompts, draw, draw_without(context, prompts), effect,
        context.agreement_with(prompts), place,
    )  # fmt: skip


def edge_control(context: Context) -> Task:
    """Make a ControlNet on edges."""
    place, rows = make_controlnet(context, "edges", effects.edges, context.config.edges), context.rows("edges")
    maps = effects.edges(context.shown.pictures[rows])
    return control_task(
        context, "ControlNet, edges", place, rows, maps, "correlation of edges",
        lambda pictures: effects.edge_likeness(pictures, maps),
    )  # fmt: skip


def shape_control(context: Context) -> Task:
    """Make a ControlNet on silhouettes."""
    place, rows = make_controlnet(context, "shapes", effects.ink, context.config.shapes), context.rows("shapes")
    masks = effects.ink(context.shown.pictures[rows])
    return control_task(
        context, "ControlNet, silhouettes", place, rows, masks.astype(np.float32), "overlap of silhouettes",
        lambda pictures: effects.overlap(pictures, masks),
    )  # fmt: skip


def picture_prompt(context: Context) -> Task:
    """Make an IP-Adapter on Lite0's features, used with an empty prompt."""
    place, run = context.out / "picture", context.out / "runs" / "picture"
    config = context.config.picture
    if not context.is_made("picture", config):
        # all pictures: with fewer it overfits and ignores unseen ones
        captions = context.own_captions(range(len(context.data)), config.seed)
        source = Captioned(HeldPictures(context.data.pictures), captions)
        fingerprint = digest({"features": context.picture_features[:64]})
        spec = context.training_spec("IP-Adapter", source, config, training.ALONE, features=fingerprint)
        project = training.initial_projection(context.picture_features, context.states())
        training.train_ip_adapter(spec, context.unet(), context.picture_features, project, run, place)
    rows = context.rows("picture")
    prompts = [""] * len(rows)
    given = context.shown.pictures[rows]
    features = context.features_of(given)

    def draw(model: Model) -> np.ndarray:
        pipe = pipeline("StableDiffusionPipeline", context.folder, model)
        pipe.load_ip_adapter([training.read_ip_adapter(place)], subfolder="", weight_name="", image_encoder_folder=None)
        return draw_from_features(pipe, prompts, features, context.config.seed, **call_arguments(model))

    return Task(
        "IP-Adapter", "likeness to the picture, less that to others", "agreement with the picture's name", given,
        prompts, draw, draw_without(context, prompts), lambda pictures: context.likeness(pictures, given),
        context.agreement_with(context.names(rows)), place,
    )  # fmt: skip


def from_picture(context: Context, name: str, given: np.ndarray, prompts: Sequence[str]) -> Sampler:
    """Return a function that samples by diffusers' img2img at the task's strength."""

    def draw(model: Model) -> np.ndarray:
        pipe = pipeline("StableDiffusionImg2ImgPipeline", context.folder, model, gamma=GAMMAS.get(name))
        return sample(context, model, pipe, prompts, {"image": images(given)}, strength=STRENGTHS[name])

    return draw


def img2img(context: Context) -> Task:
    """Redraw a picture of the same concept; the outline should stay."""
    rows = context.rows("img2img")
    given, prompts = context.shown.pictures[rows], context.names(rows)
    return Task(
        "img2img", OVERLAP, AGREEMENT, given, prompts, from_picture(context, "img2img", given, prompts),
        draw_without(context, prompts), lambda pictures: effects.overlap(pictures, effects.ink(given)),
        context.agreement_with(prompts),
    )  # fmt: skip


def style_transfer(context: Context) -> Task:
    """Redraw a picture in another style."""
    flat = [row for row, record in enumerate(context.shown.records) if record.style in ("noto", "twemoji", "emojione")]
    rows = context.rows("style transfer", flat)
    given = context.shown.pictures[rows]
    prompts = [f"{name}, {NEW_STYLE}" for name in context.names(rows)]
    return Task(
        "style transfer", f"share read as {NEW_STYLE}", OVERLAP, given, prompts,
        from_picture(context, "style transfer", given, prompts), lambda model: given,
        lambda pictures: context.style_rate(pictures, NEW_STYLE),
        lambda pictures: effects.overlap(pictures, effects.ink(given)),
    )  # fmt: skip


def super_resolution(context: Context) -> Task:
    """Redraw a picture of 16 x 16 pixels at 64 x 64; the added detail should be right."""
    rows = context.rows("super-resolution")
    sharp, prompts = context.shown.pictures[rows], context.names(rows)
    given = effects.blurred(sharp)
    return Task(
        "super-resolution", "correlation of what is added with what was lost", AGREEMENT, given, prompts,
        from_picture(context, "super-resolution", given, prompts), lambda model: given,
        lambda pictures: effects.detail_likeness(pictures, given, sharp), context.agreement_with(prompts),
    )  # fmt: skip


def inpainting(context: Context) -> Task:
    """Complete half of a picture."""
    rows = context.rows("inpainting")
    whole, prompts = context.shown.pictures[rows], context.names(rows)
    half = whole.shape[2] // 2
    given = whole.copy()
    given[:, :, half:] = 255
    mask = np.zeros(whole.shape, np.uint8)
    mask[:, :, half:] = 255

    def draw(model: Model) -> np.ndarray:
        pipe = pipeline("StableDiffusionInpaintPipeline", context.folder, model)
        pipe.unet.register_to_config(in_channels=4)  # expected of a text-to-image network; here 16
        sources = {"image": images(given), "mask_image": images(mask)}
        return sample(context, model, pipe, prompts, sources, strength=1.0, height=64, width=64)

    return Task(
        "inpainting", AGREEMENT, "closeness of the half that is given", given, prompts, draw,
        lambda model: given, context.agreement_with(prompts),
        lambda pictures: effects.closeness(pictures[:, :, :half], given[:, :, :half]),
    )  # fmt: skip


TASKS: Mapping[str, Callable[[Context], Task]] = {
    "community": community,
    "style": style,
    "edges": edge_control,
    "shapes": shape_control,
    "picture": picture_prompt,
    "img2img": img2img,
    "inpainting": inpainting,
    "style transfer": style_transfer,
    "super-resolution": super_resolution,
}
