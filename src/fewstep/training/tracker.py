"""Where figures and grids of a run go beside log.jsonl: Accelerate's trackers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.common.extras import check_installed
from fewstep.common.files import write_text

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from PIL import Image

PROJECT = "fewstep"
"""Project of runs in W&B and trackio."""
RUN_ID = "tracker_id.txt"
"""File with a run's number in W&B, under which a resumed run goes on."""


def check_tracker(kind: str) -> None:
    """Refuse a tracker whose package is not installed."""
    if kind in ("wandb", "trackio"):
        check_installed(f"loop.tracker = {kind!r}", [kind], kind)


class Tracker:
    """A tracker of one run, opened at its first entry.

    Args:
        kind: tensorboard, wandb, trackio or none.
        folder: the run folder.
        config: settings, which W&B and trackio show.
    """

    def __init__(self, kind: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.kind = kind
        self.folder = folder
        self.config = config
        self._open: GeneralTracker | None = None

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures of a step."""
        if tracker := self._tracker(step):
            tracker.log(dict(figures), step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Log a picture of a step."""
        import numpy as np

        tracker = self._tracker(step)
        if tracker is None:
            return
        pixels = np.asarray(picture)
        if self.kind == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif self.kind == "wandb":
            tracker.log_images({name: [pixels]}, step=step)
        else:
            import trackio

            tracker.log({name: trackio.Image(pixels)}, step=step)

    def close(self) -> None:
        """Finish; the next entry opens it again."""
        if self._open is not None:
            self._open.finish()
            self._open = None

    def _tracker(self, step: int) -> GeneralTracker | None:
        if self._open is None and self.kind != "none":
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            kind: Any = LOGGER_TYPE_TO_CLASS[self.kind]
            if self.kind == "tensorboard":  # entries of a killed run after its checkpoint are purged
                self._open = kind("tensorboard", self.folder, purge_step=step)
            else:
                self._open = kind(PROJECT, name=self.folder.name, resume="allow", **self._where())
            self._open.start()
            if self.kind != "tensorboard":
                self._open.store_init_configuration(dict(self.config))
        return self._open

    def _where(self) -> dict[str, Any]:
        """Return W&B's number of this run, made once, and its folder."""
        if self.kind != "wandb":
            return {}
        number = ""
        with suppress(OSError):
            number = (self.folder / RUN_ID).read_text(encoding="utf-8").strip()
        if not number:
            number = secrets.token_hex(8)
            write_text(self.folder / RUN_ID, number)
        return {"id": number, "dir": str(self.folder)}
