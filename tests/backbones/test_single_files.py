"""Checkpoints of one file: what they are, without a folder of configs, quantised, incomplete, with tensors to spare."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.backbones import teachers
from fewstep.backbones.base import load_backbone
from fewstep.backbones.pipeline_folder import folder_of, read_folder
from fewstep.backbones.single_file import known_configs, recognise, vocabulary
from fewstep.backbones.single_file.components import checkpoint_places, network_of
from fewstep.backbones.single_file.known_configs import configs
from fewstep.backbones.single_file.recognise import Checkpoint
from fewstep.backbones.single_file.sd_checkpoint import checkpoint_weights, to_original, unet_keys
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import Entry, read_safetensors_header
from fewstep.students.lora_checks import check_lora
from support import tiny_pipelines
from support.original_names import sd3_original

UNET = "model.diffusion_model."
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def whole(folder: Path, act: str = "quick_gelu") -> Tensors:
    """All tensors of a pipeline folder under their original names."""
    backbone = load_backbone(folder)
    encoders = backbone.text_encoders
    encoders[0].config.hidden_act = act
    state = backbone.network.state_dict()
    weights = checkpoint_weights(state, backbone.vae.state_dict(), encoders, prediction="eps", zero_snr=False)
    return {name: value.contiguous() for name, value in weights.items()}


def bare(folder: Path, place: Path) -> Path:
    """Configs and tokenizers alone."""
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    return place


def in_a_whole(weights: Tensors) -> Tensors:
    return {f"{UNET}{name}": value.contiguous() for name, value in weights.items()}


def networks(place: Path) -> dict[str, Tensors]:
    backbone = load_backbone(place)
    parts = (backbone.network, backbone.vae, *backbone.text_encoders)
    return {name: dict(part.state_dict()) for name, part in zip(backbone.folder.family.weighed, parts, strict=True)}


def assert_same(place: Path, folder: Path) -> None:
    found, own = networks(place), networks(folder)
    for part, tensors in own.items():
        for name, value in tensors.items():
            assert torch.equal(found[part][name], value), (part, name)


# parameters as published: Stable Diffusion 1.5, 2.1, XL base 1.0, their autoencoder and CLIP's text encoders
COUNTS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
    },
}  # fmt: skip


def known(version: Any, prediction: Any, place: Path) -> tuple[Any, dict[str, Any]]:
    for name, data in configs(version, prediction).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(json.dumps(data), encoding="utf-8")
    folder = folder_of(place, configs(version, prediction)["model_index.json"], "config")
    return folder, {part: network_of(folder, part) for part in folder.family.weighed}


@pytest.mark.parametrize("version", list(COUNTS))
def test_the_known_configs_are_those_of_the_published_networks(version: str, tmp_path: Path) -> None:
    """Every parameter counted, and recognised by their own names and shapes."""
    folder, made = known(version, "eps", tmp_path)
    assert {part: sum(p.numel() for p in network.parameters()) for part, network in made.items()} == COUNTS[version]
    entries = {}
    for part, places in checkpoint_places(folder, made, Checkpoint("", UNET)).items():
        state = made[part].state_dict()
        entries |= {held.key: Entry("F16", tuple(state[name].shape), 0) for name, held in places.items()}
    found = recognise.recognise(Path("x.safetensors"), {"modelspec.prediction_type": "epsilon"}, entries, {})
    assert (found.version, found.pipeline, found.prediction) == (version, folder.pipeline, "eps")


WIDTHS = {"sd1": (768, 4, False), "sd2": (1024, 4, False), "sdxl": (2048, 4, True)}


def header(width: int, channels: int, vector: bool, *more: str, prefix: str = UNET) -> dict[str, Entry]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_blocks.0.0.weight": (320, channels, 3, 3),
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (320, width),
        **({"label_emb.0.0.weight": (1280, 2816)} if vector else {}),
    }
    found = {f"{prefix}{name}": Entry("F16", shape, 0) for name, shape in shapes.items()}
    return found | {name: Entry("F16", (1,), 0) for name in more}


@pytest.mark.parametrize(
    ("metadata", "marks", "notes", "wanted"),
    [
        ({}, (), {}, (None, None)),
        ({}, ("v_pred",), {}, ("v", False)),
        ({}, ("v_pred", "ztsnr"), {}, ("v", True)),
        ({}, ("ztsnr",), {}, (None, True)),
        ({"modelspec.prediction_type": "v"}, (), {}, ("v", False)),
        ({"modelspec.prediction_type": "epsilon"}, (), {}, ("eps", False)),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), {}, ("v", False)),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, (), {}, ("eps", False)),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, (), {}, (None, None)),
        ({}, (), {"prediction": "v"}, ("v", False)),
        ({"modelspec.prediction_type": "V-Prediction"}, (), {}, ("v", False)),
        ({"modelspec.prediction_type": "flow"}, (), {}, ("flow", False)),
        ({}, (), {"prediction": "x0"}, ("x0", False)),
    ],
)
def test_the_prediction_in_a_files_metadata(
    metadata: dict[str, str], marks: tuple[str, ...], notes: dict[str, Any], wanted: tuple[str | None, bool | None]
) -> None:
    for version, shape in WIDTHS.items():
        for prefix in ("model.diffusion_model.", "diffusion_model.", ""):
            entries = header(*shape, *marks, prefix=prefix)
            found = recognise.recognise(Path("x"), metadata, entries, notes)
            assert (found.version, found.prediction, found.zero_snr) == (version, *wanted)
            assert found.prefix == prefix
            assert found.guess == ("v" if version == "sd2" and wanted[0] is None else None)


@pytest.mark.parametrize(("beside", "words"), [(True, "beside its weights"), (False, "is a LoRA")])
def test_an_adapter_in_a_checkpoint_is_not_a_lora(beside: bool, words: str) -> None:
    adapter = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": Entry("F16", (4, 1280), 0)}
    with pytest.raises(UserError, match=words):
        recognise.recognise(Path("x"), {}, adapter | (header(*WIDTHS["sd1"]) if beside else {}), {})


def test_a_prediction_in_an_unknown_word_is_refused() -> None:
    with pytest.raises(UserError, match="bridge"):
        recognise.recognise(Path("x"), {"modelspec.prediction_type": "bridge"}, header(*WIDTHS["sdxl"]), {})


def test_a_flow_needs_a_scheduler_of_a_flow(tmp_path: Path) -> None:
    """The word in the file goes before its kind's usual scheduler, of betas."""
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    save_file(whole(folder), tmp_path / "x.safetensors", {"modelspec.prediction_type": "flow"})
    with pytest.raises(UserError, match="predicts flow"):
        teachers.teacher_folder(tmp_path / "x.safetensors", folder)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    place = teachers.teacher_folder(tmp_path / "x.safetensors", folder)
    assert load_backbone(place).prediction == "flow"
    assert_same(place, folder)


