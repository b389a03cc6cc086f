"""The add-ons and uses of the figure: what each is made of, how it is drawn with, and what it is to keep.

An effect is a number for each picture, larger where the add-on does more of what it is for: what a picture with it has
more than one without it, drawn by the same. A student keeps (its effect) / (the base's), by means over the same prompts
and noise. Beside it stands what must not be lost for it: a picture that ignores the prompt, or its source, may follow
an add-on well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fewstep.common.tensors import digest
from fewstep.data.images import Captioned, HeldPictures
from fewstep.evaluation.metric import Array
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import AddOnConfig
from fewstep_worlds.emoji8.studies.addons import image_effects as looks
from fewstep_worlds.emoji8.studies.addons import training
from fewstep_worlds.emoji8.studies.addons.context import CAPTIONS, Workshop
from fewstep_worlds.emoji8.studies.addons.pipelines import Who, asked, drawn, drawn_after, images, pipeline

PEOPLE = ("people-body", "smileys-emotion")
"""Groups of concepts that have a skin."""
SKIN = 0.08
"""Share of skin from which a picture shows it."""
STRENGTHS = {"img2img": 0.5, "style transfer": 0.75, "super-resolution": 0.3}
GAMMAS = {"super-resolution": 0.0}
"""Students' gamma where it is not their own: where what is given is to stay, no noise is put back."""
AFTER_A_PICTURE = ("inpainting", "style transfer", "super-resolution")
"""Uses whose effect is told beside what is given, not beside another drawing."""
NEW_STYLE = "fluent 3d style"


@dataclass(frozen=True)
class Task:
    """One row of the figure.

    Attributes:
        name: of the row.
        effect_name: what the effect measures.
        beside_name: what must not be lost for it.
        given: pictures that stand for what it starts from, in the figure, and for what is meant.
        prompts: what is drawn.
        draw: who -> pictures, with the add-on.
        without: who -> pictures without it; or what is there before.
        effect: pictures -> a number each.
        beside: pictures -> a number each.
        add_on: what it is drawn with, beside the base; None for a use of the base alone.
    """

    name: str
    effect_name: str
    beside_name: str
    given: np.ndarray
    prompts: Sequence[str]
    draw: Callable[[Who], np.ndarray]
    without: Callable[[Who], np.ndarray]
    effect: Callable[[np.ndarray], Array]
    beside: Callable[[np.ndarray], Array]
    add_on: Path | None = None


AGREEMENT = "agreement with the prompt"
OVERLAP = "overlap with the picture's silhouette"


def plainly(shop: Workshop, prompts: Sequence[str]) -> Callable[[Who], np.ndarray]:
    """Drawing with the base as it is."""

    def draw(who: Who) -> np.ndarray:
        pipe = pipeline("StableDiffusionPipeline", shop.folder, who)
        return drawn(pipe, prompts, shop.config.seed, {}, **asked(who))

    return draw


def people_of(world: emoji8.Emoji8) -> list[int]:
    """Pictures of people and faces that show their skin."""
    share = looks.skin(world.pictures).mean((1, 2))
    return [row for row, record in enumerate(world.records) if share[row] >= SKIN and record.group in PEOPLE]


def community(shop: Workshop) -> Task:
    """A checkpoint that was tuned on people with skin tones, which the base has never seen."""
    people = people_of(shop.data)
    place, run = shop.out / "community", shop.out / "runs" / "community"
    tones = list(looks.TONES)
    some = shop.learned("community", people, 1 + len(tones))
    if not shop.made("community", shop.config.community):
        pictures = [shop.data.pictures[some], *(looks.with_tone(shop.data.pictures[some], tone) for tone in tones)]
        captions = shop.own_captions(some, shop.config.community.seed)
        captions += [[f"{shop.data.records[row].name}, {tone}"] * CAPTIONS for tone in tones for row in some]
        source = Captioned(HeldPictures(np.concatenate(pictures)), captions)
        lesson = shop.taught("community checkpoint", source, shop.config.community, training.EMPTY)
        pipe = pipeline("StableDiffusionPipeline", shop.folder, Who("base", None, 1))
        training.fine_tune(lesson, shop.unet(), pipe, run, place)
    rows = shop.rows("community", people_of(shop.shown))
    wanted = [tones[i % len(tones)] for i in range(len(rows))]
    prompts = [f"{name}, {tone}" for name, tone in zip(shop.names(rows), wanted, strict=True)]
    given = np.concatenate([looks.with_tone(shop.shown.pictures[[r]], t) for r, t in zip(rows, wanted, strict=True)])

    def draw(who: Who) -> np.ndarray:
        return drawn(pipeline("StableDiffusionPipeline", place, who), prompts, shop.config.seed, {}, **asked(who))

    return Task(
        "community checkpoint", "share with the asked skin tone", AGREEMENT, given, prompts, draw,
        plainly(shop, prompts), lambda pictures: looks.tone_share(pictures, wanted),
        shop.agreement_with(shop.names(rows)), place,
    )  # fmt: skip


