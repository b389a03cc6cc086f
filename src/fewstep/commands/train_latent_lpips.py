"""Train a perceptual distance between latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.backbones.checks import check_diffusion
from fewstep.backbones.teachers import named_teacher
from fewstep.common.arguments import checked
from fewstep.common.config import validate
from fewstep.common.defaults import world
from fewstep.common.errors import UserError
from fewstep.common.extras import WATCHING, check_installed


@checked
def train_perceptual(
    *,
    out: Path | str,
    prompts: Path | str | None = None,
    teacher: Path | str = "",
    device: str = "auto",
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> Path:
    """Train a distance between a teacher's latents that says what pixel features say; returns its folder.

    Args:
        out: run folder; a run that was stopped is resumed from it, a finished one returned at once.
        prompts: prompt file that the teacher draws latents from; None for Emoji-8's captions, which the bundled
            teacher alone knows.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the bundled one.
        device: auto, cpu or cuda.
        overrides: dotted changes to its settings, e.g. "loop.steps=1000".
        teacher_config: for a single-file teacher, a pipeline folder of its kind.

    Raises:
        UserError: anything wrong, in one line, before any long work.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.common.choices import check_device
    from fewstep.common.config import parse_overrides
    from fewstep.common.files import check_writable
    from fewstep.data.prompts import read_prompts
    from fewstep.methods.latent_lpips.settings import LatentLpipsTrainConfig, check_prompts
    from fewstep.training.run_folder import check_same_run

    check_device(device)
    config = validate(LatentLpipsTrainConfig, parse_overrides(overrides, LatentLpipsTrainConfig))
    if prompts is None and teacher:
        raise UserError(f"prompts must be given for teacher = {str(teacher)!r}: a text file, one prompt a line")
    if prompts is None:
        said = [row[0] for row in world("prompts").captions_alone(1, 0).captions]
    else:
        said = read_prompts(prompts, "prompts")
    check_prompts(said)
    folder = read_folder(teacher_path(named_teacher(teacher, teacher_config)))
    check_diffusion("teacher", folder)
    check_writable(Path(out))
    check_same_run(Path(out), config)
    check_installed("train-perceptual", WATCHING)
    from fewstep.common.device import pick_device

    place = pick_device(device)
    from fewstep.backbones.base import load_backbone
    from fewstep.methods.latent_lpips.train import make_latent_lpips

    return make_latent_lpips(config, load_backbone(folder.path, place), said, Path(out))
