"""The bundled teacher's figures: does it draw what it is asked for, does it copy, is its background white?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.drawing import Artist, labelled_sheet, load_artist, save_picture
from fewstep.draws import generator
from fewstep.evaluation.metric import Figure
from fewstep.evaluation.neighbours import Neighbours
from fewstep.evaluation.whiteness import Whiteness
from fewstep.files import write_json
from fewstep.settings import TEACHER_SAMPLING
from fewstep.world import emoji8
from fewstep.world.measures import Gallery, lite0, metrics

SHOWN = (
    *("octopus, noto style", "octopus, fluent 3d style", "octopus", "sea, animal", "doggy", "automobile"),
    *("red apple, twemoji style", "rocket", "crying face, emojione style", "birthday cake, fluent color style"),
)
"""Prompts of the sample grid: with and without style, keywords, and words of no caption."""


@dataclass(frozen=True)
class Card:
    """Figures by name, in the order of the model card."""

    figures: dict[str, Figure]

    def markdown(self) -> str:
        """A table."""
        lines = ["| figure | value | 95 % interval | n |", "| --- | --- | --- | --- |"]
        for name, figure in self.figures.items():
            interval = f"{figure.low:.3f} to {figure.high:.3f}" if figure.low is not None else ""
            lines.append(f"| {name} | {figure.value:.3f} | {interval} | {figure.n} |")
        return "\n".join(lines)


def teacher_card(pipeline: Path, out: Path, *, n: int = 1000, omega: float = 3.0, steps: int = 50) -> Card:
    """Draw and judge; write card.json, card.md and samples.webp into `out`.

    Args:
        pipeline: the teacher's folder.
        out: where to write.
        n: seen prompts (name with style) drawn from the training records.
        omega: guidance, papers' convention.
        steps: of guided DDIM.
    """
    artist = load_artist(pipeline)
    sampling = TEACHER_SAMPLING.model_copy(update={"steps": steps, "omega": omega})
    gallery = Gallery.load()
    features = lite0()
    records = gallery.data.records
    chosen = generator(0, "teacher card").permutation(len(records))[:n]
    figures: dict[str, Figure] = {}

    def look_up(prompts: list[str], concepts: list[str] | None, pictures: np.ndarray) -> Neighbours:
        return gallery.neighbours(features, pictures, prompts, concepts)

    def draw(prompts: list[str], first: int) -> np.ndarray:
        return artist.draw(prompts, [first + i for i in range(len(prompts))], sampling)

    prompts = [emoji8.name_with_style(records[i]) for i in chosen]
    seen = draw(prompts, 10_000)
    shares = look_up(prompts, None, seen)
    figures["seen prompts: nearest real picture has the right concept"] = shares.right_concept
    figures["... with the prompt's own picture left out"] = shares.right_concept_without_own
    if shares.own is not None:
        figures["... nearest real picture is the prompt's own training picture"] = shares.own
    truth = gallery.data.pictures[chosen]
    real = look_up(prompts, None, truth)
    figures["real pictures: nearest other real picture has the right concept"] = real.right_concept_without_own
    unseen = [emoji8.name_with_style(record) for record in emoji8.load_records("heldout-pair")]
    pairs = look_up(unseen, None, draw(unseen, 20_000))
    figures["held-out (concept, family) pairs: right concept"] = pairs.right_concept
    words = json.loads((emoji8.folder() / "synonyms.json").read_text(encoding="utf-8"))
    names = [entry["name"] for entry in words]
    said = [entry["word"] for entry in words]
    figures["words of no caption: right concept"] = look_up(said, names, draw(said, 30_000)).right_concept
    figures["the same concepts by their captions' names"] = look_up(names, names, draw(names, 30_000)).right_concept
    for metric in metrics(gallery, features, n):
        if isinstance(metric, Whiteness):
            name = metric.identity.name
            figures[name] = metric.reduce(metric.features(seen, prompts), None, 0)
            figures[f"{name}, real pictures"] = metric.reduce(metric.features(truth, prompts), None, 0)
    card = Card(figures)
    write_json(out / "card.json", {name: figure.to_dict() for name, figure in figures.items()})
    (out / "card.md").write_text(card.markdown() + "\n", encoding="utf-8")
    save_picture(sample_grid(artist, omega, steps), out / "samples.webp")
    return card


def sample_grid(artist: Artist, omega: float, steps: int, noises: int = 6) -> Image.Image:
    """A row a noise, a column a prompt."""
    sampling = TEACHER_SAMPLING.model_copy(update={"steps": steps, "omega": omega})
    rows = []
    for seed in range(noises):
        rows.append((f"seed {seed}", artist.draw(SHOWN, [seed] * len(SHOWN), sampling)))
    return labelled_sheet(rows, SHOWN)
