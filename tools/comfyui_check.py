"""Draw a student's pictures by the node pack in headless ComfyUI, and compare them with `fewstep sample`'s.

python tools/comfyui_check.py path/to/ComfyUI --python path/to/its/python

For Stable Diffusion 1.5, SDXL and Flux: writes a random base (`comfyui_bases.py`) and a random TCD LoRA on it, exports
both, copies `comfyui/` and the files into the ComfyUI folder, starts it on the CPU, and posts the workflow of
`comfyui/api_workflows/`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfyui_bases import small_sizes, write_base
from fewstep import export_as
from fewstep.backbones.base import load_backbone
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.diffusion.config import Sampling
from fewstep.inference.generator import load_image_generator
from fewstep.students.inference_settings import inference_record
from fewstep.students.lora import save_lora
from fewstep.training.roles import AdapterRoles, add_adapter

ROOT = Path(__file__).resolve().parents[1]
PROMPT, SIZE, SEED, PORT = "an octopus on a bicycle", (128, 96), 7, 8199
"""SIZE is (width, height)."""
RUNS: dict[str, tuple[tuple[int, float, str], ...]] = {
    "sd15": ((4, 0.3, ""), (4, 0.0, ""), (8, 1.0, ""), (2, 0.7, ""), (2, 0.3, "a blue sky")),
    "sdxl": ((4, 0.3, ""), (2, 1.0, ""), (2, 0.3, "a blue sky")),
    "flux": ((4, 0.3, ""), (2, 1.0, "")),
}
"""Steps, gamma and negative prompt of the drawings."""
LARGEST, LEVELS = 1e-5, 1
"""Largest differences allowed: of a latent, as a share of the largest, and of a picture, of 255 levels; ComfyUI rounds
pictures down."""


class Drawn(NamedTuple):
    """A run's latent [1, C, h, w] at the network's scale, and its picture, uint8 [H, W, 3]."""

    latent: Tensor
    picture: np.ndarray


def make_student(base: Path, place: Path) -> Path:
    """Write a random LoRA with TCD's settings, on every layer that recipes adapt."""
    backbone = load_backbone(base)
    add_adapter(backbone.network, "student", 4, 6.0, backbone.targets, seed=3)
    roles = AdapterRoles(backbone.network)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, parameter in roles.parameters("student").items():
        drawn = parameter.detach().clone()
        weights[name] = 0.05 * torch.randn(drawn.shape, generator=generator) if "lora_B" in name else drawn
    sampling = Sampling(steps=4, gamma=0.3)
    return save_lora(
        place, weights, rank=4, alpha=6.0, targets=backbone.targets,
        base=read_folder(base).fingerprint(read_folder(base).network),
        sampling=sampling, notes={"method": "tcd", **inference_record(backbone, sampling)}, dtype=torch.float32,
    )  # fmt: skip


def our_pictures(kind: str, base: Path, student: Path) -> tuple[list[Drawn], float]:
    """Return a kind's runs as fewstep draws them, and the share by which the LoRA moves the first one's latent."""

    def draw(lora: Path | None, runs: tuple[tuple[int, float, str], ...]) -> Iterator[Drawn]:
        generator = load_image_generator(base, lora)
        condition = generator.encode([PROMPT])
        for steps, gamma, negative in runs:
            sampling = Sampling(steps=steps, gamma=gamma, size=SIZE)
            latent = replace(generator, negative=negative).latents(condition, [SEED], sampling)
            yield Drawn(latent, generator.to_pictures(latent, [SEED])[0])

    ours = list(draw(student, RUNS[kind]))
    (plain,) = draw(None, RUNS[kind][:1])
    return ours, share(plain.latent, ours[0].latent)


def share(latent: Tensor, of: Tensor) -> float:
    """Return the largest difference of two latents, as a share of the largest number of the second."""
    return float((latent - of).abs().max() / of.abs().max())


def install(kind: str, base: Path, student: Path, comfy: Path, work: Path) -> None:
    """Export a base and its student, and copy them to where the workflow looks for them."""
    shutil.rmtree(work / "exports", ignore_errors=True)
    form = "diffusers" if kind == "flux" else "kohya"
    lora, _ = export_as(student, form, out=work / "exports" / "lora", teacher=base, prompts=[PROMPT], check=False)
    files = {lora if lora.is_file() else lora / "pytorch_lora_weights.safetensors": "loras/student.safetensors"}
    if kind == "flux":
        files |= {
            base / "transformer" / "diffusion_pytorch_model.safetensors": "diffusion_models/flux1-dev.safetensors",
            published_names(base / "text_encoder" / "model.safetensors"): "text_encoders/clip_l.safetensors",
            base / "text_encoder_2" / "model.safetensors": "text_encoders/t5xxl_fp16.safetensors",
            base / "vae" / "diffusion_pytorch_model.safetensors": "vae/ae.safetensors",
        }
    else:
        whole, _ = export_as(base, "single-file", out=work / "exports" / "base", prompts=[PROMPT], check=False)
        files[whole] = f"checkpoints/{kind}.safetensors"
    for file, place in files.items():
        shutil.copy2(file, comfy / "models" / place)


def published_names(file: Path) -> Path:
    """Write CLIP's weights under the names of its published file, which newer transformers shorten; return the file."""
    tensors = load_file(file)
    prefix = "" if any(name.startswith("text_model.") for name in tensors) else "text_model."
    place = file.with_name("clip_l.safetensors")
    save_file({prefix + name: value for name, value in tensors.items()}, place)
    return place


