"""Teacher, solvers and students measured on the same prompts and noise, for all studies and worlds.

Pictures and rows are stored under a hash of all that decides them, so that a stopped study is resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fewstep.backbones.pipeline_folder import read_folder
from fewstep.backbones.teachers import teacher_path
from fewstep.common.defaults import world
from fewstep.common.device import pick_device, pick_precision
from fewstep.common.files import sha256
from fewstep.common.messages import Bar
from fewstep.common.provenance import commit, hardware
from fewstep.common.tensor_cache import cached
from fewstep.diffusion.config import TEACHER_SAMPLING, Sampling
from fewstep.evaluation.detail import detail_scale
from fewstep.evaluation.diversity import NOISES, PROMPTS, diversity
from fewstep.evaluation.evaluate import TeacherPictures, evaluate_pictures, score_pictures
from fewstep.evaluation.features import Features
from fewstep.evaluation.lite0 import Lite0Features
from fewstep.evaluation.metric import Figure, Metric
from fewstep.inference.generator import ImageGenerator, load_image_generator
from fewstep_worlds.report.results import By, Results, Row, load_results, save_results

INDEX0_NOTE = "ends at index 0 (sigma = .029), as TCD does; DDIM and Euler end on clean data"
SOLVER_NAMES = {"euler": "Euler", "ddim": "DDIM", "dpmpp_2s": "DPM-Solver++(2S)"}


@dataclass(frozen=True)
class Entry:
    """A network and how it is sampled: one row of a comparison.

    Attributes:
        method: its name in tables.
        sampling: network calls, gamma, guidance.
        lora: the student, None for the teacher.
        seed: of the student's training, and of the noise.
    """

    method: str
    sampling: Sampling
    lora: Path | None = None
    seed: int = 0
    note: str = ""

    @property
    def steps(self) -> int:
        """Steps of the sampler, each of one network call or two."""
        return self.sampling.steps // self.sampling.calls_a_step

    @property
    def nfe_a_step(self) -> int:
        """Network evaluations of a step: two for a guided call."""
        return self.sampling.calls_a_step * (2 if self.sampling.omega else 1)

    def count(self, by: By) -> int:
        """Return the steps or the network evaluations."""
        return self.steps * (self.nfe_a_step if by == "nfe" else 1)


def teacher_entry(omega: float, steps: int, seed: int, name: str = "teacher") -> Entry:
    """Return the teacher's converged end points: guided DDIM."""
    sampling = TEACHER_SAMPLING.model_copy(update={"steps": steps, "omega": omega})
    return Entry(name, sampling, seed=seed)


