"""`fewstep world chinese`: the same claims prompted in English and in Chinese, drawn from the same noise and scored.

The Chinese is in none of the adapter's text pairs. All pictures are scored against the English prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fewstep.backbones.teachers import read_teacher
from fewstep.common.defaults import world
from fewstep.common.files import write_json, write_text
from fewstep.common.provenance import commit, hardware
from fewstep.evaluation.bootstrap import RESAMPLES, centred_interval, counts, mean_figure
from fewstep.evaluation.evaluate import score_pictures
from fewstep.evaluation.features import Features
from fewstep.evaluation.lite0 import Lite0Features
from fewstep.evaluation.metric import Array, Figure
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep.inference.multilingual.pairs import Pair
from fewstep.inference.multilingual.train import train_adapter
from fewstep.students.resolve import resolve_student
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.studies.comparison import Entry, PictureStore, teacher_entry
from fewstep_worlds.studies.settings import ChineseConfig
from fewstep_worlds.studies.students import students_omega


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        network: student or teacher.
        steps: network calls.
        prompts: set of prompts.
        english, chinese: mean score of the pictures of the prompts in each language.
        ratio: of Chinese to English, resampled by prompts; None where the English score is 0.
    """

    network: str
    steps: int
    prompts: str
    english: Figure
    chinese: Figure
    ratio: Figure | None


def ratio_figure(ours: Array, theirs: Array, seed: int) -> Figure | None:
    """Return mean(ours) / mean(theirs) of the same N prompts, with its interval over draws of N prompts.

    None where mean(theirs) is 0; draws where it is 0 do not count.
    """
    if not theirs.mean():
        return None
    value = float(ours.mean() / theirs.mean())
    drawn = counts(len(ours), RESAMPLES, seed, "ratio")
    drawn = drawn[drawn @ theirs != 0]
    return Figure(value, *centred_interval(value, (drawn @ ours) / (drawn @ theirs)), len(ours))


def measure(
    entry: Entry, name: str, pairs: Sequence[Pair], config: ChineseConfig, adapter: Path, out: Path
) -> tuple[Line, list[tuple[str, np.ndarray]]]:
    """Draw and score one set of prompts in both languages; return the row, and the first pictures."""
    english = [pair.target for pair in pairs]
    suite = world().suite(english, config.seed, Features(Lite0Features(), out / "features"))
    metric = next(metric for metric in suite.metrics if metric.identity.group == "prompt")
    figures, scores, shown = [], [], []
    for language, texts, own in (("English", english, None), ("Chinese", [pair.source for pair in pairs], adapter)):
        pictures = PictureStore(texts, out / "pictures", own).pictures(entry)
        (found,) = score_pictures(pictures, english, [metric], None).values()
        scores.append(np.asarray(found))
        figures.append(replace(mean_figure(scores[-1], config.seed), identity=metric.identity))
        shown.append((f"{entry.method} {entry.sampling.steps}, {language}", pictures[: config.shown]))
    ratio = ratio_figure(scores[1], scores[0], config.seed)
    return Line(entry.method, entry.sampling.steps, name, figures[0], figures[1], ratio), shown


def table(lines: Sequence[Line]) -> str:
    """Return the rows as Markdown."""
    rows = [
        (x.network, f"{x.steps}", x.prompts, *(_cell(figure) for figure in (x.english, x.chinese, x.ratio)))
        for x in lines
    ]
    return markdown(["network", "steps", "prompts", "English", "Chinese", "ratio"], rows, left=3).rstrip()


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def measure_chinese(config: ChineseConfig, out: Path) -> Path:
    """Train the adapter if none is named, draw, score; return the table's path. A stopped run is resumed."""
    folder, own = read_teacher(), world()
    adapter = Path(config.adapter) if config.adapter else out / "adapter"
    if not config.adapter:
        train_adapter(config.training, folder, own.text_pairs(), out / "training", adapter)
    lora, sampling, omega = resolve_student(folder, config.lora, {"steps": config.steps})
    name, place = ("student", lora.path) if lora else ("teacher", None)
    guidance = students_omega() if omega is None else omega
    entries = [Entry(name, sampling, place, config.seed), teacher_entry(guidance, config.teacher_steps, config.seed)]
    lines, listed = [], []
    for title, pairs in own.held_out_pairs(config.prompts).items():
        rows: list[tuple[str, np.ndarray]] = []
        for entry in entries:
            line, shown = measure(entry, title, pairs, config, adapter, out)
            lines.append(line)
            rows += shown
        labels = [pair.target for pair in pairs[: config.shown]]
        save_image(labelled_grid(rows, labels, 1), out / f"{title.replace(' ', '-')}.webp")
        listed.append(f"{title}: " + "; ".join(f"{pair.source} ({pair.target})" for pair in pairs[: config.shown]))
    identity = lines[0].english.identity
    assert identity is not None
    note = (
        f"{identity.name}: {identity.measures}. One picture of each prompt, 95 % intervals over prompts. "
        f"Student: {lora}. Seed {config.seed}, commit {commit()}, {hardware()}."
    )
    write_text(out / "chinese.md", "\n\n".join(["# Chinese prompts", table(lines), note, *listed]) + "\n")
    write_json(out / "chinese.json", {"note": note, "lines": [asdict(line) for line in lines]})
    return out / "chinese.md"
