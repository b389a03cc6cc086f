"""`fewstep train-adapter`: train an adapter from multilingual sentence vectors to a teacher's token states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.common.arguments import checked, with_options


@checked
def train_adapter(
    *,
    out: Path | str = "runs/adapter",
    pairs: Path | str | None = None,
    teacher: Path | str = "",
    teacher_config: Path | str = "",
    device: str = "auto",
    precision: str | None = None,
    overrides: Mapping[str, Any] | str | Sequence[str] = (),
) -> Path:
    """Train an adapter for prompts in other languages, for a teacher and its students, from text pairs alone.

    Example: fewstep train-adapter --out runs/adapter; fewstep sample --adapter runs/adapter/adapter --steps 3 章鱼

    Example: fewstep train-adapter --pairs pairs.tsv -s output_share=.5 -s loop.steps=5000

    Args:
        out: run folder; a stopped run is resumed from it.
        pairs: text pairs, .tsv (text, tab, the same text in English) or .jsonl; if omitted, the bundled world's
            pairs.
        teacher: pipeline folder, single-file checkpoint or hub id; if omitted, the bundled teacher.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        device: auto, cpu or cuda.
        precision: precision of training, auto, fp32, bf16 or fp16; sets loop.precision.
        overrides: setting, key=value, e.g. output_share=.5. May be repeated; in Python also a mapping.

    Returns:
        The adapter's folder, `out`/adapter.

    Raises:
        UserError: anything wrong, before any long work.
    """
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.choices import check_device
    from fewstep.common.config import parse_overrides, validate
    from fewstep.common.defaults import world
    from fewstep.common.extras import check_installed
    from fewstep.common.files import check_writable
    from fewstep.inference.multilingual.pairs import read_pairs
    from fewstep.inference.multilingual.settings import PACKAGES, AdapterConfig
    from fewstep.training.run_folder import check_same_run

    changes = with_options(overrides, {"loop.precision": precision})
    config = validate(AdapterConfig, parse_overrides(changes, AdapterConfig))
    check_device(device)
    folder = read_teacher(teacher, teacher_config)
    found = world("pairs").text_pairs() if pairs is None else read_pairs(pairs)
    check_writable(Path(out))
    check_same_run(Path(out), config)
    check_installed("train-adapter", PACKAGES, extra="multilingual")
    from fewstep.common.device import pick_device
    from fewstep.inference.multilingual.train import train_adapter

    train_adapter(config, folder, found, Path(out), device=pick_device(device))
    return Path(out) / "adapter"
