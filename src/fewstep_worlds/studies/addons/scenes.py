"""What the add-ons study takes from sticker scenes: pictures with prompts, masks, and measures by the reader.

The base's own data has neither the arrangements of a community checkpoint nor the held-out style.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fewstep.common.accelerator import make_accelerator
from fewstep.common.files import atomic_folder
from fewstep.common.random_streams import generator
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import digest
from fewstep.evaluation.metric import Array, Pictures
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.autoencoder import to_tensor
from fewstep_worlds.common.training import ENDLESS, fit
from fewstep_worlds.stickers import heldout
from fewstep_worlds.stickers.claim import Facts, check, make_claim
from fewstep_worlds.stickers.dataset import fingerprint
from fewstep_worlds.stickers.draw import draw_background, draw_scene
from fewstep_worlds.stickers.grammar import write
from fewstep_worlds.stickers.prompts import Prompt, training_prompt
from fewstep_worlds.stickers.reader import Reader, damage, load_reader, make_targets, read_pictures, reader_loss
from fewstep_worlds.stickers.reward import load_world_scorer
from fewstep_worlds.stickers.scene import SIDE, Scene, make_scene
from fewstep_worlds.stickers.sprites import load_sprites, sprite_folder
from fewstep_worlds.stickers.vocabulary import HELD_OUT_STYLE, STYLES
from fewstep_worlds.studies.settings import AddOnConfig

__all__ = ["Prompt", "Reader", "load_reader"]

Kind = Literal["open", "arranged", "style"]
"""Scenes as the base was trained on; of an arrangement; of the held-out style."""
TRAINING, TESTS = 5, 109
"""Seeds of the scenes that add-ons are trained on, and of those that they are measured on."""
ARRANGEMENTS = {"row": (3, 4), "column": (3, 4), "ring": (5, 6)}
"""Arrangement -> numbers of stickers."""
FLAT = 4.0
"""Largest distance of a sticker from the line of a row or column, in pixels."""
NEAR = 6.0
"""Largest distance of stickers at the same place, in pixels."""
DAMAGE = {"blur": 1.2, "noise": 0.2}
"""Largest deviations of blur, in pixels, and of noise on the pictures that the style's reader is trained on."""


def make_prompt(kind: Kind, seed: int, index: int) -> Prompt:
    """Return a scene of a kind, and a prompt about it that states the arrangement or the style."""
    if kind == "open":
        prompt = training_prompt(make_scene(seed, index), seed, index)
        assert prompt is not None
        return prompt
    rng = generator(seed, f"stickers add-on {kind}", index)
    if kind == "style":
        scene, ending = make_scene(seed, index, "style"), ""
        claim = replace(make_claim(scene, rng), style=HELD_OUT_STYLE)
    else:
        name = tuple(ARRANGEMENTS)[int(rng.integers(len(ARRANGEMENTS)))]
        scene, ending = _arranged(make_scene(seed, index), name, rng), f", in a {name}"
        claim = replace(make_claim(scene, rng), things=tuple(scene.counts.items()))
    return Prompt(write(claim, "english", rng, heldout.synonyms()) + ending, claim, scene)


def _arranged(scene: Scene, name: str, rng: np.random.Generator) -> Scene:
    """Return a scene with stickers of its first concept in a row, a column or a ring."""
    n = int(rng.choice(ARRANGEMENTS[name]))
    if name == "ring":
        size, angles = rng.uniform(14, 18), rng.uniform(0, 2 * math.pi) + 2 * math.pi * np.arange(n) / n
        centres = SIDE / 2 + rng.uniform(19, 22) * np.stack([np.cos(angles), np.sin(angles)], 1)
    else:
        gap = SIDE / n * rng.uniform(0.9, 1)
        size = gap * rng.uniform(0.85, 0.95)
        along = SIDE / 2 + gap * (np.arange(n) - (n - 1) / 2)
        across = np.full(n, rng.uniform(size / 2, SIDE - size / 2))
        centres = np.stack([along, across] if name == "row" else [across, along], 1)
    first = scene.stickers[0]
    return replace(scene, stickers=tuple(replace(first, x=float(x), y=float(y), size=size) for x, y in centres))


