"""Unmodified pipelines on a learned schedule: the images of our own loop, batch by batch and one by one.

A case says how a pipeline is called for some rows (numbers of samples), and what our own denoiser for it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.denoisers.pipeline import from_pipeline, noise_of
from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.sampling import integrate
from ts_adapt.schedulers.attach import attach, detach, network_of
from ts_adapt.schedulers.scheduler import LearnedScheduler

STEPS, WIDTH, TOKENS, SCALE = 4, 16, 3, 3.0
ROWS = [3, 8, 5]
KINDS = ["static", "one-shot", "recursive"]


def drawn(row: int, *shape: int, stream: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * stream + row))


def noise(rows: Sequence[int], *shape: int, stream: int = 0) -> Tensor:
    return torch.stack([drawn(row, *shape, stream=stream) for row in rows])


def generators(rows: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in rows]


def embeddings(rows: Sequence[int]) -> Tensor:
    return noise(rows, TOKENS, WIDTH, stream=1)


def pooled(rows: Sequence[int], width: int) -> Tensor:
    return noise(rows, width, stream=2)


def as_images(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Case:
    """shape of a sample; call(pipe, rows) -> states or images; ours(pipe) -> denoiser; condition(rows);
    finish: from our last state to what `call` returns; guided; options of a predictor that sees the condition"""

    shape: tuple[int, ...]
    call: Callable[..., Tensor]
    ours: Callable[[Any], Any]
    condition: Callable[[Sequence[int]], dict[str, Any]]
    finish: Callable[[Any, Tensor], Tensor]
    options: dict[str, int]


def unconditional(rows: Sequence[int]) -> dict[str, Any]:
    return {}


def call_pixels(pipe: Any, rows: Sequence[int], **options: Any) -> Tensor:
    options = {"num_inference_steps": STEPS, **options}
    return nchw(pipe(batch_size=len(rows), generator=generators(rows), output_type="np", **options).images)


def call_ldm(pipe: Any, rows: Sequence[int], **options: Any) -> Tensor:
    """What is to be decoded: the nearest code of a latent jumps, so images do not tell how near two latents are."""
    seen: list[Tensor] = []
    handle = pipe.vqvae.quantize.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = call_pixels(pipe, rows, **options)
    handle.remove()
    assert images.shape == (len(rows), 3, 16, 16)
    return seen[0] * pipe.vqvae.config.scaling_factor


def nchw(images: Any) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def call_dit(pipe: Any, rows: Sequence[int], guidance_scale: float = SCALE, **options: Any) -> Tensor:
    options = {"num_inference_steps": STEPS, "generator": generators(rows), "guidance_scale": guidance_scale, **options}
    return nchw(pipe([row + 100 for row in rows], output_type="np", **options).images)


def call_sd(pipe: Any, rows: Sequence[int], guidance_scale: float = SCALE, **options: Any) -> Tensor:
    options = {
        "num_inference_steps": STEPS, "latents": noise(rows, 4, 8, 8), "prompt_embeds": embeddings(rows),
        "negative_prompt_embeds": torch.zeros(len(rows), TOKENS, WIDTH), **options,
    }  # fmt: skip
    out: Tensor = pipe(guidance_scale=guidance_scale, output_type="latent", **typed(pipe, options)).images
    return out


def typed(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Tensors in the precision of the pipeline, as its own text encoders give them."""
    dtype = network_of(pipe).dtype
    return {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in options.items()}


def call_sdxl(pipe: Any, rows: Sequence[int], guidance_scale: float = SCALE, **options: Any) -> Tensor:
    return call_sd(
        pipe, rows, guidance_scale, pooled_prompt_embeds=pooled(rows, WIDTH),
        negative_pooled_prompt_embeds=torch.zeros(len(rows), WIDTH), **options,
    )  # fmt: skip


def call_sd3(pipe: Any, rows: Sequence[int], guidance_scale: float = SCALE, **options: Any) -> Tensor:
    return call_sd(
        pipe, rows, guidance_scale, pooled_prompt_embeds=pooled(rows, 6),
        negative_pooled_prompt_embeds=torch.zeros(len(rows), 6), height=16, width=16, **options,
    )  # fmt: skip


