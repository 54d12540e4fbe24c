"""A pipeline's own loop and the direct way agree, in states, in gradients and in pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.pipeline import from_pipeline
from ts_adapt.denoisers.time_derivative import TimeDerivative
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import DERIVATIVES, Denoiser, Node, TimeGrid
from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.policies import StepByStep
from ts_adapt.sampling import embedding_of, integrate, noise_for

STEPS, ROWS = 4, 3
PROMPTS = ["a cat", "dog", "the end"]
Pair = tuple[Denoiser, dict[str, Any], PipelineDenoiser, dict[str, Any]]


@pytest.fixture(scope="module", params=[("sd", 1.0), ("sd", 3.0), ("dit", 1.0), ("dit", 3.0)], ids=str)
def pair(request: Any, tiny: Any) -> Pair:
    """The direct denoiser, guided or not, with its condition, and that of the pipeline, with its own."""
    name, scale = request.param
    pipe = tiny.pipeline(name)
    direct: Any = from_pipeline(pipe)
    through = PipelineDenoiser(pipe, {"guidance_scale": scale})
    if name == "sd":
        conditions = direct.encode(PROMPTS), through.encode(PROMPTS)
    else:
        conditions = ({"class_labels": torch.tensor([3, 7, 1])},) * 2
    return direct if scale == 1 else Guided(direct, scale), dict(conditions[0]), through, dict(conditions[1])


def noise(denoiser: Denoiser) -> Tensor:
    return torch.randn(ROWS, *denoiser.shape, generator=torch.Generator().manual_seed(1))


def close(x: Tensor, y: Tensor, tolerance: float = 3e-6) -> bool:
    return bool((x - y).norm() <= tolerance * y.norm())


def own_grids(denoiser: Denoiser, condition: dict[str, Any], guided: bool) -> tuple[Tensor, GridSpace]:
    """Numbers of a grid of its own, with corrections of every kind, for each sample."""
    corrections = ["shift", "scale", "coefficients", "embedding", *(["guidance"] if guided else [])]
    found = embedding_of(denoiser, noise(denoiser), condition)
    assert found is not None
    space = GridSpace(denoiser.noise_schedule, STEPS, corrections, 2, found.width)
    z = space.numbers(TimeGrid(fixed.make("karras", denoiser.noise_schedule, STEPS)))
    spread = torch.randn(ROWS, len(z), generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    return (z + 0.1 * spread).requires_grad_(), space


def test_a_single_evaluation_is_that_of_the_direct_way(pair: Pair) -> None:
    direct, condition, through, own = pair
    x, t = noise(direct), torch.tensor([100.0, 500.2, 900.0]).double()
    scale = torch.tensor([1.0, 1.1, 0.9])
    for given in (
        {"t": torch.tensor(437.25).double()},
        {"t": t},
        {"t": t, "model_time": t + 3, "output_scale": scale},
        {"t": t, **({"guidance_factor": scale} if direct.guides else {})},
    ):
        before = through.evaluations
        found = through(x, **given, **own)
        assert close(found, direct(x, **given, **condition)) and through.evaluations == before + 1


@pytest.mark.parametrize("solver", ["unipc-3", "ddpm", "heun"])
def test_a_solve_meets_the_same_states(solver: str, pair: Pair) -> None:
    direct, condition, through, own = pair
    x, grid, before = noise(direct), fixed.make("karras", direct.noise_schedule, STEPS), through.evaluations
    met: list[tuple[int, Tensor]] = []
    options: dict[str, Any] = {
        "step_noise": noise_for(0, range(ROWS), x) if solver == "ddpm" else None, "keep_trajectory": True,
    }  # fmt: skip
    expected = integrate(direct, build_solver(solver, direct.noise_schedule), grid, x, condition=condition, **options)
    found = integrate(
        through, build_solver(solver, direct.noise_schedule), grid, x, condition=own, check=True,
        callback=lambda node, x_t, x0: met.append((node.index, x_t)), **options,
    )  # fmt: skip
    assert torch.equal(found.times, expected.times) and close(found.x, expected.x, 1e-5)
    assert found.states is not None and expected.states is not None
    assert found.x0 is not None and expected.x0 is not None
    assert close(found.states, expected.states, 1e-5) and close(found.x0, expected.x0, 1e-5)
    assert [index for index, _ in met] == list(range(STEPS))
    assert all(torch.equal(x_t, found.states[:, index]) for index, x_t in met)
    assert through.evaluations - before == STEPS * (2 if solver == "heun" else 1)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("way", DERIVATIVES)
def test_gradients_are_those_of_the_direct_way(way: str, checkpoint: bool, pair: Pair) -> None:
    ends, gradients, count = [], [], pair[2].evaluations
    for denoiser, condition in (pair[:2], pair[2:]):
        z, space = own_grids(denoiser, condition, pair[0].guides)
        taken, x = TimeDerivative(denoiser, way), noise(denoiser).requires_grad_()
        solver = build_solver("unipc-2", denoiser.noise_schedule)
        end = integrate(taken, solver, space.grid(z), x, condition=condition, checkpoint=checkpoint).x
        gradients.append(torch.autograd.grad(end.square().mean(), [z, x]))
        ends.append(end)
    assert close(ends[1], ends[0], 1e-5)
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert close(found, expected, 1e-5)
    assert pair[2].evaluations - count in (STEPS, STEPS + 2)  # slow looks for the embedding once


def test_a_grid_that_all_share_has_the_sum_of_the_gradients(pair: Pair) -> None:
    gradients = []
    for denoiser, condition in (pair[:2], pair[2:]):
        space = GridSpace(denoiser.noise_schedule, STEPS)
        z = space.numbers(TimeGrid(fixed.make("karras", denoiser.noise_schedule, STEPS))).clone().requires_grad_()
        solver = build_solver("dpmpp-2m", denoiser.noise_schedule)
        end = integrate(denoiser, solver, space.grid(z), noise(denoiser), condition=condition).x
        gradients.append(torch.autograd.grad(end.square().mean(), z)[0])
    assert close(gradients[1], gradients[0], 1e-4)  # guidance adds up in another order, and the last step amplifies


def test_pictures_and_their_gradients_are_those_of_the_direct_way(pair: Pair) -> None:
    direct, _, through, _ = pair
    states = [(3 * noise(direct)).requires_grad_() for _ in range(2)]  # some pixels are beyond [-1, 1]
    count = through.evaluations
    images = [denoiser.decode(x) for denoiser, x in zip((direct, through), states, strict=True)]
    assert close(images[1], images[0]) and through.evaluations == count
    gradients = [torch.autograd.grad(image.square().sum(), x)[0] for image, x in zip(images, states, strict=True)]
    assert close(gradients[1], gradients[0])


def test_a_policy_without_nominal_times_is_refused(pair: Pair) -> None:
    _, _, through, own = pair
    first = Node(0, STEPS, torch.tensor(through.noise_schedule.t_max).double())
    policy = StepByStep(first, lambda x_t, x0, node, condition: node)
    with pytest.raises(TsAdaptError, match="nominal"):
        integrate(through, build_solver("ddim", through.noise_schedule), policy, noise(through), condition=own)


def test_the_pipeline_itself_keeps_its_scheduler_and_its_pictures(tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    before = {key: getattr(pipe, key) for key in ("scheduler", "image_processor", "unet", "text_encoder")}
    call = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(3)}
    images = pipe(["a cat"], **call).images
    through = PipelineDenoiser(pipe)
    through(noise(through), torch.tensor(500.0).double(), **through.encode(PROMPTS))
    call["generator"].manual_seed(3)
    assert torch.equal(pipe(["a cat"], **call).images, images)
    assert all(getattr(pipe, key) is value for key, value in before.items())
    assert "forward" not in vars(pipe.unet) and "forward" not in vars(pipe.text_encoder)
