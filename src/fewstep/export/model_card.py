"""The model card of an export: front matter of a hub, settings, code that draws with it, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fewstep.backbones.families import CONSISTENCY, FAMILIES
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.teachers import HUB_ID, teacher_name
from fewstep.common.text import read_table, read_text
from fewstep.export.formats import ADAPTERS, ExportForm, Reader
from fewstep.students.inference_settings import beside_flow_map

PICTURES = "pictures.webp"
CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
"""Entries of a card's front matter that are a base's licence."""

_TEXT: dict[str, Any] = read_table(__file__)


@dataclass(frozen=True)
class Origin:
    """The base of an export, as a hub's front matter names it.

    Attributes:
        model: owner/name on a hub; empty if it has none.
        licence: entries of the front matter.
    """

    model: str
    licence: Mapping[str, str]


def origin_of(folder: PipelineFolder, record: Mapping[str, Any], base_model: str = "", licence: str = "") -> Origin:
    """Return the origin of an export.

    Args:
        folder: the base pipeline, whose own card may name the licence.
        record: of the student, which may name its teacher.
        base_model, licence: what is used instead, if given.
    """
    named = [base_model, str(record.get("teacher", "")), teacher_name(folder.path)]
    model = next((name for name in named if HUB_ID.fullmatch(name)), "")
    return Origin(model, {"license": licence} if licence else licence_of(folder.path))


def licence_of(place: Path) -> dict[str, str]:
    """Return the licence in the front matter of a folder's card; `other` where it names none."""
    try:
        _, front, _ = read_text(place / CARD).split("---\n", 2)
        held = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):
        held = None
    found = {key: str(held[key]) for key in LICENCE_KEYS if held.get(key)} if isinstance(held, dict) else {}
    return found or {"license": "other", "license_name": "as-the-base-model"}


