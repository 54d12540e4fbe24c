"""Small networks with random weights, a denoiser of one, and a calibration set of it."""

from __future__ import annotations

import ts_adapt  # noqa: F401  isort: skip

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tiny_networks import ATTENTIVE, XL, small
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.grids import fixed
from ts_adapt.noise import BetaTable
from ts_adapt.quantizers.calibration.collect import Call, collect
from ts_adapt.sampling import initial_noise
from ts_adapt.solvers import UniPC

NETWORKS: dict[str, Callable[[], Any]] = {
    "unet": lambda: small("UNet2DModel", **ATTENTIVE),
    "sd": lambda: small("UNet2DConditionModel"),
    "sdxl": lambda: small("UNet2DConditionModel", **XL),
    "dit": lambda: small("DiTTransformer2DModel", out_channels=4),
    "pixart": lambda: small("PixArtTransformer2DModel"),
    "sd3": lambda: small("SD3Transformer2DModel"),
    "flux": lambda: small("FluxTransformer2DModel"),
}


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return NETWORKS[name]()


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


@pytest.fixture
def error(denoiser: NetworkDenoiser, calls: list[Call]) -> Callable[[], float]:
    """How far what the network says is from what it said in full precision; 0 where it is the very same."""
    full = [call.run(denoiser.network) for call in calls]

    def now() -> float:
        return sum(float((call.run(denoiser.network) - y).square().mean()) for call, y in zip(calls, full, strict=True))

    return now