@pytest.mark.parametrize("name", ["x.SAFETENSORS", "x.ckpt", "x.pt", "x.txt", "x"])
def test_safetensors_under_another_name_are_read(name: str, tmp_path: Path) -> None:
    """A file is what its bytes are: a checkpoint, and a LoRA."""
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    save_file(whole(folder), tmp_path / name)
    assert_same(teachers.teacher_folder(tmp_path / name, folder), folder)
    layer = "unet.mid_block.attentions.0.proj_in"
    (tmp_path / "lora").mkdir()
    pair = {f"{layer}.lora_A.weight": torch.ones(1, 32, 1, 1), f"{layer}.lora_B.weight": torch.ones(32, 1, 1, 1)}
    save_file(pair, tmp_path / "lora" / name)
    assert list(check_lora(tmp_path / "lora" / name, read_folder(folder)).layers) == [layer.removeprefix("unet.")]


@pytest.mark.parametrize(("spread", "guess"), [(0.02, "eps"), (0.3, "v")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_networks_of_2_are_distinguished_by_a_bias(
    spread: float, guess: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    values = torch.randn(320, generator=torch.Generator().manual_seed(0)) * spread
    key = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    save_file({key: values.to(dtype), "other": torch.zeros(7)}, tmp_path / "x.safetensors")
    _, entries = read_safetensors_header(tmp_path / "x.safetensors")
    found = recognise.recognise(tmp_path / "x.safetensors", {}, header(1024, 4, False) | entries, {})
    assert found.guess == guess


REFUSED = {
    "inpainting": header(768, 9, False),
    "edits a picture": header(768, 8, False),
    "depth-to-image": header(1024, 5, False),
    "upscaler": header(1024, 7, True),
    "refiner": header(1280, 4, True),
    "unCLIP": header(1024, 4, True),
    "Playground": header(2048, 4, True, "edm_mean", "edm_std"),
    "CosXL": header(2048, 4, True, "edm_vpred.sigma_max"),
    "ControlNet": header(768, 4, False, "control_model.input_hint_block.0.weight"),
    "LoRA": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": Entry("F16", (4, 4), 0)},
    "autoencoder alone": {"decoder.conv_in.weight": Entry("F16", (4, 4), 0)},
    "one component": {"down_blocks.0.resnets.0.conv1.weight": Entry("F16", (4, 4), 0)},
    "text encoder alone": {"text_model.embeddings.token_embedding.weight": Entry("F16", (4, 4), 0)},
    "Chroma": dict.fromkeys(["double_blocks.0.x", "distilled_guidance_layer.in_proj.bias"], Entry("F16", (1,), 0)),
    "unknown architecture": {"layers.0.weight": Entry("F16", (4, 4), 0)},
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_not_read_is_refused_by_its_name(what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        recognise.recognise(Path("x.safetensors"), {}, REFUSED[what], {})
    assert "\n" not in str(caught.value)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_alone_needs_no_folder_of_configs(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ComfyUI's users have it: the configs of its version, CLIP's vocabulary from the ComfyUI that it lies in."""
    folder = tiny_pipelines.FAMILIES[kind](tmp_path / "pipe" / "tiny")
    version, width = ("sd1", 32) if kind == "sd" else ("sdxl", 80)
    own = {
        str(f.relative_to(folder)): json.loads(f.read_text()) for f in folder.rglob("*.json") if f.name != "vocab.json"
    }
    comfy = tmp_path / "ComfyUI"
    tiny_pipelines.clip_tokenizer(comfy / "comfy" / "sd1_tokenizer")
    monkeypatch.setitem(recognise._WIDTHS, (width, kind == "sdxl"), version)
    monkeypatch.setattr(known_configs, "configs", lambda version, prediction: own)
    monkeypatch.setattr(vocabulary, "_checked", lambda place: (place / "vocab.json", place / "merges.txt"))
    file = comfy / "models" / "checkpoints" / "mine.safetensors"
    file.parent.mkdir(parents=True)
    extra = {
        "model_ema.decay": torch.zeros(()),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16),
        "betas": torch.zeros(1000),
    }
    weights = {key: value.to(dtype) for key, value in whole(folder).items()}
    save_file(weights | extra, file)
    place = teachers.teacher_folder(file)
    printed = capsys.readouterr().err
    assert "2 tensors of averaged weights" in printed
    assert "predicts eps, by its config" in printed
    found, wanted = networks(place), networks(folder)
    for part, tensors in wanted.items():
        for name, value in tensors.items():
            assert torch.equal(found[part][name], value.to(dtype).float()), name
    prompts = ["a red cat", ""]
    if dtype == torch.float32:
        for name, states in load_backbone(folder).encode(prompts).items():
            assert torch.equal(load_backbone(place).encode(prompts)[name], states)
    assert teachers.teacher_folder(file) == place
    assert capsys.readouterr().err == ""


def test_a_missing_vocabulary_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "PACKAGES", ())
    monkeypatch.setattr(vocabulary, "HUB", "nobody/nothing")
    with pytest.raises(UserError, match="--teacher-config FOLDER") as caught:
        vocabulary.clip_vocabulary(tmp_path / "x.safetensors", tmp_path)
    assert "\n" not in str(caught.value)


def test_the_vocabulary_of_a_package_s_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 bytes, the same at a word's end, 48,894 merges of many more lines, two special tokens."""
    lines = ["#version", *(f"m{number} x</w>" for number in range(60000))]
    package = tmp_path / "site" / "fake_clip_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('this is never run')", encoding="utf-8")
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(vocabulary, "PACKAGES", ("fake_clip_package",))
    tokens, merges = vocabulary.vocabulary_of(package / "bpe_simple_vocab_16e6.txt.gz")
    assert len(tokens) == 49408
    assert len(merges) == 48894
    assert [tokens[x] for x in ("!", "a", "!</w>", "m0x</w>", "<|startoftext|>", "<|endoftext|>")] == [
        0, 64, 256, 512, 49406, 49407,
    ]  # fmt: skip
    with pytest.raises(UserError, match="is not CLIP's vocabulary"):  # that of real merges has its cat elsewhere
        vocabulary.clip_vocabulary(tmp_path / "x.safetensors", tmp_path / "made")
    assert "fake_clip_package" not in sys.modules


def scaled(weights: Tensors, change: Callable[[str, Tensor], tuple[Tensors, Tensor]]) -> tuple[Tensors, Tensors]:
    """Matrices of the denoiser quantised by `change`, and their exact values."""
    stored, meant = {}, {}
    for key, value in weights.items():
        stored[key] = meant[key] = value
        if key.startswith(UNET) and value.dim() == 2 and key.endswith(".weight"):
            more, meant[key] = change(key, value)
            del stored[key]
            stored |= more
    return stored, meant


def layout(name: str) -> Callable[[str, Tensor], tuple[Tensors, Tensor]]:
    def change(key: str, value: Tensor) -> tuple[Tensors, Tensor]:
        layer = key.removesuffix(".weight")
        rows = name.startswith("rows")
        scale = value.abs().amax(1, keepdim=True) / 448 if rows else value.abs().max() / 448
        stored = (value / scale).to(torch.float8_e5m2 if "e5m2" in name else torch.float8_e4m3fn)
        meant = stored.float() * scale
        word = "weight_scale" if name != "scale_weight" else name
        kept = {key: stored, f"{layer}.{word}": scale[:, 0].clone() if name == "rows, flat" else scale}
        if name == "one number in a list":
            kept[f"{layer}.{word}"] = scale.reshape(1)
        if name == "with inputs":
            kept |= {f"{layer}.input_scale": torch.tensor(3.0)}
        if name == "scale_weight":
            kept |= {f"{layer}.scale_input": torch.tensor(3.0)}
        if "comfy_quant" in name:
            mark = json.dumps({"format": "float8_e5m2" if "e5m2" in name else "float8_e4m3fn"}).encode()
            kept |= {f"{layer}.comfy_quant": torch.tensor(list(mark), dtype=torch.uint8)}
        if name.startswith("bytes"):
            kept[key] = stored.view(torch.uint8)
        return kept, meant

    return change


LAYOUTS = [
    "scale_weight", "weight_scale", "one number in a list", "rows", "rows, flat", "with inputs", "comfy_quant",
    "comfy_quant e5m2", "bytes, comfy_quant",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["sd", "sd3", "sd3 alone"])
def test_scaled_fp8_weights_are_multiplied_by_their_scales(name: str, kind: str, tmp_path: Path) -> None:
    """Exactly: fp8 times an fp32 scale, in fp32."""
    folder = tiny_pipelines.FAMILIES[kind.split()[0]](tmp_path / "pipe" / "tiny")
    state = dict(load_backbone(folder).network.state_dict())
    if kind == "sd":
        original = whole(folder)
    else:
        layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks"))
        original = in_a_whole(sd3_original(state, layers))
    stored, meant = scaled(original, layout(name))
    mark = {f"{UNET}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    if kind == "sd3 alone":
        stored, mark = ({k.removeprefix(UNET): v for k, v in each.items()} for each in (stored, mark))
    file = tmp_path / "scaled.safetensors"
    save_file(stored | mark, file)
    found = load_backbone(teachers.teacher_folder(file, folder)).network.state_dict()
    save_file({key: value.contiguous() for key, value in meant.items()}, tmp_path / "plain.safetensors")
    wanted = load_backbone(teachers.teacher_folder(tmp_path / "plain.safetensors", folder)).network.state_dict()
    assert any(not torch.equal(wanted[key], state[key]) for key in state)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


def test_the_formats_in_the_metadata_are_read(tmp_path: Path) -> None:
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    stored, meant = scaled(whole(folder), layout("bytes"))
    layers = {
        key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key, x in stored.items() if x.dtype == torch.uint8
    }
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(stored, tmp_path / "x.safetensors", metadata)
    save_file(meant, tmp_path / "plain.safetensors")
    assert_same(*(teachers.teacher_folder(tmp_path / f"{name}.safetensors", folder) for name in ("x", "plain")))


@pytest.mark.parametrize(
    ("end", "tensor", "words"),
    [
        ("comfy_quant", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8), "nvfp4"),
        ("comfy_quant", torch.tensor([1, 2], dtype=torch.uint8), "does not name a format"),
        ("weight_scale", torch.ones(2, 3), "weight_scale"),
        ("weight_scale_2", torch.ones(()), "weight_scale_2"),
        ("pre_quant_scale", torch.ones(32), "pre_quant_scale"),
        ("weight", torch.ones(16, 16, dtype=torch.int8), "whole numbers"),
        ("absmax", torch.ones(2), "absmax"),
    ],
)
def test_other_quantised_forms_are_refused_by_the_tensor(end: str, tensor: Tensor, words: str, tmp_path: Path) -> None:
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    weights = whole(folder)
    key = next(key for key in weights if key.endswith("attn1.to_q.weight"))
    save_file(weights | {f"{key.removesuffix('weight')}{end}": tensor}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words) as caught:
        teachers.teacher_folder(tmp_path / "x.safetensors", folder)
    assert "\n" not in str(caught.value)


OLD = "cond_stage_model.transformer.text_model."
CHANGES: dict[str, Callable[[Tensors], Tensors]] = {
    "no autoencoder": lambda w: {k: v for k, v in w.items() if not k.startswith("first_stage_model.")},
    "no text encoder": lambda w: {k: v for k, v in w.items() if not k.startswith(("cond_stage", "conditioner"))},
    "the denoiser alone": lambda w: {k: v for k, v in w.items() if k.startswith(UNET)},
    "ComfyUI's denoiser": lambda w: {k.removeprefix("model."): v for k, v in w.items() if k.startswith(UNET)},
    "the denoiser, bare": lambda w: {k.removeprefix(UNET): v for k, v in w.items() if k.startswith(UNET)},
    "CLIP's oldest keys": lambda w: {k.replace(".transformer.text_model.", ".transformer."): v for k, v in w.items()},
    "1 x 1 convolutions as matrices": lambda w: {
        k: v.flatten(1).clone() if v.shape[2:] == (1, 1) and "attn_1" in k else v for k, v in w.items()
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CHANGES))
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_a_file_lacks_comes_from_the_config_folder(name: str, kind: str, tmp_path: Path) -> None:
    folder = tiny_pipelines.FAMILIES[kind](tmp_path / "pipe" / "tiny")
    weights = CHANGES[name](whole(folder))
    save_file(weights, tmp_path / "x.safetensors")
    assert_same(teachers.teacher_folder(tmp_path / "x.safetensors", folder), folder)
    configs_alone = bare(folder, tmp_path / "bare")
    if len(weights) < len(whole(folder)):
        lacking = "text_encoder" if name == "no text encoder" else "vae"
        with pytest.raises(UserError, match=f"holds no {lacking}"):
            teachers.teacher_folder(tmp_path / "x.safetensors", configs_alone)
    else:
        assert_same(teachers.teacher_folder(tmp_path / "x.safetensors", configs_alone), folder)


def test_the_last_text_block_of_2_is_left_out(tmp_path: Path) -> None:
    """Files of 2.x hold one block more than its config has; the penultimate states are used."""
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}), encoding="utf-8")
    weights = whole(folder, act="gelu")
    extra = {k.replace("resblocks.1.", "resblocks.2."): v.clone() for k, v in weights.items() if ".resblocks.1." in k}
    assert extra
    extra |= {
        "cond_stage_model.model.text_projection": torch.zeros(32, 32),
        "cond_stage_model.model.logit_scale": torch.zeros(()),
    }
    save_file(weights | extra, tmp_path / "x.safetensors")
    assert_same(teachers.teacher_folder(tmp_path / "x.safetensors", bare(folder, tmp_path / "bare")), folder)


@pytest.mark.parametrize("key", [f"{UNET}time_embed.cond_proj.weight", "adapter.weight", "first_stage_model.more.bias"])
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_tensor_that_nothing_reads_is_refused_by_name(key: str, kind: str, tmp_path: Path) -> None:
    folder = tiny_pipelines.FAMILIES[kind](tmp_path / "pipe" / "tiny")
    state = dict(load_backbone(folder).network.state_dict())
    weights = whole(folder) if kind == "sd" else in_a_whole(sd3_original(state, 4))
    save_file(weights | {key: torch.zeros(3)}, tmp_path / "x.safetensors")
    if kind == "sd3" and key.startswith("first_stage_model."):  # of the folder, which is printed
        assert teachers.teacher_folder(tmp_path / "x.safetensors", folder).is_dir()
        return
    with pytest.raises(UserError) as caught:
        teachers.teacher_folder(tmp_path / "x.safetensors", folder)
    assert key in str(caught.value)
    assert not list((tmp_path / "cache" / "teachers").glob("x-*"))


def test_a_file_that_is_not_whole_or_of_another_size_names_the_tensor(tmp_path: Path) -> None:
    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    weights = whole(folder)
    key = f"{UNET}out.2.bias"
    save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "less.safetensors")
    save_file(weights | {key: torch.zeros(5)}, tmp_path / "other.safetensors")
    for name in ("less", "other"):
        with pytest.raises(UserError, match=r"out\.2\.bias"):
            teachers.teacher_folder(tmp_path / f"{name}.safetensors", folder)


@pytest.mark.parametrize("same", [True, False])
def test_a_noise_schedule_in_the_file_must_be_the_config_s(same: bool, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    ends = {"beta_start": 0.00085, "beta_end": 0.012} if same else {"beta_start": 0.0001, "beta_end": 0.02}
    table = DDIMScheduler(beta_schedule="scaled_linear", **ends).alphas_cumprod.half()
    save_file(whole(folder) | {"alphas_cumprod": table}, tmp_path / "x.safetensors")
    if same:
        assert_same(teachers.teacher_folder(tmp_path / "x.safetensors", folder), folder)
        return
    with pytest.raises(UserError, match="alphas_cumprod"):
        teachers.teacher_folder(tmp_path / "x.safetensors", folder)


def test_a_network_without_original_names_is_refused_by_its_layer() -> None:
    with pytest.raises(UserError, match=r"time_embedding\.cond_proj"):
        unet_keys(["conv_in.weight", "time_embedding.cond_proj.weight"])
    held = unet_keys(["conv_in.weight"])
    assert list(to_original({"conv_in.weight": torch.zeros(1)}, held)) == [f"{UNET}input_blocks.0.0.weight"]


def test_the_folder_of_a_file_passes_every_check_of_a_folder(tmp_path: Path) -> None:
    """Known configs hold no key that a pipeline folder is refused for; weights are left out here."""
    from fewstep.backbones.pipeline_folder import _check_configs

    for version, prediction in (("sd1", "eps"), ("sd2", "v"), ("sd2", "eps"), ("sdxl", "eps"), ("sdxl", "v")):
        place = tmp_path / f"{version}{prediction}"
        folder, _ = known(version, prediction, place)
        for tokenizer in folder.family.tokenizers:
            (place / tokenizer / "vocab.json").write_text("{}", encoding="utf-8")
            (place / tokenizer / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        _check_configs(folder, configs(version, prediction)["model_index.json"])  # type: ignore[arg-type]
        side = {"sd1": 512, "sd2": 768 if prediction == "v" else 512, "sdxl": 1024}[version]
        assert folder.picture_size == side


@pytest.mark.parametrize(
    "scheduler", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"]
)
def test_a_mark_of_pure_noise_is_acted_on_whatever_the_scheduler(scheduler: str, tmp_path: Path) -> None:
    """Not all of diffusers' schedulers can rescale their betas: alpha is 0 at the last time all the same."""
    import diffusers

    folder = tiny_pipelines.sd(tmp_path / "pipe" / "tiny")
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, scheduler)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_config(
        folder / "scheduler"
    )
    index = folder / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", scheduler]}), encoding="utf-8"
    )
    save_file(whole(folder) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "x.sft")
    found = load_backbone(teachers.teacher_folder(tmp_path / "x.sft", folder))
    assert found.prediction == "v"
    assert float(found.path.alpha(torch.tensor([999.0], dtype=torch.float64))) < 1e-6
    assert float(load_backbone(folder).path.alpha(torch.tensor([999.0], dtype=torch.float64))) > 0.05


@pytest.mark.parametrize("held", [("",), ("fp16",), ("", "fp16")])
def test_of_a_hub_the_plain_weights_are_taken_or_else_the_variant(
    held: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository may hold fp16 files alone; its index names a safety checker that is not fetched."""
    import fnmatch

    import huggingface_hub
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipelines.sd(tmp_path / "pipe" / "tiny"))
    for variant in held:
        pipe.save_pretrained(tmp_path / "remote", variant=variant or None)
    index = tmp_path / "remote" / "model_index.json"
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index.write_text(json.dumps(json.loads(index.read_text()) | checker), encoding="utf-8")

    def snapshot(name: str, *, allow_patterns: list[str], **settings: Any) -> str:
        for file in (tmp_path / "remote").rglob("*"):
            own = str(file.relative_to(tmp_path / "remote"))
            if file.is_file() and any(fnmatch.fnmatch(own, pattern) for pattern in allow_patterns):
                (tmp_path / "local" / own).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "local" / own)
        return str(tmp_path / "local")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    place = teachers.teacher_folder("someone/model")
    fetched = sorted(file.name for file in place.rglob("*.safetensors"))
    assert all((".fp16." in name) == (held == ("fp16",)) for name in fetched)
    assert len(fetched) == 3
    assert torch.equal(load_backbone(place).network.state_dict()["conv_in.weight"], pipe.unet.conv_in.weight)
