"""Settings of the training data. Light: no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fewstep.common.config import Config, as_pair
from fewstep.common.defaults import default_source
from fewstep.common.run_inputs import Content


class DataConfig(Config):
    """The training data."""

    source: Annotated[str, Content("data")] = Field(
        default_factory=default_source,
        description="a folder of captioned pictures, webdataset shards (.tar files, by paths or URLs), or the bundled "
        "world's pictures (stickers); without pictures: a prompt file, the bundled world's captions (captions), or a "
        "folder that `fewstep synthesize` wrote",
    )
    captions: int = Field(12, ge=1, description="captions a picture that the bundled world draws")
    trajectories: int = Field(
        2048, ge=1, description="teacher trajectories drawn and stored, with method.start = trajectory"
    )
    size: int | None = Field(
        None, ge=8, description="pixels a side of the square pictures; null for the teacher's trained size"
    )
    buckets: bool = Field(False, description="keep aspect ratios: shapes of about size x size pixels in all")
    encoder_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="type of the text encoders, fp32 or bf16, which halves T5's 19 GB; states are kept in fp16"
    )
    empty_prompts: float = Field(0.0, ge=0, le=1, description="share of samples trained with the empty prompt")

    @field_validator("size", mode="before")
    @classmethod
    def _side(cls, size: Any) -> Any:
        pair = as_pair(size)
        if not isinstance(pair, list | tuple):
            return pair
        if len(pair) != 2 or pair[0] != pair[1]:
            raise ValueError("no square; give one side, and buckets = true for pictures of several shapes")
        return pair[0]
