"""Pipelines of every supported family with tiny random networks of the real classes. Not a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer(folder: Path) -> Any:
    """A byte-pair tokenizer of single letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def piece_tokenizer(kind: str) -> Any:
    """A tokenizer of single letters, of T5's or Gemma's class."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"] if kind.startswith("T5") else ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {piece: i for i, piece in enumerate([*special, "▁", *LETTERS, *"0123456789.,:-'\"()"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    end = "</s>" if kind.startswith("T5") else "<eos>"
    shape = f"$A {end}" if kind.startswith("T5") else "<bos> $A"
    named = [(word, vocabulary[word]) for word in special if word in shape]
    made.post_processor = processors.TemplateProcessing(single=shape, special_tokens=named)
    words = {"pad_token": "<pad>", "eos_token": end, "unk_token": "<unk>"}
    if not kind.startswith("T5"):
        words["bos_token"] = "<bos>"
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=512 if kind.startswith("T5") else 4096, **words
    )
    return plain, len(vocabulary)


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""A chat's template, of the shape of Qwen3's."""


def qwen_tokenizer() -> tuple[Any, int]:
    """Return a tokenizer of single bytes, of Qwen2's class, and the size of its vocabulary."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: i for i, piece in enumerate([*letters, "re", "red", *special])}
    made = Qwen2Tokenizer(
        vocab=vocabulary, merges=[("r", "e"), ("re", "d")], additional_special_tokens=special[1:],
        eos_token="<|im_end|>", model_max_length=4096, chat_template=CHAT,
    )  # fmt: skip
    return made, len(vocabulary)


def qwen3_text(vocabulary: int, width: int = 16, layers: int = 3, kind: str = "Qwen3Model") -> Any:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=16, num_hidden_layers=layers, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def clip_text(projected: bool, width: int = 32, pooled: int = 32) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(LETTERS) * 2 + 4, hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=pooled,
        bos_token_id=54, eos_token_id=55, pad_token_id=55,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_text(vocabulary: int, width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0)
    )


def kl_vae(channels: int = 4, *, shift: float | None = None, scale: float = 0.18215) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), latent_channels=channels, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64,
        shift_factor=shift, scaling_factor=scale,
    )  # fmt: skip


def save(pipe: Any, folder: Path) -> Path:
    """Write it as real folders are: the networks' last layers are not zero."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    places = ("conv_out", "proj_out", "all_final_layer.2-1.linear", "final_layer.linear")
    last = next(layer for name, layer in network.named_modules() if name in places)
    with torch.no_grad():
        last.weight.normal_(0, 0.2)
        for name, parameter in network.named_parameters():
            if name.startswith(("txt_in", "text_fusion.projector")) and parameter.dim() > 1:
                parameter.normal_(0, 1)  # so that prompts matter
    pipe.save_pretrained(str(folder))
    return folder


def at_side(folder: Path, side: int = 8) -> Path:
    """Write the trained size of a transformer whose config is silent; the real ones' pictures are of 1024 pixels."""
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": side}), encoding="utf-8")
    return folder


def sd(folder: Path, prediction: str = "epsilon", *, zero_snr: bool = False) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr, clip_sample=False,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=kl_vae(), text_encoder=clip_text(False), tokenizer=clip_tokenizer(folder.parent / "tok"), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return save(pipe, folder)


def sdxl(folder: Path, *, zeros: bool = True) -> Path:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=80, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=kl_vae(scale=0.13025), text_encoder=clip_text(False), text_encoder_2=clip_text(True, 48),
        tokenizer=clip_tokenizer(folder.parent / "tok"), tokenizer_2=clip_tokenizer(folder.parent / "tok2"), unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip
    return save(pipe, folder)


def lcm(folder: Path, scheduler: str = "LCMScheduler", kind: str = "LatentConsistencyModelPipeline") -> Path:
    """Stable Diffusion whose UNet embeds its guidance, as LCM's full weights do; `kind` may be SDXL's class."""
    import diffusers

    base = (sdxl if kind.startswith("StableDiffusionXL") else sd)(folder.parent / f"{folder.name}-plain")
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    torch.manual_seed(7)
    unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "time_cond_proj_dim": 32})
    unet.load_state_dict(pipe.unet.state_dict(), strict=False)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.normal_(0, 0.5)
        unet.conv_out.weight.normal_(0, 0.2)
    made = getattr(diffusers, scheduler)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    if "clip_sample" in made.config:
        made.register_to_config(clip_sample=False)
    parts = {name: part for name, part in pipe.components.items() if name not in ("unet", "scheduler")}
    more = {"add_watermarker": False} if kind.startswith("StableDiffusionXL") else {"requires_safety_checker": False}
    getattr(diffusers, kind)(**parts, unet=unet, scheduler=made, **more).save_pretrained(folder)
    return folder


def pixart(folder: Path, kind: str = "PixArtSigmaPipeline", *, sizes: bool = False) -> Path:
    import diffusers

    torch.manual_seed(3)
    tokenizer, vocabulary = piece_tokenizer("T5Tokenizer")
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=12, num_attention_heads=4, caption_channels=32,
        in_channels=4, cross_attention_dim=48, out_channels=8, use_additional_conditions=sizes,
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        tokenizer=tokenizer, text_encoder=t5_text(vocabulary), vae=kl_vae(), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )  # fmt: skip
    return save(pipe, folder)


