"""The tensors of a single-file checkpoint: read one at a time, dequantised, and accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.backbones.single_file.recognise import formats_of
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import Entry

_SCALES = ("scale_weight", "weight_scale")
"""The factor of a quantised weight: ComfyUI's earlier and present name."""
_INPUT_SCALES = ("scale_input", "input_scale")
"""Scales of inputs of products in fp8, which are without effect here."""
_FLOATING = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_OLD_TEXT = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?=embeddings\.|encoder\.|final_layer)"
)
"""CLIP's keys in their oldest spelling, without `text_model.`."""


class Reader(ExitStack):
    """Open checkpoint, a context manager, that records which of its tensors were read.

    Raises:
        UserError: a broken file.
    """

    def __init__(self, file: Path, metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
        super().__init__()
        self.file, self.entries = file, entries
        self.names = {_OLD_TEXT.sub(r"\1.transformer.text_model.", key): key for key in entries}
        self.formats = formats_of(metadata, file)
        self.read: set[str] = set()
        try:
            self._stream: Any = self.enter_context(safe_open(file, "pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a whole safetensors file: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def get(self, name: str) -> Tensor:
        """Return a tensor, multiplied by the scale beside it if it is quantised.

        Raises:
            UserError: it is quantised in a format that is not read.
        """
        key = self.names[name]
        self.read.add(key)
        value: Tensor = self._stream.get_tensor(key)
        layer, _, kind = key.rpartition(".")
        if kind != "weight":
            return value
        kind_of_fp8 = self._format(layer)
        if kind_of_fp8 is not None and kind_of_fp8 not in _FLOATING:
            raise UserError(
                f"teacher = {str(self.file)!r}: {key!r} is quantised as {kind_of_fp8}; give it in fp8 "
                f"({', '.join(_FLOATING)}), fp16, bf16 or fp32"
            )
        if kind_of_fp8 is not None and value.element_size() == 1:
            value = value.view(_FLOATING[kind_of_fp8])
        if not value.is_floating_point():
            raise UserError(
                f"teacher = {str(self.file)!r}: {key!r} holds whole numbers ({self.entries[key].dtype}), a quantised "
                "form that is not read; give it in fp8, fp16, bf16 or fp32"
            )
        for scale in (f"{layer}.{name}" for name in _SCALES):
            if scale in self.entries:
                value = self._scaled(value, key, scale)
        return value

    def _format(self, layer: str) -> str | None:
        """Return the format that a layer is quantised in, None if the file names none."""
        mark = f"{layer}.comfy_quant"
        if mark in self.entries:
            self.read.add(mark)
            try:
                return str(json.loads(bytes(self._stream.get_tensor(mark).flatten().tolist()))["format"])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{self.file}: {mark!r} does not name a format: {error!r}") from error
        named = (found for name, found in self.formats.items() if layer == name or layer.endswith(f".{name}"))
        return next(named, None)

    def _scaled(self, value: Tensor, key: str, scale: str) -> Tensor:
        """Multiply a weight by its scale, one number or one for each row, in fp32."""
        factor: Tensor = self._stream.get_tensor(scale).float()
        if factor.numel() not in (1, len(value)):
            raise UserError(
                f"teacher = {str(self.file)!r}: {scale!r} is {tuple(factor.shape)}, {key!r} {tuple(value.shape)}; only "
                "one scale a matrix or one a row is read"
            )
        self.read.add(scale)
        return value.float() * factor.reshape(-1, *[1] * (value.dim() - 1))

    def beside(self, name: str) -> bool:
        """Return whether a tensor only describes how another one is quantised."""
        last = name.rpartition(".")[2]
        return last in (*_SCALES, *_INPUT_SCALES, "comfy_quant", "scaled_fp8")

    def shared_type(self, names: Iterable[str]) -> torch.dtype:
        """Return the dtype to keep matrices in: fp16 or bf16 if all of them have it, else fp32."""
        own = [self.entries[self.names[name]] for name in names if name in self.names]
        found = {entry.dtype for entry in own if len(entry.shape) > 1}
        halves = {"F16": torch.float16, "BF16": torch.bfloat16}
        return halves.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32

    def unread(self) -> list[str]:
        """Return the names of the tensors that nothing has read."""
        return [key for key in self.entries if key not in self.read]
