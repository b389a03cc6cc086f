"""Every supported family, tiny and random but of the real classes: the pictures are those of plain diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline

from fewstep import synthesize
from fewstep.backbones.base import load_backbone
from fewstep.backbones.families import FAMILIES
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import resolve
from fewstep.inference.generator import load_image_generator
from support import tiny_pipelines
from support.drawn import by_pipeline

PROMPTS = ["a red disc", "blue"]
SEEDS = [1, 2]
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("sd", {}),
    "sd, v": ("sd", {"prediction": "v_prediction"}),
    "sd, v, zero terminal SNR": ("sd", {"prediction": "v_prediction", "zero_snr": True}),
    "sdxl": ("sdxl", {}),
    "sdxl, empty prompt": ("sdxl", {"zeros": False}),
    "pixart-alpha": ("pixart", {"kind": "PixArtAlphaPipeline"}),
    "pixart-sigma": ("pixart", {}),
    "sd3": ("sd3", {}),
    "flux-dev": ("flux", {}),
    "flux-schnell": ("flux", {"guidance": False}),
    "sana": ("sana", {}),
    **{name: (name, {}) for name in ("z_image", "qwen_image", "flux2", "chroma", "krea2", "anima")},
}
NEW = [pytest.param(name, marks=pytest.mark.slow) for name in [*MADE][-6:]]
"""The newest families: of them `make test` trains and exports one student each, in `test_export`."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    def make(name: str) -> Path:
        kind, settings = MADE[name]
        return tiny_pipelines.FAMILIES[kind](tmp_path_factory.mktemp(kind) / "tiny", **settings)

    return tiny_pipelines.Lazily(make)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_drawn_in_half_precision(name: str, folders: dict[str, Path]) -> None:
    """Weights and calls are bf16, states between the calls fp32; nearly the same latents, and not the same."""
    sampling = Sampling(steps=2, gamma=0.0)
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        image_generator = load_image_generator(folders[name], precision=kind)
        assert {weight.dtype for weight in image_generator.backbone.network.parameters()} == {kind}
        condition = image_generator.encode(PROMPTS)
        found[kind] = image_generator.latents(condition, SEEDS, sampling)
        assert found[kind].dtype == torch.float32
    exact, half = found.values()
    difference = float((half - exact).abs().max())
    assert 0 < difference < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("name", [*[*MADE][:-6], *NEW])
def test_latents_are_those_of_the_pipeline(name: str, folders: dict[str, Path]) -> None:
    """Without guidance, as students are drawn, and with it, as teachers are."""
    image_generator = load_image_generator(folders[name])
    condition = image_generator.encode(PROMPTS)
    embedded = image_generator.backbone.embedded_guidance
    assert embedded == (name == "flux-dev")
    for omega in (0.0, 2.0):
        if name == "flux-schnell" and omega:
            continue  # its pipeline guides by another word, true_cfg_scale
        guidance = 3.5 if embedded and omega == 0 else 1 + omega
        sampling = Sampling(steps=3, gamma=0.0, omega=omega)
        ours = image_generator.latents(condition, SEEDS, sampling)
        wanted = by_pipeline(folders[name], PROMPTS, SEEDS, 3, guidance)
        assert float((ours - wanted).abs().max()) < 1e-4 * float(wanted.abs().max()), omega
    plain, other = (
        image_generator.latents(image_generator.encode([prompt] * 2), SEEDS, Sampling(steps=2)) for prompt in PROMPTS
    )
    assert not torch.allclose(plain, other, rtol=1e-3), "the prompt is read"


@pytest.mark.parametrize("name", ["sdxl", "pixart-sigma", "sd3", "flux-dev", "sana", *NEW])
def test_features_stop_early_and_follow_the_input(name: str, folders: dict[str, Path]) -> None:
    backbone = load_backbone(folders[name])
    condition = backbone.encode(PROMPTS)
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    t = torch.full((2,), backbone.path.noisiest / 2, dtype=torch.float64)
    found = backbone.features(backbone.network, x, t, condition)
    assert [part.shape[1] for part in found] == backbone.feature_channels
    assert all(part.dim() == 4 and len(part) == 2 for part in found)
    (gradient,) = torch.autograd.grad(found[-1].square().sum(), x)
    assert float(gradient.abs().max()) > 0
    # tokens are in the order of their points: a change in one corner shows most there
    with torch.no_grad():
        moved = x.detach().clone()
        moved[..., :2, :2] += 3.0
        first = backbone.features(backbone.network, moved, t, condition)[0] - found[0]
    change = first.abs().mean((0, 1))
    assert float(change[0, 0]) > 3 * float(change[-1, -1])


