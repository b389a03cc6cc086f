"""The data source of a distillation: `data.source`, parsed and checked once. Light: no torch."""

from __future__ import annotations

from pathlib import Path

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.data.config import DataConfig
from fewstep.data.sources import CaptionedSource, open_captioned
from fewstep.distillation.synthesis.record import SynthesizedSet, is_synthesis, open_set

Source = CaptionedSource | SynthesizedSet


def open_source(config: DataConfig, teacher: PipelineFolder) -> Source:
    """Parse and check `data.source`, for pictures of `data.size` or of the teacher's own size.

    Raises:
        UserError: as `open_captioned`, or as `open_set` for a synthesised set.
    """
    folder = Path(config.source)
    if is_synthesis(folder):
        return open_set(folder)
    return open_captioned(config.source, config.size or teacher.picture_size)