def sd3(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(4)
    tokenizer, vocabulary = piece_tokenizer("T5Tokenizer")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=12,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(16, shift=0.0609, scale=1.5305), text_encoder=clip_text(True), text_encoder_2=clip_text(True),
        text_encoder_3=t5_text(vocabulary, 64), tokenizer=clip_tokenizer(folder.parent / "tok"),
        tokenizer_2=clip_tokenizer(folder.parent / "tok2"), tokenizer_3=tokenizer,
    )  # fmt: skip
    return save(pipe, folder)


def flux(folder: Path, *, guidance: bool = True) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(5)
    tokenizer, vocabulary = piece_tokenizer("T5Tokenizer")
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),  # dev's; schnell has none
        vae=kl_vae(16, shift=0.1159, scale=0.3611),
        text_encoder=clip_text(False), tokenizer=clip_tokenizer(folder.parent / "tok"),
        text_encoder_2=t5_text(vocabulary), tokenizer_2=tokenizer, transformer=transformer,
    )  # fmt: skip
    return at_side(save(pipe, folder))


def sana(folder: Path) -> Path:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(6)
    tokenizer, vocabulary = piece_tokenizer("GemmaTokenizer")
    transformer = SanaTransformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=8,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    text = Gemma2Model(config)
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    pipe = SanaPipeline(tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=transformer, scheduler=scheduler)
    return save(pipe, folder)


def z_image(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(8)
    tokenizer, vocabulary = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6],
    )  # fmt: skip
    with torch.no_grad():
        for parameter in (transformer.x_pad_token, transformer.cap_pad_token):
            parameter.normal_(0, 0.2)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=kl_vae(16, shift=0.1159, scale=0.3611),
        text_encoder=qwen3_text(vocabulary), tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip
    return at_side(save(pipe, folder))


def qwen_vae(channels: int = 16) -> Any:
    """An autoencoder of video that halves three times."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def qwen_vl_text(vocabulary: int, kind: str, layers: int = 2) -> Any:
    """A vision and language model of Qwen's, its vision as small as can be."""
    import transformers

    text = {
        "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    if kind.startswith("Qwen3"):
        text |= {"head_dim": 8}
        text["rope_parameters"] |= {"mrope_interleaved": True}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    else:
        vision |= {"fullatt_block_indexes": [0]}
    name = "Qwen3VLConfig" if kind.startswith("Qwen3") else "Qwen2_5_VLConfig"
    return getattr(transformers, kind)(getattr(transformers, name)(text_config=text, vision_config=vision))


def qwen_image(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(9)
    tokenizer, vocabulary = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=qwen_vae(), text_encoder=qwen_vl_text(vocabulary, "Qwen2_5_VLForConditionalGeneration"),
        tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip
    return at_side(save(pipe, folder))


def flux2(folder: Path) -> Path:
    import diffusers

    torch.manual_seed(10)
    tokenizer, vocabulary = qwen_tokenizer()
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), latent_channels=8, norm_num_groups=4, layers_per_block=1, sample_size=64
    )
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=vae,
        text_encoder=qwen3_text(vocabulary, layers=28, kind="Qwen3ForCausalLM"), tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip
    return at_side(save(pipe, folder))


def chroma(folder: Path) -> Path:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(11)
    tokenizer, vocabulary = piece_tokenizer("T5Tokenizer")
    transformer = ChromaTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    with torch.no_grad():
        transformer.distilled_guidance_layer.out_proj.weight.mul_(0.3)
    pipe = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl_vae(16, shift=0.1159, scale=0.3611),
        text_encoder=t5_text(vocabulary), tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip
    return at_side(save(pipe, folder))


def krea2(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

    torch.manual_seed(12)
    tokenizer, vocabulary = qwen_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=64, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400), vae=qwen_vae(),
        text_encoder=qwen_vl_text(vocabulary, "Qwen3VLModel"), tokenizer=tokenizer, transformer=transformer,
        text_encoder_select_layers=(1, 2),
    )  # fmt: skip
    return at_side(save(pipe, folder))


def anima(folder: Path) -> Path:
    import diffusers

    torch.manual_seed(13)
    tokenizer, vocabulary = qwen_tokenizer()
    t5_tokenizer, t5_vocabulary = piece_tokenizer("T5Tokenizer")
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2.0,
        text_embed_dim=16, adaln_lora_dim=8, max_size=(128, 32, 32), rope_scale=(1.0, 1.0, 1.0),
        extra_pos_embed_type=None,
    )  # fmt: skip
    conditioner = diffusers.AnimaTextConditioner(
        source_dim=16, target_dim=16, model_dim=16, num_layers=1, num_attention_heads=2,
        target_vocab_size=t5_vocabulary,
    )  # fmt: skip
    pipe = diffusers.AnimaAutoBlocks().init_pipeline()
    pipe.update_components(
        text_encoder=qwen3_text(vocabulary), tokenizer=tokenizer, t5_tokenizer=t5_tokenizer, vae=qwen_vae(),
        text_conditioner=conditioner, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    return at_side(save(pipe, folder))


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd": sd,
    "sdxl": sdxl,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "flux2": flux2,
    "chroma": chroma,
    "krea2": krea2,
    "anima": anima,
}


class Lazily(dict[str, Path]):
    """Folders by name, each made when it is first asked for."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Path:
        self[name] = self._make(name)
        return self[name]
