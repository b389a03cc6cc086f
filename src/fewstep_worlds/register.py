"""The bundled world as a `fewstep.common.defaults.World`: sticker scenes, and the verbs of all worlds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts import App


def __getattr__(name: str) -> Any:
    """Return a member of the bundled world."""
    from fewstep_worlds.stickers import world

    return getattr(world, name)


def add_commands(app: App, studies: App) -> None:
    """Add the demo to the command, and the other verbs of the worlds to `fewstep world`."""
    from cyclopts import App

    from fewstep.commands.verb import add, shown
    from fewstep_worlds.plane.api import playground
    from fewstep_worlds.stickers import api as stickers
    from fewstep_worlds.studies import api

    add(app, api.demo, show=api.with_report)
    add(studies, playground, show=with_table)
    add(studies, api.benchmark, show=api.with_report)
    add(studies, api.family)
    add(studies, api.tlcm, show=with_table)
    add(studies, api.chinese, show=with_table)
    add(studies, api.versatility, show=with_table)
    scenes = App("stickers", help="Networks of sticker scenes.")
    add(scenes, stickers.autoencoder)
    add(scenes, stickers.reader)
    add(scenes, stickers.reader_report, show=shown)
    add(scenes, stickers.reward)
    add(scenes, stickers.reward_report, show=shown)
    add(scenes, stickers.teacher)
    add(scenes, stickers.teacher_report, show=shown)
    studies.command(scenes)


def with_table(path: Path, arguments: Mapping[str, Any]) -> list[str]:
    """Return the lines that a study prints: its table, and where it is with its other files."""
    table = path.with_name("table.md") if path.suffix == ".webp" else path
    others = sorted(file.name for file in path.parent.iterdir() if file.is_file() and file != path)
    return [table.read_text(encoding="utf-8"), f"wrote {path}; beside it {', '.join(others)}"]


def configs() -> dict[str, Any]:
    """Return the settings of the worlds' verbs by verb."""
    from fewstep_worlds.plane.settings import PlaneConfig
    from fewstep_worlds.stickers import settings as stickers
    from fewstep_worlds.studies import settings as studies

    return {
        "playground": PlaneConfig(),
        "demo": studies.DemoConfig(),
        "benchmark": studies.BenchmarkConfig(),
        "family": studies.FamilyConfig(),
        "tlcm": studies.TlcmConfig(),
        "chinese": studies.ChineseConfig(),
        "versatility": studies.VersatilityConfig(),
        "stickers autoencoder": stickers.AutoencoderConfig(),
        "stickers reader": stickers.ReaderConfig(),
        "stickers reward": stickers.RewardConfig(),
        "stickers teacher": stickers.TeacherConfig(),
    }
