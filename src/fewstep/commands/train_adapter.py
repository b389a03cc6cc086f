"""Train an adapter from a multilingual sentence encoder to a teacher's token states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.backbones.teachers import named_teacher
from fewstep.common.arguments import checked
from fewstep.common.config import validate
from fewstep.common.defaults import world
from fewstep.common.extras import check_installed


@checked
def train_adapter(
    *,
    out: Path | str = "runs/adapter",
    pairs: Path | str | None = None,
    teacher: Path | str = "",
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> Path:
    """Train an adapter that reads prompts of other languages for a teacher; returns its folder, `out`/adapter.

    Args:
        out: run folder; a run that was stopped is resumed from it.
        pairs: texts and what they are in the teacher's language, a .tsv or .jsonl file; None for Emoji-8's Chinese.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the bundled one.
        overrides: dotted changes to the settings, e.g. "loop.steps=800".
        teacher_config: for a single-file teacher, a pipeline folder of its kind.

    Raises:
        UserError: anything wrong with the pairs, the settings, the place or the installation, before any long work.
    """
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.backbones.teachers import teacher_path
    from fewstep.common.config import parse_overrides
    from fewstep.common.files import check_writable
    from fewstep.inference.multilingual.pairs import read_pairs
    from fewstep.inference.multilingual.settings import PACKAGES, AdapterConfig
    from fewstep.training.run_folder import check_same_run

    config = validate(AdapterConfig, parse_overrides(overrides, AdapterConfig))
    folder = read_folder(teacher_path(named_teacher(teacher, teacher_config)))
    if pairs is not None:
        found = read_pairs(pairs)
    else:
        found = world("pairs").text_pairs()
    check_writable(Path(out))
    check_same_run(Path(out), config)
    check_installed("train-adapter", PACKAGES, extra="multilingual")
    from fewstep.inference.multilingual.train import train_adapter

    train_adapter(config, folder, found, Path(out))
    return Path(out) / "adapter"
