"""What is done with every key of every config in a pipeline folder. Data alone; `config_checks` applies it.

A key of a class is one of four things:

- built: the class itself computes with it, and its caller passes nothing more;
- read: fewstep acts on it; its value here is the class's default;
- partly: it changes what the class's caller must do, which is implemented for some values: (default, legal values);
- harmless: it changes nothing that fewstep computes, for the reason named.

Everything else is refused by name, unless it is null. `tests/test_config_keys.py` holds the table against the
constructors of the installed diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Partly = tuple[Any, Sequence[Any]]
"""A key's default, and the values that are implemented."""


@dataclass(frozen=True)
class ConfigKeys:
    """What is done with the keys of one class; see the module."""

    built: frozenset[str] = frozenset()
    read: Mapping[str, Any] = field(default_factory=dict)
    partly: Mapping[str, Partly] = field(default_factory=dict)
    harmless: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        """Every key of the table."""
        return self.built | self.read.keys() | self.partly.keys() | self.harmless.keys()


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _because(reason: str, keys: str) -> dict[str, str]:
    """Keys that are harmless for one reason."""
    return dict.fromkeys(keys.split(), reason)


_EMA = _because(
    "bookkeeping of the average that the weights are",
    "decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup",
)
_PRECISION = _because("the autoencoder always computes in float32", "force_upcast")
_TILES = _because("size of tiles, and pictures are never cut into them", "sample_size")

