"""`fewstep world chinese`: the same concepts prompted in English and in held-out Chinese, and scored.

All forms of a prompt have the same noise, and all pictures are scored against the English name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fewstep.backbones.teachers import read_teacher
from fewstep.common.files import write_json, write_text
from fewstep.common.provenance import commit, hardware
from fewstep.evaluation.bootstrap import RESAMPLES, centred_interval, counts, mean_figure
from fewstep.evaluation.metric import Array, Figure
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep.inference.multilingual.adapter import Adapter, SentenceMap, load_adapter
from fewstep.inference.multilingual.train import train_adapter
from fewstep.students.resolve import resolve_student
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.emoji8.metrics import agreement
from fewstep_worlds.emoji8.scorers.agreement import PromptAgreement
from fewstep_worlds.emoji8.translations import Words, chinese_pairs, with_keywords
from fewstep_worlds.studies.comparison import Entry, PictureStore, teacher_entry
from fewstep_worlds.studies.settings import ChineseConfig
from fewstep_worlds.studies.students import students_omega

FORMS = ("English", "Chinese", "Chinese with keywords")
"""Forms of a prompt, in the order of the rows; the first one uses the teacher's own text encoder."""


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        network: student or teacher.
        steps: network calls.
        form: of the prompts.
        agreement: mean score against the English names, over concepts.
        ratio: to the same network's English row, resampled by concepts; None for that row.
    """

    network: str
    steps: int
    form: str
    agreement: Figure
    ratio: Figure | None


def ratio_figure(ours: Array, theirs: Array, seed: int) -> Figure:
    """Return mean(ours) / mean(theirs) of the same N concepts, with its interval over draws of N concepts."""
    value = float(ours.mean() / theirs.mean())
    drawn = counts(len(ours), RESAMPLES, seed, "ratio")
    return Figure(value, *centred_interval(value, (drawn @ ours) / (drawn @ theirs)), len(ours))


def prompts_of(words: Words, config: ChineseConfig) -> dict[str, list[str]]:
    """Return the prompts by form; the concepts are in the same order."""
    test = words.test[: config.concepts]
    english = [record.name for record in test]
    long = [with_keywords(record, record.keywords_zh) for record in test]
    return dict(zip(FORMS, (english, [record.name_zh for record in test], long), strict=True))


def measure(
    entries: Sequence[Entry], prompts: Mapping[str, Sequence[str]], config: ChineseConfig, adapter: Path, out: Path
) -> tuple[list[Line], list[tuple[str, np.ndarray]]]:
    """Sample and score every entry in every form; return the rows, and the first pictures of each concept."""
    scorer: PromptAgreement = agreement()
    english = prompts[FORMS[0]]
    lines, shown = [], []
    for entry in entries:
        own: Array | None = None
        for form, texts in prompts.items():
            own_adapter = None if form == FORMS[0] else adapter
            repeated = [text for text in texts for _ in range(config.noises)]
            pictures = PictureStore(repeated, out / "pictures", own_adapter).pictures(entry)
            names = [name for name in english for _ in range(config.noises)]
            scores: Array = scorer.features(pictures, names).reshape(len(english), config.noises).mean(1)
            ratio = None if own is None else ratio_figure(scores, own, config.seed)
            own = scores if own is None else own
            figure = replace(mean_figure(scores, config.seed), identity=scorer.identity)
            lines.append(Line(entry.method, entry.sampling.steps, form, figure, ratio))
            short = form.removeprefix("Chinese with ")
            shown.append((f"{entry.method} {entry.sampling.steps}, {short}", pictures[:: config.noises]))
    return lines, shown


def count_right(adapter: Adapter, texts: Sequence[str], names: Sequence[str]) -> int:
    """Return how many texts the adapter maps to their own English names."""
    return sum(caption == name for (caption, _), name in zip(adapter.readings(texts), names, strict=True))


def table(lines: Sequence[Line]) -> str:
    """Return the rows as Markdown."""
    rows = [
        (
            line.network,
            f"{line.steps}",
            line.form,
            _figure(line.agreement),
            "" if line.ratio is None else _figure(line.ratio),
        )
        for line in lines
    ]
    return markdown(["network", "steps", "prompts", "agreement", "ratio to English"], rows, left=5).rstrip()


def _figure(figure: Figure) -> str:
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def measure_chinese(config: ChineseConfig, out: Path) -> Path:
    """Train the adapter if none is named, draw, score; return the table's path. A stopped run is resumed."""
    folder, words = read_teacher(), Words.load()
    adapter = Path(config.adapter) if config.adapter else out / "adapter"
    pairs = chinese_pairs(words)
    if not config.adapter:
        train_adapter(config.training, folder, pairs, out / "training", adapter)
    lora, sampling, omega = resolve_student(folder, config.lora, {"steps": config.steps})
    name = "student" if lora is not None else "teacher"
    guidance = students_omega() if omega is None else omega
    place = lora.path if lora else None
    entries = [Entry(name, sampling, place, config.seed), teacher_entry(guidance, config.teacher_steps, config.seed)]
    prompts = prompts_of(words, config)
    lines, shown = measure(entries, prompts, config, adapter, out)
    count = len(prompts[FORMS[0]])
    trained = load_adapter(adapter, folder)
    plain = replace(trained, network=SentenceMap(trained.sentence.width))
    found = {form: [count_right(of, prompts[form], prompts[FORMS[0]]) for of in (trained, plain)] for form in FORMS[1:]}
    right = ", ".join(f"{form} {ours} ({theirs})" for form, (ours, theirs) in found.items())
    note = (
        f"{count} concepts whose Chinese is in none of the {len(pairs)} text pairs (their English names are among the "
        f"adapter's candidates), {config.noises} pictures of each; "
        f"95 % intervals over concepts. Mapped to their own English names by the adapter (and by the plain sentence "
        f"vectors): {right} of {count}. Student: {lora}. Seed {config.seed}, commit {commit()}, {hardware()}."
    )
    listed = [f"{a} | {b} | {c}" for a, b, c in zip(*prompts.values(), strict=True)][: config.shown]
    text = "\n\n".join(["# Chinese to image", table(lines), note, "Shown: " + "; ".join(listed)])
    write_text(out / "chinese.md", text + "\n")
    figures = [
        {"drawer": x.network, "steps": x.steps, "form": x.form, "agreement": asdict(x.agreement)}
        | ({"ratio": asdict(x.ratio)} if x.ratio else {})
        for x in lines
    ]
    write_json(out / "chinese.json", {"note": note, "lines": figures})
    rows = [(label, pictures[: config.shown]) for label, pictures in shown]
    save_image(labelled_grid(rows, prompts[FORMS[0]][: config.shown], 1), out / "chinese.webp")
    return out / "chinese.md"
