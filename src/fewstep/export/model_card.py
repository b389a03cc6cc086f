"""The model card of an export: settings, code that draws with it, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.backbones.families import CONSISTENCY
from fewstep.common.text import read_table
from fewstep.export.formats import ADAPTERS, ExportForm, Reader

PICTURES = "pictures.webp"
CARD = "README.md"

_TEXT: dict[str, Any] = read_table(__file__)


def model_card(
    name: str,
    form: ExportForm,
    record: Mapping[str, Any],
    *,
    reader: Reader,
    pipeline: str,
    network: str,
    file: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> str:
    """Return a model card in Markdown, with the front matter of the Hugging Face hub.

    Args:
        record: of the exported file.
        reader: the tool that reads the form back; there is code for diffusers unless it is fewstep.
        pipeline, network: of the base.
        file: the file's name; empty for a whole pipeline.
        prompts, seeds: of the pictures.
    """
    sampling: Mapping[str, Any] = record["sampling"]
    guidance = record.get("guidance", {})
    kind = "LoRA" if form in ADAPTERS else "model"
    tags = ["text-to-image", "diffusers", "fewstep", *(["lora"] if form in ADAPTERS else [])]
    rows = {
        "method": record.get("method", "not recorded"),
        "network calls": sampling["steps"],
        "sampler": sampling["sampler"],
        "gamma": f"{sampling['gamma']:g} (by {sampling['gamma_law']})" if sampling["sampler"] == "sss" else "-",
        "times": ", ".join(f"{t:g}" for t in record.get("times", [])),
        "grid, spacing": f"{sampling['grid']}, {sampling['spacing']}",
        "end point": sampling["end"],
        "guidance": f"omega {guidance.get('omega', 0):g}, diffusers' guidance_scale {guidance.get('scale', 1):g}",
        "prediction, path": f"{record.get('prediction')}, {record.get('path')}",
        "base": f"{pipeline}, {network} sha256 {str(record.get('base', ''))[:16] or 'not recorded'}",
    }
    if "rank" in record and form in ADAPTERS:
        rows["rank, alpha"] = f"{record['rank']}, {record['alpha']:g}"
    extra = [name for name in sampling.get("extra_conditioning") or () if name != "w" or not guidance.get("embedded")]
    table = ["| setting | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    words: dict[str, Any] = {
        **{"name": name, "kind": kind, "pipeline": pipeline, "network": network, "file": file, "pictures": PICTURES},
        "place": f"{name}/{file}" if file else name,
        "base": name if form == "merged" else "BASE",
        "steps": sampling["steps"],
        "prompt": prompts[0].replace('"', "'"),
        "tags": "\n".join(f"  - {tag}" for tag in tags),
        "shown": "; ".join(f"{prompt} (seed {seed})" for prompt, seed in zip(prompts, seeds, strict=True)),
        "table": "\n".join(table),
        "record": json.dumps(record, indent=2, ensure_ascii=False),
        "diffusers": "",
    }
    words["arguments"] = _TEXT["arguments"][form].format_map(words)
    words["load"] = _TEXT["load"][form].format_map(words)
    if network == "unet" if extra else reader != "fewstep":
        own = "consistency" if pipeline == CONSISTENCY and form == "merged" else "other"
        code = _TEXT["code"]["extra" if extra else own].format_map(words)
        words["diffusers"] = _TEXT["diffusers"].format(
            code=f"import peft\n{code}" if form == "peft" and not extra else code
        )
    text: str = _TEXT["card"].format_map(words)
    return text
