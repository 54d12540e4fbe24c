"""Unmodified pipelines on a learned schedule: the images of our own loop, batch by batch and one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_cases import (
    CASES,
    KINDS,
    ROWS,
    SCALE,
    STEPS,
    TOKENS,
    WIDTH,
    Counted,
    assert_as_our_own,
    call_flux,
    call_sd,
    embeddings,
    generators,
    guided_sd3,
    made,
    noise,
    our_own,
    sd3_condition,
    solved,
    tokens,
)  # fmt: skip
from ts_adapt.denoisers.scheduler_config import noise_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import GUIDANCE, TimeGrid
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_images_equal_our_own_loop_and_single_calls(name: str, kind: str, pipes: Any, tiny: Any) -> None:
    pipe, case = pipes(name), CASES[name]
    schedule = made(tiny, pipe, kind, name)
    expected = our_own(pipe, case, schedule, ROWS)
    attach(pipe, schedule)
    with Counted(pipe) as counted:
        together = case.call(pipe, ROWS)
    alone = torch.cat([case.call(pipe, [row]) for row in ROWS])
    assert len(counted.timesteps) == STEPS
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)
    if kind != "static":
        told = counted.timesteps[1]
        assert len(told.unique()) == len(ROWS), "each image has its own time"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dit", "sd", "sdxl", "sd3"])
def test_without_guidance(name: str, kind: str, pipes: Any, tiny: Any) -> None:
    pipe, case = pipes(name), CASES[name]
    schedule = made(tiny, pipe, kind, name)
    plain = case.ours(pipe).denoiser
    x = solved(plain, schedule, noise(ROWS, *case.shape), case.condition(ROWS))
    attach(pipe, schedule)
    found = case.call(pipe, ROWS, guidance_scale=1.0)
    torch.testing.assert_close(found, case.finish(plain, x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one-shot", "recursive"])
@pytest.mark.parametrize("name", ["ddpm", "dit", "sd", "flux"])
@pytest.mark.parametrize("guided", [True, False])
def test_the_same_noise_for_all_is_not_taken_for_guidance(
    name: str, kind: str, guided: bool, pipes: Any, tiny: Any
) -> None:
    """Two prompts from one noise look like one guided prompt, [x, x], and are told apart all the same."""
    pipe, case = pipes(name), CASES[name]
    schedule = made(tiny, pipe, kind, name)
    options: dict[str, Any] = {} if name in ("ddpm", "flux") else {"guidance_scale": SCALE if guided else 1.0}
    rows = [3, 8]
    if name in ("sd", "flux"):
        latents = noise([3, 3], *case.shape)
        options["latents"] = tokens(latents) if name == "flux" else latents
    else:
        options["generator"] = generators([3, 3])
    attach(pipe, schedule)
    together = case.call(pipe, rows, **options)
    alone = torch.cat([case.call(pipe, [row], **only(options, i)) for i, row in enumerate(rows)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def only(options: dict[str, Any], i: int) -> dict[str, Any]:
    """The options of sample `i` alone; a generator is drawn from anew."""
    mine = {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in options.items()}
    return {**mine, "generator": generators([3])} if "generator" in options else mine


def rows_of(times: Tensor) -> Tensor:
    """A grid for each of three samples, about `times`."""
    return torch.stack([torch.cat([times[:1], factor * times[1:-1], times[-1:]]) for factor in (0.8, 1.0, 1.1)])


def shared(times: Tensor) -> TimeGrid:
    spread = torch.linspace(-0.05, 0.05, 3 * STEPS).double().reshape(STEPS, 3)
    return TimeGrid(times, 0.95 * times[:-1], torch.linspace(0.9, 1.1, STEPS).double(), spread)


def own_times(times: Tensor) -> TimeGrid:
    return TimeGrid(rows_of(times))


def all_own(times: Tensor) -> TimeGrid:
    grid, factor = shared(times), torch.tensor([0.97, 1.0, 1.02]).double()
    assert grid.output_scale is not None and grid.coefficients is not None
    rows = rows_of(times)
    return TimeGrid(
        rows, 0.98 * rows[:, :-1], factor[:, None] * grid.output_scale, factor[:, None, None] * grid.coefficients
    )


def own_corrections(times: Tensor) -> TimeGrid:
    return TimeGrid(times, all_own(times).model_times, all_own(times).output_scale)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "make", "solver"),
    [
        *product(["sd"], [shared, own_times, all_own, own_corrections],
                 ["unipc-3", "dpmpp-3m-exact", "deis-3+corrector", "ipndm-3"]),
        *product(["ddpm", "dit", "sdxl", "sd3", "flux"], [shared, all_own], ["unipc-3"]),
    ],
)  # fmt: skip
def test_corrections_and_grids_of_each_image(
    name: str, make: Callable[[Tensor], TimeGrid], solver: str, pipes: Any, tiny: Any
) -> None:
    pipe, case = pipes(name), CASES[name]
    grid = make(tiny.static_times(noise_of(pipe.scheduler.config)[0]))
    assert_as_our_own(pipe, case, LearnedScheduler.from_grid(grid, solver, pipe.scheduler.config))
    if name == "sd" and make is not shared:
        with pytest.raises(TsAdaptError, match=r"are for 3 samples|3 grids for a batch of 2"):
            case.call(pipe, ROWS[:2])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind", "corrections"),
    [
        *product(["sd", "flux"], ["one-shot", "recursive"], [("shift", "scale", "coefficients")]),
        ("sd", "recursive", ("shift", "residual")),
    ],
)
def test_predicted_corrections(name: str, kind: str, corrections: tuple[str, ...], pipes: Any, tiny: Any) -> None:
    pipe, case = pipes(name), CASES[name]
    assert_as_our_own(pipe, case, made(tiny, pipe, kind, name, corrections=corrections, order=3))


def steered(times: Tensor, own: bool) -> TimeGrid:
    """A grid, or one for each sample, with factors on the guidance of every step."""
    factors = torch.tensor([0.5, 1.4, 0.8, 1.1]).double()
    if not own:
        return TimeGrid.of(times, {GUIDANCE: factors})
    return TimeGrid.of(rows_of(times), {GUIDANCE: torch.stack([factors, factors.flip(0), 1.2 * factors])})


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["dit", "sd", "sdxl", "sd3"])
def test_factors_on_the_guidance(name: str, own: bool, pipes: Any, tiny: Any, tmp_path: Path) -> None:
    pipe, case = pipes(name), CASES[name]
    grid = steered(tiny.static_times(noise_of(pipe.scheduler.config)[0]), own)
    LearnedScheduler.from_grid(grid, "unipc-3", pipe.scheduler.config).save_pretrained(tmp_path)
    assert_as_our_own(pipe, case, LearnedScheduler.from_pretrained(tmp_path))
    for options in ({"guidance_scale": 1.0}, *([{"guidance_rescale": 0.7}] if name == "sd" else [])):
        with pytest.raises(TsAdaptError, match="takes a pipeline guided by two answers"):
            case.call(pipe, ROWS, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "recursive"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_img2img_starts_inside_the_grid(kind: str, strength: float, pipes: Any, tiny: Any) -> None:
    pipe, case = pipes("sd-img2img"), CASES["sd"]
    schedule = made(tiny, pipe, kind, "sd")
    begin = STEPS - int(STEPS * strength)
    latents = noise(ROWS, *case.shape, stream=3)

    def call(rows: Sequence[int], image: Tensor) -> Tensor:
        return call_sd(pipe, rows, latents=None, image=image, strength=strength, generator=generators(rows))

    attach(pipe, schedule)
    with Counted(pipe) as counted:
        found = call(ROWS, latents)
    alone = torch.cat([call([row], latents[i : i + 1]) for i, row in enumerate(ROWS)])
    detach(pipe)
    assert len(counted.timesteps) == STEPS - begin
    t = schedule.source.plan(STEPS, schedule.noise_schedule).times[begin]
    eps = noise(ROWS, *case.shape)
    x = (schedule.noise_schedule.alpha(t) * latents + schedule.noise_schedule.sigma(t) * eps).float()
    torch.testing.assert_close(found, our_own(pipe, case, schedule, ROWS, x, begin), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, found, atol=1e-4, rtol=1e-4)


def test_img2img_refuses_what_starts_from_pure_noise(pipes: Any, tiny: Any) -> None:
    pipe = pipes("sd-img2img")
    with pytest.raises(TsAdaptError, match="StableDiffusionImg2ImgPipeline starts from a noised image"):
        attach(pipe, made(tiny, pipe, "one-shot", "sd"))
    attach(pipe, made(tiny, pipe, "static", "sd"))
    with pytest.raises(TsAdaptError, match="raise strength or num_inference_steps"):
        call_sd(pipe, ROWS, latents=None, image=noise(ROWS, 4, 8, 8), strength=0.1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "steered"])
def test_flux_with_true_guidance_calls_the_network_twice_a_step(kind: str, pipes: Any, tiny: Any) -> None:
    pipe = pipes("flux")
    if kind == "steered":
        grid = steered(tiny.static_times(noise_of(pipe.scheduler.config)[0]), own=True)
        schedule = LearnedScheduler.from_grid(grid, "unipc-3", pipe.scheduler.config)
    else:
        schedule = made(tiny, pipe, kind, "flux")
    negative = {
        "negative_prompt_embeds": torch.zeros(len(ROWS), TOKENS, WIDTH),
        "negative_pooled_prompt_embeds": torch.zeros(len(ROWS), 6),
    }
    attach(pipe, schedule)
    with Counted(pipe) as counted:
        found = call_flux(pipe, ROWS, true_cfg_scale=SCALE, **negative)
    detach(pipe)
    assert len(counted.timesteps) == 2 * STEPS
    expected = solved(guided_sd3(pipe), schedule, noise(ROWS, 4, 8, 8), sd3_condition(ROWS))
    torch.testing.assert_close(found, tokens(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one-shot", "recursive"])
def test_several_images_a_prompt(kind: str, pipes: Any, tiny: Any) -> None:
    pipe, case = pipes("sd"), CASES["sd"]
    schedule = made(tiny, pipe, kind, "sd")
    attach(pipe, schedule)
    found = call_sd(pipe, [3, 8], latents=None, num_images_per_prompt=2, generator=generators([1, 2, 3, 4]))
    detach(pipe)
    x_T, condition = noise([1, 2, 3, 4], 4, 8, 8), {"encoder_hidden_states": embeddings([3, 3, 8, 8])}
    expected = solved(case.ours(pipe), schedule, x_T, condition)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