UNET = ConfigKeys(
    built=_words(
        """center_input_sample flip_sin_to_cos freq_shift down_block_types up_block_types only_cross_attention
        layers_per_block downsample_padding mid_block_scale_factor dropout act_fn norm_num_groups norm_eps
        cross_attention_dim transformer_layers_per_block reverse_transformer_layers_per_block encoder_hid_dim
        attention_head_dim num_attention_heads use_linear_projection addition_time_embed_dim upcast_attention
        resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor time_embedding_type
        time_embedding_dim time_embedding_act_fn timestep_post_act conv_in_kernel conv_out_kernel
        projection_class_embeddings_input_dim mid_block_only_cross_attention cross_attention_norm
        addition_embed_type_num_heads"""
    ),
    read={
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "time_cond_proj_dim": None,
    },
    partly={
        "class_embed_type": (None, [None]),
        "num_class_embeds": (None, [None]),
        "class_embeddings_concat": (False, [False]),
        "addition_embed_type": (None, [None, "text"]),
        "encoder_hid_dim_type": (None, [None, "text_proj"]),
        "attention_type": ("default", ["default"]),
        "dual_cross_attention": (False, [False]),
    },
    harmless=_EMA,
)
_PIXART = _words(
    """num_attention_heads attention_head_dim num_layers dropout norm_num_groups cross_attention_dim attention_bias
    activation_fn num_embeds_ada_norm upcast_attention norm_elementwise_affine norm_eps interpolation_scale
    caption_channels use_additional_conditions"""
)
# diffusers builds PixArtTransformer2DModel from the older class's configs too; it has no such layers
_OLD_LAYERS: dict[str, Partly] = {
    "num_vector_embeds": (None, [None]),
    "use_linear_projection": (False, [False]),
    "only_cross_attention": (False, [False]),
    "double_self_attention": (False, [False]),
}
PIXART_TRANSFORMER = ConfigKeys(
    built=_PIXART,
    read={"sample_size": 128, "patch_size": 2, "in_channels": 4, "out_channels": 8},
    partly={
        **_OLD_LAYERS,
        "norm_type": ("ada_norm_single", ["ada_norm_single"]),
        "attention_type": ("default", ["default"]),
    },
    harmless=_EMA,
)
OLD_TRANSFORMER = ConfigKeys(
    built=_PIXART,
    read={"sample_size": None, "patch_size": None, "in_channels": None, "out_channels": None},
    partly={
        "norm_type": ("layer_norm", ["ada_norm_single"]),
        "attention_type": ("default", ["default"]),
        **_OLD_LAYERS,
    },
    harmless=_EMA,
)
SD3_TRANSFORMER = ConfigKeys(
    built=_words(
        """num_layers attention_head_dim num_attention_heads joint_attention_dim caption_projection_dim
        pooled_projection_dim dual_attention_layers qk_norm"""
    ),
    read={"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 96},
    harmless=_EMA,
)
FLUX_TRANSFORMER = ConfigKeys(
    built=_words(
        """num_layers num_single_layers attention_head_dim num_attention_heads joint_attention_dim
        pooled_projection_dim axes_dims_rope"""
    ),
    # diffusers has no sample_size here; a trained size that is not its pipeline's 1024 pixels may be given by it
    read={"in_channels": 64, "out_channels": None, "guidance_embeds": False, "sample_size": None},
    partly={"patch_size": (1, [1])},
    harmless=_EMA,
)
SANA_TRANSFORMER = ConfigKeys(
    built=_words(
        """num_attention_heads attention_head_dim num_layers num_cross_attention_heads cross_attention_head_dim
        cross_attention_dim caption_channels mlp_ratio dropout attention_bias norm_elementwise_affine norm_eps
        interpolation_scale qk_norm"""
    ),
    read={"sample_size": 32, "patch_size": 1, "in_channels": 32, "out_channels": 32, "timestep_scale": 1.0},
    partly={"guidance_embeds": (False, [False])},
    harmless=_because("no guidance is embedded", "guidance_embeds_scale") | _EMA,
)
KL_AUTOENCODER = ConfigKeys(
    built=_words(
        """down_block_types up_block_types layers_per_block act_fn norm_num_groups use_quant_conv
        use_post_quant_conv mid_block_add_attention"""
    ),
    read={"block_out_channels": [64], "latent_channels": 4, "scaling_factor": 0.18215},
    partly={
        "in_channels": (3, [3]),
        "out_channels": (3, [3]),
        "shift_factor": (None, [None, 0]),
        "latents_mean": (None, [None]),
        "latents_std": (None, [None]),
    },
    harmless=_PRECISION | _TILES | _EMA,
)
ASYMMETRIC_AUTOENCODER = ConfigKeys(
    built=_words(
        """down_block_types down_block_out_channels layers_per_down_block up_block_types up_block_out_channels
        layers_per_up_block act_fn norm_num_groups"""
    ),
    read={"latent_channels": 4, "scaling_factor": 0.18215, "block_out_channels": None},
    partly={"in_channels": (3, [3]), "out_channels": (3, [3])},
    harmless=_PRECISION | _TILES | _EMA,
)
TINY_AUTOENCODER = ConfigKeys(
    built=_words("num_encoder_blocks num_decoder_blocks act_fn upsample_fn decoder_block_out_channels"),
    read={"encoder_block_out_channels": [64] * 4, "latent_channels": 4, "scaling_factor": 1.0},
    partly={
        "in_channels": (3, [3]),
        "out_channels": (3, [3]),
        "upsampling_scaling_factor": (2, [2]),
        "shift_factor": (0.0, [None, 0]),
    },
    harmless=_PRECISION
    | _because("scale_latents alone reads it, for previews of other programs", "latent_magnitude latent_shift")
    | _because("the decoder's channels once more", "block_out_channels")
    | _EMA,
)
DC_AUTOENCODER = ConfigKeys(
    built=_words(
        """attention_head_dim encoder_block_types decoder_block_types decoder_block_out_channels
        encoder_layers_per_block decoder_layers_per_block encoder_qkv_multiscales decoder_qkv_multiscales
        upsample_block_type downsample_block_type decoder_norm_types decoder_act_fns encoder_out_shortcut
        decoder_in_shortcut decoder_conv_act_fn"""
    ),
    read={
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "latent_channels": 32,
        "scaling_factor": 1.0,
    },
    partly={"in_channels": (3, [3])},
    harmless=_PRECISION | _EMA,
)

_GENERATION = _because(
    "of text generation, and nothing is generated",
    """use_cache cache_implementation max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens decoder_start_token_id task_specific_params prefix sep_token_id""",
)
_TRAINING = _because(
    "of training, or of heads that an encoder has not",
    """initializer_range initializer_factor gradient_checkpointing problem_type id2label label2id num_labels
    finetuning_task classifier_dropout output_past n_positions""",
)
_LOADING = _because(
    "bookkeeping; weights are read in float32",
    """architectures model_type transformers_version torch_dtype dtype torchscript use_bfloat16 tf_legacy_loss
    tokenizer_class output_attentions output_hidden_states chunk_size_feed_forward
    cross_attention_hidden_size tie_encoder_decoder""",
)
_ENCODER = _GENERATION | _TRAINING | _LOADING
_LIKE_OTHERS: dict[str, Partly] = {"return_dict": (True, [True]), "pruned_heads": ({}, [{}])}
"""Keys of any transformers config that would change what an encoder returns."""

CLIP_TEXT = ConfigKeys(
    built=_words(
        """vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads hidden_act
        layer_norm_eps attention_dropout dropout pad_token_id bos_token_id eos_token_id is_encoder_decoder
        tie_word_embeddings is_decoder add_cross_attention"""
    ),
    read={"max_position_embeddings": 77, "use_attention_mask": None},
    partly=_LIKE_OTHERS,
    # a whole CLIP, of which transformers takes the text's part
    harmless=_ENCODER | _because("of the picture's side", "vision_config vision_config_dict logit_scale_init_value"),
)
T5_TEXT = ConfigKeys(
    built=_words(
        """is_encoder_decoder vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads
        relative_attention_num_buckets relative_attention_max_distance dropout_rate layer_norm_epsilon
        feed_forward_proj pad_token_id eos_token_id bos_token_id is_decoder is_gated_act dense_act_fn
        tie_word_embeddings scale_decoder_outputs add_cross_attention"""
    ),
    partly=_LIKE_OTHERS,
    harmless=_ENCODER,
)
GEMMA2_TEXT = ConfigKeys(
    built=_words(
        """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        head_dim hidden_activation hidden_act rms_norm_eps pad_token_id eos_token_id bos_token_id
        tie_word_embeddings rope_parameters rope_theta rope_scaling attention_bias attention_dropout
        query_pre_attn_scalar sliding_window sliding_window_size layer_types attn_logit_softcapping
        use_bidirectional_attention is_encoder_decoder is_decoder add_cross_attention"""
    ),
    read={"max_position_embeddings": 8192},
    partly=_LIKE_OTHERS,
    harmless=_ENCODER | _because("of the language model's head", "final_logit_softcapping"),
)
BERT_TEXT = ConfigKeys(
    built=_words(
        """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
        hidden_dropout_prob attention_probs_dropout_prob type_vocab_size layer_norm_eps pad_token_id
        bos_token_id eos_token_id is_decoder add_cross_attention tie_word_embeddings is_encoder_decoder"""
    ),
    read={"max_position_embeddings": 512, "use_attention_mask": None},
    partly=_LIKE_OTHERS | {"position_embedding_type": ("absolute", ["absolute"])},
    harmless=_ENCODER
    | _because(
        "of a pooler, whose output is not used",
        """directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
        pooler_type""",
    ),
)
TOKENIZER = ConfigKeys(
    built=_words(
        """bos_token eos_token unk_token pad_token sep_token cls_token mask_token add_bos_token add_eos_token
        add_prefix_space additional_special_tokens extra_special_tokens added_tokens_decoder extra_ids
        do_lower_case do_basic_tokenize tokenize_chinese_chars strip_accents never_split errors legacy
        sp_model_kwargs padding_side truncation_side split_special_tokens model_input_names
        model_specific_special_tokens add_special_tokens spaces_between_special_tokens from_slow
        fix_mistral_regex pad_token_type_id"""
    ),
    read={"model_max_length": None, "max_len": None},
    harmless=_because("of text that is made, and none is", "clean_up_tokenization_spaces chat_template")
    | _because("of chats, and prompts are none", "use_default_system_prompt response_template response_schema")
    | _because(
        "bookkeeping of files and classes",
        """tokenizer_class tokenizer_file special_tokens_map_file name_or_path processor_class backend files_loaded
        is_local local_files_only use_fast vocab_file merges_file full_tokenizer_file verbose device_map""",
    )
    | _because(
        "each call names its own", "max_length stride truncation_strategy pad_to_multiple_of padding truncation"
    ),
)

_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_STABLE = {"beta_start": 0.00085, "beta_end": 0.012}
_SNR = {"rescale_betas_zero_snr": False}
_FLOW_SIGMAS = {"use_flow_sigmas": False, "flow_shift": 1.0}
_SHIFT_LAW = {"time_shift_type": "exponential"}
_BY_SIZE = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
_DYNAMIC: dict[str, Partly] = {"use_dynamic_shifting": (False, [False])}
_THRESHOLD: dict[str, Partly] = {"thresholding": (False, [False])}
_LEARNED: dict[str, Partly] = {"variance_type": (None, [None, "fixed_small", "fixed_large"])}
_RANGE: dict[str, Partly] = {"sigma_min": (None, [None]), "sigma_max": (None, [None])}
_CLIP: dict[str, Partly] = {"clip_sample": (True, [False])}
_NO_CLIP: dict[str, Partly] = {"clip_sample": (False, [False])}
SAMPLING = _because(
    "the sampling settings choose the times, their end and the solver",
    """timestep_spacing steps_offset set_alpha_to_one skip_prk_steps final_sigmas_type use_karras_sigmas
    use_exponential_sigmas use_beta_sigmas use_lu_lambdas interpolation_type solver_order solver_type algorithm_type
    lower_order_final euler_at_final lambda_min_clipped predict_x0 disable_corrector solver_p predictor_order
    corrector_order tau_func stochastic_sampling noise_sampler_seed tensor_format""",
) | _because("nothing is clipped", "clip_sample_range dynamic_thresholding_ratio sample_max_value")
"""Keys of schedulers that choose how a path is walked, not which path it is."""


_OLD: dict[str, Partly] = {"predict_epsilon": (True, [True])}
"""What the oldest configs have in the place of prediction_type."""


def _scheduler(*read: Mapping[str, Any], **partly: Partly) -> ConfigKeys:
    merged = {key: value for part in read for key, value in part.items()}
    return ConfigKeys(read=merged, partly=_OLD | partly, harmless=SAMPLING)


_DDIM = _scheduler(_BETAS, _SNR, **_CLIP, **_THRESHOLD)
_DDPM = _scheduler(_BETAS, _SNR, **_CLIP, **_THRESHOLD, variance_type=("fixed_small", _LEARNED["variance_type"][1]))
_DPM = _scheduler(_BETAS, _SNR, _FLOW_SIGMAS, _SHIFT_LAW, **_DYNAMIC, **_THRESHOLD, **_LEARNED)
_KDPM = _scheduler(_BETAS, _STABLE)
_LCM = _scheduler(
    _BETAS, _STABLE, {"beta_schedule": "scaled_linear", "original_inference_steps": 50}, _SNR, **_NO_CLIP, **_THRESHOLD,
    timestep_scaling=(10.0, [10.0]),
)  # fmt: skip
_FLOW = {"shift": 1.0}
_THOUSAND: dict[str, Partly] = {"num_train_timesteps": (1000, [1000])}
_FLOW_STEPS: dict[str, Partly] = {
    **_THOUSAND, **_DYNAMIC, "invert_sigmas": (False, [False]), "shift_terminal": (None, [None])
}  # fmt: skip
_OURS: dict[str, Any] = {
    **_BETAS, **_STABLE, **_SNR, "beta_schedule": "scaled_linear", "path": "vp", "shift": 1.0,
    "use_dynamic_shifting": False,
}  # fmt: skip
_OUR_SAMPLING = _because("a student's settings travel in its record", "gamma gamma_law jump r form grid spacing end")

SCHEDULERS: dict[str, ConfigKeys] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DEISMultistepScheduler": _scheduler(_BETAS, _FLOW_SIGMAS, _SHIFT_LAW, **_DYNAMIC, **_THRESHOLD),
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": _scheduler(_BETAS, _FLOW_SIGMAS, _SHIFT_LAW, **_DYNAMIC, **_THRESHOLD, **_LEARNED),
    "DPMSolverSDEScheduler": _KDPM,
    "EulerAncestralDiscreteScheduler": _scheduler(_BETAS, _SNR),
    "EulerDiscreteScheduler": _scheduler(_BETAS, _SNR, **_RANGE, timestep_type=("discrete", ["discrete"])),
    "HeunDiscreteScheduler": _scheduler(_BETAS, _STABLE, **_NO_CLIP),
    "KDPM2AncestralDiscreteScheduler": _KDPM,
    "KDPM2DiscreteScheduler": _KDPM,
    "LCMScheduler": _LCM,
    "LMSDiscreteScheduler": _scheduler(_BETAS),
    "PNDMScheduler": _scheduler(_BETAS),
    "SASolverScheduler": _scheduler(_BETAS, _FLOW_SIGMAS, **_THRESHOLD, **_LEARNED),
    "TCDScheduler": _LCM,
    "UniPCMultistepScheduler": _scheduler(
        _BETAS, _SNR, _FLOW_SIGMAS, _SHIFT_LAW, **_DYNAMIC, **_THRESHOLD, **_RANGE, shift_terminal=(None, [None])
    ),
    "FlowMatchEulerDiscreteScheduler": _scheduler(_FLOW, _SHIFT_LAW, _BY_SIZE, **_FLOW_STEPS),
    "FlowMatchHeunDiscreteScheduler": _scheduler(_FLOW, **_THOUSAND),
    "FlowMatchLCMScheduler": ConfigKeys(
        read={**_FLOW, **_SHIFT_LAW, **_BY_SIZE},
        partly={**_FLOW_STEPS, "scale_factors": (None, [None])},
        harmless=SAMPLING | _because("pictures have one size from first to last", "upscale_mode"),
    ),
    "SSSScheduler": ConfigKeys(read=_OURS, harmless=SAMPLING | _OUR_SAMPLING),
    "ConsistencyScheduler": ConfigKeys(read=_OURS, harmless=SAMPLING | _OUR_SAMPLING),
}
"""Schedulers of a beta schedule or of flow matching."""
COUNTS = _words("patch_size in_channels out_channels latent_channels pos_embed_max_size num_train_timesteps")
"""Keys that fewstep computes with, and that are whole numbers above 0."""
DECISIVE: Mapping[str, Any] = {**_SNR, "trained_betas": None, "use_flow_sigmas": False}
"""Keys that decide a path, with their defaults: a scheduler that does not take one is refused with another value."""
OTHER_SCHEDULERS = _words(
    """AmusedScheduler BlockRefinementScheduler CMStochasticIterativeScheduler CogVideoXDDIMScheduler
    CogVideoXDPMScheduler CosineDPMSolverMultistepScheduler DDIMInverseScheduler DDPMWuerstchenScheduler
    DPMSolverMultistepInverseScheduler DiscreteDDIMScheduler EDMDPMSolverMultistepScheduler EDMEulerScheduler
    EntropyBoundScheduler FlowMapEulerDiscreteScheduler HeliosDMDScheduler HeliosScheduler IPNDMScheduler
    KarrasVeScheduler LTXEulerAncestralRFScheduler MiniMaxH3Scheduler PiflowScheduler RFD4ProteinaScheduler
    RePaintScheduler SCMScheduler ScoreSdeVeScheduler UnCLIPScheduler VQDiffusionScheduler"""
)
"""Schedulers of diffusers that are refused: other paths, other data, or a path walked backwards."""

