"""Preference scorers: values against the published formulas, gradients to the latent, preprocessing, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.scorers.preprocess import CLIP_MEAN, CLIP_STD, Framing, frame
from fewstep.scorers.registry import SCORERS, check_scorer, load_scorer
from fewstep.scorers.reward import PreferenceScorer
from support import scorer_references as reference

PROMPTS = ["a red disc", "blue square, on white"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random checkpoint of every scorer, as published, and HPS v2 in transformers' format."""
    base = tmp_path_factory.mktemp("scorers")
    reference.write_clip(base / "clip", seed=1)
    reference.write_clip(base / "pickscore", seed=5)
    reference.write_hpsv2(base / "hpsv2", reference.open_clip_state())
    reference.write_image_reward(base / "image_reward", reference.image_reward_state())
    reference.write_mps(base / "mps", reference.mps_state())
    return {name: base / name for name in SCORERS}


def in_double(name: str, folder: Path) -> Any:
    scorer: Any = load_scorer(name, folder)
    scorer.network.double()
    return scorer


def some_pictures(seed: int = 0, height: int = 40, width: int = 33) -> Tensor:
    """Two smooth random pictures in [-1, 1], float64."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 7, 6, generator=draw, dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 1.8 - 0.9


def clip_ids(prompts: list[str]) -> Tensor:
    """Token ids by hand: letters, their end-of-word forms, and the one merge."""
    rows = []
    for prompt in prompts:
        pieces = ["<|startoftext|>"]
        for word in prompt.replace(",", "").split():
            pieces += ["red</w>"] if word == "red" else [*word[:-1], f"{word[-1]}</w>"]
        pieces = [*pieces[: reference.CONTEXT - 1], "<|endoftext|>"]
        rows.append(pieces + ["<|endoftext|>"] * (reference.CONTEXT - len(pieces)))
    return torch.tensor([[reference.PIECES.index(piece) for piece in row] for row in rows])


LETTERS_ONLY = ["a red disc", "blue square"]


@pytest.mark.parametrize(("name", "factor"), [("clip", 100 / np.exp(2.0)), ("pickscore", 1.0)])
def test_clip_and_pickscore_are_the_librarys_logits(folders: dict[str, Path], name: str, factor: float) -> None:
    from transformers import CLIPModel

    scorer = in_double(name, folders[name])
    model = CLIPModel.from_pretrained(folders[name], local_files_only=True).double().eval()
    pictures = some_pictures()
    with torch.no_grad():
        logits = model(input_ids=clip_ids(LETTERS_ONLY), pixel_values=frame(pictures, Framing(28))).logits_per_image
        scores = scorer.score(pictures, scorer.prepare(LETTERS_ONLY))
    torch.testing.assert_close(scores, logits.diagonal() * factor, rtol=1e-9, atol=1e-9)
    assert logits[0, 0] != logits[1, 1]


def test_hpsv2_is_the_open_clip_formula(folders: dict[str, Path]) -> None:
    scorer = in_double("hpsv2", folders["hpsv2"])
    pictures = some_pictures()
    seen = frame(pictures, Framing(28, "pad"))
    expected = 100 * reference.open_clip_cosine(reference.open_clip_state(), seen, clip_ids(LETTERS_ONLY))
    with torch.no_grad():
        scores = scorer.score(pictures, scorer.prepare(LETTERS_ONLY))
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    assert (expected[0] - expected[1]).abs() > 0.1


def test_hpsv2_in_the_librarys_format_is_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    first: Any = load_scorer("hpsv2", folders["hpsv2"])
    first.network.save_pretrained(tmp_path)
    reference.write_clip_tokenizer(tmp_path)
    second = load_scorer("hpsv2", tmp_path)
    pictures = some_pictures().float()
    assert torch.equal(first.score(pictures, first.prepare(PROMPTS)), second.score(pictures, second.prepare(PROMPTS)))
    assert second.identity.input == first.identity.input


def test_hpsv2_without_a_config_is_vit_h_14() -> None:
    """Every key of the published checkpoint is read; its parameters are as many as open_clip lists, 986.11 million."""
    from transformers import CLIPModel

    from fewstep.scorers.hpsv2 import VIT_H_14, clip_config_of, clip_state

    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 49406, 49407, 0

    with torch.device("meta"):
        network = CLIPModel(clip_config_of(VIT_H_14, Tokenizer()))
    layer = [f"{norm}.{kind}" for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")]
    layer += ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"]
    layer += [f"mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")]
    published = {f"visual.transformer.resblocks.{i}.{key}" for i in range(32) for key in layer}
    published |= {f"transformer.resblocks.{i}.{key}" for i in range(24) for key in layer}
    published |= {f"visual.{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    published |= {f"visual.{key}" for key in ("class_embedding", "positional_embedding", "proj", "conv1.weight")}
    published |= {"positional_embedding", "text_projection", "token_embedding.weight", "logit_scale"}
    published |= {"ln_final.weight", "ln_final.bias"}
    assert set(clip_state({key: torch.empty(3, 1) for key in published})) == set(network.state_dict())
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 986.11


def test_image_reward_is_the_published_formula(folders: dict[str, Path]) -> None:
    scorer = in_double("image_reward", folders["image_reward"])
    pictures = some_pictures()
    prepared = scorer.prepare(PROMPTS)
    words = [["[CLS]", "a", "red", "disc", "[SEP]"], ["[CLS]", "blue", "square", ",", "on", "white", "[SEP]"]]
    ids = torch.tensor([[reference.BERT_WORDS.index(w) for w in row] + [0] * (35 - len(row)) for row in words])
    assert torch.equal(prepared["ids"], ids)
    assert prepared["mask"].sum(1).tolist() == [5, 7]
    seen = frame(pictures, Framing(28))
    expected = reference.image_reward(reference.image_reward_state(), seen, ids, prepared["mask"])
    with torch.no_grad():
        torch.testing.assert_close(scorer.score(pictures, prepared), expected, rtol=1e-9, atol=1e-9)
    other = reference.image_reward(reference.image_reward_state(), seen, ids.flip(0), prepared["mask"].flip(0))
    assert (expected - other).abs().min() > 1e-3, "the prompt is read"


def test_mps_is_the_published_formula(folders: dict[str, Path]) -> None:
    scorer = in_double("mps", folders["mps"])
    scorer.condition = "a thing"
    pictures = some_pictures()
    prepared = scorer.prepare(LETTERS_ONLY)
    seen, condition = frame(pictures, Framing(28)), clip_ids(["a thing"])
    with torch.no_grad():
        expected, attended = reference.mps(reference.mps_state(), seen, clip_ids(LETTERS_ONLY), condition)
        torch.testing.assert_close(scorer.score(pictures, prepared), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(prepared["mask"], attended)
    assert 0 < attended[1].float().mean() < 1, "some words are attended to, some are not"


@pytest.fixture(scope="module")
def decoder() -> Any:
    """A tiny random autoencoder whose pictures stay inside [-1, 1] but for a few pixels, float64."""
    from diffusers import AutoencoderKL

    torch.manual_seed(7)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    return vae.double().eval().requires_grad_(False)


@pytest.mark.parametrize("name", list(SCORERS))
def test_the_gradient_reaches_the_latent(folders: dict[str, Path], decoder: Any, name: str) -> None:
    scorer = in_double(name, folders[name])
    prepared = scorer.prepare(PROMPTS)
    draw = torch.Generator().manual_seed(11)
    latents = torch.randn(2, 4, 16, 20, generator=draw, dtype=torch.float64)

    def total(z: Tensor) -> Tensor:
        pictures = decoder.decode(z).sample
        assert pictures.shape == (2, 3, 32, 40)
        return scorer.score(pictures, prepared).sum()

    leaf = latents.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    assert all(not parameter.requires_grad for parameter in scorer.network.parameters())
    step = 1e-5
    for _ in range(3):
        way = torch.randn(latents.shape, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            numeric = (total(latents + step * way) - total(latents - step * way)) / (2 * step)
        exact = (gradient * way).sum()
        assert abs(numeric - exact) <= 1e-4 * abs(numeric), (float(numeric), float(exact))
        assert abs(numeric) > 1e-3


@pytest.mark.parametrize("name", list(SCORERS))
def test_a_scorer_keeps_the_interface(folders: dict[str, Path], name: str) -> None:
    scorer: Any = load_scorer(name, folders[name])
    assert isinstance(scorer, PreferenceScorer)
    assert not scorer.network.training
    prepared = scorer.prepare([*PROMPTS, PROMPTS[0]])
    assert all(len(rows) == 3 and not rows.requires_grad and rows.device.type == "cpu" for rows in prepared.values())
    exclusive = scorer.prepare(PROMPTS[1:])
    for key, rows in prepared.items():
        torch.testing.assert_close(exclusive[key][0], rows[1], msg="a row depends on the prompts beside it")
        assert torch.equal(rows[0], rows[2])
    pictures = some_pictures().float()
    pair = {key: rows[:2] for key, rows in prepared.items()}
    scores = scorer.score(pictures, pair)
    assert scores.dtype == torch.float32
    assert scores.shape == (2,)
    turned = scorer.score(pictures.flip(0), {key: rows.flip(0) for key, rows in pair.items()})
    torch.testing.assert_close(turned, scores.flip(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one row per picture"):
        scorer.score(pictures, prepared)
    with pytest.raises(ValueError, match="hold"):
        scorer.score(pictures, {"nothing": pictures})
    with pytest.raises(ValueError, match="no prompts"):
        scorer.prepare([])


@pytest.mark.parametrize("name", list(SCORERS))
def test_half_precision_is_near_and_scores_in_fp32(folders: dict[str, Path], name: str) -> None:
    pictures = some_pictures().float()
    full, half = (load_scorer(name, folders[name], precision=p) for p in ("fp32", "bf16"))
    scores = [scorer.score(pictures, scorer.prepare(PROMPTS)) for scorer in (full, half)]
    assert scores[1].dtype == torch.float32
    assert half.identity == full.identity
    scale = {"image_reward": 1.0, "clip": 100.0, "hpsv2": 100.0}.get(name, float(np.exp(2.0)))
    assert (scores[0] - scores[1]).abs().max() < 0.08 * scale


@pytest.mark.parametrize("name", list(SCORERS))
def test_identity_is_complete(folders: dict[str, Path], name: str) -> None:
    identity = load_scorer(name, folders[name]).identity
    record = asdict(identity)
    assert identity.name == name
    assert all(isinstance(value, str) and len(value) > 2 for value in record.values()), record
    (weights,) = folders[name].glob("*.safetensors")
    assert identity.weights_sha256 == sha256(weights)
    assert "28 x 28" in identity.input
    assert ("black around" in identity.input) == (name == "hpsv2")
    assert "arXiv" in identity.paper
    assert "commercial" in identity.commercial
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "rewards.md").read_text(encoding="utf-8")
    assert f"`{name}`" in guide
    for value in (identity.licence, identity.commercial, identity.span):
        assert value in " ".join(guide.split()), value


def eight_bit(height: int, width: int) -> np.ndarray:
    """A picture with hard edges, ramps and noise, uint8 [H, W, 3]."""
    draw = np.random.default_rng(3)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, width)[None]
    picture[height // 4 : height // 2, width // 3 :] = 255
    picture[height // 2 :, : width // 2] = draw.integers(0, 256, (height - height // 2, width // 2, 3))
    return picture


@pytest.mark.parametrize(("height", "width"), [(97, 64), (64, 131), (28, 28), (20, 31), (300, 300)])
def test_framing_is_clips_processor_without_rounding(height: int, width: int) -> None:
    """Within 1.2/255 of transformers' PIL processor, on pictures with hard edges."""
    processor = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    picture = eight_bit(height, width)
    made = processor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = made(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    ours = frame(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1, Framing(28))
    assert ours.shape == theirs.shape == (1, 3, 28, 28)
    apart = (ours - theirs).abs() * torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    assert apart.max() < 1.2
    assert apart.mean() < 0.2


@pytest.mark.parametrize(("height", "width"), [(97, 64), (64, 131), (28, 28), (20, 31)])
def test_padding_is_pils_resize_inside_black(height: int, width: int) -> None:
    picture = eight_bit(height, width)
    scale = 28 / max(height, width)
    inside = (round(height * scale), round(width * scale))
    expected = np.zeros((28, 28, 3))
    top, left = (28 - inside[0]) // 2, (28 - inside[1]) // 2
    small = Image.fromarray(picture).resize(inside[::-1], Image.Resampling.BICUBIC)
    expected[top : top + inside[0], left : left + inside[1]] = np.asarray(small)
    seen = frame(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1, Framing(28, "pad"))[0]
    ours = seen.permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    np.testing.assert_allclose(ours * 255, expected, atol=1.2)


def test_colours_that_no_picture_has_win_nothing() -> None:
    """Values outside [-1, 1] are clamped and get no gradient."""
    pictures = some_pictures()
    pictures[:, :, :10] = 1.7
    leaf = pictures.clone().requires_grad_(True)
    seen = frame(leaf, Framing(28))
    assert torch.equal(seen, frame(pictures.clamp(-1, 1), Framing(28)))
    seen.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad[:, :, :10].any()
    assert leaf.grad[:, :, 14:34].abs().min() > 0
    for wrong in (pictures[0], pictures[:, :2], pictures.to(torch.uint8)):
        with pytest.raises(ValueError, match="floating-point"):
            frame(wrong, Framing(28))


def test_a_folders_own_normalisation_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    reference.write_clip(tmp_path, seed=1)
    own = {"size": 28, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own), encoding="utf-8")
    scorer: Any = load_scorer("clip", tmp_path)
    assert scorer.framing == Framing(28, "crop", (0.5,) * 3, (0.25,) * 3)
    assert "mean 0.5 0.5 0.5" in scorer.identity.input
    for key, value in (("size", {"shortest_edge": 30}), ("resample", 2), ("do_center_crop", False)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(own | {key: value}), encoding="utf-8")
        with pytest.raises(UserError, match=f"{key} = .* must be") as caught:
            load_scorer("clip", tmp_path)
        assert caught.value.field.endswith("preprocessor_config.json")


