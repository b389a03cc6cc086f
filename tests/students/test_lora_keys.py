"""LoRAs as others publish them: every spelling merges to the same network, what is not read is refused in one line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.backbones.base import load_backbone
from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder
from fewstep.backbones.single_file.sd_names import original_names
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import read_numbers, read_safetensors_header
from fewstep.students.lora import merge_lora
from fewstep.students.lora_checks import check_lora
from fewstep.students.lora_header import base_shapes
from support import tiny_pipelines

RANK = 4
ALPHA = 2.0  # not the rank: the scale is one half
Matrices = dict[str, tuple[Tensor, Tensor]]
Spelling = Callable[[str, str], str]
WAY = {"A": "down", "B": "up"}

# the blocks of the tiny UNet (two levels, one layer each, attention everywhere) in Stable Diffusion's original code
ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    ".conv1": ".in_layers.2",
    ".conv2": ".out_layers.3",
    ".time_emb_proj": ".emb_layers.1",
    ".conv_shortcut": ".skip_connection",
}


def original(module: str) -> str:
    for ours, theirs in ORIGINAL.items():
        module = module.replace(ours, theirs)
    return module


def processor(module: str, part: str) -> str:
    attention, _, layer = module.removesuffix(".0").rpartition(".")
    return f"unet.{attention}.processor.{layer}_lora.{WAY[part]}.weight"


def is_attention(module: str) -> bool:
    return ".attn" in module


SPELLINGS: dict[str, Spelling] = {
    "diffusers": lambda m, p: f"unet.{m}.lora_{p}.weight",
    "diffusers before PEFT": lambda m, p: f"unet.{m}.lora.{WAY[p]}.weight",
    "linear layers": lambda m, p: f"unet.{m}.lora_linear_layer.{WAY[p]}.weight",
    "attention processors": processor,
    "attention processors, bare": lambda m, p: processor(m, p).removeprefix("unet."),
    "PEFT": lambda m, p: f"base_model.model.{m}.lora_{p}.weight",
    "PEFT in diffusers": lambda m, p: f"unet.base_model.model.{m}.lora_{p}.weight",
    "bare": lambda m, p: f"{m}.lora_{p}.weight",
    "kohya": lambda m, p: f"lora_unet_{m.replace('.', '_')}.lora_{WAY[p]}.weight",
    "kohya, original blocks": lambda m, p: f"lora_unet_{original(m).replace('.', '_')}.lora_{WAY[p]}.weight",
    "ComfyUI": lambda m, p: f"diffusion_model.{original(m)}.lora_{WAY[p]}.weight",
    "ComfyUI, whole checkpoint's names": lambda m, p: f"model.diffusion_model.{original(m)}.lora_{p}.weight",
    "ai-toolkit": lambda m, p: f"diffusion_model.{m}.lora_{p}.weight",
    "LyCORIS": lambda m, p: f"lycoris_{m.replace('.', '_')}.lora_{WAY[p]}.weight",
    "LyCORIS, original blocks": lambda m, p: f"lycoris_{original(m).replace('.', '_')}.lora_{WAY[p]}.weight",
    "PEFT, named adapter": lambda m, p: f"unet.{m}.lora_{p}.default.weight",
    "PEFT, parameters": lambda m, p: f"base_model.model.{m}.lora_{p}",
}


@pytest.fixture(scope="module")
def folder(tiny_pipeline: Path) -> PipelineFolder:
    return read_folder(tiny_pipeline)


@pytest.fixture(scope="module")
def matrices(folder: PipelineFolder) -> Matrices:
    """A LoRA of every layer of the UNet that can have one."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name, shape in base_shapes(folder).items():
        if len(shape) > 1:
            a = torch.randn(RANK, *shape[1:], generator=generator) / math.prod(shape[1:]) ** 0.5
            b = torch.randn(shape[0], RANK, *[1] * len(shape[2:]), generator=generator) / 4
            made[name.removesuffix(".weight")] = (a, b)
    return made


def write(
    file: Path, spelling: Spelling, matrices: Matrices, extra: dict[str, Tensor] | None = None, **metadata: Any
) -> Path:
    tensors = {spelling(module, part): m for module, pair in matrices.items() for part, m in zip("AB", pair)}
    whole = {key: value.contiguous() for key, value in (tensors | (extra or {})).items()}
    save_file(whole, file, {key: json.dumps(value) for key, value in metadata.items()})
    return file


def alphas(spelling: Spelling, modules: Iterable[str], value: Tensor) -> dict[str, Tensor]:
    return {spelling(module, "A").rpartition(".lora_")[0] + ".alpha": value.clone() for module in modules}


