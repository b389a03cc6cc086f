"""What a training step of a large teacher takes, on paper: weights, operations and activations counted on meta tensors.

    python benchmarks/scale.py

No weights are made and nothing is computed: each network of the real shape takes a step on tensors without data, and
what it would hold at once and how much it would multiply is added up. Prints docs/guide/scale.md's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from perf.networks import xl_unet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep.backbones.families import FAMILIES
from fewstep.backbones.recompute import recompute_blocks
from fewstep.scorers.preprocess import Framing, frame
from fewstep.training.live_bytes import LiveBytes
from fewstep.training.roles import add_adapter

GIB = 2**30
RANK = 64


@dataclass(frozen=True)
class Shape:
    """A teacher.

    Attributes:
        network: makes its denoiser.
        call: calls it on a batch.
        family: its name in `families.FAMILIES`.
        latent: numbers of one latent at the size that is looked at.
        text: numbers of a caption's states.
        guided: whether the teacher is evaluated twice for guidance.
    """

    network: Callable[[], nn.Module]
    call: Callable[[nn.Module, int], Tensor]
    family: str
    latent: int
    text: int
    guided: bool


def sd15() -> nn.Module:
    """Return Stable Diffusion 1.5's UNet."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the rest are the class's defaults


def call_sd15(network: nn.Module, batch: int) -> Tensor:
    """Call it on a batch of 512 x 512 pixels."""
    x, text = torch.empty(batch, 4, 64, 64), torch.empty(batch, 77, 768)
    output: Tensor = network(x, torch.empty(batch), text, return_dict=False)[0]
    return output


def call_sdxl(network: nn.Module, batch: int) -> Tensor:
    """A batch of 1024 x 1024 pixels."""
    x, text = torch.empty(batch, 4, 128, 128), torch.empty(batch, 77, 2048)
    more = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
    output: Tensor = network(x, torch.empty(batch), text, added_cond_kwargs=more, return_dict=False)[0]
    return output


def sd3() -> nn.Module:
    """Stable Diffusion 3 medium's transformer."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192,
    )  # fmt: skip


def call_sd3(network: nn.Module, batch: int) -> Tensor:
    """A batch of 1024 x 1024 pixels: 4096 tokens beside 333 of the prompt."""
    x, text = torch.empty(batch, 16, 128, 128), torch.empty(batch, 333, 4096)
    output: Tensor = network(x, text, torch.empty(batch, 2048), torch.empty(batch), return_dict=False)[0]
    return output


def flux() -> nn.Module:
    """Flux dev's transformer."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def call_flux(network: nn.Module, batch: int) -> Tensor:
    """A batch of 1024 x 1024 pixels: 4096 tokens beside 512 of the prompt."""
    output: Tensor = network(
        hidden_states=torch.empty(batch, 4096, 64), timestep=torch.empty(batch), guidance=torch.empty(batch),
        pooled_projections=torch.empty(batch, 768), encoder_hidden_states=torch.empty(batch, 512, 4096),
        txt_ids=torch.empty(512, 3), img_ids=torch.empty(4096, 3), return_dict=False,
    )[0]  # fmt: skip
    return output


SHAPES = {
    "SD 1.5": Shape(sd15, call_sd15, "StableDiffusionPipeline", 4 * 64 * 64, 77 * 768, True),
    "SDXL": Shape(xl_unet, call_sdxl, "StableDiffusionXLPipeline", 4 * 128 * 128, 77 * 2048 + 1280, True),
    "SD 3": Shape(sd3, call_sd3, "StableDiffusion3Pipeline", 16 * 128 * 128, 333 * 4096 + 2048, True),
    "Flux dev": Shape(flux, call_flux, "FluxPipeline", 16 * 128 * 128, 512 * 4096 + 768, False),
}


@dataclass
class Products:
    """Operations of attention, which the library's own counter does not see."""

    count: float = 0.0


