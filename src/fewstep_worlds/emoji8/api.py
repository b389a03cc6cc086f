"""The bundled world's verbs: each checks its settings, then imports what it needs.

A verb returns the file or folder that it wrote. Before any long work it raises UserError where a setting, the folder or
the installation does not allow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.common.arguments import checked
from fewstep.common.config import merge, parse_overrides, read_yaml, validate
from fewstep.common.extras import check_installed

if TYPE_CHECKING:
    from fewstep.evaluation.metric import Figure


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
    from fewstep.students.resolve import teacher_sampling

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