def merged(file: Path, folder: PipelineFolder) -> nn.Module:
    network = load_backbone(folder.path).network
    merge_lora(network, check_lora(file, folder))
    return network


def weights_after(file: Path, folder: PipelineFolder) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in merged(file, folder).named_parameters()}


def by_hand(folder: PipelineFolder, matrices: Matrices, scale: float) -> dict[str, Tensor]:
    weights = {name: p.detach().clone() for name, p in load_backbone(folder.path).network.named_parameters()}
    for module, (a, b) in matrices.items():
        weights[f"{module}.weight"] += scale * torch.einsum("or,ri...->oi...", b.flatten(1), a)
    return weights


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def outputs(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 32, generator=generator)
    with torch.no_grad():
        out: Tensor = network(x, torch.tensor([19.0, 759.0]), text, return_dict=False)[0]
    return out


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_merges_to_the_same_weights(
    name: str, folder: PipelineFolder, matrices: Matrices, tmp_path: Path
) -> None:
    """Without a word about alpha the scale is 1."""
    some = {m: pair for m, pair in matrices.items() if is_attention(m)} if "processors" in name else matrices
    assert len(some) > 30
    file = write(tmp_path / "lora.safetensors", SPELLINGS[name], some)
    assert_same(weights_after(file, folder), by_hand(folder, some, 1.0))


@pytest.mark.parametrize("name", [name for name in SPELLINGS if "lora_" in SPELLINGS[name]("m", "A")[-14:]])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8]
)
def test_alpha_is_a_number_in_the_file(
    name: str, dtype: torch.dtype, folder: PipelineFolder, matrices: Matrices, tmp_path: Path
) -> None:
    """alpha / rank for each layer on its own; 1 for a layer without; the file's own word before the metadata's."""
    few = dict(list(matrices.items())[::20])
    spelling = SPELLINGS[name]
    extra = alphas(spelling, few, torch.tensor(ALPHA).to(dtype))
    first, second = list(extra)[:2]
    extra[first] = torch.tensor([12]).to(dtype)
    del extra[second]
    header = check_lora(write(tmp_path / "lora.safetensors", spelling, few, extra), folder)
    scales = [header.layers[module].scale for module in few]
    assert scales == [3.0, 1.0, *[0.5] * (len(few) - 2)]
    contrary = {"lora_adapter_metadata": {"unet.lora_alpha": 20}}
    header = check_lora(write(tmp_path / "lora.safetensors", spelling, few, extra, **contrary), folder)
    assert [header.layers[module].scale for module in few] == [3.0, 5.0, *[0.5] * (len(few) - 2)]


@pytest.mark.parametrize("name", ["diffusers", "diffusers before PEFT", "attention processors", "kohya"])
def test_diffusers_draws_the_same(name: str, folder: PipelineFolder, matrices: Matrices, tmp_path: Path) -> None:
    """Every spelling that `load_lora_weights` reads into this UNet.

    Alphas that differ are in layers outside attention: diffusers 0.42 gives attention layers the commonest one.
    """
    from diffusers import StableDiffusionPipeline

    some = {m: pair for m, pair in matrices.items() if is_attention(m)} if "processors" in name else matrices
    spelling = SPELLINGS[name]
    extra = alphas(spelling, some, torch.tensor(ALPHA)) if name == "kohya" else {}
    for key in [key for key in extra if "attn" not in key][::5]:
        extra[key] = torch.tensor(7.0)
    file = write(tmp_path / "lora.safetensors", spelling, some, extra)
    ours = outputs(merged(file, folder))
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder.path, safety_checker=None)
    plain = outputs(pipeline.unet)
    pipeline.load_lora_weights(str(file))
    theirs = outputs(pipeline.unet)
    assert float((plain - theirs).abs().max()) > 1e-2
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_diffusers_own_kohya_writer(folder: PipelineFolder, matrices: Matrices, tmp_path: Path) -> None:
    """Its alpha is an int64."""
    from diffusers.utils import convert_state_dict_to_kohya

    native = {SPELLINGS["diffusers"](m, part): x for m, pair in matrices.items() for part, x in zip("AB", pair)}
    file = tmp_path / "lora.safetensors"
    save_file(convert_state_dict_to_kohya(native), file)
    assert_same(weights_after(file, folder), by_hand(folder, matrices, 1.0))