WRITERS = {
    "hpsv2": (
        reference.open_clip_state,
        reference.write_hpsv2,
        "visual.transformer.resblocks.1.attn.in_proj_bias",
        "vision_model.encoder.layers.1.self_attn.k_proj.bias",
    ),
    "image_reward": (
        reference.image_reward_state,
        reference.write_image_reward,
        "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
        "text.encoder.layer.1.crossattention.self.key.weight",
    ),
    "mps": (reference.mps_state, reference.write_mps, "cross_model.layers.1.0.fn.ff.2.weight", "cross.1.0.ff.2"),
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_missing_and_foreign_keys_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make, write, key, parameter = WRITERS[name]
    state = make()
    kept = state.pop(key)
    write(tmp_path / "missing", state)
    with pytest.raises(UserError, match=f"Missing key.*{parameter}"):
        load_scorer(name, tmp_path / "missing")
    write(tmp_path / "shape", state | {key: torch.cat([kept, kept])})
    with pytest.raises(UserError, match=f"size mismatch for {parameter}"):
        load_scorer(name, tmp_path / "shape")
    write(tmp_path / "foreign", state | {key: kept, "score_predictor.weight": torch.ones(1), "z": torch.ones(1)})
    with pytest.raises(UserError, match=r'Unexpected key.*"score_predictor\.weight", "z"') as caught:
        load_scorer(name, tmp_path / "foreign")
    assert caught.value.field.endswith(".safetensors")


def test_a_clip_folder_without_a_weight_is_refused(tmp_path: Path) -> None:
    reference.write_clip(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if key != "text_projection.weight"}, file)
    with pytest.raises(UserError, match=r'Missing key.*"text_projection.weight"'):
        load_scorer("pickscore", tmp_path)
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, file)
    load_scorer("pickscore", tmp_path)  # older folders have this buffer


