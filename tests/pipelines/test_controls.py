"""Pipelines that are told more than a prompt: pictures, and the time of the loop in a second network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from PIL import Image
from torch import Tensor

from tiny_networks import small
from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.pipeline import from_pipeline
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler

STEPS, SOLVER = 3, "unipc-2"
PROMPTS = ["a cat", "the big dog", "nothing"]


@pytest.fixture(scope="module")
def edited(tiny: Any) -> Any:
    torch.manual_seed(0)
    return tiny.stable_diffusion("StableDiffusionInstructPix2PixPipeline", unet=tiny.text_unet(in_channels=8))


@pytest.fixture(scope="module")
def controlled(tiny: Any) -> Any:
    torch.manual_seed(0)
    control = small("ControlNetModel")
    with torch.no_grad():
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            block.weight.normal_(0, 0.3)
    return tiny.stable_diffusion("StableDiffusionControlNetPipeline", controlnet=control)


def solved(denoiser: PipelineDenoiser, grid: Any, checkpoint: bool = False) -> Tensor:
    x_T, solver = initial_noise(0, range(3), denoiser.shape), build_solver(SOLVER, denoiser.noise_schedule)
    x_T = x_T.to(next(denoiser.network.parameters()).dtype)
    condition = {**denoiser.encode(PROMPTS), "number": torch.arange(3)}
    return integrate(denoiser, solver, grid, x_T, condition=condition, checkpoint=checkpoint).x


@pytest.mark.parametrize("kind", ["edited", "controlled"])
def test_the_attached_run_with_the_pictures_ends_in_the_same_state(kind: str, pictures: Path, request: Any) -> None:
    pipe = request.getfixturevalue(kind)
    denoiser = PipelineDenoiser(pipe, {"image": str(pictures), "guidance_scale": 3.0})
    assert denoiser.numbered is not None
    grid = fixed.make("karras", denoiser.noise_schedule, STEPS)
    end = solved(denoiser, grid)
    images = [Image.open(pictures / f"{number % 2}.png") for number in range(3)]
    attach(pipe, LearnedScheduler.from_grid(grid, SOLVER, pipe.scheduler.config))
    try:
        found = pipe(
            PROMPTS, image=images, guidance_scale=3.0, num_inference_steps=STEPS, output_type="latent",
            latents=initial_noise(0, range(3), denoiser.shape), generator=[torch.Generator() for _ in range(3)],
        ).images  # fmt: skip
    finally:
        detach(pipe)
    assert (found - end).norm() <= 1e-5 * end.norm()
    assert not torch.allclose(end[0], end[1], atol=1e-2)
    alone = PipelineDenoiser(pipe, {"image": str(pictures), "guidance_scale": 3.0})
    rows = {key: value[1:] for key, value in {**alone.encode(PROMPTS), "number": torch.arange(3)}.items()}
    x_T, solver = initial_noise(0, [1, 2], alone.shape), build_solver(SOLVER, alone.noise_schedule)
    assert torch.allclose(integrate(alone, solver, grid, x_T, condition=rows).x, end[1:], atol=1e-3)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_gradient_counts_what_the_control_network_is_told(
    checkpoint: bool, controlled: Any, pictures: Path
) -> None:
    denoiser = PipelineDenoiser(controlled, {"image": str(pictures), "guidance_scale": 3.0}).to(dtype=torch.float64)
    times = fixed.make("karras", denoiser.noise_schedule, STEPS).clone().requires_grad_()

    def gradient() -> float:
        return float(torch.autograd.grad(solved(denoiser, times, checkpoint).square().mean(), times)[0][2])

    whole, step = gradient(), torch.tensor([0.0, 0.0, 0.1, 0.0]).double()
    with torch.no_grad():
        up, down = (float(solved(denoiser, times + sign * step).square().mean()) for sign in (1, -1))
    untold = controlled.controlnet.time_proj.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    part = gradient()
    untold.remove()
    denoiser.to(dtype=torch.float32)
    assert whole == pytest.approx((up - down) / 0.2, rel=0.005)
    assert part != pytest.approx(whole, rel=0.015)


def test_a_predictor_is_refused_where_the_network_is_given_more_than_the_state(edited: Any, pictures: Path) -> None:
    denoiser = PipelineDenoiser(edited, {"image": str(pictures), "guidance_scale": 3.0})
    with pytest.raises(TsAdaptError):
        denoiser.shown(initial_noise(0, range(3), denoiser.shape), denoiser.encode(PROMPTS))


def test_what_blends_a_known_part_in_at_its_end_is_refused(tiny: Any) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    parts = tiny.pipeline("sd").components
    pipe = StableDiffusionInpaintPipeline(**{**parts, "image_encoder": None}, requires_safety_checker=False)
    with pytest.raises(TsAdaptError, match="blends"):
        PipelineDenoiser(pipe)


def test_what_draws_its_noise_where_none_can_be_given_is_refused(tiny: Any) -> None:
    with pytest.raises(TsAdaptError, match="noise"):
        PipelineDenoiser(tiny.pipeline("ddpm"))


def test_a_network_that_does_not_see_the_state_is_refused(tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    pipe.unet.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]), *args[1:]))
    with pytest.raises(TsAdaptError, match="is shown the same of different states"):
        PipelineDenoiser(pipe)


@pytest.mark.parametrize("way", ["no noise", "interrupted", "no schedule"])
def test_a_pipeline_that_is_refused_is_left_as_it_was(way: str, tiny: Any) -> None:
    pipe = tiny.pipeline("ddpm" if way == "no noise" else "sd")
    network, scheduler = pipe.unet.train().requires_grad_(True), pipe.scheduler
    network.conv_in.requires_grad_(False).eval()
    trained = [(module.training, *(p.requires_grad for p in module.parameters())) for module in network.modules()]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if way == "interrupted":
        handle = network.mid_block.register_forward_hook(interrupt)
    if way == "no schedule":
        pipe.scheduler = CMStochasticIterativeScheduler()
    with pytest.raises(KeyboardInterrupt if way == "interrupted" else TsAdaptError):
        (from_pipeline if way == "no schedule" else PipelineDenoiser)(pipe)
    if way == "interrupted":
        handle.remove()
    left = [(module.training, *(p.requires_grad for p in module.parameters())) for module in network.modules()]
    assert left == trained and not network._forward_pre_hooks and "forward" not in vars(network)
    assert pipe.scheduler is scheduler or way == "no schedule"


def test_own_times_are_refused_with_the_reason_where_the_network_cannot_be_told_them(tiny: Any) -> None:
    denoiser = PipelineDenoiser(tiny.pipeline("sd"))
    denoiser.loop_times_only = "the reason"
    times = fixed.make("karras", denoiser.noise_schedule, STEPS).repeat(3, 1)
    for refused in (times, TimeGrid(times[0], model_times=times[0, :-1])):
        with pytest.raises(TsAdaptError, match="the reason"):
            solved(denoiser, refused)
    with pytest.raises(TsAdaptError, match="the reason"):
        denoiser.shown(initial_noise(0, [0], denoiser.shape), {})