def test_diffusers_own_renaming_of_blocks(folder: PipelineFolder, matrices: Matrices, tmp_path: Path) -> None:
    """Kohya's files for SDXL number the blocks as the original code does."""
    from diffusers import StableDiffusionPipeline

    spelling = SPELLINGS["kohya, original blocks"]
    file = write(tmp_path / "lora.safetensors", spelling, matrices, alphas(spelling, matrices, torch.tensor(ALPHA)))
    ours = outputs(merged(file, folder))
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder.path, safety_checker=None)
    state, network_alphas = pipeline.lora_state_dict(str(file), unet_config=pipeline.unet.config)
    pipeline.load_lora_into_unet(state, network_alphas, pipeline.unet)
    torch.testing.assert_close(ours, outputs(pipeline.unet), atol=1e-5, rtol=1e-5)


def test_peft_own_folder(folder: PipelineFolder, matrices: Matrices, tmp_path: Path) -> None:
    """adapter_model.safetensors; its alpha is in adapter_config.json."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=7, target_modules=["to_q", "conv1"], alpha_pattern={"conv1": 3}, init_lora_weights=False
    )
    torch.manual_seed(2)
    model: Any = get_peft_model(load_backbone(folder.path).network, config)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert {layer.scale for layer in check_lora(path, folder).layers.values()} == {7 / RANK, 3 / RANK}
        torch.testing.assert_close(outputs(merged(path, folder)), expected, atol=1e-5, rtol=1e-5)
    (tmp_path / "adapter_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"adapter_config\.json holds a list; it must hold a mapping"):
        check_lora(tmp_path, folder)


def test_linear_layers_and_1x1_convolutions_are_the_same(
    folder: PipelineFolder, matrices: Matrices, tmp_path: Path
) -> None:
    some = {m: pair for m, pair in matrices.items() if m.endswith(("proj_in", "attn1.to_q"))}
    assert {len(a.shape) for a, _ in some.values()} == {2, 4}
    other = {
        m: (a.flatten(1), b.flatten(1)) if a.dim() == 4 else (a[..., None, None], b[..., None, None])
        for m, (a, b) in some.items()
    }
    file = write(tmp_path / "lora.safetensors", SPELLINGS["kohya"], other)
    assert_same(weights_after(file, folder), by_hand(folder, some, 1.0))


def test_block_numbers_of_real_unets() -> None:
    """Facts of the published UNets: SD 1.5's last up block without attention, SDXL's three levels."""

    def modules(down: list[tuple[int, bool]], up: list[tuple[int, bool]]) -> list[str]:
        names = ["conv_in", "conv_out", "mid_block.resnets.0.conv1", "add_embedding.linear_1"]
        for side, blocks, layers, sampler in (("down", down, 2, "down"), ("up", up, 3, "up")):
            for i, (_, attends) in enumerate(blocks):
                names += [f"{side}_blocks.{i}.resnets.{j}.conv1" for j in range(layers)]
                names += [f"{side}_blocks.{i}.attentions.{j}.proj_in" for j in range(layers) if attends]
                names += [f"{side}_blocks.{i}.{sampler}samplers.0.conv"] if i < len(blocks) - 1 else []
        return names

    sd = original_names(modules([(2, True)] * 3 + [(2, False)], [(3, False)] + [(3, True)] * 3))
    assert sd["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert sd["down_blocks.2.attentions.1.proj_in"] == "input_blocks.8.1.proj_in"
    assert sd["down_blocks.3.resnets.1.conv1"] == "input_blocks.11.0.in_layers.2"
    assert sd["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"  # no attention before it
    assert sd["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert sd["up_blocks.3.attentions.2.proj_in"] == "output_blocks.11.1.proj_in"
    xl = original_names(modules([(2, False), (2, True), (2, True)], [(3, True), (3, True), (3, False)]))
    assert xl["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert xl["down_blocks.2.attentions.1.proj_in"] == "input_blocks.8.1.proj_in"
    assert xl["up_blocks.0.attentions.0.proj_in"] == "output_blocks.0.1.proj_in"
    assert xl["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert xl["up_blocks.2.resnets.2.conv1"] == "output_blocks.8.0.in_layers.2"
    assert xl["add_embedding.linear_1"] == "label_emb.0.0"
    assert len(set(xl.values())) == len(xl)


def transformer_names(family: str, blocks: int, single: int = 0) -> dict[str, list[str]]:
    """Layers of the original code of a transformer -> diffusers' layers, in the order of rows; by hand."""
    names: dict[str, list[str]] = {"final_layer.linear": ["proj_out"]}
    for i in range(blocks):
        here = f"transformer_blocks.{i}."
        if family == "pixart":
            theirs = {
                "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v", "attn.proj": "attn1.to_out.0",
                "cross_attn.q_linear": "attn2.to_q", "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
                "cross_attn.proj": "attn2.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
            }  # fmt: skip
            names |= {f"blocks.{i}.{k}": [here + x for x in v.split()] for k, v in theirs.items()}
            continue
        image, text = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
        if family == "sd3":
            block, image_at, text_at = f"joint_blocks.{i}.", "x_block.attn.", "context_block.attn."
            theirs = {"x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2"}
        else:
            block, image_at, text_at = f"double_blocks.{i}.", "img_attn.", "txt_attn."
            theirs = {"img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "img_mod.lin": "norm1.linear"}
            theirs |= {"txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2"}
        theirs |= {f"{image_at}qkv": image, f"{text_at}qkv": text, f"{image_at}proj": "attn.to_out.0"}
        names |= {block + k: [here + x for x in v.split()] for k, v in theirs.items()}
    for i in range(single):
        here = f"single_transformer_blocks.{i}."
        linear1 = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
        names |= {f"single_blocks.{i}.linear1": [here + x for x in linear1]}
        names |= {f"single_blocks.{i}.linear2": [here + "proj_out"]}
    return names


@pytest.mark.parametrize(("family", "blocks", "single"), [("flux", 2, 2), ("sd3", 4, 0), ("pixart", 4, 0)])
@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "diffusion_model.", "transformer."])
def test_layers_that_the_original_code_holds_in_one(
    family: str, blocks: int, single: int, prefix: str, tmp_path: Path
) -> None:
    """Queries, keys and values of one LoRA: each layer gets its own rows of B, all get A."""
    folder = read_folder(tiny_pipelines.FAMILIES[family](tmp_path / "pipe" / "tiny"))
    before = {k: v.clone() for k, v in load_backbone(folder.path).network.state_dict().items()}
    names = transformer_names(family, blocks, single)
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    expected = dict(before)
    for alias, modules in names.items():
        wide = sum(len(before[f"{m}.weight"]) for m in modules)
        a = torch.randn(RANK, before[f"{modules[0]}.weight"].shape[1], generator=generator)
        b = torch.randn(wide, RANK, generator=generator)
        key = prefix + (alias if prefix.endswith(".") else alias.replace(".", "_"))
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(ALPHA)}
        delta = torch.split(b @ a * ALPHA / RANK, [len(before[f"{m}.weight"]) for m in modules])
        for module, part in zip(modules, delta, strict=True):
            expected[f"{module}.weight"] = before[f"{module}.weight"] + part
    save_file(tensors, tmp_path / "lora.safetensors")
    network = load_backbone(folder.path).network
    merge_lora(network, check_lora(tmp_path / "lora.safetensors", folder))
    assert_same(dict(network.state_dict()), expected)


