"""How the tiny pipelines are called, and what our own loop does in their place.

A case says how a pipeline is called for some rows (numbers of samples), and what our own denoiser for it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.denoisers.pipeline import from_pipeline
from ts_adapt.denoisers.scheduler_config import noise_of
from ts_adapt.sampling import integrate
from ts_adapt.schedulers.attach import attach, network_of
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
    options = {"num_inference_steps": STEPS, "generator": generators(rows), **options}
    return nchw(pipe(batch_size=len(rows), output_type="np", **options).images)


def images(pipe: Any, count: int = 2, **options: Any) -> Tensor:
    """What a pipeline of pixels makes of one seed, `(count, H, W, C)`."""
    options = {"num_inference_steps": STEPS, **options}
    return torch.from_numpy(pipe(count, torch.Generator().manual_seed(0), output_type="np", **options).images)


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


def made(tiny: Any, pipe: Any, kind: str, name: str = "sd", **options: Any) -> LearnedScheduler:
    """A schedule of `kind` for the case `name`; its predictors look at the condition."""
    options = {} if kind == "static" else {**CASES[name].options, **options}
    schedule: LearnedScheduler = tiny.schedule(kind, pipe.scheduler.config, CASES[name].shape, **options)
    return schedule


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


def solved(
    denoiser: Any, schedule: Any, x: Tensor, condition: dict[str, Any], policy: Any = None, begin: int = 0
) -> Tensor:
    """The last state of `integrate` along `schedule`, or by its solver along `policy`."""
    solver = build_solver(schedule.config["solver"], schedule.noise_schedule)
    policy = schedule.source.plan(STEPS, schedule.noise_schedule).policy(begin) if policy is None else policy
    return integrate(denoiser, solver, policy, x, condition=condition).x


def assert_as_our_own(pipe: Any, case: Case, schedule: Any) -> None:
    """That the pipeline, with `schedule` attached, gives what our own loop gives; it stays attached."""
    expected = our_own(pipe, case, schedule, ROWS)
    torch.testing.assert_close(case.call(attach(pipe, schedule), ROWS), expected, atol=1e-4, rtol=1e-4)


def our_own(
    pipe: Any, case: Case, schedule: Any, rows: Sequence[int], x: Tensor | None = None, begin: int = 0
) -> Tensor:
    """The same from `integrate`: same noise, solver, policy and condition."""
    denoiser = case.ours(pipe)
    x = solved(denoiser, schedule, noise(rows, *case.shape) if x is None else x, case.condition(rows), begin=begin)
    assert denoiser.evaluations == STEPS - begin
    return case.finish(denoiser, x)
