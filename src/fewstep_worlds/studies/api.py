"""The studies' verbs: each checks its settings, then imports what it needs.

A verb returns the file or folder that it wrote. Before any long work it raises UserError where a setting, the folder or
the installation does not allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.common.arguments import checked, with_options
from fewstep.common.config import ConfigT, parse_overrides, validate
from fewstep.common.errors import UserError
from fewstep.common.extras import check_installed


@checked
def demo(*, out: Path | str = "demo", overrides: str | Sequence[str] = ()) -> Path:
    """Distil LCM and TCD from the bundled teacher, compare them with it, write report.html. Budgeted at ten minutes.

    Example: fewstep demo --out demo -s steps=200

    Args:
        out: folder; a stopped demo is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.studies.settings import DemoConfig

    config = _checked("demo", DemoConfig, overrides, out)
    from fewstep_worlds.studies.demo import demo

    return _run(demo, config, out)


@checked
def benchmark(*, out: Path | str = "runs/benchmark", overrides: str | Sequence[str] = ()) -> Path:
    """Reproduce the TCD paper's tables and gamma figures on the bundled world, three seeds. Takes hours on a CPU.

    Args:
        out: folder; a stopped benchmark is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.studies.settings import BenchmarkConfig

    config = _checked("benchmark", BenchmarkConfig, overrides, out)
    from fewstep_worlds.studies.benchmark import benchmark

    return _run(benchmark, config, out)


@checked
def family(*, out: Path | str = "runs/family", overrides: str | Sequence[str] = ()) -> Path:
    """Compare every recipe at equal training cost, and every sampler on one student. Takes hours on a CPU.

    Example: fewstep world family -s "recipes=[tcd, tcd-2, tcd-s]"

    Args:
        out: folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep_worlds.studies.settings import FamilyConfig

    config = _checked("family", FamilyConfig, overrides, out)
    from fewstep_worlds.studies.family import family

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
    from fewstep_worlds.studies.settings import TlcmConfig

    config = _checked("tlcm", TlcmConfig, with_options(overrides, {"table": table}), out)
    from fewstep_worlds.studies.tlcm import tlcm, tlcm_settings

    check_distillation(tlcm_settings(), read_teacher(""))
    return _run(tlcm, config, out)


@checked
def chinese(*, out: Path | str = "runs/chinese", overrides: str | Sequence[str] = ()) -> Path:
    """Draw the same claims from English prompts and from Chinese ones outside the adapter's training, and score both.

    Example: fewstep world chinese -s lora=runs/tlcm/student -s steps=3

    Args:
        out: folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep.backbones.teachers import read_teacher
    from fewstep.inference.multilingual.record import read_adapter
    from fewstep.inference.multilingual.settings import PACKAGES
    from fewstep.students.resolve import resolve_student
    from fewstep_worlds.studies.settings import ChineseConfig

    config = _checked("chinese", ChineseConfig, overrides, out)
    check_installed("chinese", PACKAGES, "multilingual")
    folder = read_teacher("")
    resolve_student(folder, config.lora, {"steps": config.steps})
    if config.adapter:
        read_adapter(config.adapter, folder)
    from fewstep_worlds.studies.chinese import measure_chinese

    return _run(measure_chinese, config, out)


@checked
def versatility(*, out: Path | str = "runs/versatility", overrides: str | Sequence[str] = ()) -> Path:
    """Measure students with a community checkpoint, a style LoRA, ControlNets, an IP-Adapter, img2img and inpainting.

    Each add-on is made on the base, and then used with students that never saw it. Takes hours on a CPU.

    Example: fewstep world versatility -s tlcm=runs/tlcm/student -s tasks=[style,img2img]

    Args:
        out: folder; a stopped run is resumed from it.
        overrides: setting, key=value. May be repeated.
    """
    from fewstep.backbones.teachers import read_teacher
    from fewstep.students.resolve import resolve_student
    from fewstep_worlds.common.location import root
    from fewstep_worlds.studies.settings import VersatilityConfig

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
    for part in ("reader", "reward") if "picture" in config.tasks else ("reader",):
        if not (root() / part).is_dir():
            raise UserError(
                f"world = {str(root())!r} has no {part}/, which the study needs; set FEWSTEP_WORLD to the "
                "world/ folder of a fewstep checkout",
                field="world",
            )
    from fewstep_worlds.studies.addons.figure import versatility

    return _run(versatility, config, out)


def with_report(path: Path, arguments: Mapping[str, Any]) -> list[str]:
    """Return the lines that a study with a report prints: its first table, and where the report is."""
    from fewstep_worlds.report.results import load_results
    from fewstep_worlds.report.tables import terminal_table

    return [terminal_table(load_results(path.with_name("results.json"))), f"wrote {path}"]


def _checked(verb: str, model: type[ConfigT], overrides: str | Sequence[str], out: Path | str) -> ConfigT:
    """Resolve and check the settings of a study of the bundled world."""
    from fewstep.backbones.teachers import read_teacher
    from fewstep.common.files import check_writable

    config = validate(model, parse_overrides(overrides, model))
    read_teacher("")
    check_writable(Path(out))
    check_installed(verb)
    return config


def _run(study: Callable[[ConfigT, Path], Path], config: ConfigT, out: Path | str) -> Path:
    """Run a study with its folder locked and cleared of what a killed process left half-written in its stores."""
    from fewstep.common.files import hold_folder, sweep

    with hold_folder(Path(out)):
        for store in ("cache", "pictures", "features"):
            sweep(Path(out) / store)
        return study(config, Path(out))