class Attention(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: its inputs, its output, a number a row. Counts its products."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, products: Products) -> Tensor:
        """The output's shape."""
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32))
        ctx.products = products
        products.count += 4 * q.numel() * k.shape[-2]
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Five products where the forward pass has two."""
        q, k, v, *_ = ctx.saved_tensors
        ctx.products.count += 10 * q.numel() * k.shape[-2]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


@contextmanager
def on_paper() -> Iterator[Products]:
    """Meta tensors in bf16, attention as fused kernels do it."""
    functional: Any = nn.functional
    fused, kind = functional.scaled_dot_product_attention, torch.get_default_dtype()
    products = Products()
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, products
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield products
    finally:
        functional.scaled_dot_product_attention = fused
        torch.set_default_dtype(kind)


@dataclass(frozen=True)
class Counted:
    """What one sample takes.

    Attributes:
        base, adapter: numbers of the frozen network and of an adapter.
        forward, both: operations of a call, and of a call with its backward pass.
        held: bytes that a step with teacher calls holds at most beside its weights.
        folded: the same with gradient checkpointing.
    """

    base: int
    adapter: int
    forward: float
    both: float
    held: int
    folded: int


def operations(network: nn.Module, shape: Shape, products: Products, *, backward: bool) -> float:
    """Of one sample's call, with its backward pass or without."""
    before = products.count
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = shape.call(network, 1)
        if backward:
            output.backward(torch.empty_like(output))
    return counter.get_total_flops() + products.count - before


def step_holds(network: nn.Module, shape: Shape, batch: int) -> int:
    """Bytes that a step holds at most beside its weights.

    The student is called, then the teacher and the target beside what the student's call keeps; then the backward pass,
    with what it computes again.
    """
    network.zero_grad(set_to_none=True)
    with LiveBytes() as held:
        output = shape.call(network, batch)
        with torch.no_grad():
            shape.call(network, 2 * batch if shape.guided else batch)
            shape.call(network, batch)
        output.backward(torch.empty_like(output))
    return held.peak


@dataclass(frozen=True)
class Preferred:
    """A micro-batch of one sample of TLCM's preference stage, in bytes.

    Attributes:
        fixed: weights of the frozen decoder and of a scorer on CLIP-H, fp32.
        held: the most that the step holds beside all weights.
        plain: the same with a decoder that keeps its activations.
    """

    fixed: int
    held: int
    plain: int


def preferred() -> Preferred:
    """SDXL at 1024 x 1024 pixels, with `student.checkpointing`: jumps, a decoded picture, and two scores of it."""
    from diffusers import AutoencoderKL
    from transformers import CLIPConfig, CLIPModel

    shape, held = SHAPES["SDXL"], []
    with on_paper():
        network = shape.network().requires_grad_(False)
        add_adapter(network, "student", RANK, RANK, list(FAMILIES[shape.family].targets), 0)
        network.to(torch.bfloat16).enable_gradient_checkpointing()  # type: ignore[operator]
        vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        config = CLIPConfig(vision_config=vision | {"patch_size": 14}, text_config=text, projection_dim=1024)
        scorer = CLIPModel(config).float().requires_grad_(False)
        blocks = {"up_block_types": ("UpDecoderBlock2D",) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks)
        vae.float().requires_grad_(False)
        for again in (False, True):
            if again:
                recompute_blocks(vae.decoder)
            with LiveBytes() as counted:
                output = shape.call(network, 1)
                with torch.no_grad():
                    shape.call(network, 2)
                    shape.call(network, 1)
                pictures = vae.decode(output.float(), return_dict=False)[0]
                seen = frame(pictures, Framing(224))
                likes = [
                    scorer.vision_model(pixel_values=seen).pooler_output for _ in range(2)
                ]  # own prompt and wrong one
                torch.autograd.backward(likes, [torch.empty_like(one) for one in likes])
            held.append(counted.peak)
            network.zero_grad(set_to_none=True)
        weights = [*vae.parameters(), *scorer.parameters()]
    return Preferred(sum(weight.nbytes for weight in weights), held[1], held[0])


def sample_holds(network: nn.Module, shape: Shape) -> int:
    """What of that each sample adds; the adapter's gradients are everybody's."""
    return step_holds(network, shape, 2) - step_holds(network, shape, 1)


def counted(shape: Shape) -> Counted:
    """A network of the shape with an adapter of rank 64, counted."""
    with on_paper() as products:
        network = shape.network()
        base = sum(weight.numel() for weight in network.parameters())
        forward = operations(network.requires_grad_(False), shape, products, backward=False)
        add_adapter(network, "student", RANK, RANK, list(FAMILIES[shape.family].targets), 0)
        adapter = sum(weight.numel() for weight in network.parameters()) - base
        network.to(torch.bfloat16)
        both = operations(network, shape, products, backward=True)
        held = sample_holds(network, shape)
        network.enable_gradient_checkpointing()  # type: ignore[operator]
        return Counted(base, adapter, forward, both, held, sample_holds(network, shape))