def request_json(path: str, data: Any = None) -> Any:
    """Send a GET, or a POST of `data`; return the JSON response."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


@contextmanager
def running(comfy: Path, python: str, log: Path) -> Iterator[None]:
    """Start ComfyUI on the CPU, wait until it responds, and end it after the block."""
    with log.open("w") as stream:
        server = subprocess.Popen(
            [python, "main.py", "--cpu", "--port", str(PORT), "--force-fp32", "--fp32-vae", "--fp32-text-enc"],
            cwd=comfy, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        try:
            for _ in range(180):
                try:
                    request_json("/system_stats")
                    break
                except OSError:
                    time.sleep(1)
            yield
        finally:
            server.terminate()
            server.wait(timeout=30)


def run_workflow(workflow: dict[str, Any]) -> dict[str, Any]:
    """Post a workflow, wait for it, and return its outputs."""
    number = request_json("/prompt", {"prompt": workflow})["prompt_id"]
    while True:
        history = request_json(f"/history/{number}")
        if number in history:
            status = history[number]["status"]
            if status["status_str"] != "success":
                raise SystemExit(f"ComfyUI failed: {json.dumps(status)[:2000]}")
            return dict(history[number]["outputs"])
        time.sleep(1)


def their_picture(comfy: Path, workflow: dict[str, Any], steps: int, gamma: float, negative: str) -> Drawn:
    """Return a run as ComfyUI draws it; its latent is at the autoencoder's scale."""
    flow = copy.deepcopy(workflow)
    of = {node["class_type"]: (number, node["inputs"]) for number, node in flow.items()}
    of["FewStepStudent"][1].update(steps=steps, gamma=gamma)
    next(node["inputs"] for node in flow.values() if node["inputs"].get("text")).update(text=PROMPT)
    next(node["inputs"] for node in flow.values() if "batch_size" in node["inputs"]).update(
        width=SIZE[0], height=SIZE[1]
    )
    of["SamplerCustom"][1].update(noise_seed=SEED)
    if negative:
        sampler = of["SamplerCustom"][1]
        flow[sampler["negative"][0]]["inputs"]["text"] = negative
        given = {"model": sampler["model"], "negative": sampler["negative"], "scale": 3.0, "tau": 2.5, "alpha": 0.5}
        flow["away"] = {"class_type": "FewStepNegative", "inputs": given}
        sampler["model"] = ["away", 0]
    prefix = "latents/check"
    flow["latent"] = {
        "class_type": "SaveLatent", "inputs": {"samples": [of["SamplerCustom"][0], 0], "filename_prefix": prefix}
    }  # fmt: skip
    outputs = run_workflow(flow)

    def place(written: dict[str, str]) -> Path:
        return comfy / "output" / written["subfolder"] / written["filename"]

    latent = load_file(place(outputs["latent"]["latents"][0]))["latent_tensor"]
    with Image.open(place(outputs[of["SaveImage"][0]]["images"][0])) as picture:
        return Drawn(latent, np.asarray(picture.convert("RGB")))


def compare(kind: str, comfy: Path, python: str, work: Path) -> bool:
    """Draw a kind's runs in both, print the differences, and return whether they are those of rounding."""
    base = write_base(kind, comfy, work / "base")
    student = make_student(base, work / "student")
    ours, moved = our_pictures(kind, base, student)
    install(kind, base, student, comfy, work)
    workflow = json.loads((ROOT / "comfyui" / "api_workflows" / f"{kind}.json").read_text(encoding="utf-8"))
    vae = json.loads((base / "vae" / "config.json").read_text(encoding="utf-8"))
    equal, log = True, work / "comfyui.log"
    print(f"{kind}: the LoRA moves latents by {moved:.2g} of the largest")
    with running(comfy, python, log):
        for (steps, gamma, negative), own in zip(RUNS[kind], ours, strict=True):
            theirs = their_picture(comfy, workflow, steps, gamma, negative)
            latent = (theirs.latent - (vae["shift_factor"] or 0.0)) * vae["scaling_factor"]
            apart = share(latent, own.latent)
            levels = int(np.abs(theirs.picture.astype(int) - own.picture.astype(int)).max())
            within = f"latents within {apart:.1e}, pictures within {levels} levels"
            away = f", away from {negative!r}" * bool(negative)
            print(f"{kind}: {steps} calls, gamma {gamma:g}{away}: {within}", flush=True)
            equal = equal and apart < LARGEST and levels <= LEVELS and own.picture.std() > 0
    lost = log.read_text(encoding="utf-8", errors="replace").count("lora key not loaded")
    print(f"{kind}: {lost} keys of the LoRA were not loaded; log in {log}")
    return equal and not lost and moved > 10 * LARGEST


def main() -> None:
    """Copy the pack into ComfyUI and compare every kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="a checkout of ComfyUI; files are copied into it")
    parser.add_argument("--python", default=sys.executable, help="the Python that its requirements are installed for")
    parser.add_argument("--work", type=Path, default=Path("runs/comfyui"), help="folder for the random networks")
    parser.add_argument("--kinds", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    comfy = options.comfyui.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # restores ComfyUI's files
    shutil.copytree(ROOT / "comfyui", comfy / "custom_nodes" / "fewstep", dirs_exist_ok=True)
    with small_sizes(comfy):
        results = [compare(kind, comfy, options.python, options.work / kind) for kind in options.kinds]
    if not all(results):
        raise SystemExit("not equal")


if __name__ == "__main__":
    main()
