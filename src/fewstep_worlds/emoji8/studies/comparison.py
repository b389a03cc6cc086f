"""Teacher, solvers and students on the same prompts from the same noise, measured: what demo and benchmark share.

Pictures and rows are kept on disk by what made them, so that a stopped contest goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.device import pick_device, pick_precision
from fewstep.common.files import atomic_write, sha256
from fewstep.common.provenance import commit
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.diffusion.config import TEACHER_SAMPLING, Sampling
from fewstep.evaluation.diversity import NOISES, PROMPTS, diversity
from fewstep.evaluation.evaluate import TeacherPictures, evaluate_pictures, score_pictures
from fewstep.evaluation.features import Features
from fewstep.evaluation.metric import Figure, Metric
from fewstep.inference.generator import ImageGenerator, load_image_generator
from fewstep_worlds.emoji8.metrics import Gallery, agreement, lite0, metrics, real_diversity
from fewstep_worlds.emoji8.report.results import Results, Row, load_results, save_results
from fewstep_worlds.emoji8.scorers.agreement import PromptAgreement

INDEX0_NOTE = "ends at index 0 (sigma = .029), as TCD does; DDIM and Euler end on clean data"
SOLVER_NAMES = {"euler": "Euler", "ddim": "DDIM", "dpmpp_2s": "DPM-Solver++(2S)"}


@dataclass(frozen=True)
class Entry:
    """One line of the contest: who draws, and how.

    Attributes:
        method: its name in tables.
        sampling: steps, gamma, guidance.
        lora: the student, None for the teacher.
        seed: of the student's training, and of the noise.
    """

    method: str
    sampling: Sampling
    lora: Path | None = None
    seed: int = 0
    note: str = ""


def teacher_entry(omega: float, steps: int, seed: int, name: str = "teacher") -> Entry:
    """The teacher's converged end points: guided DDIM."""
    sampling = TEACHER_SAMPLING.model_copy(update={"steps": steps, "omega": omega})
    return Entry(name, sampling, seed=seed)


def solver_entries(
    omega: float, steps: Sequence[int], seed: int, solvers: Mapping[str, str] = SOLVER_NAMES
) -> list[Entry]:
    """Euler, DDIM and DPM-Solver++(2S), or some of these, on the teacher, at equal calls (a guided one counts once).

    All take their times from the students' grid; the two-call solver ends at the least noisy index, where its
    mid-point exists.
    """
    entries = []
    for solver, name in solvers.items():
        end, note = ("index0", INDEX0_NOTE) if solver == "dpmpp_2s" else ("clean", "")
        for count in steps:
            settings = {"sampler": solver, "steps": count, "omega": omega, "spacing": "grid", "end": end}
            entries.append(Entry(name, Sampling.model_validate(settings), seed=seed, note=note))
    return entries


def student_entries(method: str, lora: Path, sampling: Sampling, steps: Sequence[int], seed: int) -> list[Entry]:
    """A student at several step counts."""
    return [Entry(method, sampling.model_copy(update={"steps": count}), lora, seed) for count in steps]


