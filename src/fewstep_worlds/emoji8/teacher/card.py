"""The bundled teacher's model card: right concepts, copies, white backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.backbones.base import Backbone
from fewstep.common.device import pick_device
from fewstep.common.files import read_json, write_json, write_text
from fewstep.common.rng import generator
from fewstep.diffusion.config import Sampling
from fewstep.evaluation.bootstrap import mean_figure
from fewstep.evaluation.features import Features
from fewstep.evaluation.metric import Figure
from fewstep.inference.generator import ImageGenerator, load_image_generator
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep_worlds.common.autoencoder import psnr
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.metrics import Gallery, lite0, metrics
from fewstep_worlds.emoji8.whiteness import Whiteness

SHOWN = (
    *("octopus, noto style", "octopus, fluent 3d style", "octopus", "sea, animal", "doggy", "automobile"),
    *("red apple, twemoji style", "rocket", "crying face, emojione style", "birthday cake, fluent color style"),
)
"""Prompts of the sample grid: with and without style, keywords, and words of no caption."""
OWN_WORDS = {
    "words of no caption, untrained": ("new_words.json", 31_000),
    "words of no caption that the encoder was trained on": ("synonyms.json", 30_000),
}
"""Lists of a user's own words: file in Emoji-8's folder, first seed."""


def teacher_card(pipeline: Path, out: Path, *, n: int, sampling: Sampling) -> dict[str, Figure]:
    """Sample and measure a teacher; write card.json, card.md and samples.webp into `out`.

    Args:
        pipeline: the teacher's folder.
        out: where to write.
        n: seen prompts (name with style) drawn from the training records.
        sampling: of the teacher.

    Returns:
        figures by name, in the order of the card.
    """
    image_generator = load_image_generator(pipeline, None, pick_device("auto"))
    gallery = Gallery.load()
    features = lite0(out / "features")
    figures = {
        **autoencoder_figures(image_generator.backbone),
        **seen_figures(image_generator, gallery, features, sampling, n),
        **unseen_figures(image_generator, gallery, features, sampling),
    }
    rows = [
        (name, f"{f.value:.3f}", f"{f.low:.3f} to {f.high:.3f}" if f.low is not None else "", f"{f.n}")
        for name, f in figures.items()
    ]
    write_json(out / "card.json", {name: asdict(figure) for name, figure in figures.items()})
    write_text(out / "card.md", markdown(["figure", "value", "95 % interval", "n"], rows, left=4))
    save_image(sample_grid(image_generator, sampling), out / "samples.webp")
    return figures


def autoencoder_figures(backbone: Backbone) -> dict[str, Figure]:
    """Return the PSNR of held-out concepts through the autoencoder, in dB."""
    pictures = emoji8.load("heldout-concept").pictures
    values = psnr(backbone.to_pictures(backbone.to_latents(pictures)), pictures)
    return {"autoencoder, PSNR on held-out concepts (dB)": mean_figure(values, 0, "psnr")}


def draw(image_generator: ImageGenerator, prompts: Sequence[str], first: int, sampling: Sampling) -> np.ndarray:
    """Draw a picture a prompt, seeds counting up from `first`."""
    return image_generator.draw(prompts, range(first, first + len(prompts)), sampling)


def seen_figures(
    image_generator: ImageGenerator, gallery: Gallery, features: Features, sampling: Sampling, n: int
) -> dict[str, Figure]:
    """Measure training prompts: right concepts, copies, white backgrounds."""
    records = gallery.data.records
    chosen = generator(0, "teacher card").permutation(len(records))[:n]
    prompts = [emoji8.name_with_style(records[i]) for i in chosen]
    seen, truth = draw(image_generator, prompts, 10_000, sampling), gallery.data.pictures[chosen]
    shares = gallery.neighbours(features, seen, prompts)
    real = gallery.neighbours(features, truth, prompts)
    figures = {
        "seen prompts: nearest real picture has the right concept": shares.right_concept,
        "... with the prompt's own picture left out": shares.right_concept_without_own,
        "real pictures: nearest other real picture has the right concept": real.right_concept_without_own,
    }
    if shares.own is not None:
        figures["seen prompts: nearest real picture is the prompt's own training picture"] = shares.own
    for metric in metrics(gallery, features, len(prompts)):
        if isinstance(metric, Whiteness):
            name = metric.identity.name
            figures[name] = metric.reduce(metric.features(seen, prompts), None, 0)
            figures[f"{name}, real pictures"] = metric.reduce(metric.features(truth, prompts), None, 0)
    return figures


def unseen_figures(
    image_generator: ImageGenerator, gallery: Gallery, features: Features, sampling: Sampling
) -> dict[str, Figure]:
    """Measure held-out pairs of concept and style family, and two lists of words that no caption has."""
    pairs = [emoji8.name_with_style(record) for record in emoji8.load_records("heldout-pair")]

    def right(prompts: list[str], concepts: list[str] | None, first: int) -> Figure:
        pictures = draw(image_generator, prompts, first, sampling)
        return gallery.neighbours(features, pictures, prompts, concepts).right_concept

    figures = {"held-out (concept, family) pairs: right concept": right(pairs, None, 20_000)}
    for kind, (file, first) in OWN_WORDS.items():
        words = read_json(emoji8.folder() / file)
        names, synonyms = ([entry[key] for entry in words] for key in ("name", "word"))
        by_word, by_name = right(synonyms, names, first), right(names, names, first)
        share = by_word.value / by_name.value if by_name.value else 0.0
        figures[f"{kind}: right concept"] = by_word
        figures[f"{kind}: the same concepts by their captions' names"] = by_name
        figures[f"{kind}, as a share of the captioned rate"] = Figure(share, None, None, by_word.n)
    return figures


def sample_grid(image_generator: ImageGenerator, sampling: Sampling, noises: int = 6) -> Image.Image:
    """Draw a sheet: a row a noise, a column a prompt."""
    rows = [(f"seed {seed}", image_generator.draw(SHOWN, [seed] * len(SHOWN), sampling)) for seed in range(noises)]
    return labelled_grid(rows, SHOWN)
