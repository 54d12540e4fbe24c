"""The families that people use: gradients reach the grid, and what is learned on is what is sampled with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_families import FAMILIES, last_state
from tiny_families import family as family_of
from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.time_derivative import TimeDerivative
from ts_adapt.grids import fixed
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import DERIVATIVES, EMBEDDING, TimeGrid
from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.sampling import embedding_of, initial_noise, integrate
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler

STEPS, SOLVER = 3, "unipc-2"
EMBEDDED = {
    **dict.fromkeys(("sd15", "sdxl", "playground"), "time_embedding"),
    **dict.fromkeys(("sd35", "flux", "qwen-image"), "time_text_embed.timestep_embedder"),
    "sana": "time_embed.emb", "wan": "condition_embedder.time_embedder", "pixart": "adaln_single.emb",
    "ltx": "time_embed.emb",
}  # fmt: skip
"""Where their networks embed the time."""
PROMPTS = ["a cat", "the big dog"]


def noise(denoiser: PipelineDenoiser) -> Tensor:
    return initial_noise(0, range(len(PROMPTS)), denoiser.shape) * denoiser.noise_schedule.noise_scale


def student(denoiser: PipelineDenoiser, schedule: Any, way: str = "exact") -> Tensor:
    taken, solver = TimeDerivative(denoiser, way), build_solver(SOLVER, denoiser.noise_schedule)
    return integrate(taken, solver, schedule, noise(denoiser), condition=denoiser.encode(PROMPTS), check=True).x


def attached(pipe: Any, call: dict[str, Any], schedule: LearnedScheduler, x_T: Tensor) -> Tensor:
    """The last state of the pipeline's run along `schedule`."""
    attach(pipe, schedule)
    try:
        return last_state(pipe, call, PROMPTS, x_T / pipe.scheduler.init_noise_sigma, STEPS)
    finally:
        detach(pipe)


@pytest.mark.parametrize(
    ("name", "scales"), [("flux", {"true_cfg_scale": 1.0}), ("qwen-image", {"true_cfg_scale": 4.0}), ("sd15", {})]
)
def test_what_guides_beside_the_usual_scale_is_known(name: str, scales: dict[str, float], family: Any) -> None:
    assert PipelineDenoiser(*family(name)).other_scales == scales


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_the_grid_and_the_attached_run_ends_in_the_same_state(name: str, family: Any) -> None:
    pipe, call = family(name)
    denoiser = PipelineDenoiser(pipe, call)
    space = GridSpace(denoiser.noise_schedule, STEPS)
    z = space.numbers(TimeGrid(fixed.make("karras", denoiser.noise_schedule, STEPS))).clone().requires_grad_()
    for way in DERIVATIVES:
        (gradient,) = torch.autograd.grad(student(denoiser, space.grid(z), way).square().mean(), z)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, way
    grid = space.grid(z.detach())
    end = student(denoiser, grid)
    found = attached(pipe, call, LearnedScheduler.from_grid(grid, SOLVER, pipe.scheduler.config), noise(denoiser))
    assert (found - end).norm() <= 1e-5 * end.norm()


@pytest.mark.parametrize("kind", [OneShot, Recursive])
@pytest.mark.parametrize("name", FAMILIES)
def test_predictors_learn_from_what_they_see_when_attached(name: str, kind: Any, family: Any, tiny: Any) -> None:
    pipe, call = family(name)
    denoiser = PipelineDenoiser(pipe, call)
    if denoiser.loop_times_only:
        pytest.skip("the network of this pipeline cannot be told each sample's time")
    seen, condition = denoiser.shown(noise(denoiser), denoiser.encode(PROMPTS))
    text = condition["encoder_hidden_states"].shape[-1]
    predictor = tiny.predictor(kind, denoiser.noise_schedule, tuple(seen.shape[1:]), STEPS, text=text)
    weights = predictor.encoder.weight.requires_grad_()
    end = student(denoiser, predictor.policy(STEPS))
    (gradient,) = torch.autograd.grad(end.square().mean(), weights)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    weights.requires_grad_(False)
    schedule = LearnedScheduler.from_predictors(predictor, SOLVER, pipe.scheduler.config)
    found = attached(pipe, call, schedule, noise(denoiser))
    assert (found - end.detach()).norm() <= 1e-5 * end.norm()