def front_matter(form: ExportForm, record: Mapping[str, Any], origin: Origin) -> str:
    """Return the front matter of a card, YAML that a hub accepts."""
    adapter = form in ADAPTERS
    method = str(record.get("method", ""))
    tags = ["text-to-image", "diffusers", "fewstep", *(["lora"] if adapter else []), *([method] if method else [])]
    relation = "adapter" if adapter else "finetune"
    base = {"base_model": origin.model, "base_model_relation": relation} if origin.model else {}
    front = {**base, **origin.licence, "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def table_of(rows: Mapping[str, object], head: str = "setting") -> str:
    """Return a Markdown table of two columns."""
    return "\n".join([f"| {head} | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])


def training_rows(record: Mapping[str, Any]) -> dict[str, object]:
    """Return the rows of a card's table of training facts; empty for students that record none."""
    facts: Mapping[str, Any] = record.get("training") or {}
    seen = record.get("guidance_seen") or {}
    rows: dict[str, object] = {"method": record.get("method"), "optimiser steps": record.get("steps_trained")}
    rows |= {name: value for name, value in facts.items() if value is not None}
    if seen.get("convention") not in (None, "none"):
        rows["guidance of the teacher"] = f"{seen['low']:g} to {seen['high']:g} ({seen['convention']})"
    rows["base"] = f"sha256 {str(record.get('base', ''))[:16]}" if record.get("base") else None
    return {name: value for name, value in rows.items() if value is not None} if facts else {}


def plain_scheduler(record: Mapping[str, Any]) -> str:
    """Return which scheduler of diffusers makes a student's jumps, a key of `schedulers`; "" for none.

    On betas TCD's and LCM's own, on their grids and times; on a flow Euler's, where gamma is 0.
    """
    sampling: Mapping[str, Any] = record["sampling"]
    if sampling.get("extra_conditioning"):
        return ""
    if record.get("path") == "flow":
        jumps = sampling["sampler"] == "sss" and sampling.get("jump") in (None, "first_order")
        return "flow" if jumps and sampling["gamma"] == 0 and record.get("times") else ""
    if not isinstance(sampling["grid"], int) or sampling["spacing"] != "grid":
        return ""
    if sampling["sampler"] == "sss":
        same = sampling.get("jump") in (None, "first_order") and sampling["end"] == "index0"
        return "sss" if same and sampling["gamma_law"] == "time" else ""
    return "lcm" if sampling["sampler"] == "lcm" and sampling.get("jump") in (None, "skip") else ""


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
    origin: Origin,
    repo: str = "",
) -> str:
    """Return a model card in Markdown.

    Args:
        record: of the exported file.
        reader: the tool that reads the form back; there is code for diffusers unless it is fewstep.
        pipeline, network: of the base.
        file: the file's name; empty for a whole pipeline.
        prompts, seeds: of the pictures.
        repo: owner/name that it is uploaded to, which diffusers loads it from; empty for its folder.
    """
    sampling: Mapping[str, Any] = record["sampling"]
    guidance, guided = record.get("guidance", {}), FAMILIES[pipeline].guided
    rows = {
        "method": record.get("method", "not recorded"),
        "network calls": sampling["steps"],
        "sampler": sampling["sampler"],
        "gamma": f"{sampling['gamma']:g} (by {sampling['gamma_law']})" if sampling["sampler"] == "sss" else "-",
        "times": ", ".join(f"{t:g}" for t in record.get("times", [])),
        "grid, spacing": f"{sampling['grid']}, {sampling['spacing']}",
        "end point": sampling["end"],
        "guidance": f"omega {guidance.get('omega', 0):g}, {guided} {guidance.get('scale', 1):g} in diffusers",
        "prediction, path": f"{record.get('prediction')}, {record.get('path')}",
        "base": f"{pipeline}, {network} sha256 {str(record.get('base', ''))[:16] or 'not recorded'}",
    }
    if "rank" in record and form in ADAPTERS:
        rows["rank, alpha"] = f"{record['rank']}, {record['alpha']:g}"
    extra = [name for name in sampling.get("extra_conditioning") or () if name != "w" or not guidance.get("embedded")]
    words: dict[str, Any] = {
        **{"name": name, "pipeline": pipeline, "network": network, "file": file, "pictures": PICTURES},
        "front": front_matter(form, record, origin),
        "kind": "LoRA" if form in ADAPTERS else "model",
        "place": f"{name}/{file}" if file else name,
        "at": (f"https://huggingface.co/{repo}/blob/main" if form == "single-file" else repo) if repo else name,
        "from": origin.model or "BASE",
        "base": name if form == "merged" else origin.model or "BASE",
        "steps": sampling["steps"],
        "grid": sampling["grid"],
        "gamma": sampling["gamma"],
        "guided": guided,
        "scale": guidance.get("scale", 1),
        "sampler": "LCM" if sampling["sampler"] == "lcm" else "TCD",
        "sigmas": [round(t / 1000, 6) for t in record.get("times", [])],
        "prompt": prompts[0].replace('"', "'"),
        "shown": "; ".join(f"{prompt} (seed {seed})" for prompt, seed in zip(prompts, seeds, strict=True)),
        "table": table_of(rows),
        "record": json.dumps(record, indent=2, ensure_ascii=False),
        **dict.fromkeys(("plain", "diffusers", "other", "training"), ""),
    }
    words["about"] = _TEXT["about"]["style" if record.get("method") == "style" else "student"].format_map(words)
    words["origin"] = _TEXT["origin"].format(base=origin.model or "BASE")
    words["arguments"] = _TEXT["arguments"][form].format_map(words)
    words["load"] = _TEXT["load"][form].format_map(words)
    if facts := training_rows(record):
        words["training"] = _TEXT["training"].format(facts=table_of(facts, "fact"))
    if form in _TEXT["other"] and sampling["sampler"] in ("sss", "lcm"):
        words["other"] = _TEXT["other"][form].format_map(words)
    imported = "import peft\n" if form == "peft" and not extra else ""
    scheduler = plain_scheduler(record)
    plain = reader != "fewstep" and not FAMILIES[pipeline].modular
    if scheduler and plain and pipeline != CONSISTENCY:
        code = _TEXT["schedulers"][scheduler].format_map(words)
        words["plain"] = _TEXT["plain"].format(code=f"{imported}{code}")
    if (extra or reader != "fewstep") and not FAMILIES[pipeline].modular:
        own = "consistency" if pipeline == CONSISTENCY and form == "merged" else "other"
        words["flow_map"] = "" if beside_flow_map(record) else _TEXT["code"]["flow_map"].format_map(words)
        code = _TEXT["code"]["extra" if extra else own].format_map(words)
        words["diffusers"] = _TEXT["diffusers"].format(code=f"{imported}{code}")
    text: str = _TEXT["card"].format_map(words)
    return text
