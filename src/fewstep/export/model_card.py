"""The model card of an export: settings, code that draws with it, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.backbones.families import CONSISTENCY
from fewstep.export.formats import ADAPTERS, ExportForm, Reader

PICTURES = "pictures.webp"
CARD = "README.md"

_DIFFUSERS = """\
```python
import diffusers
import fewstep

{load}
pipe.scheduler = fewstep.scheduler_for("{place}", pipe.scheduler.config)
picture = pipe("{prompt}", **fewstep.call_settings("{place}")).images[0]
```"""


def _loading(form: ExportForm, pipeline: str, network: str, place: str, file: str) -> str:
    """Return the lines of Python that build `pipe`."""
    whole = f'pipe = diffusers.{pipeline}.from_pretrained("BASE")'
    if form == "merged":
        return f'pipe = diffusers.{pipeline}.from_pretrained("{place}")'
    if form == "single-file":
        return f'pipe = diffusers.{pipeline}.from_single_file("{place}/{file}", config="BASE")'
    if form == "peft":
        return f'{whole}\npipe.{network} = peft.PeftModel.from_pretrained(pipe.{network}, "{place}").merge_and_unload()'
    return f'{whole}\npipe.load_lora_weights("{place}", weight_name="{file}")'


def _attach_code(place: str, prompt: str, pipeline: str, form: ExportForm, steps: int) -> str:
    """Return the code that draws with a student with extra conditioning."""
    base = place if form == "merged" else "BASE"
    return (
        "```python\nimport diffusers\nimport fewstep\n\n"
        f'pipe = diffusers.{pipeline}.from_pretrained("{base}")\nfewstep.attach(pipe, "{place}")\n'
        f'picture = pipe("{prompt}", num_inference_steps={steps}, guidance_scale=0).images[0]\n```'
    )


def _command(form: ExportForm, place: str, file: str, prompt: str) -> str:
    """Return the command that draws with it."""
    if form == "merged":
        named = f"--teacher {place} --lora none"
    elif form == "single-file":
        named = f"--teacher {place}/{file} --teacher-config BASE --lora none"
    else:
        named = f"--teacher BASE --lora {place}/{file}"
    return f'```bash\nfewstep sample "{prompt}" {named}\n```'


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
    front = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    tags = ["text-to-image", "diffusers", "fewstep", *(["lora"] if form in ADAPTERS else [])]
    front += ["tags:", *(f"  - {tag}" for tag in tags)]
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
    prompt = prompts[0].replace('"', "'")
    inside = _attach_code(name, prompt, pipeline, form, sampling["steps"]) if extra else None
    if inside is None:
        load = _loading(form, pipeline, network, name, file)
        inside = _DIFFUSERS.format(load=load, place=f"{name}/{file}" if file else name, prompt=prompt)
        if pipeline == CONSISTENCY and form == "merged":  # the folder's own scheduler is the student's
            inside = "".join(line for line in inside.splitlines(True) if "pipe.scheduler = " not in line)
        if form == "peft":
            inside = inside.replace("import fewstep\n", "import fewstep\nimport peft\n")
    table = ["| setting | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    shown = "; ".join(f"{prompt} (seed {seed})" for prompt, seed in zip(prompts, seeds, strict=True))
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {name}",
        f"A {kind} that draws in {sampling['steps']} network calls, distilled from a {pipeline} by fewstep.",
        f"![pictures]({PICTURES})",
        f"Drawn with the settings below, from left to right: {shown}.",
        "\n".join(table),
        "The scheduler's times, its gamma and the guidance are the student's own: with others it draws worse. `BASE` "
        "is the pipeline that it was distilled from, whose licence goes on to hold.",
        *(["## In diffusers\n\n" + inside] if (network == "unet" if extra else reader != "fewstep") else []),
        "## By the command\n\n" + _command(form, name, file, prompt),
        "## All recorded settings\n\n```json\n" + json.dumps(record, indent=2, ensure_ascii=False) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"
