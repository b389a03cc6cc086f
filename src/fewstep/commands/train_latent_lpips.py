"""`fewstep train-latent-lpips`: train a perceptual distance between a teacher's latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.common.arguments import checked, with_options
from fewstep.common.errors import UserError


@checked
def train_latent_lpips(
    *,
    out: Path | str = "runs/perceptual",
    prompt_file: Path | str | None = None,
    teacher: Path | str = "",
    teacher_config: Path | str = "",
    device: str = "auto",
    precision: str | None = None,
    overrides: Mapping[str, Any] | str | Sequence[str] = (),
) -> Path:
    """Train a distance between latents that agrees with pixel features, for method.distance = latent_lpips.

    Example: fewstep train-latent-lpips --teacher PIPELINE --prompt-file prompts.txt --out runs/perceptual

    Args:
        out: run folder; a stopped run is resumed from it, a finished one returned at once.
        prompt_file: text file, one prompt a line, to draw latents from; if omitted, the bundled world's captions (for
            the bundled teacher alone).
        teacher: pipeline folder, single-file checkpoint or hub id; if omitted, the bundled teacher.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        device: auto, cpu or cuda.
        precision: precision of training, auto, fp32, bf16 or fp16; sets loop.precision.
        overrides: setting, key=value, e.g. loop.steps=1000. May be repeated; in Python also a mapping.

    Returns:
        The folder of the distance.

    Raises:
        UserError: anything wrong, before any long work.
    """
    from fewstep.backbones.checks import check_diffusion
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.choices import check_device
    from fewstep.common.config import parse_overrides, validate
    from fewstep.common.defaults import world
    from fewstep.common.files import check_writable
    from fewstep.data.prompts import read_prompts
    from fewstep.distillation.latent_lpips.settings import LatentLpipsTrainConfig, check_prompts
    from fewstep.training.run_folder import check_same_run

    check_device(device)
    changes = with_options(overrides, {"loop.precision": precision})
    config = validate(LatentLpipsTrainConfig, parse_overrides(changes, LatentLpipsTrainConfig))
    if prompt_file is not None:
        prompts = read_prompts(prompt_file, "prompt_file")
    elif teacher:
        raise UserError(
            f"prompt_file is missing; teacher = {str(teacher)!r} needs a text file, one prompt a line",
            field="prompt_file",
        )
    else:
        prompts = [row[0] for row in world("prompt_file").captions_alone(1, 0).captions]
    check_prompts(prompts)
    folder = read_teacher(teacher, teacher_config)
    check_diffusion(folder)
    check_writable(Path(out))
    check_same_run(Path(out), config)
    from fewstep.common.device import pick_device

    place = pick_device(device)
    from fewstep.backbones.base import open_backbone
    from fewstep.distillation.latent_lpips.train import make_latent_lpips

    backbone = open_backbone(folder, place)
    backbone.to_device()
    return make_latent_lpips(config, backbone, prompts, Path(out))


def train_perceptual(*, prompts: Path | str | None = None, **options: Any) -> Path:
    """Train a distance between latents; the name of `train_latent_lpips` in earlier versions."""
    return train_latent_lpips(prompt_file=prompts, **options)


def rank_correlations(folder: Path, arguments: Mapping[str, Any]) -> list[str]:
    """Return the lines that `train-latent-lpips` prints: agreement with pixel features on held-out pairs."""
    from fewstep.distillation.latent_lpips.network import read_record

    heldout = read_record(folder)["heldout"]
    return [
        *(
            f"rank correlation with pixel features, {name}: {value:.4f} (n = {heldout['n']} held-out pairs)"
            for name, value in heldout["rank_correlation"].items()
        ),
        f"wrote {folder}",
    ]
