"""The README's plain-diffusers script and `fewstep sample` draw the same picture.

The script runs in its own process and imports nothing of this project.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep import api
from fewstep.backbones.sd import LORA_TARGETS
from fewstep.export.lora import save_lora
from fewstep.folder import read_folder
from fewstep.settings import Sampling

SCRIPT = """
import sys

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, TCDScheduler

pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(sys.argv[2])
picture = pipe(
    "a red disc",
    num_inference_steps=4,
    guidance_scale=0,
    eta=0.3,
    generator=torch.Generator().manual_seed(7),
    output_type="np",
).images[0]
assert "fewstep" not in sys.modules
np.save(sys.argv[3], picture)
"""


def random_lora(pipeline: Path, out: Path) -> Path:
    """A LoRA of every adapted layer with weights large enough to change the picture."""
    from fewstep.backbones.sd import load_backbone

    network = load_backbone(pipeline).network
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not any(name == t or name.endswith(f".{t}") for t in LORA_TARGETS):
            continue
        kernel = tuple(weight.shape[2:])
        weights[f"{name}.lora_A.weight"] = torch.randn((4, weight.shape[1], *kernel), generator=generator) * 0.1
        one = (1,) * len(kernel)
        weights[f"{name}.lora_B.weight"] = torch.randn((weight.shape[0], 4, *one), generator=generator) * 0.1
    sampling = Sampling(sampler="sss", steps=4, gamma=0.3, end="index0")
    base = read_folder(pipeline).fingerprint("unet")
    return save_lora(out, weights, rank=4, alpha=4.0, targets=LORA_TARGETS, base=base, sampling=sampling, notes={})


def test_a_script_without_fewstep_draws_the_same_picture(tiny_pipeline: Path, tmp_path: Path) -> None:
    lora = random_lora(tiny_pipeline, tmp_path / "student")
    out, theirs = tmp_path / "ours.png", tmp_path / "theirs.npy"
    api.sample(["a red disc"], out=out, lora=lora, teacher=str(tiny_pipeline), seed=7, scale=1)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    subprocess.run(
        [sys.executable, str(script), str(tiny_pipeline), str(lora.parent), str(theirs)], check=True, timeout=120
    )
    ours = np.asarray(Image.open(out)).astype(np.float32)[4:-4, 4:-4]  # the sheet's white margin
    wanted = np.load(theirs) * 255
    assert ours.std() > 5  # not a flat picture
    np.testing.assert_allclose(ours, wanted, atol=1.0)

    plain = tmp_path / "plain.png"
    api.sample(
        ["a red disc"], out=plain, lora=None, teacher=str(tiny_pipeline), seed=7, scale=1,
        settings={"sampler": "sss", "steps": 4, "gamma": 0.3, "omega": 0.0, "spacing": "grid", "end": "index0"},
    )  # fmt: skip
    without = np.asarray(Image.open(plain)).astype(np.float32)[4:-4, 4:-4]
    assert np.abs(without - ours).mean() > 2  # the LoRA matters