def style(shop: Workshop) -> Task:
    """A style LoRA: blueprints."""
    place, run = shop.out / "style", shop.out / "runs" / "style"
    some = shop.learned("style")
    if not shop.made("style", shop.config.style):
        own = shop.own_captions(some, shop.config.style.seed)
        captions = [[f"{said}, blueprint style" for said in row] for row in own]
        source = Captioned(HeldPictures(looks.blueprint(shop.data.pictures[some])), captions)
        lesson = shop.taught("style LoRA", source, shop.config.style, training.EMPTY)
        training.train_style(lesson, shop.unet(), run, place)
    rows = shop.rows("style")
    prompts = [f"{name}, blueprint style" for name in shop.names(rows)]

    def draw(who: Who) -> np.ndarray:
        pipe = pipeline("StableDiffusionPipeline", shop.folder, who)
        pipe.load_lora_weights(str(place), adapter_name="style")
        pipe.set_adapters([name for name in ("student", "style") if name != "student" or who.lora is not None])
        return drawn(pipe, prompts, shop.config.seed, {}, **asked(who))

    given = looks.blueprint(shop.shown.pictures[rows])
    return Task(
        "style LoRA", "share of blueprint blue", AGREEMENT, given, prompts, draw, plainly(shop, prompts),
        looks.blueprint_share, shop.agreement_with(shop.names(rows)), place,
    )  # fmt: skip


def controlled(shop: Workshop, name: str, maps: Callable[[np.ndarray], np.ndarray], config: AddOnConfig) -> Path:
    """A ControlNet on maps of pictures, [N, H, W] in [0, 1]; its folder."""
    place, run = shop.out / name, shop.out / "runs" / name
    some = shop.learned("controlnet")
    if not shop.made(name, config):
        drawn_maps = maps(shop.data.pictures[some]).astype(np.float32)
        shown = torch.from_numpy(drawn_maps).half()[:, None].expand(-1, 3, -1, -1)
        source = Captioned(HeldPictures(shop.data.pictures[some]), shop.own_captions(some, config.seed))
        lesson = shop.taught(f"ControlNet, {name}", source, config, training.EMPTY, maps=digest({"maps": shown[:64]}))
        training.train_controlnet(lesson, shop.unet(), shown, run, place)
    return place


def control_task(
    shop: Workshop,
    title: str,
    place: Path,
    rows: Sequence[int],
    maps: np.ndarray,
    effect_name: str,
    effect: Callable[[np.ndarray], Array],
) -> Task:
    """The row of a ControlNet on maps of the pictures `rows`."""
    from diffusers import ControlNetModel

    given = np.repeat((maps * 255).round().astype(np.uint8)[..., None], 3, axis=3)
    prompts = shop.names(rows)

    def draw(who: Who) -> np.ndarray:
        controlnet = ControlNetModel.from_pretrained(place, use_safetensors=True)
        pipe = pipeline("StableDiffusionControlNetPipeline", shop.folder, who, {"controlnet": controlnet})
        return drawn(pipe, prompts, shop.config.seed, {"image": images(given)}, **asked(who))

    return Task(
        title, effect_name, AGREEMENT, given, prompts, draw, plainly(shop, prompts), effect,
        shop.agreement_with(prompts), place,
    )  # fmt: skip


def edge_control(shop: Workshop) -> Task:
    """A ControlNet on edges."""
    place, rows = controlled(shop, "edges", looks.edges, shop.config.edges), shop.rows("edges")
    maps = looks.edges(shop.shown.pictures[rows])
    return control_task(
        shop, "ControlNet, edges", place, rows, maps, "correlation of edges",
        lambda pictures: looks.edge_likeness(pictures, maps),
    )  # fmt: skip


def shape_control(shop: Workshop) -> Task:
    """A ControlNet on silhouettes."""
    place, rows = controlled(shop, "shapes", looks.ink, shop.config.shapes), shop.rows("shapes")
    masks = looks.ink(shop.shown.pictures[rows])
    return control_task(
        shop, "ControlNet, silhouettes", place, rows, masks.astype(np.float32), "overlap of silhouettes",
        lambda pictures: looks.overlap(pictures, masks),
    )  # fmt: skip