def entries_at(counts: Sequence[int], entry: Entry) -> list[Entry]:
    """Return an entry at so many network evaluations, and at so many steps, where its sampler has them."""
    calls, step = entry.sampling.calls_a_step, entry.nfe_a_step
    steps = {*counts, *(count // step for count in counts if count % step == 0)}
    return [replace(entry, sampling=entry.sampling.model_copy(update={"steps": calls * n})) for n in sorted(steps)]


def solver_entries(
    omega: float, counts: Sequence[int], seed: int, solvers: Mapping[str, str] = SOLVER_NAMES
) -> list[Entry]:
    """Return solvers on the teacher, at so many network evaluations and at so many steps.

    All use times of the students' grid. The two-call solver ends at the least noisy index, where its mid-point exists.
    """
    entries = []
    for solver, name in solvers.items():
        end, note = ("index0", INDEX0_NOTE) if solver == "dpmpp_2s" else ("clean", "")
        settings = {"sampler": solver, "steps": 4, "omega": omega, "spacing": "grid", "end": end}
        entries += entries_at(counts, Entry(name, Sampling.model_validate(settings), seed=seed, note=note))
    return entries


def student_entries(method: str, lora: Path, sampling: Sampling, counts: Sequence[int], seed: int) -> list[Entry]:
    """Return a student at so many network evaluations and at so many steps."""
    return entries_at(counts, Entry(method, sampling, lora, seed))


def stored_pictures(folder: Path, key: str, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """Read the pictures of a key, or draw and store them."""
    stored = cached(folder, key, lambda: {"pictures": torch.from_numpy(np.ascontiguousarray(draw()))})
    pictures: np.ndarray = stored["pictures"].numpy()
    return pictures


class PictureStore:
    """Samples entries of the bundled teacher and stores their pictures.

    Args:
        prompts: one picture each.
        folder: where pictures are stored.
        adapter: multilingual adapter that encodes the prompts; None for the teacher's text encoder.
    """

    def __init__(self, prompts: Sequence[str], folder: Path, adapter: Path | None = None) -> None:
        self.teacher = teacher_path("")
        self.adapter = adapter
        self.prompts = list(prompts)
        self.folder = folder
        self.device = pick_device("auto")
        bf16 = pick_precision("auto", self.device) == "bf16"
        self.precision = torch.bfloat16 if bf16 else torch.float32
        self.base = read_folder(self.teacher).identity()
        self._generators: dict[Path | None, ImageGenerator] = {}

    def image_generator(self, lora: Path | None) -> ImageGenerator:
        """Return the teacher, or the student of a LoRA; the teacher and the last student stay loaded."""
        if lora not in self._generators:
            self._generators = {key: value for key, value in self._generators.items() if key is None}
            image_generator = load_image_generator(self.teacher, lora, self.device, self.adapter)
            self._generators[lora] = replace(image_generator, precision=self.precision)
        return self._generators[lora]

    def key(self, entry: Entry) -> str:
        """Return a hash of all that decides an entry's pictures."""
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

    def pictures(self, entry: Entry) -> np.ndarray:
        """Return the entry's pictures, uint8 [N, H, W, 3], sampling them if they are not stored.

        Each prompt has noise of its own; entries of different seeds share none.
        """
        first = entry.seed * 1_000_000
        return self._stored(entry, "", self.prompts, range(first, first + len(self.prompts)))

    def noises(self, entry: Entry, prompts: int = PROMPTS, noises: int = NOISES) -> np.ndarray:
        """Return several pictures of each of the first prompts, uint8 [P, k, H, W, 3]."""
        chosen = [prompt for prompt in self.prompts[:prompts] for _ in range(noises)]
        seeds = [500_000 + seed for seed in range(len(chosen))]
        pictures = self._stored(entry, f"-{prompts}x{noises}", chosen, seeds)
        return pictures.reshape(-1, noises, *pictures.shape[1:])

    def _stored(self, entry: Entry, kind: str, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        key = f"{self.key(entry)}{kind}"
        return stored_pictures(
            self.folder, key, lambda: self.image_generator(entry.lora).draw(prompts, seeds, entry.sampling)
        )


class Comparison:
    """Entries sampled and measured on one list of prompts, by the world's own metrics.

    Args:
        prompts: that the world has real pictures of.
        out: folder of the study.
        seed: of the reference and of bootstrap intervals.
        others: further metrics.

    Raises:
        UserError: a part of the bundled world is missing or damaged.
    """

    def __init__(self, prompts: Sequence[str], out: Path, seed: int = 0, others: Sequence[Metric] = ()) -> None:
        self.store = PictureStore(prompts, out / "pictures")
        self.seed = seed
        self.suite = world().suite(prompts, seed, Features(Lite0Features(), out / "features"))
        self.reference = self.suite.reference
        self.metrics: list[Metric] = [*self.suite.metrics, *others]

    @cached_property
    def decides(self) -> str:
        """All that decides a row's figures besides the pictures, as text."""
        real = hashlib.sha256(self.reference.pictures.tobytes()).hexdigest()
        return json.dumps([[asdict(metric.identity) for metric in self.metrics], self.store.prompts, self.seed, real])

    def real(self) -> dict[str, Figure]:
        """Return the same figures of real pictures of the same prompts."""
        floor = self.reference.floor
        if floor is None:
            return {}
        usable = [metric for metric in self.metrics if metric.identity.against != "teacher"]
        return evaluate_pictures(floor, self.reference.floor_prompts, usable, self.reference, seed=self.seed)

    def measured(self, entry: Entry, pictures: np.ndarray, teacher: TeacherPictures) -> Row:
        """Measure one entry against real pictures and against the teacher's."""
        figures = evaluate_pictures(pictures, self.store.prompts, self.metrics, self.reference, teacher, self.seed)
        scores = score_pictures(pictures, self.store.prompts, self.metrics, teacher.same)
        sampling = entry.sampling
        return Row(
            method=entry.method,
            steps=entry.steps,
            nfe_a_step=entry.nfe_a_step,
            gamma=sampling.gamma if sampling.sampler == "sss" else None,
            omega=sampling.omega or None,
            seed=entry.seed,
            figures=figures,
            scores={name: [float(value) for value in values] for name, values in scores.items()},
            note=entry.note,
            commit=commit(),
        )

    def diversity(self, entry: Entry) -> dict[str, Figure]:
        """Measure the distance between pictures of one prompt from different noise."""
        return diversity(self.suite.features, self.store.noises(entry), self.seed, floor=self.suite.real_diversity)

    def measure(self, entry: Entry, teacher: Entry | None = None, *, diverse: bool = False) -> Row:
        """Return the entry's row, sampling and measuring it if it is not stored.

        Args:
            teacher: whose end points it is compared with; for the teacher itself sets are compared only.
            diverse: measure diversity too.
        """
        store = self.store
        keys = [store.key(entry), store.key(teacher) if teacher else "", self.decides]
        known = [*keys, entry.method, entry.note, diverse]
        path = store.folder / f"row-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]}.json"
        if path.is_file():
            return load_results(path).rows[0]
        end_points = TeacherPictures()
        if teacher is not None:
            same = store.pictures(teacher) if entry is not teacher else None
            # of noise that no entry of this seed shares
            end_points = TeacherPictures(same, store.pictures(replace(teacher, seed=teacher.seed + 1)))
        row = self.measured(entry, store.pictures(entry), end_points)
        if diverse:
            row = replace(row, figures={**row.figures, **self.diversity(entry)})
        save_results(path, Results(title=str(row), rows=(row,)))
        return row

    def measure_all(self, teacher: Entry, entries: Sequence[Entry], diverse: Sequence[Entry] = ()) -> list[Row]:
        """Sample and measure the teacher and all entries of one noise seed, with a progress bar.

        Distances between an entry's set and the teacher's use the teacher's pictures of other noise. The teacher's own
        row is then the figure of a perfect student. Entries in `diverse` get their diversity measured too.
        """
        rows = []
        with Bar(total=1 + len(entries), desc=f"comparison, seed {teacher.seed}", unit="row") as bar:
            for entry in [teacher, *entries]:
                bar.set_postfix_str(f"{entry.method} {entry.steps}")
                rows.append(self.measure(entry, teacher, diverse=entry in diverse))
                bar.update()
        return rows

    def results(
        self,
        title: str,
        rows: Sequence[Row],
        command: str,
        settings: Mapping[str, str],
        caveats: Sequence[str] = (),
        scale: int = 0,
    ) -> Results:
        """Return the results of a study with the settings that all studies share.

        Args:
            scale: real pictures that figures of detail are scaled by; 0 for no scale.
        """
        reference, prompts = self.reference, self.store.prompts
        return Results(
            title=title,
            rows=tuple(rows),
            real=self.real(),
            scale=detail_scale(reference.some(scale)) if scale else {},
            prompts=tuple(prompts),
            settings={
                "command": command,
                "commit": ", ".join(sorted({row.commit for row in rows})),
                "hardware": hardware(),
                "prompts": f"{len(prompts)}, one picture of each",
                **settings,
                "precision": f"networks in {str(self.store.precision).removeprefix('torch.')}, all rows alike",
            },
            caveats=tuple(caveats),
        )