NO_DRAWING = _because(
    "no picture is drawn with it", "safety_checker feature_extractor image_encoder requires_safety_checker"
)
_MARK = _because("a mark on finished pictures, which fewstep does not make", "add_watermarker")


def _pipeline(components: str, harmless: Mapping[str, str] = {}, **read: Any) -> ConfigKeys:
    return ConfigKeys(built=_words(components), read=read, harmless=harmless)


PIPELINES: dict[str, ConfigKeys] = {
    "StableDiffusionPipeline": _pipeline("vae text_encoder tokenizer unet scheduler", NO_DRAWING),
    "LatentConsistencyModelPipeline": _pipeline("vae text_encoder tokenizer unet scheduler", NO_DRAWING),
    "StableDiffusionXLPipeline": _pipeline(
        "vae text_encoder text_encoder_2 tokenizer tokenizer_2 unet scheduler",
        NO_DRAWING | _MARK,
        force_zeros_for_empty_prompt=True,
    ),
    "PixArtAlphaPipeline": _pipeline("tokenizer text_encoder vae transformer scheduler"),
    "PixArtSigmaPipeline": _pipeline("tokenizer text_encoder vae transformer scheduler"),
    "StableDiffusion3Pipeline": _pipeline(
        "transformer scheduler vae text_encoder tokenizer text_encoder_2 tokenizer_2 text_encoder_3 tokenizer_3",
        NO_DRAWING,
    ),
    "FluxPipeline": _pipeline(
        "scheduler vae text_encoder tokenizer text_encoder_2 tokenizer_2 transformer", NO_DRAWING
    ),
    "SanaPipeline": _pipeline("tokenizer text_encoder vae transformer scheduler"),
}
MODELS: dict[str, ConfigKeys] = {
    "UNet2DConditionModel": UNET,
    "PixArtTransformer2DModel": PIXART_TRANSFORMER,
    "Transformer2DModel": OLD_TRANSFORMER,
    "SD3Transformer2DModel": SD3_TRANSFORMER,
    "FluxTransformer2DModel": FLUX_TRANSFORMER,
    "SanaTransformer2DModel": SANA_TRANSFORMER,
    "AutoencoderKL": KL_AUTOENCODER,
    "AsymmetricAutoencoderKL": ASYMMETRIC_AUTOENCODER,
    "AutoencoderTiny": TINY_AUTOENCODER,
    "AutoencoderDC": DC_AUTOENCODER,
}
"""Networks and autoencoders of diffusers."""
ENCODERS: dict[str, ConfigKeys] = {
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP_TEXT,
    "T5EncoderModel": T5_TEXT,
    "Gemma2Model": GEMMA2_TEXT,
    "BertModel": BERT_TEXT,
}
"""Text encoders of transformers."""

