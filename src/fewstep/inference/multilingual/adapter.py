"""Adapter from multilingual sentence vectors to a teacher's token states, as in PEA-Diffusion (arXiv 2311.17086).

The vector of a whole prompt does not hold the order and the number of its words. A prompt is therefore cut into pieces,
and the runs of pieces that begin at each one get a sentence vector of their own. A small transformer maps them to what
the teacher's text encoders return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, sha256, write_json
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.diffusion.denoiser import Condition
from fewstep.inference.multilingual.network import MASK, StateMap
from fewstep.inference.multilingual.record import RECORD, WEIGHTS, read_adapter, text_side
from fewstep.inference.multilingual.sentence import SentenceEncoder, UniversalSentence, piece_vectors
from fewstep.inference.multilingual.settings import AdapterConfig


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, on the CPU."""

    network: StateMap
    sentence: SentenceEncoder
    config: AdapterConfig

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts of any language to a condition of the teacher's, float32 [N, ...] each."""
        parts = []
        for prompt in prompts:  # one at a time: the last digits of a batch depend on its longest prompt
            outputs = self.network(*piece_vectors(self.sentence, [prompt], self.config.window))
            parts.append({name: (v > 0).float() if name == MASK else v for name, v in outputs.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in self.network.shapes}


def save_adapter(place: Path, adapter: Adapter, folder: PipelineFolder, notes: Mapping[str, Any]) -> None:
    """Write weights and their record to a folder, atomically.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_folder(place) as part:
        save_tensors(part / WEIGHTS, adapter.network.state_dict())
        record = {
            "teacher": text_side(folder),
            "sentence": {"name": adapter.sentence.name, "sha256": adapter.sentence.sha256},
            "settings": adapter.config.model_dump(mode="json"),
            "shapes": {name: list(shape) for name, shape in adapter.network.shapes.items()},
            **notes,
            "weights_sha256": sha256(part / WEIGHTS),
        }
        write_json(part / RECORD, record)


def load_adapter(place: Path | str, folder: PipelineFolder, sentence: SentenceEncoder | None = None) -> Adapter:
    """Read an adapter for a teacher.

    Args:
        place: its folder.
        folder: the teacher.
        sentence: the sentence encoder; the one of the extra `multilingual` by default.

    Raises:
        UserError: no adapter, a damaged one, or one of another teacher or sentence encoder.
    """
    record, path = read_adapter(place, folder), Path(place) / WEIGHTS
    sentence = sentence or UniversalSentence()
    try:
        config = validate(AdapterConfig, record["settings"])
        shapes = {str(name): tuple(int(side) for side in shape) for name, shape in record["shapes"].items()}
        name, expected = str(record["sentence"]["name"]), str(record["sentence"]["sha256"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{Path(place) / RECORD} is not an adapter's record: {error!r} is wrong or missing") from error
    if sentence.sha256 != expected:
        raise UserError(f"adapter = {str(place)!r} was trained on {name}, not on {sentence.name}; install that")
    tensors = load_tensors(path)
    if sha256(path) != record["weights_sha256"]:
        raise UserError(f"{path} is not the file that {RECORD} names; restore it or train the adapter again")
    network = StateMap(config, sentence.width, shapes)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} is not an adapter's weights: {' '.join(str(error).split())[:200]}") from error
    return Adapter(network.eval().requires_grad_(False), sentence, config)