def test_swapped_halves(tmp_path: Path) -> None:
    """The last modulation of Stable Diffusion 3 is (shift, scale) there and (scale, shift) in diffusers."""
    folder = read_folder(tiny_pipelines.sd3(tmp_path / "pipe" / "tiny"))
    network = load_backbone(folder.path).network
    before = network.state_dict()["norm_out.linear.weight"].clone()
    a, b = torch.randn(RANK, before.shape[1]), torch.randn(len(before), RANK)
    file = tmp_path / "lora.safetensors"
    key = "diffusion_model.final_layer.adaLN_modulation.1"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, file)
    merge_lora(network, check_lora(file, folder))
    shift, scale = (b @ a).chunk(2)
    torch.testing.assert_close(network.state_dict()["norm_out.linear.weight"], before + torch.cat([scale, shift]))


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = f"lora_unet_{LAYER.replace('.', '_')}"
REFUSED = [
    (f"{FLAT}.lokr_w1", "is a LoKr: it holds 'lora_unet_mid_block_"),
    (f"{FLAT}.hada_w1_a", "is a LoHa: it holds 'lora_unet_mid_block_"),
    (f"{FLAT}.dora_scale", "is a DoRA: it holds 'lora_unet_mid_block_"),
    (f"unet.{LAYER}.lora_magnitude_vector", "is a DoRA: it holds 'unet.mid_block"),
    (f"{FLAT}.lora_mid.weight", "is a Tucker-decomposed LoRA: it holds"),
    (f"base_model.model.{LAYER}.oft_r.weight", "is an OFT: it holds"),
    (f"{FLAT}.diff", "is not a LoRA of a denoiser in a known spelling: it holds 'lora_unet_mid_block_"),
    (f"unet.{LAYER}.lora_B.bias", "is not a LoRA of a denoiser in a known spelling: it holds 'unet.mid_block"),
    ("bundle_emb.x.string_to_param.*", "is not a LoRA of a denoiser in a known spelling: it holds 'bundle_emb.x"),
    ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "adapts a text encoder too: it holds 'lora_te_"),
    ("lora_te2_text_projection.alpha", "adapts a text encoder too: it holds 'lora_te2_"),
    ("text_encoder.text_model.x.lora_linear_layer.up.weight", "adapts a text encoder too: it holds 'text_encoder."),
    ("base_model.model.text_model.encoder.x.lora_A.weight", "adapts a text encoder too: it holds 'base_model."),
    (
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
        "img_attn_qkv.lora_up.weight' names no layer",
    ),
    ("lora_unet_input_blocks_9_1_proj_in.alpha", "'lora_unet_input_blocks_9_1_proj_in.alpha' names no layer"),
    ("transformer.blocks.0.to_q.lora_A.weight", "'transformer.blocks.0.to_q.lora_A.weight' names no layer"),
    (f"{LAYER}.lora_A.weight", f"holds the A of {LAYER} twice: '{FLAT}.lora_down.weight' and '{LAYER}.lora_A.weight'"),
]