def arrangement(centres: Sequence[tuple[float, float]]) -> str | None:
    """Return which of `ARRANGEMENTS` the centres (x, y) of stickers make, or None."""
    if len(centres) < 3:
        return None
    apart = np.asarray(centres) - np.mean(centres, 0)
    across, down = np.abs(apart).max(0)
    if min(across, down) <= FLAT:
        return None if max(across, down) < 3 * FLAT else "row" if down <= FLAT else "column"
    radius, angles = np.hypot(*apart.T), np.sort(np.arctan2(apart[:, 1], apart[:, 0]))
    gaps = np.diff(angles, append=angles[0] + 2 * math.pi)
    even = len(centres) >= 5 and gaps.max() < 1.5 * 2 * math.pi / len(centres)
    return "ring" if even and radius.min() > 0.75 * radius.max() else None


def draw(scenes: Iterable[Scene]) -> Pictures:
    """Return the pictures of scenes, uint8 [N, 64, 64, 3]."""
    sprites = load_sprites(sprite_folder())
    return np.stack([draw_scene(scene, sprites) for scene in scenes])


def pictures_of(prompts: Sequence[Prompt]) -> Pictures:
    """Return the pictures of the scenes of prompts, uint8 [N, 64, 64, 3]."""
    return draw(prompt.scene for prompt in prompts)