def experts_alike() -> Iterator[PipelineDenoiser]:
    """Of a pipeline whose second expert is like the first: with the lower half of the times for it, then with none."""
    pipe, call = family_of("wan")
    pipe.transformer_2.load_state_dict(pipe.transformer.state_dict())
    for ratio in (0.5, 0.0):
        pipe.register_to_config(boundary_ratio=ratio)
        yield PipelineDenoiser(pipe, {**call, "guidance_scale_2": call["guidance_scale"]})


def test_the_derivative_of_two_experts_that_are_alike_is_that_of_one() -> None:
    found = []
    for denoiser in experts_alike():
        times = torch.tensor([1.0, 0.6, 0.3, 0.0]).double() * denoiser.noise_schedule.t_max
        times[-1] = denoiser.noise_schedule.t_min
        times.requires_grad_()
        end = student(denoiser, times, "slow").square().mean()
        found.append((end.detach(), *torch.autograd.grad(end, times)))
    for two, one in zip(*found, strict=True):
        assert torch.allclose(two, one, rtol=1e-4) and torch.isfinite(one).all()


def test_prompts_are_encoded_once(family: Any) -> None:
    pipe, call = family("sdxl")
    denoiser = PipelineDenoiser(pipe, call)
    seen: list[int] = []
    handle = pipe.text_encoder.embeddings.register_forward_hook(lambda module, args, out: seen.append(1))
    x, condition = noise(denoiser), denoiser.encode(PROMPTS)
    grid = fixed.make("karras", denoiser.noise_schedule, STEPS)
    first = integrate(denoiser, build_solver(SOLVER, denoiser.noise_schedule), grid, x, condition=condition).x
    calls = len(seen)
    rows = {"prompt": condition["prompt"][1:]}
    alone = integrate(denoiser, build_solver(SOLVER, denoiser.noise_schedule), grid, x[1:], condition=rows).x
    handle.remove()
    assert calls and len(seen) == calls
    assert torch.allclose(alone, first[1:], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_embedding_of_the_time_is_found_and_added_to_alike_in_learning_and_in_sampling(
    name: str, family: Any
) -> None:
    pipe, call = family(name)
    denoiser = PipelineDenoiser(pipe, call)
    found = embedding_of(denoiser, noise(denoiser), denoiser.encode(PROMPTS))
    assert found is not None and found.names == (EMBEDDED[name],)
    if denoiser.loop_times_only:
        pytest.skip("the network of this pipeline cannot be told each sample's time")
    times = fixed.make("karras", denoiser.noise_schedule, STEPS)
    for shape in ((STEPS, found.width), (len(PROMPTS), STEPS, found.width)):
        offset = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        grid = TimeGrid.of(times, {EMBEDDING: offset})
        schedule = LearnedScheduler.from_grid(grid, SOLVER, config=pipe.scheduler.config)
        learned = student(denoiser, grid)
        sampled = attached(pipe, call, schedule, noise(denoiser))
        assert bool((sampled - learned).norm() <= 1e-5 * learned.norm())
    assert bool((learned - student(denoiser, times)).norm() >= 1e-4 * learned.norm())


def test_a_solver_with_two_evaluations_a_step_adds_it_in_both_experts() -> None:
    found = []
    for denoiser in experts_alike():
        times = fixed.make("karras", denoiser.noise_schedule, STEPS)
        times = torch.cat([times[:-1], 0.5 * times[-2:-1]])  # Heun's method does not step to sigma = 0
        offset = 0.3 * torch.randn(STEPS, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        solver, given = build_solver("heun", denoiser.noise_schedule), denoiser.encode(PROMPTS)
        grids = (TimeGrid.of(times, {EMBEDDING: offset}), times)
        found.append([integrate(denoiser, solver, grid, noise(denoiser), condition=given).x for grid in grids])
    (moved, plain), (alone, _) = found
    assert bool((moved - alone).norm() <= 1e-5 * alone.norm()) and not torch.allclose(moved, plain, atol=1e-4)