def tokens(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def call_flux(pipe: Any, rows: Sequence[int], **options: Any) -> Tensor:
    options = {
        "num_inference_steps": STEPS, "latents": tokens(noise(rows, 4, 8, 8)), "prompt_embeds": embeddings(rows),
        "pooled_prompt_embeds": pooled(rows, 6), **options,
    }  # fmt: skip
    out: Tensor = pipe(height=16, width=16, output_type="latent", **typed(pipe, options)).images
    return out


def by_hand(pipe: Any) -> NetworkDenoiser:
    built_noise, prediction = noise_of(pipe.scheduler.config)
    return NetworkDenoiser(network_of(pipe), built_noise, prediction, shape=(4, 8, 8))


def guided_sdxl(pipe: Any) -> Guided:
    none = {
        "encoder_hidden_states": torch.zeros(1, TOKENS, WIDTH),
        "added_cond_kwargs": {"text_embeds": torch.zeros(1, WIDTH)},
    }
    return Guided(by_hand(pipe), SCALE, none)


def xl_condition(rows: Sequence[int]) -> dict[str, Any]:
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(len(rows), 1)
    return {
        "encoder_hidden_states": embeddings(rows),
        "added_cond_kwargs": {"text_embeds": pooled(rows, WIDTH), "time_ids": ids},
    }


def sd3_condition(rows: Sequence[int]) -> dict[str, Any]:
    return {"encoder_hidden_states": embeddings(rows), "pooled_projections": pooled(rows, 6)}


def guided_sd3(pipe: Any) -> Guided:
    none = {"encoder_hidden_states": torch.zeros(1, TOKENS, WIDTH), "pooled_projections": torch.zeros(1, 6)}
    return Guided(by_hand(pipe), SCALE, none)


def decoded(denoiser: Any, x: Tensor) -> Tensor:
    return as_images(denoiser.decode(x))


def itself(denoiser: Any, x: Tensor) -> Tensor:
    return x


EMPTY = {"encoder_hidden_states": torch.zeros(1, TOKENS, WIDTH)}
CASES = {
    "ddpm": Case((1, 8, 8), call_pixels, from_pipeline, unconditional, decoded, {}),
    "ddim": Case((1, 8, 8), call_pixels, from_pipeline, unconditional, decoded, {}),
    "ldm": Case((3, 8, 8), call_ldm, from_pipeline, unconditional, itself, {}),
    "dit": Case(
        (4, 8, 8), call_dit, lambda pipe: Guided(from_pipeline(pipe), SCALE),
        lambda rows: {"class_labels": torch.tensor(rows) + 100}, decoded, {"classes": 1000},
    ),
    "sd": Case(
        (4, 8, 8), call_sd, lambda pipe: Guided(by_hand(pipe), SCALE, EMPTY),
        lambda rows: {"encoder_hidden_states": embeddings(rows)}, itself, {"text": WIDTH},
    ),
    "sdxl": Case((4, 8, 8), call_sdxl, guided_sdxl, xl_condition, itself, {"text": WIDTH}),
    "sd3": Case((4, 8, 8), call_sd3, guided_sd3, sd3_condition, itself, {"text": WIDTH}),
    "flux": Case((4, 8, 8), call_flux, by_hand, sd3_condition, lambda denoiser, x: tokens(x), {"text": WIDTH}),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipes(tiny: Any) -> Callable[[str], Any]:
    """The pipelines, built once each."""
    built: dict[str, Any] = {}

    def pipe(name: str) -> Any:
        if name not in built:
            built[name] = tiny.pipeline(name)
        return built[name]

    return pipe


class Counted:
    """The calls of a pipeline's network while the block runs, and what it was told."""

    def __init__(self, pipe: Any) -> None:
        self.network, self.timesteps = network_of(pipe), []

    def __enter__(self) -> Counted:
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            told = kwargs["timestep"] if "timestep" in kwargs else args[1]
            self.timesteps.append(torch.as_tensor(told))

        self.handle = self.network.register_forward_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def our_own(
    pipe: Any, case: Case, schedule: Any, rows: Sequence[int], x: Tensor | None = None, begin: int = 0
) -> Tensor:
    """The same from `integrate`: same noise, solver, policy and condition."""
    denoiser = case.ours(pipe)
    solver = build_solver(schedule.config["solver"], schedule.noise)
    policy = schedule.source.plan(STEPS, schedule.noise).policy(begin)
    x = noise(rows, *case.shape) if x is None else x
    solution = integrate(denoiser, solver, policy, x, condition=case.condition(rows))
    assert denoiser.evaluations == STEPS - begin
    return case.finish(denoiser, solution.x)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_images_equal_our_own_loop_and_single_calls(name: str, kind: str, pipes: Any, tiny: Any) -> None:
    pipe, case = pipes(name), CASES[name]
    options = {} if kind == "static" else case.options
    schedule = tiny.schedule(kind, pipe.scheduler.config, case.shape, **options)
    expected = our_own(pipe, case, schedule, ROWS)
    attach(pipe, schedule)
    try:
        with Counted(pipe) as counted:
            together = case.call(pipe, ROWS)
        alone = torch.cat([case.call(pipe, [row]) for row in ROWS])
    finally:
        detach(pipe)
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
    schedule = tiny.schedule(kind, pipe.scheduler.config, case.shape, **({} if kind == "static" else case.options))
    plain = case.ours(pipe).denoiser
    solver, policy = build_solver("unipc-3", schedule.noise), schedule.source.plan(STEPS, schedule.noise).policy(0)
    solution = integrate(plain, solver, policy, noise(ROWS, *case.shape), condition=case.condition(ROWS))
    attach(pipe, schedule)
    found = case.call(pipe, ROWS, guidance_scale=1.0)
    detach(pipe)
    torch.testing.assert_close(found, case.finish(plain, solution.x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_grid_for_each_image_of_a_batch(pipes: Any, tiny: Any) -> None:
    """The oracle's grids, under guidance."""
    pipe, case = pipes("sd"), CASES["sd"]
    shared = tiny.static_times(noise_of(pipe.scheduler.config)[0])
    rows = torch.stack([torch.cat([shared[:1], factor * shared[1:-1], shared[-1:]]) for factor in (0.8, 1.0, 1.1)])
    schedule = LearnedScheduler.from_grid(rows, "dpmpp-2m", pipe.scheduler.config)
    expected = our_own(pipe, case, schedule, ROWS)
    attach(pipe, schedule)
    found = case.call(pipe, ROWS)
    with pytest.raises(TsAdaptError, match="3 grids for a batch of 2"):
        case.call(pipe, ROWS[:2])
    detach(pipe)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_model_times_and_output_scales(name: str, pipes: Any, tiny: Any) -> None:
    pipe, case = pipes(name), CASES[name]
    times = tiny.static_times(noise_of(pipe.scheduler.config)[0])
    grid = TimeGrid(times, model_times=0.95 * times[:-1], output_scale=torch.linspace(0.9, 1.1, STEPS).double())
    schedule = LearnedScheduler.from_grid(grid, "unipc-2", pipe.scheduler.config)
    expected = our_own(pipe, case, schedule, ROWS)
    attach(pipe, schedule)
    found = case.call(pipe, ROWS)
    detach(pipe)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one-shot", "recursive"])
def test_several_images_a_prompt_with_a_generator_and_a_callback(kind: str, pipes: Any, tiny: Any) -> None:
    pipe, case = pipes("sd"), CASES["sd"]
    schedule = tiny.schedule(kind, pipe.scheduler.config, case.shape, text=WIDTH)
    prompts, seen = [3, 8], []

    def callback(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, float(timestep), kwargs["latents"].shape))
        return {}

    attach(pipe, schedule)
    found = call_sd(
        pipe, prompts, latents=None, num_images_per_prompt=2, generator=generators([1, 2, 3, 4]),
        callback_on_step_end=callback,
    )  # fmt: skip
    nominal = pipe.scheduler.timesteps.tolist()
    detach(pipe)
    denoiser = case.ours(pipe)
    policy = schedule.source.plan(STEPS, schedule.noise).policy(0)
    x_T, condition = noise([1, 2, 3, 4], 4, 8, 8), {"encoder_hidden_states": embeddings([3, 3, 8, 8])}
    expected = integrate(denoiser, build_solver("unipc-3", schedule.noise), policy, x_T, condition=condition).x
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert seen == [(i, nominal[i], (4, 4, 8, 8)) for i in range(STEPS)]


@torch.no_grad()
def test_a_callback_may_change_the_latents(pipes: Any, tiny: Any) -> None:
    pipe = pipes("sd")
    attach(pipe, tiny.schedule("recursive", pipe.scheduler.config, (4, 8, 8)))
    halved = call_sd(pipe, ROWS, callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] * 0.5})
    plain = call_sd(pipe, ROWS)
    detach(pipe)
    assert torch.isfinite(halved).all() and not torch.allclose(halved, plain)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "recursive"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_img2img_starts_inside_the_grid(kind: str, strength: float, pipes: Any, tiny: Any) -> None:
    pipe, case = pipes("sd-img2img"), CASES["sd"]
    schedule = tiny.schedule(kind, pipe.scheduler.config, case.shape, **({} if kind == "static" else case.options))
    begin = STEPS - int(STEPS * strength)
    latents = noise(ROWS, *case.shape, stream=3)
    attach(pipe, schedule)
    with Counted(pipe) as counted:
        found = call_sd(pipe, ROWS, latents=None, image=latents, strength=strength, generator=generators(ROWS))
    detach(pipe)
    assert len(counted.timesteps) == STEPS - begin
    t = schedule.source.plan(STEPS, schedule.noise).times[begin]
    eps = noise(ROWS, *case.shape)
    x = (schedule.noise.alpha(t) * latents + schedule.noise.sigma(t) * eps).float()
    torch.testing.assert_close(found, our_own(pipe, case, schedule, ROWS, x, begin), atol=1e-4, rtol=1e-4)


def test_img2img_refuses_what_starts_from_pure_noise(pipes: Any, tiny: Any) -> None:
    pipe = pipes("sd-img2img")
    one_shot = tiny.schedule("one-shot", pipe.scheduler.config, (4, 8, 8))
    with pytest.raises(TsAdaptError, match="StableDiffusionImg2ImgPipeline starts from a noised image"):
        attach(pipe, one_shot)
    attach(pipe, tiny.schedule("static", pipe.scheduler.config, (4, 8, 8)))
    with pytest.raises(TsAdaptError, match="raise strength or num_inference_steps"):
        call_sd(pipe, ROWS, latents=None, image=noise(ROWS, 4, 8, 8), strength=0.1)
    detach(pipe)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_flux_with_true_guidance_calls_the_network_twice_a_step(kind: str, pipes: Any, tiny: Any) -> None:
    pipe, case = pipes("flux"), CASES["flux"]
    schedule = tiny.schedule(kind, pipe.scheduler.config, case.shape, **({} if kind == "static" else case.options))
    negative = {
        "negative_prompt_embeds": torch.zeros(len(ROWS), TOKENS, WIDTH),
        "negative_pooled_prompt_embeds": torch.zeros(len(ROWS), 6),
    }
    attach(pipe, schedule)
    with Counted(pipe) as counted:
        found = call_flux(pipe, ROWS, true_cfg_scale=SCALE, **negative)
    detach(pipe)
    assert len(counted.timesteps) == 2 * STEPS
    denoiser = guided_sd3(pipe)
    policy = schedule.source.plan(STEPS, schedule.noise).policy(0)
    expected = integrate(
        denoiser, build_solver("unipc-3", schedule.noise), policy, noise(ROWS, 4, 8, 8), condition=sd3_condition(ROWS)
    )
    torch.testing.assert_close(found, tokens(expected.x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_in_half_precision_the_network_is_told_times_in_full(name: str, kind: str, tiny: Any) -> None:
    pipe, case = tiny.pipeline(name), CASES[name]
    schedule = tiny.schedule(kind, pipe.scheduler.config, case.shape, **({} if kind == "static" else case.options))
    attach(pipe, schedule)
    with Counted(pipe) as counted:
        case.call(pipe, ROWS)
    pipe.to(torch.bfloat16)
    with Counted(pipe) as again:
        found = case.call(pipe, ROWS)
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    assert again.timesteps[0].dtype == torch.float32
    for told, in_full in zip(again.timesteps[: STEPS if kind == "static" else 1], counted.timesteps, strict=False):
        torch.testing.assert_close(told.unique(), in_full.unique())
