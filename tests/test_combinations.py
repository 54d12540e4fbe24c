"""The whole product on tiny networks: any cacher, quantizer, solver and kind of grid, alone and guided; no trace."""

from __future__ import annotations

import ts_adapt  # noqa: F401  isort: skip

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ts_adapt.assembly import build_cachers, build_quantizer, build_solver
from ts_adapt.cachers import attached
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser, step_aware_parts
from ts_adapt.interfaces import Condition
from ts_adapt.noise import BetaTable
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.quantizers.calibration.collect import collect
from ts_adapt.quantizers.methods import tdq, time_groups
from ts_adapt.quantizers.methods.registry import QUANTIZERS, build
from ts_adapt.quantizers.methods.tdq import freeze
from ts_adapt.quantizers.quantization import is_quantized, quantize, restore
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.schedules.resolve import build_grid

STEPS, BATCH, SCALE = 2, 2, 3.0
VP = BetaTable.from_config({})
SOLVERS = ["ddim", "unipc-3", "dpmpp-2m", "deis-2", "ipndm-2", "heun"]
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "minmax-w8a8": {},
    "hqq4+ptqd": {},
    "vqdm4": {"rounds": 1, "steps": 2, "beam": 1},
    "tdq-w8a8": {},
    "tinydm-w8a8": {"groups": 2},
    "bf16": {},
    "fp16": {},
}
"""One of each family, with options that make it quick; torchao, which is installed apart, has tests of its own."""
GATES = {"alone": "tgate-2-self2-warmup0", "guided": "tgate-1"}
"""Alone it is self-attention that is reused; guided, cross-attention from step 1 on, and guidance is dropped."""


SHAPE: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4, "attention_head_dim": 4,
    "mid_block_type": None,
}  # fmt: skip


def alone() -> tuple[Any, Condition]:
    network: Any = UNet2DModel(
        in_channels=1, out_channels=1, down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), **SHAPE
    )
    return NetworkDenoiser(network.eval().requires_grad_(False), VP, "v"), {}


def guided() -> tuple[Any, Condition]:
    network: Any = UNet2DConditionModel(
        in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8, **SHAPE,
    )  # fmt: skip
    text, none = torch.randn(BATCH, 3, 8), torch.randn(1, 3, 8)
    denoiser = NetworkDenoiser(network.eval().requires_grad_(False), VP, "v")
    return Guided(denoiser, SCALE, {"encoder_hidden_states": none}), {"encoder_hidden_states": text}


KINDS: dict[str, Callable[[], tuple[Any, Condition]]] = {"alone": alone, "guided": guided}


def marks(network: nn.Module) -> dict[str, Any]:
    """What each module has in its dictionary, by name and identity, and how much there is in it: hooks, parts."""
    return {
        name: {key: (id(value), len(value) if isinstance(value, dict) else None) for key, value in vars(module).items()}
        for name, module in network.named_modules()
    }


def test_every_family_of_quantizers_is_met() -> None:
    families = {build(name)[0].name for name in SETTINGS if name != "none"}
    assert families | {"torchao"} == set(QUANTIZERS)


@pytest.mark.parametrize(("kind", "quantizer"), list(product(KINDS, SETTINGS)))
@torch.no_grad()
def test_any_cacher_quantizer_solver_and_grid_go_together_and_leave_no_trace(
    tiny: Any, kind: str, quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_groups, "FIT_STEPS", 2)
    monkeypatch.setattr(tdq, "FIT_STEPS", 2)
    torch.manual_seed(0)
    denoiser, condition = KINDS[kind]()
    network, shape = denoiser.network, denoiser.shape
    x_T = initial_noise(0, range(BATCH), shape)
    grid, policy = build_grid("karras", VP, STEPS), tiny.predictor(Recursive, VP, shape, STEPS).policy()
    solvers = {name: build_solver(name, VP) for name in SOLVERS}

    def solve(name: str, own_times: bool) -> Tensor:
        found = integrate(denoiser, solvers[name], policy if own_times else grid, x_T, condition=condition)
        assert found.times.shape == ((BATCH, STEPS + 1) if own_times else (STEPS + 1,))
        return found.x

    plain, before = solve("unipc-3", False), marks(network)
    quantizing = build_quantizer(quantizer)
    if quantizing is not None:
        method, layers = build(quantizer, **SETTINGS[quantizer])
        calls = collect(denoiser, solvers["ddim"], grid, x_T, condition=condition)
        freeze(quantize(network, method, calls, layers=layers), torch.linspace(VP.t_min, VP.t_max, 20))
    quantized = marks(network)
    for name, own_times in product(SOLVERS, (False, True)):
        uncached = solve(name, own_times)
        assert uncached.shape == x_T.shape and uncached.isfinite().all()
        for cacher in ("deepcache-2", GATES[kind], f"{GATES[kind]}+deepcache-2"):
            with attached(network, *build_cachers(cacher)):
                cached = solve(name, own_times)
            assert cached.shape == x_T.shape and cached.isfinite().all()
            assert not torch.equal(cached, uncached), f"{cacher} changes nothing under {name}"
            assert marks(network) == quantized and not step_aware_parts(network)
    assert is_quantized(network) == (quantizing is not None) == (not torch.equal(solve("unipc-3", False), plain))
    if quantizing is not None:
        restore(network)
    assert marks(network) == before and torch.equal(solve("unipc-3", False), plain)
