"""Pipeline folders as people have them: drawn from as plain diffusers does, or refused by the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import export_as
from fewstep.backbones import base
from fewstep.backbones.autoencoder import from_network_scale, to_network_scale
from fewstep.backbones.base import load_backbone
from fewstep.backbones.config_keys import SCHEDULERS
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.backbones.scheduler_config import path_of
from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.schedule import FlowMatching
from fewstep.inference.generator import load_image_generator
from fewstep.inference.schedulers.few_step import SSSScheduler
from support import tiny_pipelines

PROMPTS = ["a red disc", "blue"]
SEEDS = [1, 2]
MEAN, DEVIATION = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def original(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_pipelines.FAMILIES[kind](tmp_path_factory.mktemp(kind) / "tiny")
        return made[kind]

    return original


@pytest.fixture
def folder(originals: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny pipeline, to be changed."""

    def copied(kind: str) -> Path:
        return Path(shutil.copytree(originals(kind), tmp_path / kind))

    return copied


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; "absent" removes one."""
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def rebuilt(folder: Path, component: str, **changes: Any) -> Path:
    """Replace a network by a random one of a changed config."""
    import diffusers

    torch.manual_seed(7)
    index = json.loads((folder / "model_index.json").read_text())
    kind: Any = getattr(diffusers, index[component][1])
    config = json.loads((folder / component / "config.json").read_text()) | changes
    network = kind.from_config(config)
    if component == "unet":
        with torch.no_grad():
            network.conv_out.weight.normal_(0, 0.2)
    network.save_pretrained(folder / component)
    return folder


def replaced(folder: Path, component: str, made: Any, library: str = "diffusers") -> Path:
    """Replace a component by another one, of another class."""
    shutil.rmtree(folder / component)
    made.save_pretrained(folder / component)
    edit(folder / "model_index.json", **{component: [library, type(made).__name__]})
    return folder


def theirs(folder: Path, guidance: float = 3.0) -> np.ndarray:
    """Pictures by the pipeline itself under our scheduler."""
    import diffusers

    found = read_folder(folder)
    pipe = getattr(diffusers, found.pipeline).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SSSScheduler.from_config(pipe.scheduler.config, gamma=0.0)
    more: dict[str, Any] = {}
    if found.network == "transformer":
        more = {"height": found.picture_size, "width": found.picture_size}
    if found.family.kind in ("pixart", "sana"):
        more |= {"use_resolution_binning": False, "clean_caption": False}
    drawn = pipe(
        PROMPTS, num_inference_steps=2, guidance_scale=guidance, output_type="np", **more,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    return np.asarray((drawn * 255).round())


def ours(folder: Path) -> np.ndarray:
    return load_image_generator(folder).draw(PROMPTS, SEEDS, Sampling(steps=2, gamma=0.0, omega=2.0))


def test_weights_that_were_not_fetched_are_named(folder: Callable[[str], Path]) -> None:
    """A link of a hub's cache to a blob that is gone, and the pointer that git leaves without LFS."""
    file = folder("sd") / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 3\n")
    with pytest.raises(UserError, match="LFS"):
        read_folder(file.parents[1])
    file.unlink()
    file.symlink_to(file.parents[2] / "blobs" / "12ab")
    with pytest.raises(UserError, match="12ab"):
        read_folder(file.parents[1])


@pytest.mark.parametrize("inner", ["mine", "snapshots/12ab"])
def test_a_folder_around_a_pipeline_names_it(inner: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A hub's cache, or a folder of several."""
    place = tmp_path / "models--a--b"
    shutil.copytree(folder("sd"), place / inner)
    with pytest.raises(UserError, match=inner):
        read_folder(place)


def tiny_autoencoder(channels: int = 4) -> Any:
    import diffusers

    torch.manual_seed(8)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4, scaling_factor=0.7, latent_channels=channels,
    )  # fmt: skip


def asymmetric_autoencoder() -> Any:
    import diffusers

    torch.manual_seed(9)
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, down_block_out_channels=(8,) * 4, layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, up_block_out_channels=(8,) * 4, layers_per_up_block=1,
        norm_num_groups=4,
    )  # fmt: skip


