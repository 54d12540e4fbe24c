"""The least sizes of the networks and autoencoders of diffusers, by the name of their class.

Text is WIDTH numbers a token everywhere, and a pooled text as many; pictures are 32 x 32, latents of most autoencoders
half of that, each way. What a class does not name here has the size that the class itself gives it.
"""

from __future__ import annotations

from typing import Any

WIDTH, LENGTH, LAYERS, SIZE = 32, 8, 40, 32
"""Numbers of a token, tokens of a text, layers of an encoder, pixels of a side."""
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "text_dim": WIDTH, "freq_dim": 16,
    "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip
FLUX = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, **HEADS, "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
UNET = {
    "sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "down_block_types": DOWN,
    "up_block_types": UP, "cross_attention_dim": WIDTH, "attention_head_dim": 2, "norm_num_groups": 4,
}  # fmt: skip
UNET_3D = {
    **UNET, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 4,
}  # fmt: skip
XL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + WIDTH, "cross_attention_dim": 2 * WIDTH,
}  # fmt: skip
TEXT_OR_IMAGE = {
    "in_channels": 4, "out_channels": 8, "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "encoder_hid_dim": WIDTH, "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
IF = {
    **TEXT_OR_IMAGE, "in_channels": 3, "out_channels": 6, "sample_size": SIZE, "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2, "cross_attention_norm": "group_norm", "act_fn": "gelu",
}  # fmt: skip
SD3 = {
    "sample_size": 16, "patch_size": 1, "in_channels": 4, "num_layers": 1, **HEADS, "joint_attention_dim": 2 * WIDTH,
    "caption_projection_dim": 16, "pooled_projection_dim": 2 * WIDTH, "out_channels": 4, "pos_embed_max_size": 32,
}  # fmt: skip
QWEN = {"num_layers": 1, **HEADS, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 2, 2)}
PIXART = {
    "sample_size": 16, "num_layers": 1, "patch_size": 2, **HEADS, "caption_channels": WIDTH, "in_channels": 4,
    "cross_attention_dim": 16, "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
}  # fmt: skip
SANA = {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": WIDTH,
    "sample_size": 16,
}  # fmt: skip
HUNYUAN_VIDEO = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": WIDTH,
    "pooled_projection_dim": WIDTH, "rope_axes_dim": (2, 4, 4),
}  # fmt: skip
HUNYUAN_DIT = {
    "sample_size": 16, "patch_size": 2, **HEADS, "in_channels": 4, "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": 16, "hidden_size": 16,
}  # fmt: skip
COSMOS = {
    "in_channels": 17, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "mlp_ratio": 2,
    "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
}  # fmt: skip
COGVIDEO = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
    "text_embed_dim": WIDTH, "num_layers": 1, "sample_width": 4, "sample_height": 4, "sample_frames": 9,
    "max_text_seq_length": LENGTH,
}  # fmt: skip
JOY = {"hidden_size": 32, "num_attention_heads": 2, "text_dim": WIDTH, "num_layers": 1, "rope_dim_list": [4, 6, 6]}
MOTION = {
    "block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 2,
    "motion_num_attention_heads": 2,
}  # fmt: skip
STABLE_CASCADE = {
    "conditioning_dim": 16, "block_out_channels": (16, 32), "num_attention_heads": (1, 1),
    "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
    "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock"),) * 2,
    "clip_text_pooled_in_channels": WIDTH, "clip_text_in_channels": WIDTH, "clip_image_in_channels": WIDTH,
    "switch_level": (False,), "self_attn": False, "timestep_ratio_embedding_dim": 4,
}  # fmt: skip
KL = {
    "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "scaling_factor": 0.3, "shift_factor": 0.1,
}  # fmt: skip
WAN_VAE = {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
LTX_VAE = {
    "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False), "patch_size": 1,
}  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
    # networks that denoise
    "AllegroTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "cross_attention_dim": 24,
        "sample_width": 4, "sample_height": 4, "sample_frames": 2, "caption_channels": WIDTH,
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1, **HEADS, "caption_projection_dim": 16,
        "joint_attention_dim": WIDTH, "pos_embed_max_size": 64,
    },
    "BriaFiboTransformer2DModel": {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, **HEADS, "joint_attention_dim": 2 * WIDTH,
        "text_encoder_dim": WIDTH, "axes_dims_rope": (0, 4, 4),
    },
    "BriaTransformer2DModel": {**FLUX, "pooled_projection_dim": None, "axes_dims_rope": (0, 4, 4)},
    "ChromaTransformer2DModel": {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, **HEADS, "joint_attention_dim": WIDTH,
        "axes_dims_rope": (2, 2, 4), "approximator_hidden_dim": 16, "approximator_layers": 1,
        "approximator_num_channels": 16,
    },
    "ChronoEditTransformer3DModel": {**WAN, "in_channels": 36, "image_dim": WIDTH},
    "CogVideoXTransformer3DModel": COGVIDEO,
    "CogView3PlusTransformer2DModel": {
        "in_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "out_channels": 4,
        "text_embed_dim": WIDTH, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 16, "sample_size": 16,
    },
    "CogView4Transformer2DModel": {
        "in_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 4, "out_channels": 4,
        "text_embed_dim": WIDTH, "time_embed_dim": 8, "condition_dim": 4,
    },
    "CosmosTransformer3DModel": COSMOS,
    "DiTTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 4, "out_channels": 8, "num_layers": 1, "sample_size": 8,
        "norm_num_groups": 2,
    },
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
        "text_embed_dim": WIDTH, "num_layers": 1, "sample_width": 4, "sample_height": 4, "patch_size": 2,
    },
    "Flux2Transformer2DModel": {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 3 * WIDTH, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
    },
    "FluxTransformer2DModel": FLUX,
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, **HEADS,
        "caption_channels": (WIDTH, WIDTH), "text_emb_dim": 2 * WIDTH, "num_routed_experts": 2,
        "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32), "llama_layers": (0, 0),
    },
    "HunyuanDiT2DModel": {**HUNYUAN_DIT, "num_layers": 2},
    "HunyuanImageTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, **HEADS, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
        "text_embed_dim": WIDTH, "text_embed_2_dim": WIDTH, "rope_axes_dim": (4, 4),
    },
    "HunyuanVideo15Transformer3DModel": {
        "in_channels": 9, "out_channels": 4, **HEADS, "num_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0,
        "text_embed_dim": WIDTH, "text_embed_2_dim": WIDTH, "image_embed_dim": WIDTH, "rope_axes_dim": (2, 2, 4),
        "target_size": 16, "task_type": "t2v",
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        **HUNYUAN_VIDEO, "patch_size": 2, "has_image_proj": True, "image_proj_dim": WIDTH, "has_clean_x_embedder": True,
    },
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "I2VGenXLUNet": UNET_3D,
    "Kandinsky3UNet": {
        "time_embedding_dim": 4, "groups": 2, "attention_head_dim": 4, "block_out_channels": (8, 16),
        "cross_attention_dim": 4, "encoder_hid_dim": WIDTH,
    },
    "Kandinsky5Transformer3DModel": {
        "in_text_dim": WIDTH, "in_text_dim2": WIDTH, "time_dim": 16, "model_dim": 16, "ff_dim": 32,
        "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (1, 1, 2),
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 8, "out_channels": 8, **HEADS, "cross_attention_dim": 16, "num_layers": 1,
        "caption_channels": WIDTH,
    },
    "LTX2VideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, **HEADS, "cross_attention_dim": 16, "audio_in_channels": 4,
        "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8, "num_layers": 1, "caption_channels": WIDTH, "rope_double_precision": False,
        "rope_type": "split",
    },
    "LatteTransformer3DModel": PIXART,
    "MotifVideoTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "num_single_layers": 1, "patch_size": 1,
        "text_embed_dim": WIDTH, "image_embed_dim": WIDTH, "rope_axes_dim": (4, 4, 4),
    },
    "NucleusMoEImageTransformer2DModel": {
        "out_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 4, 4), "moe_enabled": False, "capacity_factors": [8.0, 8.0],
    },
    "JoyImageEditTransformer3DModel": JOY,
    "JoyImageEditPlusTransformer3DModel": JOY,
    "Krea2Transformer2DModel": {
        "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": WIDTH, "num_text_layers": 3,
        "text_num_attention_heads": 2, "text_num_key_value_heads": 1, "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2),
    },
    "DreamLiteUNetModel": {
        "sample_size": 16,
        "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), "block_out_channels": (16, 32),
        "cross_attention_dim": WIDTH, "attention_head_dim": 8, "layers_per_block": 1, "norm_num_groups": 8,
    },
    "AceStepTransformer1DModel": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "in_channels": 9, "audio_acoustic_hidden_dim": 3,
    },
    "AceStepConditionEncoder": {
        "hidden_size": 32, "intermediate_size": 32, "text_hidden_dim": WIDTH, "timbre_hidden_dim": 3,
        "num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    },
    "LTX2TextConnectors": {
        "caption_channels": WIDTH, "text_proj_in_factor": LAYERS + 1, "video_connector_num_attention_heads": 4,
        "video_connector_attention_head_dim": 8, "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": None, "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 8, "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": None, "connector_rope_base_seq_len": 32,
        "rope_double_precision": False, "rope_type": "split",
    },
    "LTX2Vocoder": {
        "in_channels": 16, "hidden_channels": 32, "upsample_kernel_sizes": [4, 4], "upsample_factors": [2, 2],
        "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]], "output_sampling_rate": 16000,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 4, "block_out_channels": (8,), "decoder_block_out_channels": (8,), "layers_per_block": (1,),
        "decoder_layers_per_block": (1, 1), "spatio_temporal_scaling": (True,),
        "decoder_spatio_temporal_scaling": (True,), "decoder_inject_noise": (False, False),
        "downsample_type": ("spatial",), "upsample_residual": (False,), "upsample_factor": (1,), "patch_size": 1,
        "decoder_causal": False,
    },
    "AutoencoderKLLTX2Audio": {
        "base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "resolution": 32, "latent_channels": 2, "mel_bins": 8,
    },
    "CosmosControlNetModel": {
        "n_controlnet_blocks": 1, "in_channels": 18, "model_channels": 32, "num_attention_heads": 2,
        "attention_head_dim": 16, "mlp_ratio": 2, "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
        "extra_pos_embed_type": "learnable", "img_context_dim_in": 32, "img_context_dim_out": 32,
    },
    "ZImageControlNetModel": {
        "control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4, "dim": 32,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    },
    "ReduxImageEncoder": {"redux_dim": WIDTH, "txt_in_features": WIDTH},
    "StableUnCLIPImageNormalizer": {"embedding_dim": WIDTH},
    "LongCatImageTransformer2DModel": FLUX,
    "Lumina2Transformer2DModel": {
        "sample_size": 4, "in_channels": 4, "hidden_size": 8, "num_layers": 1, "num_attention_heads": 1,
        "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 2, 2), "cap_feat_dim": WIDTH,
    },
    "LuminaNextDiT2DModel": {
        "sample_size": 16, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 1, "num_kv_heads": 1,
        "multiple_of": 16, "cross_attention_dim": WIDTH,
    },
    "MochiTransformer3DModel": {
        **HEADS, "num_layers": 2, "pooled_projection_dim": 16, "text_embed_dim": WIDTH, "time_embed_dim": 4,
        "max_sequence_length": LENGTH,
    },
    "OmniGenTransformer2DModel": {
        "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32, "num_layers": 1,
        "time_step_dim": 4, "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
    },
    "OvisImageTransformer2DModel": {
        "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1, **HEADS,
        "joint_attention_dim": WIDTH, "axes_dims_rope": (2, 2, 4),
    },
    "PRXTransformer2DModel": {
        "patch_size": 1, "in_channels": 4, "context_in_dim": WIDTH, "hidden_size": 8, "mlp_ratio": 2.0, "num_heads": 2,
        "depth": 1, "axes_dim": (2, 2),
    },
    "PixArtTransformer2DModel": PIXART,
    "PriorTransformer": {**HEADS, "embedding_dim": WIDTH, "num_layers": 1, "num_embeddings": LENGTH},
    "QwenImageTransformer2DModel": QWEN,
    "SD3Transformer2DModel": SD3,
    "SanaTransformer2DModel": SANA,
    "SanaVideoTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": WIDTH, "sample_size": 8,
        "rope_max_seq_len": 32,
    },
    "SkyReelsV2Transformer3DModel": WAN,
    "StableAudioDiTModel": {
        "sample_size": 4, "in_channels": 3, "num_layers": 1, "attention_head_dim": 4,
        "num_key_value_attention_heads": 2, "num_attention_heads": 2, "out_channels": 3, "cross_attention_dim": 4,
        "time_proj_dim": 8, "global_states_input_dim": 8, "cross_attention_input_dim": 4,
    },
    "StableCascadeUNet": STABLE_CASCADE,
    "UNet2DConditionModel": UNET,
    "UNet2DModel": {
        "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4,
    },
    "UNet3DConditionModel": UNET_3D,
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "cross_attention_dim": WIDTH,
        "num_attention_heads": 2, "projection_class_embeddings_input_dim": 12, "addition_time_embed_dim": 4,
    },
    "WanAnimateTransformer3DModel": {
        **WAN, "num_layers": 2, "in_channels": 36, "image_dim": WIDTH,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16, "motion_style_dim": 8,
        "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    },
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": {**WAN, "num_layers": 2, "vace_layers": (0, 1)},
    "WuerstchenDiffNeXt": {
        "c_hidden": [16, 16], "nhead": [-1, 4], "blocks": [1, 1], "level_config": ["CT", "CTA"], "c_cond": WIDTH,
        "clip_embd": WIDTH, "inject_effnet": [False, True], "c_r": 4, "effnet_embd": 4, "patch_size": 1,
    },
    "WuerstchenPrior": {"c_in": 2, "c": 8, "depth": 1, "c_cond": WIDTH, "c_r": 8, "nhead": 2},
    "ZImageTransformer2DModel": {
        "in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": WIDTH, "axes_dims": (8, 4, 4), "axes_lens": (64, 32, 32),
    },
    "BriaFibo2Transformer2DModel": {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 3 * WIDTH,
        "injection_layer_ids": (0,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
        "gist_step": 4, "gist_min_text_len": 8, "gist_max_text_len": 16, "axes_dims": (8, 4, 4),
        "axes_lens": (256, 64, 64),
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 16, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 16, "in_channels": 16,
        "out_channels": 16, "text_in_dim": WIDTH, "rope_axes_dim": (4, 2, 2),
    },
    "Ideogram4Transformer2DModel": {
        "in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 16,
        "adaln_dim": 8, "llm_features_dim": 13 * WIDTH, "mrope_section": (4, 2, 2),
    },
    # networks beside them
    "ControlNetModel": {
        "block_out_channels": (8, 16), "layers_per_block": 1, "down_block_types": DOWN,
        "conditioning_embedding_out_channels": (4, 8), "cross_attention_dim": WIDTH, "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    "ControlNetUnionModel": {
        **XL, "block_out_channels": (8, 16), "layers_per_block": 1, "down_block_types": DOWN, "norm_num_groups": 4,
        "conditioning_embedding_out_channels": (4, 8), "attention_head_dim": 2, "num_trans_channel": 8,
        "num_trans_head": 2, "num_proj_channel": 8,
    },
    "ControlNetXSAdapter": {
        "conditioning_embedding_out_channels": (4, 8), "num_attention_heads": 2, "block_out_channels": (4, 8),
        "base_block_out_channels": (8, 16), "cross_attention_dim": WIDTH, "down_block_types": DOWN, "sample_size": 16,
        "max_norm_num_groups": 4, "use_linear_projection": False, "learn_time_embedding": True,
    },
    "FluxControlNetModel": FLUX,
    "HunyuanDiT2DControlNetModel": {**HUNYUAN_DIT, "transformer_num_layers": 2},
    "MotionAdapter": MOTION,
    "QwenImageControlNetModel": QWEN,
    "SD3ControlNetModel": SD3,
    "SanaControlNetModel": SANA,
    "SparseControlNetModel": {
        "block_out_channels": (8, 16), "layers_per_block": 1, "conditioning_channels": 3,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "cross_attention_dim": WIDTH,
        "conditioning_embedding_out_channels": (4, 8), "norm_num_groups": 1,
        "use_simplified_condition_embedding": False,
    },
    "StableAudioProjectionModel": {"text_encoder_dim": WIDTH, "conditioning_dim": 4, "min_value": 0, "max_value": 32},
    "T2IAdapter": {"channels": (8, 16), "num_res_blocks": 1, "downscale_factor": 2},
    # autoencoders
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8), "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.4,
    },
    "AutoencoderKL": KL,
    "AsymmetricAutoencoderKL": {},
    "AutoencoderKLAllegro": {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2},
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    },
    "AutoencoderKLCosmos": {
        "encoder_block_out_channels": (8,) * 4, "decode_block_out_channels": (8,) * 4, "attention_resolutions": (8,),
        "resolution": 64, "num_layers": 1,
    },
    "AutoencoderKLFlux2": {
        "sample_size": 32, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 1,
    },
    "AutoencoderKLHunyuanImage": {
        "latent_channels": 4, "block_out_channels": (32,) * 4, "layers_per_block": 1, "spatial_compression_ratio": 8,
        "sample_size": 32, "in_channels": 3, "out_channels": 3, "scaling_factor": 0.5,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "latent_channels": 4, "block_out_channels": (16,) * 2, "layers_per_block": 1, "spatial_compression_ratio": 4,
        "scaling_factor": 0.5,
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": (16, 16), "layers_per_block": 1, "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2, "downsample_match_channel": False, "upsample_match_channel": False,
    },
    "AutoencoderKLLTXVideo": LTX_VAE,
    "AutoencoderKLMagvit": {
        "block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
        "spatial_group_norm": False,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4, "layers_per_block": (1,) * 5,
    },
    "AutoencoderKLQwenImage": WAN_VAE,
    "AutoencoderKLTemporalDecoder": {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
    "AutoencoderKLWan": WAN_VAE,
    "AutoencoderOobleck": {
        "encoder_hidden_size": 6, "downsampling_ratios": [1, 2], "decoder_channels": 3, "decoder_input_channels": 3,
        "channel_multiples": [2, 4], "sampling_rate": 4,
    },
    "AutoencoderTiny": {},
    "PaellaVQModel": {"bottleneck_blocks": 1, "num_vq_embeddings": 2, "embed_dim": 8},
    "VQModel": {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4,
    },
}  # fmt: skip