def test_folders_are_refused_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    def refusal(name: str, folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            check_scorer(name, folder)
        text = str(caught.value)
        assert "\n" not in text
        assert caught.value.field in ("scorer", str(folder))
        return text

    assert "'pickscore'" in refusal("pick_score", tmp_path)
    assert "does not exist" in refusal("mps", tmp_path / "nowhere")
    assert "safetensors" in refusal("clip", tmp_path)
    reference.write_bert_tokenizer(tmp_path)
    assert "safetensors" in refusal("image_reward", tmp_path)
    (tmp_path / "ImageReward.pt").write_bytes(b"pickle")
    text = refusal("image_reward", tmp_path)
    assert "ImageReward.pt" in text
    assert "docs/guide/rewards.md" in text
    save_file(reference.mps_state(), tmp_path / "one.safetensors")
    assert "its keys are those of 'mps'" in refusal("image_reward", tmp_path)
    assert "its keys are those of 'mps'" in refusal("hpsv2", tmp_path)
    save_file(reference.image_reward_state(), tmp_path / "one.safetensors")
    assert "med_config.json" in refusal("image_reward", tmp_path)
    (tmp_path / "two.safetensors").write_bytes(b"")
    assert "two.safetensors" in refusal("image_reward", tmp_path)
    clip = tmp_path / "clip"
    reference.write_clip(clip)
    (clip / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    assert "'bert'" in refusal("clip", clip)
    (clip / "config.json").unlink()
    assert "config.json" in refusal("clip", clip)
    bare = tmp_path / "bare"
    reference.write_hpsv2(bare, reference.open_clip_state())
    (bare / "merges.txt").unlink()
    assert "holds no tokenizer" in refusal("hpsv2", bare)


def test_other_mistakes_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp32"):
        load_scorer("clip", folders["clip"], precision="fp33")  # type: ignore[arg-type]
    reference.write_hpsv2(tmp_path / "narrow", reference.open_clip_state())
    (tmp_path / "narrow" / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"width 32.*open_clip_config.json"):
        load_scorer("hpsv2", tmp_path / "narrow")
    reference.write_clip(tmp_path / "end")
    config = json.loads((tmp_path / "end" / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (tmp_path / "end" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="eos_token_id 7"):
        load_scorer("clip", tmp_path / "end")
    reference.write_clip(tmp_path / "words")
    vocabulary = json.loads((tmp_path / "words" / "vocab.json").read_text())
    vocabulary |= {f"x{i}": len(vocabulary) + i for i in range(3)}
    (tmp_path / "words" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(UserError, match="another model's"):
        load_scorer("clip", tmp_path / "words")


def test_refusing_needs_no_torch(folders: dict[str, Path]) -> None:
    program = (
        "import sys\n"
        "from fewstep.scorers.registry import SCORERS, check_scorer\n"
        f"for name, folder in { ({name: str(folder) for name, folder in folders.items()})!r}.items():\n"
        "    check_scorer(name, folder)\n"
        "assert not {'torch', 'transformers', 'diffusers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_guides_own_scorer_runs() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "rewards.md").read_text(encoding="utf-8")
    program = next(part for part in guide.split("```python\n")[1:] if "class ColourScorer" in part).split("```")[0]
    names: dict[str, Any] = {}
    exec(program, names)
    scorer = names["ColourScorer"]()
    assert isinstance(scorer, PreferenceScorer)
    pictures = torch.full((2, 3, 8, 8), 0.5, requires_grad=True)
    scores = scorer.score(pictures, scorer.prepare(["a red disc", "a disc"]))
    torch.testing.assert_close(scores, torch.tensor([-(0.25 + 2 * 2.25), -0.75]))
    scores.sum().backward()
    assert pictures.grad is not None
    assert pictures.grad[0, 0].min() > 0 > pictures.grad[1].max()