def spelled_as_before(folder: Path) -> None:
    """An autoencoder whose attention layers have their oldest names, as of Stable Diffusion 1.x."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in load_file(file).items():
        kept = next((key.replace(new, old) for new, old in names.items() if f"attentions.0.{new}" in key), key)
        weights[kept] = value
    assert any("proj_attn" in key for key in weights)
    save_file(weights, file, {"format": "pt"})


def named_as_before(folder: Path) -> None:
    """PixArt's transformer under the name, and with the keys, of the class that it was part of."""
    old = dict.fromkeys(["double_self_attention", "only_cross_attention", "use_linear_projection"], False)
    edit(folder / "transformer/config.json", _class_name="Transformer2DModel", num_vector_embeds=None, **old)
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])


def heun_without_betas(folder: Path) -> None:
    """Its defaults are those of Stable Diffusion, unlike most schedulers'."""
    config = {"_class_name": "HeunDiscreteScheduler", "num_train_timesteps": 1000}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    edit(folder / "model_index.json", scheduler=["diffusers", "HeunDiscreteScheduler"])


def flow_of_a_unet(folder: Path) -> None:
    import diffusers

    made = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    )
    replaced(folder, "scheduler", made)


def spelled_as_a_whole_clip(folder: Path) -> None:
    """A text encoder whose config is that of a whole CLIP."""
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"model_type": "clip", "projection_dim": 32, "text_config": config}))


UNUSUAL: dict[str, tuple[str, Callable[[Path], object]]] = {
    "latents' mean and deviation": (
        "sdxl", lambda d: edit(d / "vae/config.json", latents_mean=MEAN, latents_std=DEVIATION, scaling_factor=0.5),
    ),
    "AutoencoderTiny": ("sd", lambda d: replaced(d, "vae", tiny_autoencoder())),
    "AutoencoderTiny of SDXL": ("sdxl", lambda d: replaced(d, "vae", tiny_autoencoder())),
    "AutoencoderTiny of Stable Diffusion 3": ("sd3", lambda d: replaced(d, "vae", tiny_autoencoder(16))),
    "AutoencoderTiny of PixArt": ("pixart", lambda d: replaced(d, "vae", tiny_autoencoder())),
    "AutoencoderTiny of Flux": ("flux", lambda d: replaced(d, "vae", tiny_autoencoder(16))),
    "the oldest transformer of PixArt": ("pixart", named_as_before),
    "the oldest names of layers": ("sd", spelled_as_before),
    "AsymmetricAutoencoderKL": ("sd", lambda d: replaced(d, "vae", asymmetric_autoencoder())),
    "no middle block": ("sd", lambda d: rebuilt(d, "unet", mid_block_type=None)),
    "a text embedding beside the time's": (
        "sd", lambda d: rebuilt(d, "unet", addition_embed_type="text", addition_embed_type_num_heads=2),
    ),
    "projected text states": (
        "sd",
        lambda d: rebuilt(d, "unet", encoder_hid_dim=32, encoder_hid_dim_type="text_proj", cross_attention_dim=24),
    ),
    "projected text states, by width alone": (
        "sd", lambda d: rebuilt(d, "unet", encoder_hid_dim=32, cross_attention_dim=24),
    ),
    "a pair of sizes": ("sd", lambda d: edit(d / "unet/config.json", sample_size=[8, 8])),
    "the oldest sizes": (
        "sd", lambda d: edit(d / "unet/config.json", sample_size=8, _diffusers_version="0.6.0.dev0"),
    ),
    "keys of an average": ("sd", lambda d: edit(d / "unet/config.json", decay=0.999, power=0.75, use_ema_warmup=False)),
    "a scheduler's own defaults": ("sd", heun_without_betas),
    "a flow of a UNet": ("sd", flow_of_a_unet),
    "clipping that the pipeline turns off": (
        "sd", lambda d: edit(d / "scheduler/scheduler_config.json", clip_sample=True),
    ),
    "a whole CLIP's config": ("sd", spelled_as_a_whole_clip),
    "the empty prompt encoded": ("sdxl", lambda d: edit(d / "model_index.json", force_zeros_for_empty_prompt=False)),
    "a mark": ("sdxl", lambda d: edit(d / "model_index.json", add_watermarker=False)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_folders_are_drawn_as_diffusers_draws_them(name: str, folder: Callable[[str], Path]) -> None:
    kind, change = UNUSUAL[name]
    place = folder(kind)
    before = None if name == "the oldest sizes" else ours(place)
    change(place)
    found = ours(place)
    assert np.abs(found.astype(int) - theirs(place)).max() <= 1
    backbone = load_backbone(place)
    assert backbone.to_latents(found).shape == (2, *backbone.latent_shape), "pictures are encoded too"
    acted = ("mean", "Auto", "middle", "text", "own defaults", "flow", "encoded")
    if before is not None and any(word in name for word in acted):
        assert not np.array_equal(before, found), "the key was acted on"


@pytest.mark.parametrize("length", ["absent", None, 1e30, 10**30, 64])
def test_the_text_encoder_bounds_the_tokens(length: Any, folder: Callable[[str], Path]) -> None:
    """Plain diffusers cannot draw so; the pictures are those of the same folder with the encoder's own length."""
    for kind in ("sd", "sdxl", "sd3"):
        place = folder(kind)
        before = load_backbone(place).encode(PROMPTS)
        edit(place / "tokenizer/tokenizer_config.json", model_max_length=length)
        after = load_backbone(place).encode(PROMPTS)
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "sana"])
def test_latents_come_back_from_the_network_s_scale(kind: str, folder: Callable[[str], Path]) -> None:
    place = folder(kind)
    if kind == "sdxl":
        edit(place / "vae/config.json", latents_mean=MEAN, latents_std=DEVIATION)
    vae = load_backbone(place).vae
    latents = torch.randn(2, vae.config.latent_channels, 3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(to_network_scale(vae, from_network_scale(vae, latents)), latents, rtol=1e-5, atol=1e-5)
    if kind == "sdxl":  # as the pipelines of SDXL encode
        mean, deviation = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, DEVIATION))
        wanted = (latents - mean) * vae.config.scaling_factor / deviation
        torch.testing.assert_close(to_network_scale(vae, latents), wanted)