def write_captioned(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Write the pictures of prompts and metadata.jsonl, as `data.source` reads them."""
    with atomic_folder(folder) as part:
        lines = []
        for number, (prompt, picture) in enumerate(zip(prompts, pictures_of(prompts), strict=True)):
            Image.fromarray(picture).save(part / f"{number:05d}.png")
            lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": prompt.text}))
        (part / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def silhouettes(pictures: Pictures, prompts: Sequence[Prompt]) -> npt.NDArray[np.bool_]:
    """Return the pixels that stickers cover in the pictures of the prompts' scenes, [N, 64, 64]."""
    covered: npt.NDArray[np.bool_] = (
        pictures != np.stack([draw_background(prompt.scene.background) for prompt in prompts])
    ).any(3)
    return covered


def in_words(scene: Scene) -> str:
    """Return the concepts, the colour and the pattern of a scene as a short caption."""
    return " ".join([*scene.counts, scene.background.colour, scene.background.pattern])


def training_prompts(kind: Kind, indices: Iterable[int]) -> list[Prompt]:
    """Return prompts about the scenes that add-ons are trained on."""
    return [make_prompt(kind, TRAINING, index) for index in indices]


def unseen_prompts(kind: Kind, n: int) -> list[Prompt]:
    """Return `n` prompts about scenes that nothing was trained on."""
    return [make_prompt(kind, TESTS, index) for index in range(n)]


def incomplete(n: int) -> tuple[list[Prompt], Pictures, npt.NDArray[np.bool_]]:
    """Return `n` unseen prompts of two stickers, their pictures without the second, and masks of it [n, 64, 64].

    A mask is a box whose edges are multiples of 4 pixels, which a cell of the latents is.
    """
    every = (make_prompt("open", TESTS, index) for index in count())
    prompts = list(islice((p for p in every if len(p.scene.stickers) == len(p.scene.counts) == 2), n))
    masks = np.zeros((n, SIDE, SIDE), bool)
    for mask, prompt in zip(masks, prompts, strict=True):
        last = prompt.scene.stickers[1]
        reach = 0.65 * last.size
        rows, columns = (
            slice(max(4 * math.floor((middle - reach) / 4), 0), 4 * math.ceil((middle + reach) / 4))
            for middle in (last.y, last.x)
        )
        mask[rows, columns] = True
    return prompts, draw(replace(prompt.scene, stickers=prompt.scene.stickers[:1]) for prompt in prompts), masks


Measure = Callable[[Facts, Prompt], float]
"""(what the reader finds in a picture, the prompt with its scene) -> 1 for full agreement, 0 for none."""


def agrees(facts: Facts, prompt: Prompt) -> float:
    """Return 1 where every stated fact is found; the held-out style, which the reader never saw, is left out."""
    claim = replace(prompt.claim, style=None) if prompt.claim.style == HELD_OUT_STYLE else prompt.claim
    return float(all(check(claim, facts).values()))


def same_style(facts: Facts, prompt: Prompt) -> float:
    """Return 1 where the style is the scene's; a reader of all styles must have found it."""
    return float(facts.style == prompt.scene.style)


def is_arranged(facts: Facts, prompt: Prompt) -> float:
    """Return 1 where the stickers of the scene's concept make the scene's arrangement."""
    first = prompt.scene.stickers[0].concept
    own = [(x, y) for concept, x, y in facts.places if concept == first]
    return float(arrangement(own) == arrangement([(sticker.x, sticker.y) for sticker in prompt.scene.stickers]))


def same_places(facts: Facts, prompt: Prompt) -> float:
    """Return the share of stickers, of picture and scene, where the other has one too, whatever they show."""
    own = np.array([(x, y) for _, x, y in facts.places]).reshape(-1, 1, 2)
    others = np.array([(sticker.x, sticker.y) for sticker in prompt.scene.stickers])
    near = np.linalg.norm(own - others, axis=2) <= NEAR
    return float(near.any(0).sum() + near.any(1).sum()) / (len(own) + len(others))


def same_stickers(facts: Facts, prompt: Prompt) -> float:
    """Return the share of stickers that picture and scene have in common by concept (Dice's coefficient)."""
    own, others = Counter(concept for concept, _, _ in facts.places), Counter(prompt.scene.counts)
    return 2 * (own & others).total() / (own.total() + others.total())


def by_reader(reader: Reader, measure: Measure, prompts: Sequence[Prompt]) -> Callable[[Pictures], Array]:
    """Return a function from the pictures of the prompts to a measure of each, float64 [N]."""

    def measured(pictures: Pictures) -> Array:
        found = read_pictures(reader, pictures)
        return np.array([measure(facts, prompt) for facts, prompt in zip(found, prompts, strict=True)])

    return measured


def train_style_reader(reader: Reader, config: AddOnConfig, run: Path) -> Reader:
    """Return the reader, trained further on scenes of all styles: it never saw the held-out one, nor stickers in it.

    Raises:
        UserError: the run folder holds a training with other settings or inputs.
    """
    trained, device = copy.deepcopy(reader), reader.heat.weight.device

    def fetch(items: np.ndarray, rng: KeyedRng) -> Batch:
        of = [make_scene(TRAINING, index, "train" if index % len(STYLES) else "style") for index in items.tolist()]
        blur, noise = (rng.uniform(name, 0, most).float() for name, most in DAMAGE.items())
        pictures = damage(to_tensor(draw(of)), blur, noise, rng.normal("pixels", (3, SIDE, SIDE)).cpu())
        batch = {"pictures": pictures, **make_targets(of)}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def loss(batch: Batch, _: KeyedRng) -> Loss:
        return reader_loss(trained(batch["pictures"]), batch)

    plan = [Update("reader", dict(trained.named_parameters()), loss, config.optim)]
    accelerator = make_accelerator(config.loop.precision, device)
    inputs = {"reader": digest(reader.state_dict()), "scenes": fingerprint()}
    fitted = fit(run.name, plan, fetch, ENDLESS, run, config, config.loop, accelerator, inputs)
    trained.load_state_dict(fitted["reader"])
    return trained.eval()


def load_encoder(device: torch.device) -> Callable[[Pictures], Tensor]:
    """Return the features of pictures by the preference scorer: mean and maximum over cells, [N, width] on the CPU.

    The scorer shares nothing with the reader, which measures what is drawn from its features.
    """
    network = load_world_scorer(device).network.pictures

    @torch.inference_mode()
    def encode(pictures: Pictures) -> Tensor:
        parts = (to_tensor(pictures[start : start + 64]) for start in range(0, len(pictures), 64))
        cells = torch.cat([network(part.to(device)) for part in parts])
        return torch.cat([cells.mean(1), cells.amax(1)], 1).float().cpu()

    return encode
