"""Which pretrained pipelines are supported, and what each is made of. Light: read before torch is imported.

A family is a row here and one small module in `fewstep.backbones`; see `docs/guide/adding-a-backbone.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

UNET_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""The layers of a UNet that LCM-LoRA, TCD and TLCM adapt (suffixes of module names)."""
GUIDANCE_KEY = "time_embedding.cond_proj.weight"
"""The weight of a UNet's guidance embedding, diffusers' `time_cond_proj_dim`."""
GUIDANCE_WIDTH = 256
"""Width of the sinusoid of omega in students that have one: LCM's."""
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""The layers of a diffusion transformer that are adapted: attention and what follows it."""
JOINT_TARGETS = (
    *ATTENTION_TARGETS,
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2"),
)
"""The same where pictures and prompts go through one attention, each with layers of its own."""


@dataclass(frozen=True)
class Family:
    """One kind of pipeline folder.

    Attributes:
        kind: its name here.
        backbone: where its class is, MODULE:CLASS.
        network: the denoiser's component.
        encoders: the text encoders; each has a tokenizer of the same number.
        targets: the layers that a LoRA adapts by default, by the ends of their names.
        classes: the classes that the denoiser may be of.
        sample_size: latent points a side at the trained size, for networks whose config lacks it.
        packed: latent points that the network takes as one, in its channels.
        variance: whether the network may output a variance too, as a second half of its channels.
    """

    kind: str
    backbone: str
    network: str
    encoders: tuple[str, ...]
    targets: tuple[str, ...]
    classes: tuple[str, ...]
    sample_size: int = 0
    packed: int = 1
    variance: bool = False

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers of the text encoders, in their order."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """The components that pictures are drawn with."""
        return (self.network, "vae", "scheduler", *self.encoders, *self.tokenizers)

    @property
    def weighed(self) -> tuple[str, ...]:
        """The components with weights."""
        return (self.network, "vae", *self.encoders)

    @property
    def readers(self) -> tuple[str, ...]:
        """The components that encode prompts."""
        return (*self.encoders, *self.tokenizers)


SD = Family(
    kind="sd",
    backbone="fewstep.backbones.sd:StableDiffusion",
    network="unet",
    encoders=("text_encoder",),
    targets=UNET_TARGETS,
    classes=("UNet2DConditionModel",),
)
SDXL = Family(
    kind="sdxl",
    backbone="fewstep.backbones.sdxl:StableDiffusionXL",
    network="unet",
    encoders=("text_encoder", "text_encoder_2"),
    targets=UNET_TARGETS,
    classes=("UNet2DConditionModel",),
)
PIXART = Family(
    kind="pixart",
    backbone="fewstep.backbones.pixart:PixArt",
    network="transformer",
    encoders=("text_encoder",),
    targets=ATTENTION_TARGETS,
    classes=("PixArtTransformer2DModel", "Transformer2DModel"),
    variance=True,
)
SD3 = Family(
    kind="sd3",
    backbone="fewstep.backbones.sd3:StableDiffusion3",
    network="transformer",
    encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    targets=JOINT_TARGETS,
    classes=("SD3Transformer2DModel",),
)
FLUX = Family(
    kind="flux",
    backbone="fewstep.backbones.flux:Flux",
    network="transformer",
    encoders=("text_encoder", "text_encoder_2"),
    targets=(*JOINT_TARGETS, "proj_mlp", "proj_out"),
    classes=("FluxTransformer2DModel",),
    sample_size=128,
    packed=4,
)
SANA = Family(
    kind="sana",
    backbone="fewstep.backbones.sana:Sana",
    network="transformer",
    encoders=("text_encoder",),
    targets=("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"),
    classes=("SanaTransformer2DModel",),
    variance=True,
)

CONSISTENCY = "LatentConsistencyModelPipeline"
"""Stable Diffusion's parts around a UNet that embeds its guidance."""
FAMILIES = {
    "StableDiffusionPipeline": SD,
    CONSISTENCY: SD,
    "StableDiffusionXLPipeline": SDXL,
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
    "SanaPipeline": SANA,
}
"""Pipeline class -> family."""
