"""Networks of diffusers with random weights, as small as they can be. What a test wants otherwise, it says."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from diffusers_zoo.sizes import SIZES

WIDTH = 16
"""Numbers of a token of text."""
OWN: dict[str, dict[str, Any]] = {
    "UNet2DModel": {"in_channels": 1, "out_channels": 1},
    "UNet2DConditionModel": {"sample_size": 8, "cross_attention_dim": WIDTH},
    "ControlNetModel": {"cross_attention_dim": WIDTH},
    "PixArtTransformer2DModel": {"sample_size": 8, "caption_channels": WIDTH},
    "SD3Transformer2DModel": {
        "sample_size": 8, "patch_size": 2, "joint_attention_dim": WIDTH, "pooled_projection_dim": 6,
    },
    "FluxTransformer2DModel": {"joint_attention_dim": WIDTH, "pooled_projection_dim": 6},
    "WanTransformer3DModel": {"in_channels": 4, "out_channels": 4, "text_dim": WIDTH},
    "AutoencoderKL": {"sample_size": 16, "shift_factor": None},
    "AutoencoderKLQwenImage": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "temperal_downsample": [False], "attn_scales": [],
        "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
    },
    "AutoencoderKLWan": {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    "VQModel": {"latent_channels": 3, "scaling_factor": 0.4},
}  # fmt: skip
"""Over the sizes of `diffusers_zoo.sizes`: fewer numbers and pixels."""
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
    return ready(getattr(diffusers, kind)(**{**SIZES[kind], **OWN.get(kind, {}), **options}))


def said(network: Any) -> Tensor:
    """What a UNet answers to two pictures, and to two texts where it reads any."""
    generator, config = torch.Generator().manual_seed(0), network.config
    x = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    read = "cross_attention_dim" in config
    given = (
        {"encoder_hidden_states": torch.randn(2, 3, config.cross_attention_dim, generator=generator)} if read else {}
    )
    with torch.no_grad():
        answer: Tensor = network(x, timestep=torch.tensor([300.0, 700.0]), **given).sample
    return answer