def picture_prompt(shop: Workshop) -> Task:
    """An IP-Adapter: the picture alone says what is drawn, by Lite0's features."""
    place, run = shop.out / "picture", shop.out / "runs" / "picture"
    config = shop.config.picture
    if not shop.made("picture", config):
        # all there are: from fewer it learns pictures by heart, and nothing of those that it is shown later
        captions = shop.own_captions(range(len(shop.data)), config.seed)
        source = Captioned(HeldPictures(shop.data.pictures), captions)
        told = digest({"features": shop.seen[:64]})
        lesson = shop.taught("IP-Adapter", source, config, training.ALONE, features=told)
        project = training.read_off(shop.seen, shop.states())
        training.train_ip_adapter(lesson, shop.unet(), shop.seen, project, run, place)
    rows = shop.rows("picture")
    prompts = [""] * len(rows)
    given = shop.shown.pictures[rows]
    features = shop.features_of(given)

    def draw(who: Who) -> np.ndarray:
        pipe = pipeline("StableDiffusionPipeline", shop.folder, who)
        pipe.load_ip_adapter([training.read_ip_adapter(place)], subfolder="", weight_name="", image_encoder_folder=None)
        return drawn_after(pipe, prompts, features, shop.config.seed, **asked(who))

    return Task(
        "IP-Adapter", "likeness to the picture over strangers", "agreement with the picture's name", given, prompts,
        draw, plainly(shop, prompts), lambda pictures: shop.likeness(pictures, given),
        shop.agreement_with(shop.names(rows)), place,
    )  # fmt: skip


def from_picture(shop: Workshop, name: str, given: np.ndarray, prompts: Sequence[str]) -> Callable[[Who], np.ndarray]:
    """Drawing by plain diffusers' img2img at the task's strength."""

    def draw(who: Who) -> np.ndarray:
        pipe = pipeline("StableDiffusionImg2ImgPipeline", shop.folder, who, gamma=GAMMAS.get(name))
        strength = STRENGTHS[name]
        return drawn(
            pipe, prompts, shop.config.seed, {"image": images(given)}, strength=strength, **asked(who, strength)
        )

    return draw


def img2img(shop: Workshop) -> Task:
    """The same thing drawn anew from a picture: its outline is to stay."""
    rows = shop.rows("img2img")
    given, prompts = shop.shown.pictures[rows], shop.names(rows)
    return Task(
        "img2img", OVERLAP, AGREEMENT, given, prompts, from_picture(shop, "img2img", given, prompts),
        plainly(shop, prompts), lambda pictures: looks.overlap(pictures, looks.ink(given)),
        shop.agreement_with(prompts),
    )  # fmt: skip


def style_transfer(shop: Workshop) -> Task:
    """A picture of one style drawn anew in another."""
    flat = [row for row, record in enumerate(shop.shown.records) if record.style in ("noto", "twemoji", "emojione")]
    rows = shop.rows("style transfer", flat)
    given = shop.shown.pictures[rows]
    prompts = [f"{name}, {NEW_STYLE}" for name in shop.names(rows)]
    return Task(
        "style transfer", f"share read as {NEW_STYLE}", OVERLAP, given, prompts,
        from_picture(shop, "style transfer", given, prompts), lambda who: given,
        lambda pictures: shop.style_rate(pictures, NEW_STYLE),
        lambda pictures: looks.overlap(pictures, looks.ink(given)),
    )  # fmt: skip


def super_resolution(shop: Workshop) -> Task:
    """A picture of 16 x 16 pixels drawn anew at 64 x 64: detail is to come, and be the right one."""
    rows = shop.rows("super-resolution")
    sharp, prompts = shop.shown.pictures[rows], shop.names(rows)
    given = looks.blurred(sharp)
    return Task(
        "super-resolution", "correlation of what is added with what was lost", AGREEMENT, given, prompts,
        from_picture(shop, "super-resolution", given, prompts), lambda who: given,
        lambda pictures: looks.detail_likeness(pictures, given, sharp), shop.agreement_with(prompts),
    )  # fmt: skip


def inpainting(shop: Workshop) -> Task:
    """Half of a picture, drawn to the end."""
    rows = shop.rows("inpainting")
    whole, prompts = shop.shown.pictures[rows], shop.names(rows)
    half = whole.shape[2] // 2
    given = whole.copy()
    given[:, :, half:] = 255
    mask = np.zeros(whole.shape, np.uint8)
    mask[:, :, half:] = 255

    def draw(who: Who) -> np.ndarray:
        pipe = pipeline("StableDiffusionInpaintPipeline", shop.folder, who)
        pipe.unet.register_to_config(in_channels=4)  # by which it knows a text-to-image network; latents have 16 here
        shown = {"image": images(given), "mask_image": images(mask)}
        return drawn(pipe, prompts, shop.config.seed, shown, strength=1.0, height=64, width=64, **asked(who))

    return Task(
        "inpainting", AGREEMENT, "closeness of the half that is given", given, prompts, draw,
        lambda who: given, shop.agreement_with(prompts),
        lambda pictures: looks.closeness(pictures[:, :, :half], given[:, :, :half]),
    )  # fmt: skip


TASKS: Mapping[str, Callable[[Workshop], Task]] = {
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
