"""Schedules in pipelines with EDM's schedulers: what the network is shown, what it is told, and what comes of it."""

from __future__ import annotations

import sys
import types
from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor

from pipeline_cases import ROWS, STEPS, call_sd, embeddings, noise
from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.pipeline import from_pipeline
from ts_adapt.denoisers.scheduler_config import scheduler_config
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.sampling import integrate
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler

OPTIONS = {"sigma_data": 0.7, "sigma_max": 40.0}


def scheduler(kind: str, prediction_type: str) -> Any:
    options = {**OPTIONS, "prediction_type": prediction_type}
    if kind == "euler":
        return EDMEulerScheduler(**options)
    if kind == "dpm":
        return EDMDPMSolverMultistepScheduler(**options, solver_order=1)
    module = import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    return module.CosineDPMSolverMultistepScheduler(**options, solver_order=1)


def grid_of(theirs: Any) -> Tensor:
    """The sigmas of a run of `theirs`, whose ends are rounded."""
    theirs.set_timesteps(STEPS)
    sigmas: Tensor = theirs.sigmas.double()
    sigmas[0], sigmas[-2] = theirs.config.sigma_max, theirs.config.sigma_min
    return sigmas


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["euler", "dpm"])
def test_the_sigmas_of_diffusers_give_what_diffusers_gives(
    kind: str, prediction_type: str, own: bool, tiny: Any
) -> None:
    pipe = tiny.pipeline("sd")
    pipe.scheduler = scheduler(kind, prediction_type)
    expected, grid = call_sd(pipe, ROWS), grid_of(pipe.scheduler)
    grid = grid.repeat(len(ROWS), 1) if own else grid
    attach(pipe, LearnedScheduler.from_grid(grid, "euler", scheduler_config(pipe.scheduler)))
    torch.testing.assert_close(call_sd(pipe, ROWS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["euler", "dpm", "cosine"])
def test_a_schedule_offers_what_edms_schedulers_say(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    theirs = scheduler(kind, "v_prediction")  # torchsde is for the stochastic steps of one of them
    ours = LearnedScheduler.from_grid(grid_of(theirs), "euler", theirs.config)
    ours = LearnedScheduler.from_config(ours.config)  # as a file has it
    ours.set_timesteps(STEPS)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-6)
    assert ours.init_noise_sigma == pytest.approx(theirs.init_noise_sigma, rel=1e-9)
    x0, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    at = theirs.timesteps[[1, 3]]
    torch.testing.assert_close(ours.add_noise(x0, eps, at), theirs.add_noise(x0, eps, at), rtol=1e-3, atol=1e-3)
    x = theirs.add_noise(x0, eps, theirs.timesteps[[2, 2]])
    t = theirs.timesteps[2]
    torch.testing.assert_close(ours.scale_model_input(x, t), theirs.scale_model_input(x, t), rtol=1e-5, atol=1e-5)
    raw = torch.randn_like(x)
    expected = theirs.precondition_outputs(x, raw, theirs.sigmas[2])
    torch.testing.assert_close(ours.step(raw, t, x).pred_original_sample, expected, rtol=1e-5, atol=1e-5)


def corrected(times: Tensor) -> TimeGrid:
    """Times of their own for each image, with corrections."""
    own = torch.stack([times, *(times**power for power in (1.05, 0.95))])
    own[:, 0], own[:, -1] = times[0], times[-1]
    return TimeGrid(own, model_times=own[:, :-1] * 0.9 + 0.001, output_scale=torch.linspace(0.8, 1.2, STEPS))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["corrected", "one-shot", "recursive"])
def test_times_of_each_image_are_those_of_our_own_loop(kind: str, tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    pipe.scheduler = scheduler("euler", "epsilon")
    denoiser, config = from_pipeline(pipe), scheduler_config(pipe.scheduler)
    noise_schedule = denoiser.noise_schedule
    if kind == "corrected":
        schedule = LearnedScheduler.from_grid(corrected(fixed.make("karras", noise_schedule, STEPS)), "unipc-3", config)
        policy: Any = schedule.source.grids[STEPS]
    else:
        schedule = tiny.schedule(kind, config, (4, 8, 8))
        policy = schedule.source.predictors[STEPS].policy(STEPS)
    x_T = noise(ROWS, 4, 8, 8) * noise_schedule.noise_scale
    condition = {"encoder_hidden_states": embeddings(ROWS)}
    solver = build_solver("unipc-3", noise_schedule)
    expected = integrate(denoiser, solver, policy, x_T, condition=condition).x
    attach(pipe, schedule)
    found = call_sd(pipe, ROWS, guidance_scale=1.0)
    detach(pipe)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_step_of_the_pipeline_itself_has_the_time_and_the_guidance_of_each_image(tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    pipe.scheduler = scheduler("euler", "epsilon")
    denoiser, other = (PipelineDenoiser(pipe, {"guidance_scale": w}) for w in (3.0, 1.5))
    x, condition = 5 * noise(ROWS[:2], 4, 8, 8), denoiser.encode(["a cat", "the big dog"])
    t, factors = torch.tensor([20.0, 0.5]).double(), torch.tensor([1.0, 0.5]).double()
    found = denoiser(x, t, guidance_factor=factors, **condition)
    for row, of in enumerate((denoiser, other)):
        alone = slice(row, row + 1)
        expected = of(x[alone], t[row], **{key: value[alone] for key, value in condition.items()})
        torch.testing.assert_close(found[alone], expected, rtol=1e-4, atol=1e-5)


def test_states_that_the_network_was_not_shown_in_their_unit_are_refused() -> None:
    family = LearnedScheduler.from_grid("karras", config=scheduler_config(EDMEulerScheduler()))
    family.set_timesteps(STEPS)
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(TsAdaptError, match=r"call scheduler.scale_model_input\(sample, t\)"):
        family.step(x, family.timesteps[0], x)


def test_another_noise_of_edm_is_another_model(tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    pipe.scheduler = scheduler("euler", "epsilon")
    schedule = LearnedScheduler.from_grid("karras", config=scheduler_config(EDMEulerScheduler(sigma_data=0.5)))
    with pytest.raises(TsAdaptError, match="they differ in EDM's noise"):
        attach(pipe, schedule)
    for options in ({"sigma_min": 0.0}, {"sigma_data": -1.0}, {"sigma_told": "cosine"}, {"prediction_type": "sample"}):
        with pytest.raises(TsAdaptError, match=next(iter(options))):
            LearnedScheduler.from_config({**schedule.config, **options})