ANY: Sequence[Any] = ()
"""Stands for every value, in `BY_PIPELINE`."""
_BY_PICTURE = {"use_dynamic_shifting": (False, ANY)}
_SHIFTED = {"shift_factor": (None, ANY)}
BY_PIPELINE: dict[str, dict[str, dict[str, Partly]]] = {
    # it turns clipping off, whatever the scheduler's config says
    "StableDiffusionPipeline": {"scheduler": {"clip_sample": (False, ANY)}},
    "StableDiffusionXLPipeline": {
        "unet": {"addition_embed_type": (None, ["text_time"])},
        "vae": {"latents_mean": (None, ANY), "latents_std": (None, ANY)},
    },
    "StableDiffusion3Pipeline": {"scheduler": _BY_PICTURE, "vae": _SHIFTED},
    "FluxPipeline": {"scheduler": _BY_PICTURE, "vae": _SHIFTED},
}
"""Where a pipeline does more, or asks for more: its class -> component -> key -> as `ConfigKeys.partly`."""
VOCABULARIES: dict[str, Sequence[tuple[str, ...]]] = {
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",), ("spiece.model",)),
    "GemmaTokenizer": (("tokenizer.json",), ("tokenizer.model",)),
    "LlamaTokenizer": (("tokenizer.json",), ("tokenizer.model",)),
    "BertTokenizer": (("tokenizer.json",), ("vocab.txt",)),
}
"""The files that a tokenizer's vocabulary is read from, either of several sets; any of them for other classes."""
