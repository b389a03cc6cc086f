"""`fewstep synthesize`: from a teacher and a prompt file to a stored set.

On the CPU the settings and prompts decide every byte, in any number of processes and after any number of kills.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone, open_backbone
from fewstep.backbones.lengths import CutPrompts
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.teachers import read_teacher
from fewstep.common import distributed as processes
from fewstep.common.accelerator import make_accelerator
from fewstep.common.device import DTYPES, pick_device, pick_precision
from fewstep.common.distributed import fail_together, is_main, main_process_first, print_once
from fewstep.common.files import atomic_folder, atomic_write, hold_folder, remove_folder, sweep, write_json, write_text
from fewstep.common.mapped_tensors import map_tensors, write_rows
from fewstep.common.messages import Bar, logger
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.grid import end_time, training_grid
from fewstep.diffusion.samplers import step_between
from fewstep.distillation.synthesis.planning import check_free, cost_of, fingerprints, prompt_entries
from fewstep.distillation.synthesis.record import (
    CONDITIONS,
    MANIFEST,
    PLAN,
    PROMPTS,
    UNFINISHED,
    FileRecord,
    Manifest,
    Plan,
    ShardRecord,
    is_whole,
    read_plan,
    read_records,
    refuse_other,
    shard_name,
    write_record,
)
from fewstep.distillation.synthesis.settings import SynthesisConfig
from fewstep.distillation.synthesis.shards import ShardMaker, make_shard, share
from fewstep.distillation.trajectory import TeacherOde
from fewstep.inference.generator import image_generator_of

ENCODED = 512
"""Prompts encoded at a time."""


def make_plan(config: SynthesisConfig, lines: Sequence[str], backbone: Backbone) -> Plan:
    """Return the plan of a set: what decides the bytes of its files."""
    path, settings = backbone.path, config.drawn
    channels, height, width = backbone.latent_shape
    precision = pick_precision(config.precision, backbone.device)
    return Plan(
        settings=settings,
        **fingerprints(backbone.folder),
        **prompt_entries(lines),
        precision=precision,
        weights=precision,
        device=backbone.device.type,
        prediction=backbone.prediction,
        shape=(channels, height, width),
        times=(end_time(path, settings.end), *training_grid(path, settings.grid).tolist()),
    )


def synthesize(
    config: SynthesisConfig,
    lines: Sequence[str],
    out: Path,
    *,
    teacher: PipelineFolder | None = None,
    quiet: bool = False,
) -> Path:
    """Draw a set into the folder `out`, resuming what it already holds, and return the folder.

    Every process of a launch must call it; each draws its share of the missing shards.

    Args:
        teacher: what `config.teacher` names, if it was read already.
        lines: prompts, each of `config.each` samples; a prompt may be on several lines.

    Raises:
        UserError: the folder holds another set or is in use, the teacher cannot be read, or a number is not finite.
    """
    device = pick_device(config.device)
    kept = DTYPES[pick_precision(config.precision, device)]
    accelerator = make_accelerator(config.precision, device)
    backbone = open_backbone(teacher or read_teacher(config.teacher), accelerator.device, kept)
    plan, distinct = make_plan(config, lines, backbone), list(dict.fromkeys(lines))
    silent = quiet or not is_main()
    with ExitStack() as held:
        with fail_together():
            if is_main():
                held.enter_context(hold_folder(out))
                _open(out, plan)
        missing = _missing(out, plan, accelerator.device, silent)
        with fail_together():
            if is_main():
                _reopen(out, plan, missing)
        table = main_process_first(partial(_conditions, out, plan, distinct, backbone, silent))
        backbone.release_encoders()
        backbone.to_device()
        if not silent:
            there = plan.shards - len(missing)
            cost = [*cost_of(config, lines, backbone.folder).lines()]
            cost += [f"there    {there} of {plan.shards} shards already"] if there else []
            logger.info("\n".join([f"writes to {out}", *cost]))
        number = {prompt: row for row, prompt in enumerate(distinct)}
        denoiser, settings = image_generator_of(backbone).denoiser, plan.settings
        step = partial(step_between, denoiser.path, solver=settings.solver)
        ode = TeacherOde(denoiser, plan.times, step, settings.guidance.guides)
        maker = ShardMaker(plan, ode, backbone, torch.tensor([number[line] for line in lines]), table)
        _draw(maker, out, missing, silent)
        with fail_together():
            if is_main():
                _close(out, plan)
    return out


def _open(out: Path, plan: Plan) -> None:
    """Prepare the folder of a new set or of one that is resumed.

    Raises:
        UserError: it holds another set, or other files under the names of a set's.
    """
    sweep(out)
    before = read_plan(out)
    if before is not None:
        refuse_other(out, before, plan.model_dump(mode="json"))
        sweep(out / UNFINISHED)
        return
    check_free(out)
    write_json(out / UNFINISHED / PLAN, plan.model_dump(mode="json"))


def _missing(out: Path, plan: Plan, device: torch.device, silent: bool) -> list[int]:
    """Return the numbers of missing and broken shards; each process checks its share."""
    absent = torch.zeros(plan.shards, device=device)
    with fail_together():
        records = read_records(out, plan)
        mine = range(processes.rank(), plan.shards, processes.world_size())
        fresh = not any((out / shard_name(number)).exists() for number in mine)
        for number in Bar(mine, desc="checking shards", unit="shard", disable=silent or fresh):
            record = records.get(shard_name(number))
            if isinstance(record, ShardRecord) and record.samples == len(plan.items(number)) and is_whole(out, record):
                continue
            absent[number] = 1
            if (out / shard_name(number)).exists():
                logger.info(f"{out / shard_name(number)} is broken or unfinished; it is drawn again")
    found: list[int] = processes.sum_over_processes(absent).nonzero().flatten().tolist()
    return found


def _text_is_whole(out: Path, records: Mapping[str, FileRecord]) -> bool:
    return all(is_whole(out, records.get(name)) for name in (PROMPTS, CONDITIONS))


def _reopen(out: Path, plan: Plan, missing: Sequence[int]) -> None:
    """Turn a finished set with missing or broken files into an unfinished one: its manifest does not hold meanwhile."""
    if not (out / MANIFEST).is_file():
        return
    records = read_records(out, plan)
    if not missing and _text_is_whole(out, records):
        return
    with atomic_folder(out / UNFINISHED) as part:
        write_json(part / PLAN, plan.model_dump(mode="json"))
        for record in records.values():
            write_json(part / f"{record.file}.json", record.model_dump(mode="json"))
    (out / MANIFEST).unlink()


def _close(out: Path, plan: Plan) -> None:
    """Write the manifest of a set whose files are all there; it replaces their single records."""
    if not (out / MANIFEST).is_file():
        records = read_records(out, plan)
        manifest = {
            "plan": plan,
            "prompts": records[PROMPTS],
            "conditions": records[CONDITIONS],
            "shards": [records[shard_name(number)] for number in range(plan.shards)],
        }
        write_json(out / MANIFEST, Manifest.model_validate(manifest).model_dump(mode="json"))
    if (out / UNFINISHED).exists():
        remove_folder(out / UNFINISHED)


def _conditions(out: Path, plan: Plan, distinct: Sequence[str], backbone: Backbone, silent: bool) -> dict[str, Tensor]:
    """Return the text states of the distinct prompts and, last, the unconditional one; encode and store missing ones.

    They are stored in fp16, and the teacher gets the stored ones.
    """
    path = out / CONDITIONS
    if _text_is_whole(out, read_records(out, plan)):
        return map_tensors(path)
    write_text(out / PROMPTS, "".join(f"{prompt}\n" for prompt in distinct))
    write_record(out, out / PROMPTS)

    cut = CutPrompts(backbone)

    def parts() -> Iterator[Condition]:
        with Bar(total=len(distinct), desc="encoding prompts", unit="prompt", disable=silent) as bar:
            for start in range(0, len(distinct), ENCODED):
                some = distinct[start : start + ENCODED]
                cut(some)
                yield backbone.encode(some)
                bar.update(len(some))
        yield backbone.null(1)
        print_once([] if silent else cut.lines())

    with atomic_write(path) as part:
        write_rows(part, len(distinct) + 1, ({k: v.half() for k, v in states.items()} for states in parts()))
    write_record(out, path)
    return map_tensors(path)


def _draw(maker: ShardMaker, out: Path, missing: Sequence[int], silent: bool) -> None:
    """Draw the missing shards, each process its share; after each round a failure of one process stops all."""
    plan, count = maker.plan, processes.world_size()
    with Bar(
        total=sum(len(plan.items(number)) for number in missing),
        desc=f"drawing {plan.settings.kind}",
        unit="sample",
        disable=silent or not missing,
        dynamic_ncols=True,
    ) as bar:
        for turn, number in enumerate(share(missing, processes.rank(), count)):
            with fail_together():
                if number is not None:
                    make_shard(maker, out, number, bar.update)
            others = missing[turn * count : (turn + 1) * count]
            bar.update(sum(len(plan.items(other)) for other in others if other != number))
