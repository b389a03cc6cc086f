"""Negative prompts without guidance, by normalised attention guidance."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.inference.generator import load_image_generator
from fewstep.inference.negative_guidance import AttentionGuidance, NegativeGuidance
from support import tiny_pipelines

SAMPLING = Sampling(steps=2, gamma=0.3)
CROSS = ["sd", "sdxl", "pixart", "sana"]


def attended(attention: Any, x: Tensor, text: Tensor) -> Tensor:
    """Softmax attention of x to a prompt, head by head, without its last layer."""
    q, k, v = attention.to_q(x), attention.to_k(text), attention.to_v(text)
    q, k, v = (each.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for each in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tau", [2.5, 1.1])
def test_it_is_the_papers_algorithm(tau: float) -> None:
    """Algorithm 1, written out for one cross-attention of diffusers."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    block = torch.nn.Module()
    block.attn2 = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)  # type: ignore[assignment]
    x, text, other = torch.randn(3, 5, 8), torch.randn(3, 7, 6), torch.randn(1, 7, 6)
    with torch.no_grad():
        plain = block.attn2(x, encoder_hidden_states=text)
        positive, negative = attended(block.attn2, x, text), attended(block.attn2, x, other.expand(3, -1, -1))
        away = positive + 4 * (positive - negative)
        lengths = [each.abs().sum(-1, keepdim=True) for each in (away, positive)]
        ratio = lengths[0] / lengths[1]
        assert float(ratio.max()) > 1.1, "the limit is reached"
        away = torch.where(ratio > tau, away / lengths[0] * lengths[1] * tau, away)
        wanted = block.attn2.to_out[0](0.4 * away + 0.6 * positive)
        guided = NegativeGuidance(block, AttentionGuidance(scale=4, tau=tau, alpha=0.4))
        guided.keep(lambda: block.attn2(x, encoder_hidden_states=other.expand(3, -1, -1)))
        torch.testing.assert_close(block.attn2(x, encoder_hidden_states=text), wanted)
        guided.close()
        torch.testing.assert_close(block.attn2(x, encoder_hidden_states=text), plain, rtol=0, atol=0)


@pytest.mark.parametrize("family", CROSS)
def test_pictures_are_led_away(family: str, tmp_path: Path) -> None:
    """The prompt itself as the negative one changes nothing; other prompts change the picture, each in its way."""
    generator = load_image_generator(tiny_pipelines.FAMILIES[family](tmp_path / family))
    prompts, seeds = ["a red disc", "a red disc"], [1, 2]
    condition = generator.encode(prompts)

    def drawn(negative: str, **changes: Any) -> Tensor:
        made = replace(generator, negative=negative, **changes)
        return made.latents(condition, seeds, SAMPLING)

    plain = drawn("")
    torch.testing.assert_close(drawn("a red disc"), plain, rtol=1e-4, atol=1e-4)
    blue = drawn("blue squares")
    assert float((blue - plain).abs().mean()) > 1e-3
    assert float((drawn("green frogs") - blue).abs().mean()) > 1e-4
    torch.testing.assert_close(drawn("blue squares", batch=1), blue, rtol=1e-4, atol=1e-4)
    assert torch.equal(drawn(""), plain), "nothing of it is left"


def test_a_pipeline_with_our_scheduler_draws_the_same(tmp_path: Path) -> None:
    import diffusers

    folder = tiny_pipelines.FAMILIES["sd"](tmp_path / "sd")
    generator = replace(load_image_generator(folder), negative="blue squares")
    ours = generator.draw(["a red disc"], [3], SAMPLING)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = fewstep.SSSScheduler.from_config(pipe.scheduler.config, gamma=0.3)

    def theirs() -> np.ndarray:
        noise = torch.Generator().manual_seed(3)
        size = {"height": ours.shape[1], "width": ours.shape[2]}
        found: np.ndarray = pipe(
            "a red disc", num_inference_steps=2, guidance_scale=0, generator=noise, output_type="np", **size
        ).images
        return found

    plain = theirs()
    away = fewstep.lead_away(pipe, "blue squares")
    led = theirs()
    assert np.abs(led * 255 - ours).max() <= 1.01
    assert np.abs(led - plain).max() > 0.01
    away.close()
    np.testing.assert_array_equal(theirs(), plain)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_networks_without_cross_attention_are_refused(family: str, tmp_path: Path) -> None:
    folder = tiny_pipelines.FAMILIES[family](tmp_path / family)
    with pytest.raises(UserError) as error:
        fewstep.sample("a red disc", teacher=folder, omega=0.0, negative_prompt="blue", out=tmp_path / "a.png")
    assert error.value.field == "negative_prompt"
    with pytest.raises(UserError) as error:
        NegativeGuidance(load_image_generator(folder).backbone.network)
    assert error.value.field == "negative_prompt"


class ComfyModel:
    """ComfyUI's model with one block, which calls patches in its order (`BasicTransformerBlock`)."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.patch: Any = None
        self.replace: dict[tuple[str, int], Any] = {}

    def get_model_object(self, name: str) -> Any:
        return SimpleNamespace(input_blocks=[0, 1], output_blocks=[0])

    def clone(self) -> ComfyModel:
        return ComfyModel(self.attention)

    def set_model_attn2_patch(self, patch: Any) -> None:
        self.patch = patch

    def set_model_attn2_replace(self, patch: Any, name: str, number: int) -> None:
        self.replace[name, number] = patch

    def run(self, x: Tensor, text: Tensor, kinds: list[int]) -> Tensor:
        options = {"n_heads": self.attention.heads, "cond_or_uncond": kinds}
        n, context, value = self.patch(x, text, text, options)
        q, k, v = self.attention.to_q(n), self.attention.to_k(context), self.attention.to_v(value)
        out: Tensor = self.attention.to_out[0](self.replace["input", 1](q, k, v, options))
        return out


def test_the_node_does_the_same_at_cfg_1() -> None:
    """With a negative prompt of another length; with unconditional rows in the batch it does nothing."""
    from diffusers.models.attention_processor import Attention

    file = Path(__file__).parents[2] / "comfyui" / "negative_guidance.py"
    spec = importlib.util.spec_from_file_location("negative_node", file)
    assert spec is not None
    assert spec.loader is not None
    node: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    torch.manual_seed(0)
    block = torch.nn.Module()
    block.attn2 = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)  # type: ignore[assignment]
    x, text, other = torch.randn(3, 5, 8), torch.randn(3, 6, 6), torch.randn(1, 3, 6)
    with torch.no_grad():
        plain = block.attn2(x, encoder_hidden_states=text)
        model = node.led_away(ComfyModel(block.attn2), other, 4.0, 1.2, 0.4)
        guided = NegativeGuidance(block, AttentionGuidance(4.0, 1.2, 0.4))
        guided.keep(lambda: block.attn2(x, encoder_hidden_states=other.repeat(3, 2, 1)))
        torch.testing.assert_close(model.run(x, text, [0]), block.attn2(x, encoder_hidden_states=text))
        torch.testing.assert_close(model.run(x, text, [0, 1]), plain)
    assert set(model.replace) == {("input", 0), ("input", 1), ("middle", 0), ("output", 0)}
    with pytest.raises(ValueError, match="cfg above 1"):
        node.led_away(SimpleNamespace(get_model_object=lambda name: object()), other, 1.0, 2.5, 0.5)
