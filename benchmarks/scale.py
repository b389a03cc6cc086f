"""What a training step of a large teacher takes, on paper: weights, operations and activations counted on meta tensors.

    python benchmarks/scale.py

No weights are made and nothing is computed: each network of the real shape is called once on tensors without data, and
what it would save for its backward pass and how much it would multiply is added up. Prints docs/scale.md's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from perf.networks import xl_unet
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fewstep.families import FAMILIES
from fewstep.roles import add_adapter

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
        guided: whether the teacher is asked twice for guidance.
    """

    network: Callable[[], nn.Module]
    call: Callable[[nn.Module, int], Tensor]
    family: str
    latent: int
    text: int
    guided: bool


def call_sdxl(network: nn.Module, batch: int) -> Tensor:
    """A batch of 1024 x 1024 pixels."""
    x, text = torch.empty(batch, 4, 128, 128), torch.empty(batch, 77, 2048)
    more = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
    said: Tensor = network(x, torch.empty(batch), text, added_cond_kwargs=more, return_dict=False)[0]
    return said


def flux() -> nn.Module:
    """Flux dev's transformer."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def call_flux(network: nn.Module, batch: int) -> Tensor:
    """A batch of 1024 x 1024 pixels: 4096 tokens beside 512 of the prompt."""
    said: Tensor = network(
        hidden_states=torch.empty(batch, 4096, 64), timestep=torch.empty(batch), guidance=torch.empty(batch),
        pooled_projections=torch.empty(batch, 768), encoder_hidden_states=torch.empty(batch, 512, 4096),
        txt_ids=torch.empty(512, 3), img_ids=torch.empty(4096, 3), return_dict=False,
    )[0]  # fmt: skip
    return said


SHAPES = {
    "SDXL": Shape(xl_unet, call_sdxl, "StableDiffusionXLPipeline", 4 * 128 * 128, 77 * 2048 + 1280, True),
    "Flux dev": Shape(flux, call_flux, "FluxPipeline", 16 * 128 * 128, 512 * 4096 + 768, False),
}


class Attention(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: its inputs, its output, a number a row. Counts its products."""

    flops = 0

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output's shape."""
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32))
        Attention.flops += 4 * q.numel() * k.shape[-2]
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, ...]:
        """Five products where the forward pass has two."""
        q, k, v, *_ = ctx.saved_tensors
        Attention.flops += 10 * q.numel() * k.shape[-2]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Held:
    """A saved tensor, counted as long as autograd keeps it; one storage once."""

    live: dict[int, int] = {}  # noqa: RUF012  (what all of them share)
    bytes = 0
    peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        whole = tensor if tensor._base is None else tensor._base
        self.key = 0 if isinstance(whole, nn.Parameter) else tensor.untyped_storage()._cdata
        if self.key:
            seen = Held.live.get(self.key, 0)
            Held.live[self.key] = seen + 1
            if not seen:
                Held.bytes += tensor.untyped_storage().nbytes()
                Held.peak = max(Held.peak, Held.bytes)

    def __del__(self) -> None:
        if self.key:
            Held.live[self.key] -= 1
            if not Held.live[self.key]:
                Held.bytes -= self.tensor.untyped_storage().nbytes()


@contextmanager
def on_paper() -> Iterator[None]:
    """Meta tensors in bf16, attention as fused kernels do it."""
    functional: Any = nn.functional
    fused, kind = functional.scaled_dot_product_attention, torch.get_default_dtype()
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: Attention.apply(query, key, value)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        functional.scaled_dot_product_attention = fused
        torch.set_default_dtype(kind)


@dataclass(frozen=True)
class Counted:
    """What one sample takes.

    Attributes:
        base, adapter: numbers of the frozen network and of an adapter.
        forward, both: operations of a call, and of a call with its backward pass.
        saved: bytes that the call keeps at most for its backward pass.
        folded: the same with gradient checkpointing.
    """

    base: int
    adapter: int
    forward: float
    both: float
    saved: int
    folded: int


def operations(network: nn.Module, shape: Shape, *, backward: bool) -> float:
    """Of one sample's call, with its backward pass or without."""
    Attention.flops = 0
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        said = shape.call(network, 1)
        if backward:
            said.backward(torch.empty_like(said))
    return float(counter.get_total_flops() + Attention.flops)


