"""Negative prompts without guidance: normalised attention guidance (NAG, arXiv 2505.21179).

A few-step student is sampled without guidance, so that its network is never called with a negative prompt. NAG leads
the outputs of cross-attention away from those to the negative prompt, for the price of a second cross-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.loading import EnoughError
from fewstep.common.arguments import checked
from fewstep.common.errors import UserError

CROSS = "attn2"
"""Name of cross-attention in diffusers' transformer blocks."""
TEXT = ("encoder_hidden_states", "attention_mask")
"""Arguments of a cross-attention that belong to the prompt."""


@dataclass(frozen=True)
class AttentionGuidance:
    """Strengths of NAG.

    Attributes:
        scale: phi, of the extrapolation; the released code's `nag_scale` is phi + 1.
        tau: most that the length of an attention's output grows by.
        alpha: share of the guided output.
    """

    scale: float = 3.0
    tau: float = 2.5
    alpha: float = 0.5

    def blend(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return alpha z^ + (1 - alpha) z+, z^ = z~ min(|z~|, tau |z+|)/|z~|, z~ = z+ + phi (z+ - z-) (algorithm 1).

        z+, z- are the outputs of attention before its last layer, [B, tokens, width]; lengths are L1 norms over the
        width.
        """
        away = positive + self.scale * (positive - negative)
        ratio = away.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True).clamp(min=1e-7)
        limited = away * (ratio.clamp(max=self.tau) / ratio.clamp(min=1e-7))
        return self.alpha * limited + (1 - self.alpha) * positive


class NegativeGuidance:
    """Leads a network's cross-attention away from a negative prompt while it is on.

    The prompt's inputs of cross-attention are kept from a call of the network with the negative prompt (`keep`), which
    is stopped at the first of them. They are the same in all blocks.

    Raises:
        UserError: a network without cross-attention, whose blocks attend to text and picture together.
    """

    def __init__(self, network: nn.Module, guidance: AttentionGuidance | None = None) -> None:
        self.guidance = guidance or AttentionGuidance()
        self.kept: dict[str, Tensor] | None = None
        attentions: list[Any] = [part for name, part in network.named_modules() if name.split(".")[-1] == CROSS]
        if not attentions:
            kind = type(network).__name__
            raise UserError(
                f"negative_prompt has no effect on a {kind}, which has no cross-attention; remove it",
                field="negative_prompt",
            )
        self.handles = [
            handle
            for part in attentions
            for handle in (
                part.register_forward_pre_hook(self._double, with_kwargs=True),
                part.to_out[0].register_forward_pre_hook(self._blend),
            )
        ]
        self.keeping = self._doubled = False

    def keep(self, run: Callable[[], object]) -> None:
        """Keep the prompt's inputs of `run`, a call of the network with the negative prompt."""
        self.keeping = True
        try:
            with torch.no_grad(), suppress(EnoughError):
                run()
        finally:
            self.keeping = False

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def _double(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Let an attention attend to both prompts: rows with the prompt, then rows with the negative one."""
        text = {name: kwargs[name] for name in TEXT if kwargs.get(name) is not None}
        if "encoder_hidden_states" not in text:
            return None
        if self.keeping:
            self.kept = {name: value[:1].clone() for name, value in text.items()}
            raise EnoughError
        if self.kept is None:
            return None
        rows = {name: self.kept[name].to(value).expand(len(value), *value.shape[1:]) for name, value in text.items()}
        both = {name: torch.cat([value, rows[name]]) for name, value in text.items()}
        self._doubled = True
        return (torch.cat([args[0], args[0]]), *args[1:]), {**kwargs, **both}

    def _blend(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self._doubled:
            return None
        self._doubled = False
        return (self.guidance.blend(*args[0].chunk(2)), *args[1:])


@contextmanager
def leading_away(
    network: nn.Module, run: Callable[[], object], guidance: AttentionGuidance | None = None
) -> Iterator[None]:
    """Lead a network's calls away from a negative prompt until the block ends; `run` calls it with that prompt."""
    away = NegativeGuidance(network, guidance)
    try:
        away.keep(run)
        yield
    finally:
        away.close()


@checked
def lead_away(
    pipe: Any, negative_prompt: str, *, scale: float = 3.0, tau: float = 2.5, alpha: float = 0.5
) -> NegativeGuidance:
    """Lead a diffusers pipeline's pictures away from a negative prompt, without guidance, until `close` is called.

    Then call `pipe(prompt, guidance_scale=0)`, which any scheduler may sample.

    Args:
        pipe: a pipeline whose network has cross-attention (Stable Diffusion, XL, PixArt, SANA).
        negative_prompt: text to lead away from.
        scale, tau, alpha: see `AttentionGuidance`.

    Raises:
        UserError: a network without cross-attention.
    """
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    away = NegativeGuidance(network, AttentionGuidance(scale, tau, alpha))
    encoded = pipe.encode_prompt(
        negative_prompt, device=network.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    text = {"encoder_hidden_states": encoded[0]}
    if hasattr(pipe, "transformer"):
        text["encoder_attention_mask"] = encoded[1]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if away.kept is None and not away.keeping:  # the first call's other inputs have the shapes that are needed
            rows = len(kwargs["encoder_hidden_states"])
            wide = {name: value.expand(rows, *value.shape[1:]) for name, value in text.items()}
            away.keep(lambda: module(*args, **{**kwargs, **wide}))

    away.handles.append(network.register_forward_pre_hook(before, with_kwargs=True))
    return away
