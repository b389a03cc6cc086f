"""Which pretrained pipelines are supported, and what each is made of. Light: read before torch is imported.

A family is a row here and one small module in `fewstep.backbones`; `docs/backbones.md` says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass

UNET_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""The layers of a UNet that LCM-LoRA, TCD and TLCM adapt (suffixes of module names)."""


@dataclass(frozen=True)
class Family:
    """One kind of pipeline folder.

    Attributes:
        kind: its name here.
        backbone: where its class is, MODULE:CLASS.
        network: the component that denoises.
        encoders, tokenizers: the components that read prompts, each encoder with the tokenizer at its place.
        targets: the layers that a LoRA adapts where a config names none, by the ends of their names.
        classes: the classes that the denoising network may be of.
        sample_size: latent points a side at the trained size, for networks whose config does not say.
        packed: latent points that the network takes as one, in its channels.
    """

    kind: str
    backbone: str
    network: str
    encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    targets: tuple[str, ...]
    classes: tuple[str, ...]
    sample_size: int = 0
    packed: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The components that pictures are drawn with."""
        return (self.network, "vae", "scheduler", *self.encoders, *self.tokenizers)

    @property
    def weighed(self) -> tuple[str, ...]:
        """Those with weights."""
        return (self.network, "vae", *self.encoders)

    @property
    def readers(self) -> tuple[str, ...]:
        """Those that decide what a prompt becomes."""
        return (*self.encoders, *self.tokenizers)


SD = Family(
    kind="sd",
    backbone="fewstep.backbones.sd:StableDiffusion",
    network="unet",
    encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    targets=UNET_TARGETS,
    classes=("UNet2DConditionModel",),
)
SDXL = Family(
    kind="sdxl",
    backbone="fewstep.backbones.sdxl:StableDiffusionXL",
    network="unet",
    encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    targets=UNET_TARGETS,
    classes=("UNet2DConditionModel",),
)

FAMILIES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
}
"""Pipeline class -> family."""
