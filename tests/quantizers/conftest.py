"""Small networks with random weights, a denoiser of one, and a calibration set of it."""

from __future__ import annotations

import ts_adapt  # noqa: F401  isort: skip

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.grids import fixed
from ts_adapt.noise import BetaTable
from ts_adapt.quantizers.calibration.collect import Call, collect
from ts_adapt.sampling import initial_noise
from ts_adapt.solvers import UniPC


def unet() -> Any:
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip


def text_unet(**options: Any) -> Any:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=16, **options,
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], Any]] = {
    "unet": unet,
    "sd": text_unet,
    "sdxl": lambda: text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=40
    ),
    "dit": lambda: DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=2,
    ),
    "pixart": lambda: PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=2, cross_attention_dim=8, caption_channels=16,
    ),
    "sd3": lambda: SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        caption_projection_dim=8, joint_attention_dim=16, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=8,
    ),
    "flux": lambda: FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    ),
}  # fmt: skip


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return NETWORKS[name]().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    """(name, seed=0) -> a network of diffusers with random weights."""
    return build


@pytest.fixture
def denoiser() -> NetworkDenoiser:
    return NetworkDenoiser(build("unet"), BetaTable(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)), "epsilon")


@pytest.fixture
def solve(denoiser: NetworkDenoiser) -> tuple[Any, Any, Any]:
    """Solver, grid of four steps, and the noise of six samples."""
    grid = fixed.make("linear", denoiser.noise_schedule, 4)
    return UniPC(denoiser.noise_schedule, order=3), grid, initial_noise(0, range(6), denoiser.shape)


@pytest.fixture
def calls(denoiser: NetworkDenoiser, solve: tuple[Any, Any, Any]) -> list[Call]:
    return collect(denoiser, *solve)