def kept(network: nn.Module, shape: Shape) -> int:
    """Bytes of activations that a call with its backward pass holds at most, one sample."""
    Held.bytes = Held.peak = 0
    Held.live.clear()
    with saved_tensors_hooks(Held, lambda held: held.tensor):
        said = shape.call(network, 1)
        said.backward(torch.empty_like(said))
    return Held.peak


def counted(shape: Shape) -> Counted:
    """A network of the shape with an adapter of rank 64, counted."""
    with on_paper():
        network = shape.network()
        base = sum(weight.numel() for weight in network.parameters())
        forward = operations(network.requires_grad_(False), shape, backward=False)
        add_adapter(network, "student", RANK, RANK, list(FAMILIES[shape.family].targets), 0)
        adapter = sum(weight.numel() for weight in network.parameters()) - base
        network.to(torch.bfloat16)
        both = operations(network, shape, backward=True)
        saved = kept(network, shape)
        network.enable_gradient_checkpointing()  # type: ignore[operator]
        return Counted(base, adapter, forward, both, saved, kept(network, shape))


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
"""GiB for the CUDA context, workspaces and the largest buffers that are not kept."""
BYTES = {"bf16": 2.0, "8bit": 1.02, "4bit": 0.56}
"""Bytes a frozen weight: bitsandbytes' scales are counted, and what it leaves wide is not."""
LEARNS = 4 + 4 + 8 + 4
"""Bytes a learned weight: itself, its gradient, AdamW's moments, its average, all fp32."""


def fits(memory: float, one: Counted, held: float, kept_for: int) -> str:
    """How many samples a micro-batch can have on a GPU, or a dash."""
    left = memory * 1e9 / GIB - ASIDE - (held * one.base + LEARNS * one.adapter) / GIB
    count = int(left / (kept_for / GIB))
    return str(count) if count > 0 else "-"


def budget(name: str, shape: Shape, one: Counted) -> None:
    """Print which micro-batches fit on which GPU, and how long a sample takes there."""
    asked = 2 if shape.guided else 1
    stored = one.both + one.forward
    online = stored + asked * one.forward
    print(f"\n### {name}\n\n| GPU | " + " | ".join(f"{kind}, checkpointing" for kind in BYTES), end="")
    print(" | bf16 | stored | online | online, checkpointing | teacher's samples an hour |")
    print("| --- " * (len(BYTES) + 6) + "|")
    for gpu, (memory, peak) in GPUS.items():
        counts = [fits(memory, one, held, one.folded) for held in BYTES.values()]
        counts.append(fits(memory, one, BYTES["bf16"], one.saved))
        speed = REACHED * peak * 1e12
        rates = [speed / stored, speed / online, speed / (online + one.forward)]
        walks = speed / (50 * 2 * one.forward if shape.guided else 50 * one.forward) * 3600
        told = [f"{rate:.2f}" for rate in rates]
        if not shape.guided:  # its walks cannot be stored: guidance is told to it
            told[0] = "-"
        cells = [*counts, *told, f"{walks:.0f}"]
        print(f"| {gpu}, {memory} GB | " + " | ".join(cells) + " |")
    full, teacher = LEARNS * one.base / 1e9, 2 * one.base / 1e9
    print(f"\nfull fine-tuning: {full:.0f} GB of weights, gradients, moments, averages; {teacher:.0f} GB of teacher")


def main() -> None:
    """Print what was counted, and what follows for each GPU."""
    print(f"LoRA rank {RANK} on the family's own layers, 1024 x 1024 pixels, one sample, bf16\n")
    heads = ["", "frozen weights", "adapter", "F", "F and backward", "kept", "checkpointing", "latent", "caption"]
    print("| " + " | ".join(heads) + " |")
    print("| --- " * 9 + "|")
    found = {name: counted(shape) for name, shape in SHAPES.items()}
    for name, one in found.items():
        shape = SHAPES[name]
        print(
            f"| {name} | {one.base / 1e9:.2f} B, {2 * one.base / GIB:.1f} GiB in bf16 | {one.adapter / 1e6:.0f} M "
            f"| {one.forward / 1e12:.1f} TFLOP | {one.both / one.forward:.2f} F | {one.saved / GIB:.1f} GiB "
            f"| {one.folded / GIB:.1f} GiB | {shape.latent * 4 / 2**10:.0f} KiB | {shape.text * 2 / 2**20:.2f} MiB |"
        )
    for name, one in found.items():
        budget(name, SHAPES[name], one)


if __name__ == "__main__":
    main()
