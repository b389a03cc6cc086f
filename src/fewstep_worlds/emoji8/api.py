"""The bundled world's verbs: each checks its settings, then imports what it needs.

A verb returns the file or folder that it wrote. Before any long work it raises UserError where a setting, the folder or
the installation does not allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.common.arguments import checked, with_options
from fewstep.common.config import ConfigT, merge, parse_overrides, read_yaml, validate
from fewstep.common.errors import UserError
from fewstep.common.extras import check_installed

if TYPE_CHECKING:
    from fewstep.evaluation.metric import Figure


@checked
def demo(*, out: Path | str = "demo", overrides: str | Sequence[str] = ()) -> Path:
    """Distil LCM and TCD from the bundled teacher, compare them with it, write report.html. Budgeted at ten minutes.

    Example: fewstep demo --out demo -s steps=200

    Args:
        out: folder; a stopped demo is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.emoji8.config import DemoConfig

    config = _checked("demo", DemoConfig, overrides, out)
    from fewstep_worlds.emoji8.studies.demo import demo

    return _run(demo, config, out)


@checked
def benchmark(*, out: Path | str = "runs/benchmark", overrides: str | Sequence[str] = ()) -> Path:
    """Reproduce the TCD paper's Table 1 and gamma figures on the bundled world, three seeds. Takes hours on a CPU.

    Args:
        out: folder; a stopped benchmark is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.emoji8.config import BenchmarkConfig

    config = _checked("benchmark", BenchmarkConfig, overrides, out)
    from fewstep_worlds.emoji8.studies.benchmark import benchmark

    return _run(benchmark, config, out)


@checked
def family(*, out: Path | str = "runs/family", overrides: str | Sequence[str] = ()) -> Path:
    """Compare every recipe at equal training cost, and every sampler on one student. Takes hours on a CPU.

    Example: fewstep world family -s "recipes=[tcd, tcd-2, tcd-s]"

    Args:
        out: folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.emoji8.config import FamilyConfig

    config = _checked("family", FamilyConfig, overrides, out)
    from fewstep_worlds.emoji8.studies.family import family

    return _run(family, config, out)


@checked
def tlcm(*, table: int = 1, out: Path | str = "runs/tables", overrides: str | Sequence[str] = ()) -> Path:
    """Reproduce a table of the TLCM paper on the bundled world, from prompts alone. Takes hours.

    Example: fewstep world tlcm --table 2 -s "seeds=[0]"

    Args:
        table: 1: beside the teacher, LCM and TCD; 2: each ingredient; 3: p.
        out: folder, one for all tables; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep.backbones.teachers import read_teacher
    from fewstep.distillation.checks import check_distillation
    from fewstep_worlds.emoji8.config import TlcmConfig

    config = _checked("tlcm", TlcmConfig, with_options(overrides, {"table": table}), out, multilingual=True)
    from fewstep_worlds.emoji8.studies.tlcm import tlcm, tlcm_settings

    check_distillation(tlcm_settings(), read_teacher(""))
    return _run(tlcm, config, out)


@checked
def chinese(*, out: Path | str = "runs/chinese", overrides: str | Sequence[str] = ()) -> Path:
    """Draw concepts whose Chinese the adapter never saw, from English and Chinese prompts, and score both.

    Example: fewstep world chinese -s lora=runs/tlcm/student -s steps=3

    Args:
        out: folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep.backbones.teachers import read_teacher
    from fewstep.inference.multilingual.record import read_adapter
    from fewstep.students.resolve import resolve_student
    from fewstep_worlds.emoji8.config import ChineseConfig

    config = _checked("chinese", ChineseConfig, overrides, out, multilingual=True)
    folder = read_teacher("")
    resolve_student(folder, config.lora, {"steps": config.steps})
    if config.adapter:
        read_adapter(config.adapter, folder)
    from fewstep_worlds.emoji8.studies.chinese import measure_chinese

    return _run(measure_chinese, config, out)


