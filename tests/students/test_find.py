"""Teachers, students and runs below folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.tensors import save_tensors
from fewstep.students.find import DEPTH, Found, find_models
from support.random_lora import random_lora


def test_what_lies_below_folders(tiny_pipeline: Path, tmp_path: Path) -> None:
    base = read_folder(tiny_pipeline).fingerprint("unet")
    shutil.copytree(tiny_pipeline, tmp_path / "models" / "sd")
    student = random_lora(tiny_pipeline, tmp_path / "runs" / "tcd" / "student").parent
    for name in ("config.yaml", "log.jsonl"):
        (tmp_path / "runs" / "tcd" / name).touch()
    weight = {"one": torch.zeros(2, 2)}
    foreign, single = tmp_path / "other" / "style.safetensors", tmp_path / "models" / "v1.safetensors"
    foreign.parent.mkdir()
    save_tensors(foreign, {"lora_unet_down_blocks_0.lora_up.weight": weight["one"]}, {})
    save_tensors(single, {"model.diffusion_model.input_blocks.0.0.weight": weight["one"]}, {})
    # neither models nor looked into
    save_tensors(tmp_path / "models" / "vae.safetensors", weight, {})
    save_tensors(tmp_path / "runs" / "tcd" / "student" / "conditioning.safetensors", weight, {})
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    deep = tmp_path.joinpath(*["deep"] * (DEPTH + 1))
    for place in (tmp_path / ".hidden", tmp_path / "runs" / "tcd" / "checkpoints", deep):
        place.mkdir(parents=True)
        shutil.copy(single, place)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    assert sorted(find_models([tmp_path])) == sorted(
        [
            Found("teacher", tmp_path / "models" / "sd"),
            Found("teacher", single),
            Found("lora", foreign),
            Found("run", tmp_path / "runs" / "tcd"),
            Found("lora", student, base),
        ]
    )
