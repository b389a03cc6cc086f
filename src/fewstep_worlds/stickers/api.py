"""The verbs of sticker scenes: training and measuring their networks. They return a network's folder, or a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.common.arguments import checked
from fewstep.common.config import parse_overrides, validate
from fewstep.common.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fewstep.training.config import LoopConfig


@checked
def autoencoder(*, out: Path | str = "runs/stickers/autoencoder", overrides: str | Sequence[str] = ()) -> Path:
    """Train the autoencoder.

    Args:
        out: run folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.stickers.settings import AutoencoderConfig

    config = validate(AutoencoderConfig, parse_overrides(overrides, AutoencoderConfig))

    from fewstep_worlds.stickers.autoencoder import train_autoencoder

    vae = train_autoencoder(config, Path(out), _accelerator(config.loop))
    vae.save_pretrained(Path(out) / "final")
    return Path(out) / "final"


@checked
def reader(*, out: Path | str = "runs/stickers/reader", overrides: str | Sequence[str] = ()) -> Path:
    """Train the reader, which recovers the facts of a scene from its picture.

    Args:
        out: run folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.stickers.settings import ReaderConfig

    config = validate(ReaderConfig, parse_overrides(overrides, ReaderConfig))

    from fewstep_worlds.stickers.reader import save_reader, train_reader

    trained = train_reader(config, Path(out), _accelerator(config.loop))
    save_reader(trained, Path(out) / "final")
    return Path(out) / "final"


@checked
def reader_report(*, reader: Path | str, autoencoder: Path | str | None = None, n: int = 2000) -> str:
    """Measure a reader on unseen scenes: real, of held-out kinds, blurred, noised, autoencoded.

    Args:
        reader: folder of a finished reader.
        autoencoder: folder of an AutoencoderKL that the autoencoded scenes pass through.
        n: scenes of each condition.
    """
    from fewstep.commands.sample import check_positive
    from fewstep_worlds.common.autoencoder import load_vae
    from fewstep_worlds.stickers.accuracy import as_table
    from fewstep_worlds.stickers.reader import load_reader
    from fewstep_worlds.stickers.reader_report import reader_report

    check_positive("n", n)
    vae = load_vae(Path(autoencoder)) if autoencoder else None
    return as_table(reader_report(load_reader(Path(reader)), n, vae))


@checked
def reward(*, out: Path | str = "runs/stickers/reward", overrides: str | Sequence[str] = ()) -> Path:
    """Train the preference scorer, which gives a picture a number for a prompt.

    Args:
        out: run folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.stickers.settings import RewardConfig

    config = validate(RewardConfig, parse_overrides(overrides, RewardConfig))

    from fewstep_worlds.stickers.reward import save_reward
    from fewstep_worlds.stickers.reward_training import train_reward, vocabulary

    trained = train_reward(config, Path(out), _accelerator(config.loop))
    save_reward(trained, vocabulary(), Path(out) / "final")
    return Path(out) / "final"


@checked
def reward_report(*, reward: Path | str, n: int = 2000) -> str:
    """Measure how often a preference scorer prefers the true prompt of an unseen scene to one with a wrong fact.

    Args:
        reward: folder of a finished preference scorer.
        n: scenes of each condition: real, of held-out kinds, blurred, noised.
    """
    from fewstep.commands.sample import check_positive
    from fewstep_worlds.stickers.accuracy import as_table
    from fewstep_worlds.stickers.reward import load_reward
    from fewstep_worlds.stickers.reward_training import reward_report

    check_positive("n", n)
    return as_table(reward_report(load_reward(Path(reward)), n))


@checked
def teacher(
    *, target: Path | str, out: Path | str = "runs/stickers/teacher", overrides: str | Sequence[str] = ()
) -> Path:
    """Train the teacher on the latents of a finished autoencoder (-s autoencoder=FOLDER) and write its pipeline.

    Args:
        target: new folder for the pipeline.
        out: run folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.common.target import check_target
    from fewstep_worlds.stickers.settings import TeacherConfig

    config = validate(TeacherConfig, parse_overrides(overrides, TeacherConfig))
    check_target(Path(target), Path(out))

    from fewstep_worlds.stickers.teacher import train_teacher

    train_teacher(config, Path(out), Path(target), _accelerator(config.loop))
    return Path(target)


@checked
def teacher_report(
    *,
    pipeline: Path | str,
    reader: Path | str,
    steps: Sequence[int],
    omega: Sequence[float],
    n: int = 1000,
    prompts: str = "open",
) -> str:
    """Measure scene accuracy and FD-Lite0 of a teacher's pictures at every step count and guidance.

    Example: fewstep world stickers teacher-report --pipeline P --reader R --steps 50 --steps 4 --omega 1 --omega 2

    Args:
        pipeline: pipeline folder of a teacher.
        reader: folder of a finished reader.
        steps: steps of guided DDIM; pictures of the others are compared with those of the first. May be repeated.
        omega: guidance in the papers' convention. May be repeated.
        n: unseen prompts, at least 500.
        prompts: set of unseen prompts (prompts.SETS).
    """
    from fewstep.evaluation.limits import FD_FEWEST
    from fewstep_worlds.stickers.accuracy import as_table
    from fewstep_worlds.stickers.reader import load_reader
    from fewstep_worlds.stickers.teacher_report import SamplingSettings, teacher_report

    if n < FD_FEWEST:
        raise UserError(f"n = {n} must be at least {FD_FEWEST}")
    settings = [SamplingSettings(count, guidance) for count in steps for guidance in omega]
    rows = teacher_report(Path(pipeline), load_reader(Path(reader)), settings, n, prompts)
    distances = (
        f"{name}: FD-Lite0 to real scenes {row.fd_real:.2f}, to the first row's pictures {row.fd_first:.2f}"
        for name, row in rows.items()
    )
    return "\n".join([as_table({name: row.shares for name, row in rows.items()}), *distances])


def _accelerator(loop: LoopConfig) -> Accelerator:
    """Return the accelerator of a training, on the GPU where there is one."""
    from fewstep.common.accelerator import make_accelerator
    from fewstep.common.device import pick_device

    return make_accelerator(loop.precision, pick_device("auto"))