class Studio:
    """KeyedRng entries and keeps their pictures.

    Args:
        teacher: pipeline folder.
        prompts: one picture each.
        folder: where pictures are kept.
        adapter: what reads the prompts, where they are of another language.
    """

    def __init__(self, teacher: Path, prompts: Sequence[str], folder: Path, adapter: Path | None = None) -> None:
        self.teacher = teacher
        self.adapter = adapter
        self.prompts = list(prompts)
        self.folder = folder
        self.device = pick_device("auto")
        bf16 = pick_precision("auto", self.device) == "bf16"
        self.precision = torch.bfloat16 if bf16 else torch.float32
        self.base = read_folder(teacher).identity()
        self._artists: dict[str, ImageGenerator] = {}

    def image_generator(self, lora: Path | None) -> ImageGenerator:
        """The teacher, or the student of a LoRA; loaded once, the last one kept."""
        key = str(lora)
        if key not in self._artists:
            self._artists = {"None": self._artists["None"]} if "None" in self._artists else {}
            image_generator = load_image_generator(self.teacher, lora, self.device, self.adapter)
            self._artists[key] = replace(image_generator, precision=self.precision)
        return self._artists[key]

    def key(self, entry: Entry) -> str:
        """What decides an entry's pictures, hashed."""
        digest = hashlib.sha256()
        known = [self.base, entry.sampling.model_dump(mode="json"), entry.seed, self.prompts, str(self.precision)]
        digest.update(json.dumps(known).encode())
        if entry.lora is not None:
            files = [entry.lora] if entry.lora.is_file() else sorted(entry.lora.glob("*.safetensors"))
            for file in files:
                digest.update(bytes.fromhex(sha256(file)))
        if self.adapter is not None:
            digest.update(bytes.fromhex(sha256(*sorted(self.adapter.glob("adapter.*")))))
        return digest.hexdigest()[:24]

    def seeds(self, seed: int) -> Sequence[int]:
        """The seed of each prompt's noise; contests of different seeds share none."""
        return range(seed * 1_000_000, seed * 1_000_000 + len(self.prompts))

    def pictures(self, entry: Entry) -> np.ndarray:
        """The entry's pictures, uint8 [N, H, W, 3], drawn if they are not there yet."""
        return self._kept(entry, "", self.prompts, self.seeds(entry.seed))

    def noises(self, entry: Entry, prompts: int = PROMPTS, noises: int = NOISES) -> np.ndarray:
        """Several pictures of each of the first prompts, uint8 [P, k, H, W, 3]."""
        chosen = [prompt for prompt in self.prompts[:prompts] for _ in range(noises)]
        seeds = [500_000 + seed for seed in range(len(chosen))]
        pictures = self._kept(entry, f"-{prompts}x{noises}", chosen, seeds)
        return pictures.reshape(-1, noises, *pictures.shape[1:])

    def _kept(self, entry: Entry, kind: str, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        path = self.folder / f"{self.key(entry)}{kind}.safetensors"
        if path.is_file():
            kept: np.ndarray = load_tensors(path)["pictures"].numpy()
            return kept
        pictures = self.image_generator(entry.lora).draw(prompts, seeds, entry.sampling)
        with atomic_write(path) as part:
            save_tensors(part, {"pictures": torch.from_numpy(pictures)})
        return pictures


@dataclass(frozen=True)
class Bench:
    """What every judge of one run shares: the real pictures, the backbone's features, the scorer.

    Attributes:
        gallery: Emoji-8's training pictures.
        features: of pictures, kept in the run's folder.
        agreement: the prompt-agreement metric.
        others: further metrics.
    """

    gallery: Gallery
    features: Features
    agreement: PromptAgreement
    others: tuple[Metric, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> Bench:
        """Read the bundled world's; `folder` keeps features of pictures between processes.

        Raises:
            UserError: a part of the bundled world is missing or damaged.
        """
        return cls(Gallery.load(), lite0(folder), agreement())


class Judge:
    """The bundled world's metrics, for one list of prompts.

    FD is left out below its smallest sample (500), where its bias rules.

    Args:
        prompts: open prompts or captions of Emoji-8; real pictures of the same concepts are the reference.
        bench: what all judges share.
        seed: of the reference and of bootstrap intervals.
    """

    def __init__(self, prompts: Sequence[str], bench: Bench, seed: int = 0) -> None:
        self.prompts = list(prompts)
        self.bench = bench
        self.seed = seed
        self.reference = bench.gallery.reference(prompts, seed)
        self.metrics: list[Metric] = metrics(bench.gallery, bench.features, len(prompts))
        self.metrics[1:1] = [bench.agreement, *bench.others]

    @cached_property
    def key(self) -> str:
        """What decides a row's figures besides the pictures, as text."""
        real = hashlib.sha256(self.reference.pictures.tobytes()).hexdigest()
        return json.dumps([[asdict(metric.identity) for metric in self.metrics], self.prompts, self.seed, real])

    def real(self) -> dict[str, Figure]:
        """The same figures of real pictures of the same prompts."""
        floor = self.reference.floor
        assert floor is not None
        usable = [metric for metric in self.metrics if metric.identity.against != "teacher"]
        return evaluate_pictures(floor, self.reference.floor_prompts, usable, self.reference, seed=self.seed)

    def row(self, entry: Entry, pictures: np.ndarray, teacher: TeacherPictures) -> Row:
        """Measure one entry against real pictures and against the teacher's."""
        figures = evaluate_pictures(pictures, self.prompts, self.metrics, self.reference, teacher, self.seed)
        scores = score_pictures(pictures, self.prompts, self.metrics, teacher.same)
        sampling = entry.sampling
        return Row(
            method=entry.method,
            steps=sampling.steps,
            gamma=sampling.gamma if sampling.sampler == "sss" else None,
            omega=sampling.omega or None,
            seed=entry.seed,
            figures=figures,
            scores={name: [float(value) for value in values] for name, values in scores.items()},
            calls_note="two evaluations of the network a call (with and without the prompt)" if sampling.omega else "",
            note=entry.note,
            commit=commit(),
        )


def with_diversity(row: Row, entry: Entry, studio: Studio, judge: Judge) -> Row:
    """The row with one figure more: how much pictures of one prompt differ from noise to noise."""
    bench = judge.bench
    real = real_diversity(bench.gallery, bench.features, judge.prompts[:PROMPTS], judge.seed)
    figures = diversity(bench.features, studio.noises(entry), judge.seed, floor=real.value if real else None)
    return replace(row, figures={**row.figures, **figures})


def other_noise(teacher: Entry) -> Entry:
    """The teacher once more, from noise that no entry of its seed shares."""
    return replace(teacher, seed=teacher.seed + 1)


def measured(studio: Studio, judge: Judge, entry: Entry, teacher: Entry | None, *, diverse: bool = False) -> Row:
    """The entry's row, drawn and measured if it is not kept yet.

    Args:
        teacher: whose end points it is compared with (set with set only, where that is the entry itself); None
            for none.
        diverse: measure diversity too.
    """
    known = [studio.key(entry), studio.key(teacher) if teacher else "", judge.key, entry.method, entry.note, diverse]
    path = studio.folder / f"row-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]}.json"
    if path.is_file():
        return load_results(path).rows[0]
    end_points = TeacherPictures()
    if teacher is not None:
        same = studio.pictures(teacher) if entry is not teacher else None
        end_points = TeacherPictures(same, studio.pictures(other_noise(teacher)))
    row = judge.row(entry, studio.pictures(entry), end_points)
    if diverse:
        row = with_diversity(row, entry, studio, judge)
    save_results(path, Results(title=str(row), rows=(row,)))
    return row


def contest(
    studio: Studio,
    judge: Judge,
    teacher: Entry,
    entries: Sequence[Entry],
    diverse: Sequence[Entry] = (),
) -> list[Row]:
    """Draw and measure the teacher and all entries of one noise seed, with a progress bar.

    Distances between an entry's set and the teacher's are taken from the teacher's pictures of other noise; the
    teacher's own row then says what a perfect student would get.

    Entries that are also in `diverse` get their diversity measured too.
    """
    rows = []
    with tqdm(total=1 + len(entries), desc=f"contest, seed {teacher.seed}", unit="row") as bar:
        for entry in [teacher, *entries]:
            bar.set_postfix_str(f"{entry.method} {entry.sampling.steps}")
            rows.append(measured(studio, judge, entry, teacher, diverse=entry in diverse))
            bar.update()
    return rows
