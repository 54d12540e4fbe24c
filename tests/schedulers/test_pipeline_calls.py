"""What users of pipelines do beside the two lines: callbacks, lists of times, interruptions, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from pipeline_cases import (
    CASES,
    KINDS,
    ROWS,
    STEPS,
    WIDTH,
    Counted,
    by_hand,
    call_sd,
    embeddings,
    guided_sd3,
    made,
    noise,
    sd3_condition,
    solved,
    tokens,
)  # fmt: skip
from ts_adapt.errors import TsAdaptError, TsAdaptWarning
from ts_adapt.grids.given import from_sigmas
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import edm_sigma
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.resolve import build_grid


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_another_guidance_than_it_was_learned_under_is_said_once_a_run(
    kind: str, pipes: Any, tiny: Any, recwarn: pytest.WarningsRecorder
) -> None:
    pipe = pipes("sd")
    schedule = made(tiny, pipe, kind)
    schedule.register_to_config(learned_for={"guidance_scale": 3.0})
    attach(pipe, schedule)
    for scale, said in ((3.0, 0), (6.0, 0), (1.0, 1), (7.0, 1)):
        recwarn.clear()
        call_sd(pipe, ROWS, guidance_scale=scale)
        assert [one.category for one in recwarn if "guidance_scale 3," in str(one.message)] == [TsAdaptWarning] * said


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one-shot", "recursive"])
def test_the_scale_of_the_call_is_what_a_predictor_is_told(
    kind: str, pipes: Any, tiny: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """Of the two copies that the network sees, and of one where it is not guided."""
    pipe, case = pipes("sd"), CASES["sd"]
    schedule = tiny.schedule(kind, pipe.scheduler.config, case.shape, **case.options, scales=[1.0, 4.0])
    schedule.register_to_config(learned_for={"guidance_scale": [1.0, 4.0]})
    encoder, seen = next(iter(schedule.source.predictors.values())).encoder, list[Any]()
    standard = encoder.standard
    encoder.standard = lambda scale: (seen.append(scale), standard(scale))[1]
    attach(pipe, schedule)
    for scale, said in ((1.0, 0), (3.0, 0), (4.5, 1)):
        recwarn.clear()
        seen.clear()
        call_sd(pipe, ROWS, guidance_scale=scale)
        assert seen and all(each.tolist() == [scale] * len(ROWS) for each in seen)
        assert len([one for one in recwarn if "under guidance_scale 1 to 4, " in str(one.message)]) == said


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_sees_every_step_and_may_change_the_latents(kind: str, pipes: Any, tiny: Any) -> None:
    pipe, seen = pipes("sd"), []

    def callback(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, float(timestep), kwargs["latents"].shape))
        return {"latents": kwargs["latents"] * 0.5} if step == 1 else {}

    attach(pipe, made(tiny, pipe, kind))
    halved, nominal = call_sd(pipe, ROWS, callback_on_step_end=callback), pipe.scheduler.timesteps.tolist()
    plain = call_sd(pipe, ROWS)
    assert seen == [(i, nominal[i], (3, 4, 8, 8)) for i in range(STEPS)]
    assert torch.isfinite(halved).all() and not torch.allclose(halved, plain)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_may_switch_guidance_off_half_way(kind: str, pipes: Any, tiny: Any) -> None:
    """diffusers' own example of a callback: the batch of the network is halved within the run."""
    pipe = pipes("sd")

    def callback(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    attach(pipe, made(tiny, pipe, kind))
    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with Counted(pipe) as counted:
        together = call_sd(pipe, ROWS, **options)
    alone = torch.cat([call_sd(pipe, [row], **options) for row in ROWS])
    if kind != "static":
        assert [len(told) for told in counted.timesteps] == [6, 6, 3, 3]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_call_does_not_disturb_the_next(kind: str, pipes: Any, tiny: Any) -> None:
    pipe = pipes("sd")

    def interrupt(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return kwargs

    attach(pipe, made(tiny, pipe, kind))
    expected = call_sd(pipe, ROWS)
    stopped = call_sd(pipe, ROWS, callback_on_step_end=interrupt)
    assert pipe.scheduler.step_index == 2 and not torch.allclose(stopped, expected)
    torch.testing.assert_close(call_sd(pipe, ROWS[:1]), expected[:1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_lists_of_timesteps_and_sigmas(name: str, pipes: Any, tiny: Any) -> None:
    """`retrieve_timesteps` hands them on to schedulers whose set_timesteps takes them."""
    pipe, case = pipes(name), CASES[name]
    attach(pipe, schedule := made(tiny, pipe, "static"))
    times = torch.tensor([999.0, 700.5, 300.25, 60.0, 0.0]).double()
    sigmas = edm_sigma(schedule.noise_schedule, times[:-1]).tolist()
    by_time = case.call(pipe, ROWS, num_inference_steps=None, timesteps=times[:-1].tolist())
    by_sigma = case.call(pipe, ROWS, num_inference_steps=None, sigmas=[*sigmas, 0.0])
    without_end = case.call(pipe, ROWS, num_inference_steps=None, sigmas=sigmas)
    detach(pipe)
    x_T, condition = noise(ROWS, *case.shape), case.condition(ROWS)
    expected = solved(case.ours(pipe), schedule, x_T, condition, TimeGrid(times))
    for found in (by_time, by_sigma, without_end):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_sigmas_of_flows_are_their_times(name: str, pipes: Any, tiny: Any) -> None:
    """They are not shifted, though the configs of these pipelines say shift and dynamic shifting."""
    pipe, case = pipes(name), CASES[name]
    attach(pipe, schedule := made(tiny, pipe, "static", name))
    found = case.call(pipe, ROWS, sigmas=[1.0, 0.8, 0.5, 0.1])
    detach(pipe)
    denoiser = guided_sd3(pipe) if name == "sd3" else by_hand(pipe)
    times = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0]).double()
    x = solved(denoiser, schedule, noise(ROWS, 4, 8, 8), sd3_condition(ROWS), times)
    torch.testing.assert_close(found, tokens(x) if name == "flux" else x, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_published_lists_of_diffusers(pipes: Any, tiny: Any) -> None:
    """Align Your Steps begins a hair above the table's largest sigma, which is meant."""
    pipe = pipes("sd")
    schedule = attach(pipe, LearnedScheduler.from_grid("karras", "dpmpp-2m")).scheduler
    by_sigma = call_sd(pipe, ROWS, num_inference_steps=None, sigmas=AysSchedules["StableDiffusionSigmas"])
    times, _ = from_sigmas(AysSchedules["StableDiffusionSigmas"], schedule.noise_schedule, "ays")
    torch.testing.assert_close(schedule.timesteps, times[:-1].float())
    by_time = call_sd(pipe, ROWS, num_inference_steps=None, timesteps=AysSchedules["StableDiffusionTimesteps"])
    assert len(schedule.timesteps) == 10
    named = LearnedScheduler.from_grid(
        build_grid("ays-sd15", schedule.noise_schedule, 10), "dpmpp-2m", pipe.scheduler.config
    )
    attach(pipe, named)
    by_name = call_sd(pipe, ROWS, num_inference_steps=10)
    torch.testing.assert_close(by_sigma, by_name, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(by_time, by_name, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_without_a_number_of_steps_is_refused_before_any(kind: str, pipes: Any, tiny: Any) -> None:
    pipe = pipes("sd")
    attach(pipe, made(tiny, pipe, kind))
    with pytest.raises(TsAdaptError, match=r"number of steps is 50.* without num_inference_steps asks for the pipe"):
        pipe(prompt_embeds=embeddings(ROWS), guidance_scale=1, output_type="latent")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_in_half_precision(name: str, kind: str, tiny: Any) -> None:
    """Own times are told in full; where all images share them the pipeline tells them itself, in its own precision."""
    pipe, case = tiny.pipeline(name), CASES[name]
    attach(pipe, made(tiny, pipe, kind, name))
    with Counted(pipe) as counted:
        case.call(pipe, ROWS)
    pipe.to(torch.bfloat16)
    with Counted(pipe) as again:
        found = case.call(pipe, ROWS)
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    told, in_full = again.timesteps[0], counted.timesteps[0]
    if kind == "static":
        assert told.dtype == (torch.bfloat16 if name == "flux" else torch.float32)
        in_full = in_full.to(told.dtype)
    else:
        assert told.dtype == torch.float32
    torch.testing.assert_close(told.unique(), in_full.unique())


@torch.no_grad()
def test_a_prompt_is_encoded_by_the_pipeline(pipes: Any, tiny: Any) -> None:
    """Words go through the pipeline's tokenizer and text encoder; the predictor sees what comes of them."""
    pipe = pipes("sd")
    attach(pipe, made(tiny, pipe, "one-shot"))
    options = {"prompt_embeds": None, "negative_prompt_embeds": None, "latents": noise([1, 1], 4, 8, 8)}
    both = call_sd(pipe, [1, 1], prompt=["a cat", "dogs"], **options)
    options["latents"] = options["latents"][:1]
    alone = [call_sd(pipe, [1], prompt=words, **options) for words in ("a cat", "dogs")]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*alone) and embeddings([1]).shape[-1] == WIDTH
