"""The bundled world's verbs as functions: each refuses what is wrong at once, then loads what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.common.arguments import checked
from fewstep.common.config import ConfigT, merge, parse_overrides, read_yaml, validate
from fewstep.common.errors import UserError
from fewstep.common.extras import check_installed

if TYPE_CHECKING:
    from fewstep.evaluation.metric import Figure


@checked
def demo(*, out: Path | str = "demo", overrides: str | Sequence[str] = ()) -> Path:
    """Distil LCM and TCD from the bundled teacher, measure and show them; returns the report's path.

    Raises:
        UserError: anything wrong with the settings, the place or the installation, before any long work.
    """
    from fewstep_worlds.emoji8.config import DemoConfig

    config = _ready("demo", DemoConfig, overrides, Path(out))
    from fewstep_worlds.emoji8.studies.demo import demo

    with _own(Path(out)):
        return demo(config, Path(out))


@checked
def benchmark(*, out: Path | str = "runs/benchmark", overrides: str | Sequence[str] = ()) -> Path:
    """Run the full benchmark on the bundled world; returns the report's path.

    Raises:
        UserError: anything wrong with the settings, the place or the installation, before any long work.
    """
    from fewstep_worlds.emoji8.config import BenchmarkConfig

    config = _ready("benchmark", BenchmarkConfig, overrides, Path(out))
    from fewstep_worlds.emoji8.studies.benchmark import benchmark

    with _own(Path(out)):
        return benchmark(config, Path(out))


@checked
def family(*, out: Path | str = "runs/family", overrides: str | Sequence[str] = ()) -> Path:
    """Distil every recipe from the bundled teacher at equal training cost, and measure; returns the tables' path.

    Raises:
        UserError: anything wrong with the settings, the place or the installation, before any long work.
    """
    from fewstep_worlds.emoji8.config import FamilyConfig

    config = _ready("family", FamilyConfig, overrides, Path(out))
    from fewstep_worlds.emoji8.studies.family import family

    with _own(Path(out)):
        return family(config, Path(out))


@checked
def tlcm(*, table: int = 1, out: Path | str = "runs/tables", overrides: str | Sequence[str] = ()) -> Path:
    """One of the TLCM paper's tables on the bundled world; returns its path.

    Raises:
        UserError: anything wrong with the settings, the place or the installation, before any long work.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.distillation.checks import check_distillation
    from fewstep.inference.multilingual.settings import PACKAGES
    from fewstep_worlds.emoji8.config import TlcmConfig

    config = _ready("tlcm", TlcmConfig, [f"table={table}", *overrides_list(overrides)], Path(out))
    check_installed("tlcm", PACKAGES, "multilingual")
    from fewstep_worlds.emoji8.studies.tlcm import law_of, tlcm

    check_distillation(law_of(), read_folder(teacher_path("")))
    with _own(Path(out)):
        return tlcm(config, Path(out))


def overrides_list(overrides: str | Sequence[str]) -> list[str]:
    """Overrides as a list."""
    return [overrides] if isinstance(overrides, str) else list(overrides)


@checked
def chinese(*, out: Path | str = "runs/chinese", overrides: str | Sequence[str] = ()) -> Path:
    """Draw concepts asked for in English and in held-out Chinese, and score both; returns the table's path.

    Raises:
        UserError: anything wrong with the settings, the place or the installation, before any long work.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.inference.multilingual.record import read_adapter
    from fewstep.inference.multilingual.settings import PACKAGES
    from fewstep.students.resolve import resolve_student
    from fewstep_worlds.emoji8.config import ChineseConfig

    config = _ready("chinese", ChineseConfig, overrides, Path(out))
    check_installed("chinese", PACKAGES, extra="multilingual")
    folder = read_folder(teacher_path(""))
    resolve_student(folder, config.lora, {"steps": config.steps})
    if config.adapter:
        read_adapter(config.adapter, folder)
    from fewstep_worlds.emoji8.studies.chinese import measure_chinese

    with _own(Path(out)):
        measure_chinese(config, Path(out))
    return Path(out) / "chinese.md"


@checked
def versatility(*, out: Path | str = "runs/versatility", overrides: str | Sequence[str] = ()) -> Path:
    """Make the ecosystem's add-ons on the base, and use them with students that never saw them; returns the table.

    Raises:
        UserError: anything wrong with the settings, the students, the place or the installation, before any long work.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.students.resolve import resolve_student
    from fewstep_worlds.emoji8.config import VersatilityConfig

    config = _ready("versatility", VersatilityConfig, overrides, Path(out))
    folder = read_folder(teacher_path(""))
    for student in (config.tcd, config.tlcm):
        for steps in config.steps if student else ():
            sampling = resolve_student(folder, student, {"steps": steps}).sampling
            if sampling.extra_conditioning or sampling.sampler not in ("sss", "lcm"):
                raise UserError(
                    f"student = {student!r} is drawn with {sampling.sampler}, conditioned on "
                    f"{list(sampling.extra_conditioning)}, which no "
                    "diffusers pipeline does here; the nearest is a TCD or TLCM student"
                )
    from fewstep_worlds.emoji8.studies.addons.figure import versatility

    with _own(Path(out)):
        return versatility(config, Path(out))