@pytest.mark.parametrize("name", ["sdxl", "pixart-sigma", "sd3", "flux-dev", "sana", *NEW])
def test_pictures_go_through_the_autoencoder(name: str, folders: dict[str, Path]) -> None:
    """Latents are scaled and shifted as the pipeline does it, there and back."""
    backbone = load_backbone(folders[name])
    vae = backbone.vae
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, getattr(vae.config, "scaling_factor", None)
    video = vae.config.get("temperal_downsample") is not None
    if video:
        shift, scale = (torch.tensor(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
        scale = 1 / scale
    elif scale is None:  # FLUX.2's statistics
        shift = vae.bn.running_mean[:, None, None]
        scale = (vae.bn.running_var[:, None, None] + vae.config.batch_norm_eps) ** -0.5
    patched = vae.config.get("patch_size") is not None
    with torch.no_grad():
        z = latents / scale + shift
        z = z[:, :, None] if video else Flux2KleinPipeline._unpatchify_latents(z) if patched else z
        wanted = vae.decode(z, return_dict=False)[0]
        torch.testing.assert_close(backbone.decode(latents), wanted[:, :, 0] if video else wanted)
        pictures = backbone.to_pictures(latents)
        assert pictures.shape == (2, backbone.picture_size, backbone.picture_size, 3)
        own = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = vae.encode(own[:, :, None] if video else own)
        means = found.latent_dist.mean if hasattr(found, "latent_dist") else found.latent
        means = means[:, :, 0] if video else Flux2KleinPipeline._patchify_latents(means) if patched else means
        torch.testing.assert_close(backbone.to_latents(pictures), (means - shift) * scale)


@pytest.mark.parametrize("name", NEW)
def test_gradient_checkpointing_changes_nothing(name: str, folders: dict[str, Path]) -> None:
    backbone = load_backbone(folders[name])
    network: Any = backbone.network
    condition, t = backbone.encode(PROMPTS), torch.full((2,), 0.5, dtype=torch.float64)
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    for recomputed in (False, True):
        if recomputed:
            network.enable_gradient_checkpointing()
        out = backbone.call(network, x, t, condition)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), x)[0]))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["sd, v, zero terminal SNR", "sdxl", "pixart-sigma", "sd3", "flux-dev", "sana", *NEW])
def test_distilled_saved_and_drawn_again(
    name: str, kind: str, folders: dict[str, Path], picture_folder: Path, tmp_path: Path
) -> None:
    """Three steps; what is read back from the files draws what the trained network draws."""
    words = [
        f"teacher={folders[name]}", f"data.source={picture_folder}", "device=cpu", f"student.kind={kind}",
        "student.rank=2", "loop.steps=3", "loop.batch=2", "loop.validate_every=null", "optim.lr=1e-2", "optim.ema=null",
        "optim.warmup=0",
    ]  # fmt: skip
    config = resolve("tcd", None, words)
    place = distillation.distill(config, tmp_path / "run", quiet=True)
    start = load_image_generator(folders[name])
    condition = start.encode(PROMPTS)
    student = load_image_generator(folders[name], place) if kind == "lora" else load_image_generator(place)
    sampling = Sampling(steps=2, gamma=0.0)
    before, after = (image_generator.latents(condition, SEEDS, sampling) for image_generator in (start, student))
    assert float((after - before).abs().max()) > 1e-3 * float(before.abs().max()), "something was learned"
    assert student.sampling == config.sampling


def test_a_large_pixart_alpha_is_conditioned_on_the_size(tmp_path: Path) -> None:
    """As in its pipeline, at 1024 pixels alone: height and width, and their ratio."""
    backbone = load_backbone(tiny_pipelines.pixart(tmp_path / "alpha", "PixArtAlphaPipeline", sizes=True))
    condition = backbone.encode(PROMPTS)
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    found = backbone.call(backbone.network, x, torch.tensor([10.0, 500.0]), condition)
    network: Any = backbone.network
    wanted = network(
        x, encoder_hidden_states=condition["text"], encoder_attention_mask=condition["mask"],
        timestep=torch.tensor([10, 500]), return_dict=False,
        added_cond_kwargs={
            "resolution": torch.tensor([[64.0, 128.0]] * 2), "aspect_ratio": torch.tensor([[0.5]] * 2),
        },
    )[0].chunk(2, dim=1)[0]  # fmt: skip
    torch.testing.assert_close(found, wanted)


def test_another_network_in_a_known_pipeline_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Components outside the family are not loaded, least of all code in the folder."""
    for component, entry, words in (
        ("transformer", ["diffusers", "AuraFlowTransformer2DModel"], "it must be SD3Transformer2DModel"),
        ("transformer", ["my_module", "SD3Transformer2DModel"], "is never run"),
        ("vae", ["evil", "AutoencoderKL"], "takes its vae from 'evil'"),
    ):
        folder = tmp_path / f"{component}-{entry[0]}"
        shutil.copytree(folders["sd3"], folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, component: entry}))
        with pytest.raises(UserError, match=words):
            read_folder(folder)
    folder = tmp_path / "other"
    shutil.copytree(folders["sd3"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    with pytest.raises(UserError, match="is a KandinskyPipeline; it must be one of"):
        read_folder(folder)


def test_a_network_that_wants_more_channels_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """For example an inpainting network."""
    folder = tmp_path / "wide"
    shutil.copytree(folders["sdxl"], folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(UserError, match=r"has in_channels = 9, its latents have 4"):
        _ = read_folder(folder).latent_shape


def test_every_family_has_its_backbone() -> None:
    import importlib

    for family in FAMILIES.values():
        module, _, name = family.backbone.partition(":")
        assert hasattr(importlib.import_module(module), name)
        assert family.kind == module.rpartition(".")[2]


def test_trajectories_of_a_teacher_without_a_branch_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """It embeds its guidance and has no unconditional output, which trajectories need."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\n")
    with pytest.raises(UserError) as refused:
        synthesize(prompts, out=tmp_path / "set", teacher=folders["flux-dev"], kind="trajectories")
    assert refused.value.field == "kind"
    assert not (tmp_path / "set").exists()
    made = synthesize(
        prompts, out=tmp_path / "set", teacher=folders["flux-dev"], overrides=["each=2", "grid=5", "device=cpu"]
    )
    assert len(list(made.glob("shard-*.safetensors"))) == 1