GPUS = {
    "RTX 3090": (24, 71),
    "RTX 4090": (24, 165),
    "L40S": (48, 362),
    "A100": (80, 312),
    "H100": (80, 989),
    "H200": (141, 989),
}
"""GB of memory, and TFLOP a second of dense bf16 products, from their data sheets."""
REACHED = 0.4
"""Share of that which a step is taken to reach."""
ASIDE = 1.5
"""GiB for the CUDA context and workspaces."""
BYTES = {"bf16": 2.0, "8bit": 1.02, "4bit": 0.56}
"""Bytes a frozen weight: bitsandbytes' scales are counted, and what it leaves wide is not."""
LEARNS = 4 + 4 + 8 + 4
"""Bytes a learned weight: itself, its gradient, AdamW's moments, its average, all fp32."""


def fits(memory: float, one: Counted, kept: float, sample: int) -> str:
    """How many samples a micro-batch can have on a GPU, or a dash."""
    left = memory * 1e9 / GIB - ASIDE - (kept * one.base + LEARNS * one.adapter) / GIB
    count = int(left / (sample / GIB))
    return str(count) if count > 0 else "-"


def budget(name: str, shape: Shape, one: Counted) -> None:
    """Print which micro-batches fit on which GPU, and how long a sample takes there."""
    evaluations = 2 if shape.guided else 1
    stored = one.both + one.forward
    online = stored + evaluations * one.forward
    print(f"\n### {name}\n\n| GPU | " + " | ".join(f"{kind}, checkpointing" for kind in BYTES), end="")
    print(" | bf16 | stored | online | online, checkpointing | teacher's samples an hour |")
    print("| --- " * (len(BYTES) + 6) + "|")
    for gpu, (memory, peak) in GPUS.items():
        counts = [fits(memory, one, kept, one.folded) for kept in BYTES.values()]
        counts.append(fits(memory, one, BYTES["bf16"], one.held))
        speed = REACHED * peak * 1e12
        rates = [speed / stored, speed / online, speed / (online + one.forward)]
        trajectories = f"{speed / (50 * evaluations * one.forward) * 3600:.0f}"
        if memory * 1e9 / GIB < ASIDE + 2 * one.base / GIB:  # a synthesis in bf16 keeps its teacher in it
            trajectories = "-"
        speeds = [f"{rate:.2f}" for rate in rates]
        if not shape.guided:  # its trajectories cannot be stored: guidance is an input
            speeds[0] = "-"
        cells = [*counts, *speeds, trajectories]
        print(f"| {gpu}, {memory} GB | " + " | ".join(cells) + " |")
    full, teacher = LEARNS * one.base / 1e9, one.base / 1e9
    print(
        f"\nfull fine-tuning: {full:.0f} GB of weights, gradients, moments, averages; of teacher {2 * teacher:.0f} GB"
    )
    print(f"in bf16, {4 * teacher:.0f} split over processes (loop.shard keeps it in fp32)")


def main() -> None:
    """Print what was counted, and what follows for each GPU."""
    print(f"LoRA rank {RANK} on the family's own layers, pictures of the trained size, one sample, bf16\n")
    heads = [
        "",
        "frozen weights",
        "adapter",
        "F",
        "F and backward",
        "a step holds",
        "checkpointing",
        "latent",
        "caption",
    ]
    print("| " + " | ".join(heads) + " |")
    print("| --- " * 9 + "|")
    found = {name: counted(shape) for name, shape in SHAPES.items()}
    for name, one in found.items():
        shape = SHAPES[name]
        print(
            f"| {name} | {one.base / 1e9:.2f} B, {2 * one.base / GIB:.1f} GiB in bf16 | {one.adapter / 1e6:.0f} M "
            f"| {one.forward / 1e12:.1f} TFLOP | {one.both / one.forward:.2f} F | {one.held / GIB:.1f} GiB "
            f"| {one.folded / GIB:.2f} GiB | {shape.latent * 4 / 2**10:.0f} KiB | {shape.text * 2 / 2**20:.2f} MiB |"
        )
    for name, one in found.items():
        budget(name, SHAPES[name], one)
    step, own = preferred(), found["SDXL"]
    weights = (2 * own.base + LEARNS * own.adapter + step.fixed) / GIB
    print(
        f"\nSDXL, preference, a micro-batch of one: {weights:.1f} GiB of weights, gradients, moments and averages, "
        f"{step.held / GIB:.1f} GiB held ({step.plain / GIB:.1f} where the decoder keeps its activations), "
        f"{weights + step.held / GIB:.1f} GiB in all"
    )


if __name__ == "__main__":
    main()