@checked
def train_teacher(
    *, out: Path | str, target: Path | str, config: Path | str | None = None, overrides: str | Sequence[str] = ()
) -> Path:
    """Train the bundled world's teacher and write it as a pipeline folder.

    Raises:
        UserError: anything wrong with the settings or the place.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.common.files import check_writable
    from fewstep.training.run_folder import check_same_run
    from fewstep_worlds.common.target import check_target
    from fewstep_worlds.emoji8.config import TeacherConfig

    given = read_yaml(config, TeacherConfig) if config else {}
    settings = validate(TeacherConfig, merge(given, parse_overrides(overrides, TeacherConfig)))
    check_writable(Path(out))
    check_writable(Path(target).parent)
    check_target(Path(target), Path(out))
    for part in ("vae", "unet", "decoder"):
        check_same_run(Path(out) / part, getattr(settings, part))
    if settings.unet.start:
        read_folder(settings.unet.start, "unet.start")
    from fewstep_worlds.emoji8.teacher.train import train_teacher

    train_teacher(settings, Path(out), Path(target))
    return Path(target)


@checked
def train_scorer(*, out: Path | str, overrides: str | Sequence[str] = ()) -> Path:
    """Train the bundled world's prompt-agreement scorer; returns its folder, `out`/scorer.

    Raises:
        UserError: anything wrong with the settings or the place.
    """
    from fewstep.common.files import check_writable
    from fewstep_worlds.emoji8.config import AgreementConfig

    settings = validate(AgreementConfig, parse_overrides(overrides, AgreementConfig))
    check_writable(Path(out))
    from fewstep_worlds.emoji8.scorers.train import train_scorer

    train_scorer(settings, Path(out))
    return Path(out) / "scorer"


@checked
def train_reward(*, out: Path | str, overrides: str | Sequence[str] = ()) -> Path:
    """Train the bundled world's preference scorer; returns its folder, `out`/scorer.

    Raises:
        UserError: anything wrong with the settings, the place or the installation.
    """
    from fewstep.common.files import check_writable
    from fewstep.inference.multilingual.settings import PACKAGES
    from fewstep_worlds.emoji8.config import RewardConfig

    settings = validate(RewardConfig, parse_overrides(overrides, RewardConfig))
    check_writable(Path(out))
    check_installed("train-reward", PACKAGES, "multilingual")
    from fewstep_worlds.emoji8.scorers.reward import SentenceVectors
    from fewstep_worlds.emoji8.scorers.train import train_scorer

    train_scorer(settings, Path(out), text=SentenceVectors())
    return Path(out) / "scorer"


@checked
def teacher_card(
    *, out: Path | str, teacher: Path | str = "", omega: float | None = None, steps: int = 50, n: int = 1000
) -> dict[str, Figure]:
    """Measure a teacher of the bundled world; returns its figures by name, and writes card.json, card.md, samples.webp.

    Args:
        out: folder.
        teacher: pipeline folder; empty for the bundled one.
        omega: guidance in the papers' convention; None for what the teacher brings along.
        steps: of guided DDIM.
        n: seen prompts to draw.

    Raises:
        UserError: anything wrong with the settings, the place or the installation, before any long work.
    """
    from fewstep.backbones.checks import check_sampling
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.common.files import check_writable
    from fewstep.diffusion.config import Sampling
    from fewstep.students.sampling import teacher_sampling

    folder = read_folder(teacher_path(teacher))
    own = teacher_sampling(folder.path)
    sampling = validate(Sampling, own.model_dump() | {"steps": steps, "omega": own.omega if omega is None else omega})
    check_sampling(sampling, folder)
    if n < 1:
        raise UserError(f"n = {n} must be at least 1; the nearest legal one is 1")
    check_writable(Path(out))
    check_installed("teacher-card")
    from fewstep_worlds.emoji8.teacher.card import teacher_card

    return teacher_card(folder.path, Path(out), n=n, sampling=sampling).figures


def _ready(verb: str, model: type[ConfigT], overrides: str | Sequence[str], out: Path) -> ConfigT:
    """The settings of a verb that measures on the bundled world, refused here if it could not run."""
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.common.files import check_writable

    config = validate(model, parse_overrides(overrides, model))
    read_folder(teacher_path(""))
    check_writable(out)
    check_installed(verb)
    return config


@contextmanager
def _own(out: Path) -> Iterator[None]:
    """Keep other processes out of a folder, and clear what a killed one left half-written in its stores."""
    from fewstep.common.files import hold_folder, sweep

    with hold_folder(out):
        for store in ("cache", "pictures", "features"):
            sweep(out / store)
        yield