@pytest.mark.parametrize(("key", "words"), REFUSED, ids=[key for key, _ in REFUSED])
def test_what_is_not_read_is_refused_by_its_key(
    key: str, words: str, folder: PipelineFolder, matrices: Matrices, tmp_path: Path
) -> None:
    """However good the rest of the file is: nothing is dropped in silence."""
    good = {LAYER: matrices[LAYER]}
    file = write(tmp_path / "lora.safetensors", SPELLINGS["kohya"], good)
    assert set(check_lora(file, folder).layers) == {LAYER}
    write(file, SPELLINGS["kohya"], good, {key: torch.zeros(2, 2)})
    with pytest.raises(UserError) as caught:
        check_lora(file, folder)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (torch.zeros(2), r"alpha' is not one number: its shape is \(2,\)"),
        (torch.tensor(float("nan")), "alpha' is not one number: it is nan"),
        (torch.tensor(True), "alpha' cannot be read"),
    ],
)
def test_alphas_that_are_no_numbers(
    alpha: Tensor, words: str, folder: PipelineFolder, matrices: Matrices, tmp_path: Path
) -> None:
    file = write(tmp_path / "lora.safetensors", SPELLINGS["kohya"], {LAYER: matrices[LAYER]}, {f"{FLAT}.alpha": alpha})
    with pytest.raises(UserError, match=words):
        check_lora(file, folder)


def test_half_a_layer_is_refused(folder: PipelineFolder, matrices: Matrices, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    a, b = matrices[LAYER]
    whole = {f"{FLAT}.lora_down.weight": a, f"{FLAT}.lora_up.weight": b}
    save_file(whole | {"lora_unet_conv_in.alpha": torch.tensor(1.0)}, file)
    with pytest.raises(UserError, match="it holds 1 A and 1 B matrices, of conv_in not both"):
        check_lora(file, folder)


def test_a_truncated_file_is_refused(folder: PipelineFolder, matrices: Matrices, tmp_path: Path) -> None:
    spelling = SPELLINGS["kohya"]
    file = write(tmp_path / "lora.safetensors", spelling, matrices, alphas(spelling, matrices, torch.tensor(ALPHA)))
    whole = file.read_bytes()
    for length in (0, 7, 300, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is not a whole safetensors file"):
            check_lora(file, folder)


def test_numbers_are_read_without_the_library(tmp_path: Path) -> None:
    file = tmp_path / "numbers.safetensors"
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    types += [torch.int8, torch.uint8]
    values = {str(dtype): torch.tensor(13.0).to(dtype) for dtype in types}
    values |= {f"-{dtype}": torch.tensor([[-3.0]]).to(dtype) for dtype in types[:-1]}
    save_file(values | {"bulk": torch.randn(7)}, file)
    entries = read_safetensors_header(file)[1]
    assert entries.pop("bulk").shape == (7,)
    assert read_numbers(file, entries) == {name: float(value.item()) for name, value in values.items()}


def test_a_foreign_lora_is_checked_at_once(folder: PipelineFolder, matrices: Matrices, tmp_path: Path) -> None:
    """In milliseconds, and without torch."""
    spelling = SPELLINGS["kohya, original blocks"]
    file = write(tmp_path / "lora.safetensors", spelling, matrices, alphas(spelling, matrices, torch.tensor(ALPHA)))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        check_lora(file, folder)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
    code = (
        "import sys\nfrom fewstep.backbones.pipeline_folder import read_folder\n"
        "from fewstep.students.lora_checks import check_lora\n"
        "print(len(check_lora(sys.argv[1], read_folder(sys.argv[2])).layers), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(folder.path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [str(len(matrices)), "False"], done.stderr