def test_looks_without_a_middle_block(folder: Callable[[str], Path]) -> None:
    backbone = load_backbone(rebuilt(folder("sd"), "unet", mid_block_type=None))
    x = torch.randn(2, *backbone.latent_shape)
    found = backbone.features(backbone.network, x, torch.tensor([500.0, 1.0]), backbone.encode(PROMPTS))
    assert [part.shape[1] for part in found] == backbone.feature_channels == [16, 32]


WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    ("sd", "model_index.json", {"prior_head": ["diffusers", "PriorTransformer"]}, "prior_head"),
    ("sd", "model_index.json", {"vae": ["diffusers", "ConsistencyDecoderVAE"]}, "ConsistencyDecoderVAE"),
    ("sd", "model_index.json", {"vae": ["diffusers", ["AutoencoderKL"]]}, "vae"),
    ("sd", "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    ("sd", "unet/config.json", {"num_class_embeds": 10}, "num_class_embeds"),
    ("sd", "unet/config.json", {"class_embeddings_concat": True}, "class_embeddings_concat"),
    ("sd", "unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type"),
    ("sd", "unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
    ("sdxl", "unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type"),
    ("sdxl", "unet/config.json", {"addition_embed_type": "absent"}, "addition_embed_type"),
    ("sdxl", "unet/config.json", {"addition_time_embed_dim": 16}, "projection_class_embeddings_input_dim"),
    ("sd", "unet/config.json", {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 9}, "encoder_hid_dim_type"),
    ("sd", "unet/config.json", {"attention_type": "gated"}, "attention_type"),
    ("sd", "unet/config.json", {"dual_cross_attention": True}, "dual_cross_attention"),
    ("sd", "unet/config.json", {"cross_attention_dim": 48}, "cross_attention_dim"),
    ("sd", "unet/config.json", {"out_channels": 8}, "out_channels"),
    ("sd", "unet/config.json", {"sample_size": None}, "sample_size"),
    ("sd", "unet/config.json", {"sample_size": "absent"}, "sample_size"),
    ("sd", "unet/config.json", {"sample_size": [8, 16]}, "sample_size"),
    ("sd", "unet/config.json", {"sample_size": "8"}, "sample_size"),
    ("sd", "unet/config.json", {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
    ("sd", "unet/config.json", {"a_key_of_the_future": 1}, "a_key_of_the_future"),
    ("sd", "unet/config.json", {"norm_eps": float("nan")}, "norm_eps"),
    ("sd", "vae/config.json", {"latents_mean": MEAN, "latents_std": DEVIATION}, "latents_mean"),
    ("sd", "vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
    ("sd", "vae/config.json", {"out_channels": 4}, "out_channels"),
    ("sd", "vae/config.json", {"scaling_factor": 0.0}, "scaling_factor"),
    ("sd", "vae/config.json", {"scaling_factor": None}, "scaling_factor"),
    ("sd", "vae/config.json", {"scaling_factor": float("inf")}, "scaling_factor"),
    ("sdxl", "vae/config.json", {"latents_mean": MEAN}, "latents_std"),
    ("sdxl", "vae/config.json", {"latents_mean": MEAN, "latents_std": DEVIATION[:3]}, "latents_std"),
    ("sdxl", "vae/config.json", {"latents_mean": MEAN, "latents_std": [0.0] * 4}, "latents_std"),
    ("flux", "vae/config.json", {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}, "latents_mean"),
    ("pixart", "transformer/config.json", {"norm_type": "layer_norm"}, "norm_type"),
    ("pixart", "transformer/config.json", {"attention_type": "gated"}, "attention_type"),
    ("sana", "transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
    ("sana", "vae/config.json", {"in_channels": 4}, "in_channels"),
    ("flux", "transformer/config.json", {"patch_size": 2}, "patch_size"),
    ("sd3", "transformer/config.json", {"sample_size": None}, "sample_size"),
    ("sd", "text_encoder/config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("sd", "text_encoder/config.json", {"return_dict": False}, "return_dict"),
    ("sd", "text_encoder/config.json", {"layer_norm_type": "rms"}, "layer_norm_type"),
    ("sd3", "text_encoder_3/config.json", {"alibi": True}, "alibi"),
    ("sd", "tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tok.Tok", None]}}, "auto_map"),
    ("sd3", "transformer/config.json", {"patch_size": 0.5}, "patch_size"),
    ("sd3", "transformer/config.json", {"pos_embed_max_size": "12"}, "pos_embed_max_size"),
    ("sd", "text_encoder/config.json", {"hidden_size": []}, "hidden_size"),
    ("sd", "tokenizer/tokenizer_config.json", {"model_max_length": {}}, "model_max_length"),
    ("sd", "tokenizer/tokenizer_config.json", {"model_max_length": False}, "model_max_length"),
    ("sd", "tokenizer/tokenizer_config.json", {"max_len": 0}, "max_len"),
    ("flux", "scheduler/scheduler_config.json", {"max_image_seq_len": 256}, "max_image_seq_len"),
    ("flux", "scheduler/scheduler_config.json", {"base_shift": "x"}, "base_shift"),
    ("sd", "scheduler/scheduler_config.json", {"trained_betas": 3}, "trained_betas"),
    ("sd", "scheduler/scheduler_config.json", {"trained_betas": [0.1, 7.0]}, "trained_betas"),
    ("sd", "scheduler/scheduler_config.json", {"beta_end": -0.1}, "beta_end"),
    ("sd", "scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps"),
    ("sd", "scheduler/scheduler_config.json", {"beta_schedule": "cubic"}, "beta_schedule"),
    ("sd", "scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
    ("sd", "scheduler/scheduler_config.json", {"sigma_data": 0.5}, "sigma_data"),
    ("sd", "scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "prediction_type"),
    ("sd", "scheduler/scheduler_config.json", {"prediction_type": "trigflow"}, "prediction_type"),
    ("sd", "scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas"),
    ("sd", "scheduler/scheduler_config.json", {"snr_shift_scale": 3.0}, "snr_shift_scale"),
    ("sdxl", "scheduler/scheduler_config.json", {"timestep_type": "continuous"}, "timestep_type"),
    ("sdxl", "scheduler/scheduler_config.json", {"sigma_max": 80.0}, "sigma_max"),
    ("pixart", "scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "variance_type"),
    ("pixart", "scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas"),
    ("pixart", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ("sana", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "num_train_timesteps"),
    ("sana", "scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas"),
    ("sd3", "scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas"),
    ("sd3", "scheduler/scheduler_config.json", {"shift_terminal": 0.02}, "shift_terminal"),
    ("sd3", "scheduler/scheduler_config.json", {"num_train_timesteps": 100}, "num_train_timesteps"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "changes", "field"), WRONG)
def test_what_is_not_acted_on_is_refused_by_name(
    kind: str, file: str, changes: dict[str, Any], field: str, folder: Callable[[str], Path]
) -> None:
    place = folder(kind)
    edit(place / file, **changes)
    with pytest.raises(UserError, match=field) as refused:
        load_backbone(place).encode(PROMPTS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler", "KarrasVeScheduler",
     "ScoreSdeVeScheduler", "VQDiffusionScheduler", "IPNDMScheduler", "UnCLIPScheduler", "SCMScheduler",
     "DDIMInverseScheduler", "RePaintScheduler", "CogVideoXDDIMScheduler"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["both", "index", "file"])
def test_other_noise_is_refused(name: str, place: str, folder: Callable[[str], Path]) -> None:
    """Whether the pipeline names it, its own file, or both."""
    import diffusers

    made = folder("sdxl")
    if place != "index":
        kind: Any = getattr(diffusers, name)
        scheduler = kind(num_vec_classes=10) if name == "VQDiffusionScheduler" else kind()
        (made / "scheduler" / "scheduler_config.json").unlink()
        scheduler.save_pretrained(made / "scheduler")
    if place != "file":
        edit(made / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(UserError, match=name):
        read_folder(made)


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"SSSScheduler", "ConsistencyScheduler"}))
def test_a_config_without_keys_has_the_noise_of_its_class(name: str, folder: Callable[[str], Path]) -> None:
    """A file that names its class alone: betas, their number and the prediction are the class's defaults."""
    import diffusers

    kind: Any = getattr(diffusers, name)
    if "dummy" in kind.__module__:
        pytest.skip(f"{name} needs a package that is not installed")
    place = folder("sd")
    edit(place / "model_index.json", scheduler=["diffusers", name])
    (place / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    path = path_of(read_folder(place).noise)
    if name.startswith("FlowMatch"):
        assert path == FlowMatching(1.0)
        return
    table = kind().alphas_cumprod.double()
    t = torch.arange(len(table), dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t).square(), table, rtol=1e-6, atol=1e-9)
    assert path.noisiest == len(table) - 1


def test_a_scheduler_that_ignores_the_noise_of_the_network_is_refused(folder: Callable[[str], Path]) -> None:
    """Another scheduler's key is ignored by diffusers; where it decides the noise, the pictures would be wrong."""
    place = folder("sd")
    file = place / "scheduler/scheduler_config.json"
    edit(file, _class_name="PNDMScheduler", prediction_type="v_prediction", clip_sample=False, use_karras_sigmas=True)
    edit(place / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    read_folder(place)
    edit(file, rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        read_folder(place)


@pytest.mark.parametrize("kind", ["sd", "pixart", "sana"])
@pytest.mark.parametrize("lost", ["every", "one", "cut"])
def test_a_vocabulary_that_is_not_whole_is_refused(kind: str, lost: str, folder: Callable[[str], Path]) -> None:
    place = folder(kind)
    tokenizer = place / "tokenizer"
    if kind == "sd":  # as the hub's folders have it
        clip = tiny_pipelines.clip_tokenizer(place / "plain")
        assert clip is not None
        shutil.rmtree(tokenizer)
        shutil.move(place / "plain", tokenizer)
        whole = load_backbone(place).encode(PROMPTS)["text"]
        assert torch.isfinite(whole).all()
    files = [file for file in tokenizer.iterdir() if file.name != "tokenizer_config.json"]
    last = sorted(files)[0]
    for file in files if lost == "every" else [last]:
        if lost == "cut":
            kept = file.read_bytes()
            file.write_bytes(
                kept[: kept.rstrip().rfind(b"\n") + 1] if file.suffix == ".txt" else kept[: len(kept) // 2]
            )
        else:
            file.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_backbone(place).encode(PROMPTS)


def test_a_vocabulary_of_sentencepiece(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's folders of PixArt have it: spiece.model alone. Without the package, the extra is named."""
    place = folder("pixart")
    with_json = load_backbone(place).encode(PROMPTS)
    (place / "tokenizer" / "tokenizer.json").unlink()
    (place / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model())
    edit(place / "tokenizer" / "tokenizer_config.json", tokenizer_class="T5Tokenizer", extra_ids=0)
    edit(place / "model_index.json", tokenizer=["transformers", "T5Tokenizer"])
    pytest.importorskip("sentencepiece")
    first = read_folder(place).identity("tokenizer")
    found = load_backbone(place).encode(PROMPTS)
    torch.testing.assert_close(found["mask"], with_json["mask"])
    torch.testing.assert_close(found["text"] * found["mask"][..., None], with_json["text"] * found["mask"][..., None])
    with (place / "tokenizer" / "spiece.model").open("ab") as stream:
        stream.write(b"\x0a\x00")
    assert read_folder(place).identity("tokenizer") != first, "the vocabulary is part of what prompts become"
    monkeypatch.setattr("fewstep.backbones.config_checks.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"fewstep\[sentencepiece\]"):
        read_folder(place)


def sentencepiece_model() -> bytes:
    """The letters of `piece_tokenizer`, with the same ids, as a unigram model."""

    def number(n: int) -> bytes:
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    def field(tag: int, wire: int, data: bytes) -> bytes:
        return number(tag << 3 | wire) + (number(len(data)) if wire == 2 else b"") + data

    letters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789.,:-'\"()"]
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    pieces = [*kinds, "▁", *letters]
    model = b"".join(
        field(
            1,
            2,
            field(1, 2, piece.encode())
            + field(2, 5, np.float32(-1).tobytes())
            + field(3, 0, number(kinds.get(piece, 1))),
        )
        for piece in pieces
    )
    trainer = (
        field(3, 0, number(1)) + field(4, 0, number(len(pieces))) + field(40, 0, number(2)) + field(41, 0, number(1))
    )
    return model + field(2, 2, trainer) + field(3, 2, field(1, 2, b"identity"))


@pytest.mark.parametrize(("component", "file"), [
    ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model"),
])  # fmt: skip
@pytest.mark.parametrize("spelling", ["{0}.base_layer.{1}", "{0}.lora_A.default.{1}", "{0}.lora_down.{1}"])
def test_an_adapter_that_was_left_on_is_named(
    component: str, file: str, spelling: str, folder: Callable[[str], Path]
) -> None:
    place = folder("sd")
    path = place / component / f"{file}.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if key.endswith("weight"))
    module, _, leaf = key.rpartition(".")
    value = weights.pop(key) if "base" in spelling else weights[key].clone()
    save_file(weights | {spelling.format(module, leaf): value}, path, {"format": "pt"})
    with pytest.raises(UserError, match="adapter"):
        read_folder(place)


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_weights_without_a_place_are_named(component: str, folder: Callable[[str], Path]) -> None:
    """A config that builds less than was trained: diffusers would draw with what is left."""
    place = folder("sd")
    path = place / component / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"extra_embedding.weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"extra_embedding\.weight"):
        _ = load_backbone(place).vae


@pytest.mark.parametrize("file", [
    "model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json",
])  # fmt: skip
@pytest.mark.parametrize("content", [b'{"name": "caf\xe9"}', b"\xff\xfa\x00", b"[" * 100_000, b"[]", b"", b"null"])
def test_json_that_is_none_is_refused_in_one_line(file: str, content: bytes, folder: Callable[[str], Path]) -> None:
    place = folder("sd")
    (place / file).write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_backbone(place).encode(PROMPTS)
    assert "\n" not in str(refused.value)
    assert str(place / file.partition("/")[0]) in str(refused.value)


def test_calls_that_fail_name_the_part(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(folder("sd"))
    condition = backbone.encode(PROMPTS)
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([500.0, 1.0])
    with pytest.raises(UserError, match="unet"):
        backbone.call(backbone.network, x, t, {"text": condition["text"][..., :5]})
    with pytest.raises(UserError, match="unet"):
        backbone.features(backbone.network, x[:, :3], t, condition)
    with pytest.raises(UserError, match="vae"):
        backbone.decode(x[:, :3])
    with pytest.raises(UserError, match="vae"):
        backbone.to_latents(np.zeros((1, 8, 8, 4), np.uint8))
    backbone.text_encoders[0].resize_token_embeddings(3)
    with pytest.raises(UserError, match="text_encoder"):
        backbone.encode(PROMPTS)


def test_every_error_of_a_library_is_one_line() -> None:
    for error in (KeyError("x"), IndexError(), AssertionError("a\nb"), OverflowError("int too big"), RuntimeError("r")):
        with pytest.raises(UserError, match="cannot run the unet") as caught, base.named("run", "the unet"):
            raise error
        assert "\n" not in str(caught.value)


def test_an_autoencoder_that_a_single_file_cannot_hold(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Readers of single files take its kind and its scale from the family alone."""
    place = folder("sdxl")
    edit(place / "vae/config.json", latents_mean=MEAN, latents_std=DEVIATION)
    with pytest.raises(UserError, match="latents_mean"):
        export_as(place, form="single-file", out=tmp_path / "one", device="cpu")
    written, _ = export_as(place, form="merged", out=tmp_path / "merged", device="cpu")
    assert np.abs(ours(written).astype(int) - theirs(written)).max() <= 1
    other = replaced(folder("sd"), "vae", tiny_autoencoder())
    with pytest.raises(UserError, match="AutoencoderTiny"):
        export_as(other, form="single-file", out=tmp_path / "one", device="cpu")
