"""The baseline: what a step of diffusers' LCM LoRA examples does, read from them, in our own words.

Read in `train_lcm_distill_lora_sd_wds.py` and `..._sdxl_wds.py` (commit 58eb52c). Two copies of the network, one with
the adapter; the autoencoder and the text encoders run in every step, the text encoders in the run's precision, the
autoencoder in it too on SD (on SDXL in fp32), some pictures at a time; the teacher is called twice, with and without
the prompt; the target is the student itself without gradient; AdamW and clipping go over all parameters of the network.
The loss is read back for the progress bar in every step. Nothing is cached, nothing compiled.

Where it departs from them: they open autocast around the teacher, and on SD around the target, without naming a type,
which is fp16 on a GPU and bf16 on a CPU whatever the run's own; here all calls are made in the run's precision, the one
that ours is timed in. In fp16 the loss is not scaled. Reading and decoding picture files is left out: their loader does
it elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""Layers that its LoRA adapts where nobody names others."""
GRID = 50
SCALING = 10.0
ENCODED = {"StableDiffusionXLPipeline": 8}
"""Pictures that the autoencoder takes at once, by pipeline; 32 elsewhere."""

States = dict[str, Any]
"""The network's inputs from prompts, by the names of its arguments."""


class LcmScript:
    """The example's state, and its step: with the encoders in it, or without.

    Args:
        folder: a Stable Diffusion pipeline, 1.x, 2.x or XL.
        pictures: [B, 3, H, W] in [-1, 1], the batch of every step.
        precision: that everything is called in.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        pictures: Tensor,
        prompts: Sequence[str],
        *,
        precision: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        import diffusers
        from peft import LoraConfig, get_peft_model

        self.device = torch.device(device)
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(
            self.device
        )
        self.pipe, self.vae, self.precision = pipe, pipe.vae, precision
        self.large = hasattr(pipe, "text_encoder_2")
        for encoder in [pipe.text_encoder, *([pipe.text_encoder_2] if self.large else [pipe.vae])]:
            torch.nn.Module.to(encoder, precision)  # diffusers' own `to` warns of modules that it may not have
        self.encoded = ENCODED.get(type(pipe).__name__, 32)
        self.noise = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        self.teacher = pipe.unet.requires_grad_(False)
        student = type(pipe.unet).from_pretrained(folder / "unet", use_safetensors=True).to(self.device).train()
        self.unet: Any = get_peft_model(student, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-6)
        self.pictures, self.prompts = pictures.to(self.device), list(prompts)
        alphas = self.noise.alphas_cumprod.to(self.device)
        self.alpha, self.sigma = alphas.sqrt(), (1 - alphas).sqrt()
        self.times = torch.arange(1, GRID + 1, device=self.device) * (1000 // GRID) - 1
        self.before = alphas[torch.clamp(self.times - 1000 // GRID, min=0)]
        with torch.no_grad():
            self.null = self.states([""] * len(self.prompts))

    def states(self, prompts: Sequence[str]) -> States:
        """Encode prompts to the network's inputs."""
        found = self.pipe.encode_prompt(list(prompts), device=self.device, num_images_per_prompt=1,
                                        do_classifier_free_guidance=False)  # fmt: skip
        condition: States = {"encoder_hidden_states": found[0]}
        if self.large:
            side = float(self.pictures.shape[-1])
            sizes = torch.tensor([side, side, 0, 0, side, side], device=self.device).expand(len(prompts), -1)
            condition["added_cond_kwargs"] = {"text_embeds": found[2], "time_ids": sizes}
        return condition

    def latents(self) -> Tensor:
        """A draw of the pictures' latents."""
        parts = self.pictures.to(self.vae.dtype).split(self.encoded)
        drawn = torch.cat([self.vae.encode(part).latent_dist.sample() for part in parts])
        return (drawn * self.vae.config.scaling_factor).to(self.precision)

    @torch.no_grad()
    def encode(self) -> tuple[Tensor, States]:
        """The batch as the network sees it."""
        return self.latents(), self.states(self.prompts)

    @cached_property
    def kept(self) -> tuple[Tensor, States]:
        """The batch, encoded once."""
        return self.encode()

    def let_encoders_go(self) -> None:
        """Keep the batch, and free what encoded it: `step` cannot be taken any more."""
        _ = self.kept
        del self.pipe, self.vae

    def step(self) -> None:
        """One optimiser step as the example takes it, encoders and all."""
        self.learn(*self.encode())

    def step_on_kept(self) -> None:
        """One optimiser step on what was encoded beforehand."""
        self.learn(*self.kept)

    def data(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 by a prediction of the noise."""
        shaped = (-1, 1, 1, 1)
        return (x - self.sigma[t].view(shaped) * output) / self.alpha[t].view(shaped)

    def jump(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """LCM's skip connection."""
        scaled = (SCALING * t).view(-1, 1, 1, 1)
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return skip * x + out * self.data(output, x, t)

    def learn(self, x_0: Tensor, states: States) -> None:
        """One optimiser step on latents and states."""
        mixed = torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)
        n = torch.randint(0, GRID, (len(x_0),), device=self.device)
        start = self.times[n]
        t = torch.clamp(start - 1000 // GRID, min=0)
        x = self.noise.add_noise(x_0, torch.randn_like(x_0), start)
        w = ((15 - 5) * torch.rand(len(x_0), device=self.device) + 5).view(-1, 1, 1, 1)
        with mixed:
            landed = self.jump(self.unet(x, start, **states).sample, x, start)
        with torch.no_grad():
            with mixed:
                with_prompt = self.teacher(x, start, **states).sample
                without = self.teacher(x, start, **self.null).sample
            x0 = self.data(with_prompt, x, start)
            x0 = x0 + w * (x0 - self.data(without, x, start))
            eps = with_prompt + w * (with_prompt - without)
            below = self.before[n].view(-1, 1, 1, 1)
            following = below.sqrt() * x0 + (1 - below).sqrt() * eps
            with mixed:
                wanted = self.jump(self.unet(following, t, **states).sample, following, t)
        loss = ((landed.float() - wanted.float()) ** 2 + 0.001**2).sqrt().mean() - 0.001
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.extra_conditioning = loss.detach().item()
