"""The verbs that make what distillations use, as functions: synthesised sets, perceptual distances, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.commands.distill import named_teacher
from fewstep.distillation.checks import WATCHING, check_diffusion, check_installed
from fewstep.common.arguments import checked
from fewstep.common.config import validate
from fewstep.common.errors import UserError

if TYPE_CHECKING:
    from fewstep.export.verify import Checked
    from fewstep.distillation.synthesis.planning import SynthesisCost
    from fewstep.distillation.synthesis.reader import Synthesis
    from fewstep.distillation.synthesis.settings import SynthesisConfig


CARD_PROMPTS = ("an octopus", "a red apple", "a house", "a cat")
"""What a model card shows where no prompts are named."""


@checked
def synthesize(
    prompt_file: Path | str,
    *,
    out: Path | str,
    teacher: Path | str = "",
    kind: str | None = None,
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> Path:
    """Draw a set from prompts alone with a teacher, for training without pictures; returns its folder.

    Args:
        prompt_file: one prompt a line.
        out: folder; a set that was stopped is gone on with.
        teacher: pipeline folder, single-file checkpoint or hub id; empty for the one that overrides name, else the
            bundled one.
        kind: `latents` (end points) or `trajectories` (whole walks); None for what overrides say, else latents.
        overrides: `key=value` for the other settings.
        teacher_config: for a single-file teacher, a pipeline folder of its kind.

    Raises:
        UserError: anything wrong, in one line, before any long work.
    """
    settings, lines, _ = _synthesis(prompt_file, out, named_teacher(teacher, teacher_config), kind, overrides)
    from fewstep.distillation.synthesis.synthesize import synthesize as draw

    return draw(settings, lines, Path(out))


@checked
def synthesis_cost(
    prompt_file: Path | str,
    *,
    out: Path | str,
    teacher: Path | str = "",
    kind: str | None = None,
    overrides: str | Sequence[str] = (),
    teacher_config: Path | str = "",
) -> SynthesisCost:
    """What `synthesize` with the same arguments will take: samples, network evaluations, disk. Nothing is written.

    Raises:
        UserError: what `synthesize` would refuse.
    """
    return _synthesis(prompt_file, out, named_teacher(teacher, teacher_config), kind, overrides)[2]


def _synthesis(
    prompt_file: Path | str, out: Path | str, teacher: Path | str, kind: str | None, overrides: str | Sequence[str]
) -> tuple[SynthesisConfig, list[str], SynthesisCost]:
    """The settings, prompts and cost of a synthesis, refused here if it could not run."""
    from fewstep.data.prompts import read_prompts
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.distillation.config import teacher_path
    from fewstep.distillation.synthesis.planning import check_synthesis, cost_of
    from fewstep.distillation.synthesis.settings import resolve_synthesis

    settings = resolve_synthesis(overrides, teacher, kind)
    lines = read_prompts(prompt_file)
    folder = read_folder(teacher_path(settings.teacher))
    check_synthesis(settings, lines, folder, Path(out))
    return settings, lines, cost_of(settings, lines, folder)


@checked
def read_synthesis(folder: Path | str) -> Synthesis:
    """Open a set that `synthesize` has finished.

    Raises:
        UserError: it is none, is not finished, or a file of it is missing or of another size or layout.
    """
    from fewstep.distillation.synthesis.record import check_files, read_manifest

    check_files(Path(folder), read_manifest(Path(folder)))
    from fewstep.distillation.synthesis.reader import read_synthesis as read

    return read(folder)


@checked
def export_as(
    student: Path | str,
    form: str = "diffusers",
    *,
    out: Path | str,
    teacher: Path | str = "",
    precision: str | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    check: bool = True,
    device: str = "auto",
    teacher_config: Path | str = "",
) -> tuple[Path, Checked | None]:
    """Write a student in the form that another tool reads, with a model card; see `export.forms`.

    Args:
        student: a LoRA file or folder, a bundled student by name, or the folder of a whole pipeline.
        form: diffusers, peft, kohya, merged or single-file.
        out: folder to write; there must be none yet, or an empty one.
        teacher: the LoRA's base: pipeline folder, single-file checkpoint or hub id; empty for the bundled one.
        precision: of whole networks, fp32, fp16 or bf16; None for the base's own. `merged` rounds the denoiser alone,
            `single-file` all that it holds.
        prompts: of the card's pictures.
        seed: of the first picture.
        check: read it back as its users will, and compare.
        device: auto, cpu or cuda.
        teacher_config: for a single-file teacher, a pipeline folder of its kind.

    Returns:
        the file, or the folder of a whole pipeline; what reading it back has shown.

    Raises:
        UserError: no such student or form, a form that cannot hold it, a place that is taken; or what was read back is
            not the student.
    """
    from fewstep.export.formats import ADAPTERS, check_form
    from fewstep.common.files import check_writable
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.common.choices import check_device
    from fewstep.distillation.config import teacher_path
    from fewstep.students.resolve import choose_student

    check_device(device)
    if precision not in (None, "fp32", "fp16", "bf16"):
        raise UserError(f"precision = {precision!r} is unknown; the nearest legal one is 'fp16'")
    whole = (Path(student) / "model_index.json").is_file()
    folder = read_folder(student if whole else teacher_path(named_teacher(teacher, teacher_config)))
    if whole and (teacher or teacher_config):
        raise UserError(
            f"teacher = {str(teacher)!r} says nothing beside student = {str(student)!r}, a whole pipeline; the nearest "
            "is to leave it out"
        )
    chosen = choose_student(folder, None if whole else student, {})
    if not whole and chosen.lora is None:
        raise UserError(
            f"student = {str(student)!r} is the teacher itself; the nearest is a LoRA, or a whole student's folder"
        )
    classes = {name: folder.components[name][1] for name in folder.family.encoders}
    told = folder.told_beside(chosen.sampling.told)
    found = check_form(form, folder.family.kind, lora=not whole, told=told, encoders=classes, vae=folder.config("vae"))
    if precision and found.form in ADAPTERS:
        raise UserError(
            f"precision = {precision!r} is of whole networks, and a LoRA is written as it was; the nearest is to leave "
            "it out"
        )
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        held = next(iter(sorted(item.name for item in place.iterdir())), "") if place.is_dir() else "a file"
        raise UserError(f"out = {str(place)!r} holds {held}, which would be lost; the nearest is a new folder")
    check_writable(place.parent)
    from fewstep.common.device import pick_device

    where = pick_device(device)
    from fewstep.export.export import Student
    from fewstep.export.export import export as write

    return write(
        Student(folder, chosen.lora),
        found.form,
        found.reader,
        place,
        precision=precision,
        prompts=list(prompts) or CARD_PROMPTS,
        seed=seed,
        check=check,
        device=where,
    )


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
    from fewstep.common.config import parse_overrides
    from fewstep.data.prompts import read_prompts
    from fewstep.common.files import check_writable
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.common.choices import check_device
    from fewstep.methods.latent_lpips.settings import PerceptualConfig, check_prompts
    from fewstep.distillation.config import teacher_path
    from fewstep.training.run_folder import check_same_run
    from fewstep_worlds.emoji8 import dataset as emoji8

    check_device(device)
    config = validate(PerceptualConfig, parse_overrides(overrides, PerceptualConfig))
    if prompts is None and teacher:
        raise UserError(f"prompts must be given for teacher = {str(teacher)!r}: a text file, one prompt a line")
    if prompts is None:
        said = [row[0] for row in emoji8.caption_table(emoji8.load_records("train"), 1, 0)]
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
    from fewstep.methods.latent_lpips.train import make_perceptual

    return make_perceptual(config, load_backbone(folder.path, place), said, Path(out))


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
    from fewstep.common.config import parse_overrides
    from fewstep.common.files import check_writable
    from fewstep.backbones.pipeline_folder import read_folder
    from fewstep.inference.multilingual.pairs import read_pairs
    from fewstep.inference.multilingual.settings import PACKAGES, AdapterConfig
    from fewstep.distillation.config import teacher_path
    from fewstep.training.run_folder import check_same_run

    config = validate(AdapterConfig, parse_overrides(overrides, AdapterConfig))
    folder = read_folder(teacher_path(named_teacher(teacher, teacher_config)))
    if pairs is not None:
        found = read_pairs(pairs)
    else:
        from fewstep_worlds.emoji8.translations import chinese_pairs

        found = chinese_pairs()
    check_writable(Path(out))
    check_same_run(Path(out), config)
    check_installed("train-adapter", PACKAGES, extra="multilingual")
    from fewstep.inference.multilingual.train import train_adapter

    train_adapter(config, folder, found, Path(out))
    return Path(out) / "adapter"
