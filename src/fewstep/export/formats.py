"""The forms that a student can be exported in, and the tool that reads each back. Light: read before torch."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.choices import check_choice
from fewstep.common.errors import UserError

ExportForm = Literal["diffusers", "peft", "kohya", "merged", "single-file"]
"""diffusers: a LoRA as `load_lora_weights` reads it. peft: as `PeftModel.from_pretrained` does. kohya: as kohya's
scripts write it and ComfyUI reads it. merged: a whole pipeline folder. single-file: a whole checkpoint in the original
names."""
FORMS: tuple[ExportForm, ...] = get_args(ExportForm)
Reader = Literal["diffusers", "peft", "fewstep"]
"""The tool that reads a form back: diffusers, PEFT inside a diffusers pipeline, or this library."""
ADAPTERS: tuple[ExportForm, ...] = ("diffusers", "peft", "kohya")
"""Forms that hold a LoRA."""


class Support(NamedTuple):
    """Support of a form for a family: the tool that reads it back, None if it is not offered; and why."""

    reader: Reader | None
    why: str = ""


_KOHYA = {
    "sd": Support("diffusers"),
    "sdxl": Support("diffusers"),
    **dict.fromkeys(("z_image", "flux2"), Support("diffusers")),
    **dict.fromkeys(("qwen_image", "chroma", "krea2", "anima"), Support("fewstep")),
    "sd3": Support(None, "diffusers has no reader of kohya's names for it; ComfyUI reads the diffusers form"),
    "flux": Support(None, "ComfyUI reads the diffusers form"),
}


def support(form: ExportForm, family: str) -> Support:
    """Return the support of a form for a family of pipelines."""
    if form == "kohya":
        return _KOHYA.get(family, Support(None, "fewstep has no table of kohya's names for it"))
    if form == "single-file" and family not in ("sd", "sdxl"):
        return Support(None, "diffusers and ComfyUI hold it as a folder, or as its transformer alone")
    if form == "diffusers" and family == "pixart":
        return Support("fewstep", "diffusers has no LoRA loader for it; the peft form loads there")
    return Support("peft" if form == "peft" else "diffusers")


def check_form(
    form: str, folder: PipelineFolder, *, lora: bool, extra_conditioning: tuple[str, ...]
) -> tuple[ExportForm, Reader]:
    """Return a form and the tool that reads it back; refuse a form that cannot hold the student.

    Args:
        folder: the student's base, or its own pipeline.
        lora: whether the student is a LoRA; else a whole pipeline.
        extra_conditioning: its extra inputs (s, w).

    Raises:
        UserError: naming the form to use.
    """

    def refuse(reason: str, remedy: str) -> UserError:
        return UserError(f"form = {form!r} {reason}; use {remedy!r}")

    check_choice("form", form, FORMS)
    kind = cast(ExportForm, form)
    reader, why = support(kind, folder.family.kind)
    if reader is None:
        raise refuse(f"is not offered for {folder.family.kind}: {why}", "diffusers")
    if kind in ADAPTERS and not lora:
        raise refuse("holds a LoRA, the student is a whole pipeline", "merged")
    if extra_conditioning and kind not in ("diffusers", "merged"):
        raise refuse(f"cannot hold extra conditioning ({', '.join(extra_conditioning)})", "diffusers")
    if kind == "single-file":
        for name in folder.family.encoders:
            if not folder.components[name][1].startswith("CLIPText"):
                raise refuse(f"holds CLIP text encoders, the {name} is a {folder.components[name][1]}", "merged")
        vae = folder.config("vae")
        scaled = vae.get("latents_mean") is not None
        if vae["_class_name"] != "AutoencoderKL" or scaled:
            own = f"{vae['_class_name']}{' with them' * scaled}"
            raise refuse(f"holds an AutoencoderKL without latents_mean and latents_std, the vae is a {own}", "merged")
    # only fewstep reads extra embeddings
    return kind, "fewstep" if extra_conditioning else reader
