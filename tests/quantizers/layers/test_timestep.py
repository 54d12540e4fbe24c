"""The time that quantizers inside a network are told: of guided, gated and folded batches, behind a pipeline's hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ts_adapt.assembly import build_cachers
from ts_adapt.cachers import attached
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.denoisers.scheduler_config import noise_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import BetaTable
from ts_adapt.quantizers.calibration.collect import collect
from ts_adapt.quantizers.layers.timestep import TimestepListener
from ts_adapt.quantizers.methods import tdq, time_groups
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import (
    quantize,
)
from ts_adapt.sampling import integrate
from ts_adapt.schedulers.attach import attach
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.solvers import UniPC

STEPS = 4


def test_the_listener_tells_every_sample_its_time(denoiser: Any, solve: Any) -> None:
    solver, grid, x_T = solve
    network, heard = denoiser.network, []
    listener = TimestepListener(network)
    network.conv_in.register_forward_pre_hook(lambda module, args: heard.append(listener.now(args[0].shape[0]).clone()))
    integrate(denoiser, solver, grid, x_T)
    assert [times.unique().tolist() for times in heard] == [[pytest.approx(float(t))] for t in grid[:-1]]
    own = torch.stack([grid, grid * 0.99 + grid[-1] * 0.01] * 3)
    heard.clear()
    integrate(denoiser, solver, own, x_T)
    assert torch.allclose(torch.stack(heard, 1), own[:, :-1].float())
    heard.clear()
    denoiser(torch.cat([x_T, x_T]), own[:, 1].repeat(2))
    assert torch.allclose(heard[0], own[:, 1].repeat(2).float())
    assert listener.now(24).shape == (24,) and torch.equal(listener.now(24)[:2], listener.now(12)[:1].repeat(2))
    with pytest.raises(TsAdaptError, match="12 timesteps were given for a batch of 7"):
        listener.now(7)
    listener.stop()
    assert not network._forward_pre_hooks


def test_a_listener_that_has_heard_nothing_says_so(denoiser: Any) -> None:
    with pytest.raises(TsAdaptError, match="call the network that it is in"):
        TimestepListener(denoiser.network).now(1)
    with pytest.raises(TsAdaptError, match="takes no timestep"):
        TimestepListener(nn.Linear(2, 2))


class Told(nn.Module):
    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x


def test_every_row_is_told_its_own_time() -> None:
    network = Told()
    listener = TimestepListener(network)
    with pytest.raises(TsAdaptError, match="run by itself"):
        listener.now(1)
    network(torch.zeros(4, 1), torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert listener.now(4).tolist() == [10, 20, 30, 40]
    assert listener.now(8).tolist() == [10, 10, 20, 20, 30, 30, 40, 40], "heads folded into the batch"
    assert listener.now(2).tolist() == [30, 40], "the conditional half alone"
    with pytest.raises(TsAdaptError, match="4 timesteps were given for a batch of 3"):
        listener.now(3)
    network(torch.zeros(4, 1), torch.tensor(7.0))
    assert listener.now(4).tolist() == [7] * 4


@pytest.mark.parametrize("quantizer", ["tdq-w8a8", "tinydm-w8a8"])
def test_a_gated_guided_batch_is_told_the_times_of_its_samples(
    make: Callable[..., Any], quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sample has a grid of its own; gated as a batch they come out as each by itself."""
    for module in (time_groups, tdq):
        monkeypatch.setattr(module, "FIT_STEPS", 1)
    network = make("sd")
    noise_schedule = BetaTable(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    null = {"encoder_hidden_states": torch.zeros(5, 16)}
    denoiser = Guided(NetworkDenoiser(network, noise_schedule, "epsilon", null_condition=null), 3.0)
    torch.manual_seed(0)
    text = {"encoder_hidden_states": torch.randn(2, 5, 16)}
    x_T, solver = torch.randn(2, 4, 8, 8), UniPC(noise_schedule, order=2)
    grids = torch.stack([fixed.make(name, noise_schedule, STEPS) for name in ("linear", "karras")])
    method, layers = build(quantizer)
    quantize(network, method, collect(denoiser, solver, grids, x_T, condition=text), layers=layers)
    for cachers in ("tgate-2", "tgate-2+deepcache-2"):
        with attached(network, *build_cachers(cachers)):
            both = integrate(denoiser, solver, grids, x_T, condition=text).x
            for row in (slice(0, 1), slice(1, 2)):
                own = {name: value[row] for name, value in text.items()}
                one = integrate(denoiser, solver, grids[row], x_T[row], condition=own).x
                assert torch.allclose(one, both[row], atol=0.05 * float(both.abs().max()))


@pytest.mark.parametrize("first", ["listener", "schedule"])
def test_behind_a_schedule_in_a_pipeline_the_time_is_the_networks(tiny: Any, first: str) -> None:
    """The schedule tells the network other times than the loop's, whichever of the two came first."""
    pipe = tiny.pipeline("ddpm")
    times = fixed.make("linear", noise_of(pipe.scheduler.config, "DDPMScheduler")[0], STEPS)
    grid = TimeGrid(times, model_times=0.8 * times[:-1])
    schedule = LearnedScheduler.from_grid(grid, solver="unipc", config=dict(pipe.scheduler.config))
    listener = TimestepListener(pipe.unet) if first == "listener" else None
    attach(pipe, schedule)
    listener = listener or TimestepListener(pipe.unet)
    heard, got = [], []
    pipe.unet.conv_out.register_forward_pre_hook(lambda module, args: heard.append(float(listener.now(1))))
    pipe.unet.time_proj.register_forward_pre_hook(lambda module, args: got.append(float(args[0][0])))
    pipe(1, torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="np")
    assert heard == got == pytest.approx((0.8 * times[:-1]).tolist())
