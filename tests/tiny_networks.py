"""Networks of diffusers with random weights, as small as they can be. What a test wants otherwise, it says."""

from __future__ import annotations

from typing import Any

import diffusers

WIDTH = 16
"""Numbers of a token of text."""
SIZES: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4,
        "attention_head_dim": 8,
    },
    "UNet2DConditionModel": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": WIDTH,
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8, "num_layers": 1,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_num_groups": 2,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8, "num_layers": 1,
        "sample_size": 8, "patch_size": 2, "norm_num_groups": 2, "cross_attention_dim": 8, "caption_channels": WIDTH,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 4,
        "num_attention_heads": 2, "caption_projection_dim": 8, "joint_attention_dim": WIDTH,
        "pooled_projection_dim": 6, "out_channels": 4, "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "pooled_projection_dim": 6,
        "axes_dims_rope": (2, 2, 4), "guidance_embeds": False,
    },
    "WanTransformer3DModel": {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32,
    },
    "AutoencoderKL": {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8), "sample_size": 16, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4, "scaling_factor": 0.3,
    },
}  # fmt: skip
ATTENTIVE = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
"""A UNet2DModel with attention on the way down, in the middle and on the way up."""
XL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
}  # fmt: skip
"""A UNet2DConditionModel that is told sizes and a pooled text, as Stable Diffusion XL's."""


def ready(module: Any) -> Any:
    return module.eval().requires_grad_(False)


def small(kind: str, **options: Any) -> Any:
    """One of the class `kind`, with `options` of its own."""
    return ready(getattr(diffusers, kind)(**{**SIZES[kind], **options}))
