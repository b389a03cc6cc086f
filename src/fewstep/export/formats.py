"""The forms that a student can be exported in, and who reads each back: one table for the command, tests and docs.

Light: an export is refused before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fewstep.common.errors import UserError, nearest

ExportForm = Literal["diffusers", "peft", "kohya", "merged", "single-file"]
"""diffusers: a LoRA as `load_lora_weights` reads it. peft: as `PeftModel.from_pretrained` does. kohya: as kohya's
scripts write it and ComfyUI reads it. merged: a whole pipeline folder. single-file: a whole checkpoint in the original
names."""
FORMS: tuple[ExportForm, ...] = get_args(ExportForm)
Reader = Literal["diffusers", "peft", "fewstep"]
"""Who reads a form back: diffusers itself, PEFT inside a diffusers pipeline, or this library alone."""
ADAPTERS: tuple[ExportForm, ...] = ("diffusers", "peft", "kohya")
"""Forms that hold a LoRA."""


@dataclass(frozen=True)
class Offer:
    """Whether a form is offered for a family: who reads it back, or why it is not."""

    reader: Reader | None
    why: str = ""


_UNREAD = "no trainer or interface reads kohya's names for it"
_ALONE = "diffusers and ComfyUI hold it as a folder, or as its transformer alone"
_KOHYA = {
    "sd": Offer("diffusers"),
    "sdxl": Offer("diffusers"),
    "sd3": Offer(None, "diffusers has no reader of kohya's names for it; ComfyUI reads the diffusers form"),
    "flux": Offer(None, "kohya's form holds q, k and v in one matrix; ComfyUI reads the diffusers form"),
}
_SINGLE = {"sd": Offer("diffusers"), "sdxl": Offer("diffusers")}


def offer(form: ExportForm, family: str) -> Offer:
    """Whether a form is offered for a family of pipelines."""
    if form == "kohya":
        return _KOHYA.get(family, Offer(None, _UNREAD))
    if form == "single-file":
        return _SINGLE.get(family, Offer(None, _ALONE))
    if form == "diffusers" and family == "pixart":
        return Offer("fewstep", "diffusers has no LoRA loader for it; the peft form loads there")
    return Offer("peft" if form == "peft" else "diffusers")


@dataclass(frozen=True)
class Way:
    """A form that a student can take, and who reads it back."""

    form: ExportForm
    reader: Reader


def check_form(
    form: str,
    family: str,
    *,
    lora: bool,
    extra_conditioning: tuple[str, ...],
    encoders: Mapping[str, str],
    vae: Mapping[str, Any],
) -> Way:
    """Refuse a form that this student cannot be held in.

    Args:
        lora: whether the student is a LoRA; else a whole pipeline.
        extra_conditioning: its extra inputs (s, w).
        encoders: text encoder -> its class.
        vae: the autoencoder's config, with its class as `_class_name`.

    Raises:
        UserError: naming the nearest form.
    """
    kind = next((legal for legal in FORMS if legal == form), None)
    if kind is None:
        raise UserError(f"form = {form!r} is unknown; the nearest is {nearest(form, FORMS)!r}")
    found = offer(kind, family)
    if found.reader is None:
        raise UserError(f"form = {form!r} is not offered for {family}: {found.why}; the nearest is 'diffusers'")
    if kind in ADAPTERS and not lora:
        raise UserError(f"form = {form!r} holds a LoRA, the student is a whole pipeline; the nearest is 'merged'")
    if extra_conditioning and kind not in ("diffusers", "merged"):
        raise UserError(
            f"form = {form!r} cannot hold extra conditioning ({', '.join(extra_conditioning)}); use 'diffusers'"
        )
    odd = [name for name, kind_of in encoders.items() if not kind_of.startswith("CLIPText")]
    if kind == "single-file" and odd:
        raise UserError(
            f"form = 'single-file' holds CLIP text encoders, the {odd[0]} is a {encoders[odd[0]]}; "
            "the nearest is 'merged'"
        )
    if kind == "single-file" and (vae["_class_name"] != "AutoencoderKL" or vae.get("latents_mean") is not None):
        raise UserError(
            f"form = 'single-file' holds an AutoencoderKL without latents_mean and latents_std, the vae is a "
            f"{vae['_class_name']}{' with them' * (vae.get('latents_mean') is not None)}; the nearest is 'merged'"
        )
    # only fewstep reads extra embeddings
    return Way(kind, "fewstep" if extra_conditioning else found.reader)


def table(families: tuple[str, ...]) -> str:
    """Form x family as a Markdown table: who reads it back, or a number of the reasons below it."""
    reasons: list[str] = []

    def cell(form: ExportForm, family: str) -> str:
        found = offer(form, family)
        if not found.why:
            return str(found.reader)
        if found.why not in reasons:
            reasons.append(found.why)
        return f"{found.reader or '-'} ({reasons.index(found.why) + 1})"

    rows = [f"| `{form}` | {' | '.join(cell(form, family) for family in families)} |" for form in FORMS]
    head = [f"| form | {' | '.join(families)} |", f"| --- |{' --- |' * len(families)}"]
    return "\n".join([*head, *rows, "", *(f"({i}) {why}.  " for i, why in enumerate(reasons, 1))])