@checked
def versatility(*, out: Path | str = "runs/versatility", overrides: str | Sequence[str] = ()) -> Path:
    """Measure students with a community checkpoint, a style LoRA, ControlNets, an IP-Adapter, img2img and inpainting.

    Each add-on is made on the base, and then used with students that never saw it. Takes hours on a CPU.

    Example: fewstep world versatility -s tlcm=runs/tlcm/student

    Args:
        out: folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep.backbones.teachers import read_teacher
    from fewstep.students.resolve import resolve_student
    from fewstep_worlds.emoji8.config import VersatilityConfig

    config = _checked("versatility", VersatilityConfig, overrides, out)
    folder = read_teacher("")
    for field in ("tcd", "tlcm"):
        student = getattr(config, field)
        for steps in config.steps if student else ():
            sampling = resolve_student(folder, student, {"steps": steps}).sampling
            if sampling.extra_conditioning or sampling.sampler not in ("sss", "lcm"):
                raise UserError(
                    f"{field} = {student!r} is sampled with {sampling.sampler} and conditioned on "
                    f"{list(sampling.extra_conditioning)}, which no diffusers pipeline supports here; use a TCD or "
                    "TLCM student",
                    field=field,
                )
    from fewstep_worlds.emoji8.studies.addons.figure import versatility

    return _run(versatility, config, out)


@checked
def train_teacher(
    *,
    out: Path | str = "runs/teacher",
    target: Path | str = "runs/teacher/pipeline",
    config: Path | str | None = None,
    overrides: str | Sequence[str] = (),
) -> Path:
    """Train the bundled world's teacher: autoencoder, denoiser, the decoder once more. Takes hours on a CPU.

    Args:
        out: run folder; a stopped run is resumed from it.
        target: pipeline folder to write.
        config: YAML file of the teacher's settings.
        overrides: setting laid over config, key=value. May be repeated.
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
def train_scorer(*, out: Path | str = "runs/scorer", overrides: str | Sequence[str] = ()) -> Path:
    """Train the bundled world's prompt-agreement scorer.

    Args:
        out: run folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep.common.files import check_writable
    from fewstep_worlds.emoji8.config import AgreementConfig

    settings = validate(AgreementConfig, parse_overrides(overrides, AgreementConfig))
    check_writable(Path(out))
    from fewstep_worlds.emoji8.scorers.train import train_scorer

    train_scorer(settings, Path(out))
    return Path(out) / "scorer"


@checked
def train_reward(*, out: Path | str = "runs/reward", overrides: str | Sequence[str] = ()) -> Path:
    """Train the bundled world's preference scorer, a reward that students may be trained with.

    Args:
        out: run folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep.common.files import check_writable
    from fewstep.inference.multilingual.settings import PACKAGES
    from fewstep_worlds.emoji8.config import RewardConfig

    settings = validate(RewardConfig, parse_overrides(overrides, RewardConfig))
    check_writable(Path(out))
    check_installed("train-reward", PACKAGES, "multilingual")
    from fewstep_worlds.emoji8.scorers.reward import sentence_encoder
    from fewstep_worlds.emoji8.scorers.train import train_scorer

    train_scorer(settings, Path(out), text=sentence_encoder())
    return Path(out) / "scorer"


@checked
def teacher_card(
    *,
    out: Path | str = "runs/card",
    teacher: Path | str = "",
    omega: float | None = None,
    steps: int = 50,
    n: int = 1000,
) -> dict[str, Figure]:
    """Measure a teacher of the bundled world: right concepts, copies, unseen words, white backgrounds.

    Args:
        out: folder for card.json, card.md and samples.webp.
        teacher: pipeline folder; if omitted, the bundled teacher.
        omega: guidance in the papers' convention; the teacher's own if omitted.
        steps: steps of guided DDIM.
        n: seen prompts to draw.
    """
    from fewstep.backbones.checks import check_sampling
    from fewstep.backbones.teachers import read_teacher
    from fewstep.commands.sample import check_positive
    from fewstep.common.files import check_writable
    from fewstep.diffusion.config import Sampling
    from fewstep.students.sampling import teacher_sampling

    folder = read_teacher(teacher)
    own = teacher_sampling(folder)
    sampling = validate(Sampling, own.model_dump() | {"steps": steps, "omega": own.omega if omega is None else omega})
    check_sampling(sampling, folder)
    check_positive("n", n)
    check_writable(Path(out))
    check_installed("teacher-card")
    from fewstep_worlds.emoji8.teacher.card import teacher_card

    return teacher_card(folder.path, Path(out), n=n, sampling=sampling)


def card_lines(figures: Mapping[str, Figure], arguments: Mapping[str, Any]) -> list[str]:
    """Return the lines that `teacher-card` prints."""
    from fewstep.commands.evaluate import figure_lines

    return [*figure_lines(figures), f"wrote {Path(arguments['out']) / 'card.md'}"]


def _checked(
    verb: str, model: type[ConfigT], overrides: str | Sequence[str], out: Path | str, *, multilingual: bool = False
) -> ConfigT:
    """Resolve and check the settings of a study of the bundled world."""
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.files import check_writable
    from fewstep.inference.multilingual.settings import PACKAGES

    config = validate(model, parse_overrides(overrides, model))
    read_teacher("")
    check_writable(Path(out))
    check_installed(verb)
    if multilingual:
        check_installed(verb, PACKAGES, "multilingual")
    return config


def _run(study: Callable[[ConfigT, Path], Path], config: ConfigT, out: Path | str) -> Path:
    """Run a study with its folder locked and cleared of what a killed process left half-written in its stores."""
    from fewstep.common.files import hold_folder, sweep

    with hold_folder(Path(out)):
        for store in ("cache", "pictures", "features"):
            sweep(Path(out) / store)
        return study(config, Path(out))
