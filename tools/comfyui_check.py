"""Run a student in headless ComfyUI and compare its latents with `fewstep sample`'s.

python tools/comfyui_check.py path/to/ComfyUI --python path/to/its/python

Writes a random pipeline of Stable Diffusion 1.5's shape (narrower, with its real text encoder's shape and tokenizer)
and a random TCD LoRA on it, exports the pipeline as a single file and the LoRA in kohya's layout, copies the node of
`comfyui/` and the files into the ComfyUI folder, starts it on the CPU, and posts the workflow of
`comfyui/tcd_workflow_api.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep import export_as
from fewstep.backbones.base import load_backbone
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.diffusion.config import Sampling
from fewstep.inference.generator import load_image_generator
from fewstep.students.inference_settings import inference_record
from fewstep.students.lora import save_lora
from fewstep.students.lora_header import read_header
from fewstep.training.roles import AdapterRoles, add_adapter

ROOT = Path(__file__).resolve().parents[1]
PROMPT, SIZE = "an octopus on a bicycle", 256
RUNS = ((4, 0.3), (4, 0.0), (8, 1.0), (2, 0.7))
"""Steps and gamma of the drawings."""
PORT = 8199


def make_base(folder: Path, tokenizer: Path) -> Path:
    """Write a random pipeline whose parts ComfyUI recognises as Stable Diffusion 1.5's."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8, block_out_channels=(320, 640), layers_per_block=1, cross_attention_dim=768,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=SIZE,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
        )
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=unet, scheduler=scheduler,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


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
        place, weights, rank=4, alpha=6.0, targets=backbone.targets, base=read_folder(base).fingerprint("unet"),
        sampling=sampling, notes={"method": "tcd", **inference_record(backbone, sampling)}, dtype=torch.float32,
    )  # fmt: skip


def request_json(path: str, data: Any = None) -> Any:
    """Send a GET, or a POST of `data`; return the JSON response."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


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


def comfyui_latent(comfy: Path, workflow: dict[str, Any], steps: int, gamma: float) -> Tensor:
    """Return the latent of ComfyUI, at the scale of the network."""
    flow = copy.deepcopy(workflow)
    flow["2"]["inputs"] |= {"steps": steps, "gamma": gamma}
    flow["3"]["inputs"]["text"] = PROMPT
    flow["5"]["inputs"] |= {"width": SIZE, "height": SIZE}
    flow["6"]["inputs"]["noise_seed"] = 7
    flow["9"] = {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": "latents/check"}}
    written = run_workflow(flow)["9"]["latents"][0]
    file = comfy / "output" / written["subfolder"] / written["filename"]
    return load_file(file)["latent_tensor"] * 0.18215


def main() -> None:
    """Write the networks, start ComfyUI, run the workflow and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="a checkout of ComfyUI; files are copied into it")
    parser.add_argument("--python", default=sys.executable, help="the Python that its requirements are installed for")
    parser.add_argument("--work", type=Path, default=Path("runs/comfyui"), help="folder for the random networks")
    options = parser.parse_args()
    comfy, work = options.comfyui.resolve(), options.work
    base = work / "base"
    if not base.is_dir():
        make_base(base, comfy / "comfy" / "sd1_tokenizer")
    student = make_student(base, work / "student")
    shutil.rmtree(work / "exports", ignore_errors=True)
    whole, _ = export_as(base, "single-file", out=work / "exports" / "base", prompts=[PROMPT], check=False)
    lora, checked = export_as(student, "kohya", out=work / "exports" / "student", teacher=base, prompts=[PROMPT])
    print(checked.line if checked else "")
    shutil.copy2(whole, comfy / "models" / "checkpoints" / "base.safetensors")
    shutil.copy2(lora, comfy / "models" / "loras" / "student.safetensors")
    shutil.copy2(ROOT / "comfyui" / "fewstep_student.py", comfy / "custom_nodes")
    workflow = json.loads((ROOT / "comfyui" / "tcd_workflow_api.json").read_text(encoding="utf-8"))
    log = work / "comfyui.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [options.python, "main.py", "--cpu", "--port", str(PORT), "--force-fp32"],
            cwd=comfy, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        try:
            for _ in range(180):
                try:
                    request_json("/system_stats")
                    break
                except OSError:
                    time.sleep(1)
            image_generator = load_image_generator(base, student)
            worst = 0.0
            for steps, gamma in RUNS:
                theirs = comfyui_latent(comfy, workflow, steps, gamma)
                sampling = image_generator.sampling.model_copy(update={"steps": steps, "gamma": gamma})
                ours = image_generator.latents(image_generator.encode([PROMPT]), [7], sampling)
                plain = load_image_generator(base).latents(image_generator.encode([PROMPT]), [7], sampling)
                apart = float((theirs - ours).abs().max() / ours.abs().max())
                moved = float((plain - ours).abs().max() / ours.abs().max())
                print(f"{steps} calls, gamma {gamma:g}: within {apart:.1e} of ours; the LoRA moves them by {moved:.1e}")
                worst = max(worst, apart)
        finally:
            server.terminate()
            server.wait(timeout=30)
    text = log.read_text(encoding="utf-8", errors="replace")
    lost = [line for line in text.splitlines() if "lora key not loaded" in line]
    layers = len(
        read_header(
            student, {k: tuple(v.shape) for k, v in image_generator.backbone.network.state_dict().items()}
        ).layers
    )
    print(f"{layers} layers were exported, {len(lost)} keys were not loaded; log in {log}")
    if lost or not worst < 1e-4:
        raise SystemExit("not equal")


if __name__ == "__main__":
    main()
