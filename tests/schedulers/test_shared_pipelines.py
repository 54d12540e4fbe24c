"""Pipelines that are copied, pickled, saved, or share their network: from_pipe, components, threads."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

from pipeline_cases import KINDS, ROWS, call_sd, generators, images, made, noise
from ts_adapt.errors import TsAdaptError
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_copies_of_a_pipeline_are_independent(copied: Any, kind: str, tiny: Any) -> None:
    pipe = tiny.pipeline("ddpm")
    former = pipe.scheduler
    attach(pipe, tiny.schedule(kind, former.config, SHAPE))
    expected = images(pipe)
    other = copied(pipe)
    assert other.scheduler is not pipe.scheduler and other.unet is not pipe.unet
    assert torch.equal(images(other), expected)
    detach(other)
    assert not other.unet._forward_pre_hooks and type(other.scheduler) is type(former)
    assert torch.equal(images(pipe), expected)
    again = attach(tiny.pipeline("ddpm"), copied(pipe.scheduler))
    assert torch.equal(images(again), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_be_copied_in_the_middle(kind: str, tiny: Any) -> None:
    pipe = tiny.pipeline("ddpm")
    schedule, x = tiny.schedule(kind, pipe.scheduler.config, SHAPE), torch.randn(2, *SHAPE)
    schedule.set_timesteps(4)
    with torch.no_grad():
        for t in schedule.timesteps[:2]:
            x = schedule.step(pipe.unet(x, schedule.network_timesteps(x)).sample, t, x).prev_sample
        ends = []
        for one in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), schedule):
            y = x
            for t in one.timesteps[2:]:
                y = one.step(pipe.unet(y, one.network_timesteps(y)).sample, t, y).prev_sample
            ends.append(y)
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_of_the_same_components(kind: str, tiny: Any) -> None:
    pipe = tiny.pipeline("ddpm")
    attach(pipe, tiny.schedule(kind, pipe.scheduler.config, SHAPE))
    expected = images(pipe)
    assert torch.equal(images(DDPMPipeline(**pipe.components)), expected)
    other = DDPMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
    plain = images(other)
    attach(other, tiny.schedule("static", other.scheduler.config, SHAPE, solver="ddim"))
    assert not torch.equal(images(other), plain)
    assert torch.equal(images(pipe), expected)
    detach(pipe)
    detach(other)
    assert torch.equal(images(other), plain) and not pipe.unet._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_image_to_image_from_a_pipe_that_was_attached_to(kind: str, guidance: float, tiny: Any) -> None:
    """from_pipe takes scheduler and network along; the guidance of the first pipeline says nothing of the second's."""
    pipe, reference = tiny.pipeline("sd"), tiny.pipeline("sd-img2img")
    attach(pipe, made(tiny, pipe, kind))
    call_sd(pipe, ROWS, guidance_scale=4.0 - guidance)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    latents = noise(ROWS, 4, 8, 8, stream=3)

    def call(pipe: Any) -> Any:
        options = {"latents": None, "image": latents, "strength": 0.5, "generator": generators(ROWS)}
        return call_sd(pipe, ROWS, guidance, **options)

    if kind == "one-shot":
        with pytest.raises(TsAdaptError, match="cannot begin inside, as img2img does"):
            call(other)
        return
    reference.unet.load_state_dict(pipe.unet.state_dict())
    reference.vae.load_state_dict(pipe.vae.state_dict())
    attach(reference, made(tiny, reference, kind))
    expected = call(reference)
    torch.testing.assert_close(call(other), expected, atol=1e-4, rtol=1e-4)
    attach(other, pipe.scheduler)
    torch.testing.assert_close(call(other), expected, atol=1e-4, rtol=1e-4)
    back = StableDiffusionPipeline.from_pipe(other)
    torch.testing.assert_close(call_sd(back, ROWS), call_sd(pipe, ROWS), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_broken_off_run_does_not_reach_another_pipeline_of_the_same_network(tiny: Any) -> None:
    """Both schedules have the same nominal times; the call belongs to the run that was begun last."""
    pipe = tiny.pipeline("ddpm")
    other = DDPMPipeline(pipe.unet, pipe.scheduler)
    recursive = tiny.schedule("recursive", pipe.scheduler.config, SHAPE)
    nominal = recursive.source.plan(4, recursive.noise_schedule).times
    attach(other, LearnedScheduler.from_grid(nominal, "unipc-3", pipe.scheduler.config))
    expected = images(other)
    recursive = attach(pipe, recursive).scheduler
    recursive.set_timesteps(4)
    x, first = torch.randn(2, *SHAPE), recursive.timesteps[0]
    x = recursive.step(pipe.unet(x, first).sample, first, x).prev_sample
    pipe.unet(x, recursive.timesteps[1])
    assert torch.equal(images(other), expected)


@pytest.mark.parametrize("kind", ["one-shot", "recursive"])
def test_threads_may_share_a_network(kind: str, tiny: Any) -> None:
    """A scheduler and a pipeline for each thread, as diffusers wants it; the calls of the network interleave."""
    pipe = tiny.pipeline("ddpm")
    schedule = tiny.schedule(kind, pipe.scheduler.config, SHAPE)
    pipes = [attach(DDPMPipeline(pipe.unet, pipe.scheduler), copy.deepcopy(schedule)) for _ in range(2)]
    counts = [2, 3]
    expected = [images(one, count) for one, count in zip(pipes, counts, strict=True)]
    turn, found = threading.Barrier(2, timeout=60), [None, None]
    handle = pipe.unet.register_forward_hook(lambda *call: (turn.wait(), None)[1])

    def work(i: int) -> None:
        found[i] = images(pipes[i], counts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for one, other in zip(found, expected, strict=True):
        assert one is not None and torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_pipeline_is_saved_and_loaded(kind: str, tiny: Any, tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd")
    attach(pipe, made(tiny, pipe, kind))
    expected = call_sd(pipe, ROWS)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["ts_adapt", "LearnedScheduler"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, StableDiffusionPipeline) and isinstance(loaded.scheduler, LearnedScheduler)
    if kind != "static":
        with pytest.raises(TsAdaptError, match=r"the network was not told them: use ts_adapt.attach"):
            call_sd(loaded, ROWS)
    torch.testing.assert_close(call_sd(attach(loaded, loaded.scheduler), ROWS), expected, atol=1e-5, rtol=1e-5)
    given = StableDiffusionPipeline.from_pretrained(
        tmp_path, scheduler=LearnedScheduler.from_pretrained(tmp_path, "scheduler")
    )
    torch.testing.assert_close(call_sd(attach(given, given.scheduler), ROWS), expected, atol=1e-5, rtol=1e-5)


def test_another_scheduler_from_the_config_of_an_attached_one(tiny: Any) -> None:
    """The usual way to change a scheduler: its config carries betas and prediction type on."""
    pipe = tiny.pipeline("ddim")
    attach(pipe, LearnedScheduler.from_grid("karras", "unipc"))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    assert pipe.scheduler.config["beta_schedule"] == "scaled_linear"


def test_what_pipelines_ask_of_a_scheduler() -> None:
    schedule = LearnedScheduler.from_config(DDIMScheduler(steps_offset=1).config)
    assert len(schedule) == schedule.config.num_train_timesteps == 1000
    assert schedule.order == 1 and schedule.init_noise_sigma == 1
    assert getattr(schedule.config, "steps_offset", 1) == 1 and not getattr(schedule.config, "clip_sample", False)
    assert schedule.config.prediction_type == "epsilon" and schedule.config.get("shift", 1.0) == 1.0
    assert DDIMScheduler in schedule.compatibles and LearnedScheduler.__name__ in repr(schedule)


def test_a_saved_pipeline_loads_in_a_new_process_that_has_imported_the_package_alone(tiny: Any, tmp_path: Path) -> None:
    attach(pipe := tiny.pipeline("ddpm"), LearnedScheduler.from_grid("karras", "unipc"))
    pipe.save_pretrained(tmp_path)
    code = (
        "import sys, ts_adapt\n"
        "from diffusers import DiffusionPipeline\n"
        "assert type(DiffusionPipeline.from_pretrained(sys.argv[1]).scheduler) is ts_adapt.LearnedScheduler\n"
        "assert ts_adapt.load(sys.argv[1]).prediction == 'sample'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
