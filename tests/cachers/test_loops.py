"""A pipeline tells its cachers the step by whatever scheduler it has, and a run that was broken off leaves nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from torch import Tensor

from ts_adapt.cachers import DeepCache, TGate, attached
from ts_adapt.errors import TsAdaptError
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler

STEPS, ROWS = 5, 2
CACHERS: dict[str, Callable[[], list[Any]]] = {
    "deepcache": lambda: [DeepCache(2, branch=1)],
    "both": lambda: [DeepCache(2), TGate(3, self_attention_interval=2, warm_up=1)],
}


def images(pipe: Any, steps: int = STEPS, **call: Any) -> Tensor:
    """Of two samples; guided where the pipeline has prompts."""
    generators = [torch.Generator().manual_seed(row) for row in range(ROWS)]
    texts = {"prompt": ["a cat", "dog"], "guidance_scale": 3.0} if hasattr(pipe, "encode_prompt") else {}
    own = texts or {"batch_size": ROWS}
    made = pipe(generator=generators, num_inference_steps=steps, output_type="np", **{**own, **call}).images
    return torch.from_numpy(made)


@contextmanager
def told_by_hand(network: Any, cachers: list[Any], steps: int, order: int) -> Iterator[None]:
    """Cachers on a network that is called `order` times a step."""
    calls: list[Any] = []

    def tell(*_: Any) -> None:
        for cacher in cachers:
            cacher.at(len(calls) // order)
        calls.append(_)

    with attached(network, *cachers):
        for cacher in cachers:
            cacher.begin(steps, ROWS)
        handle = network.register_forward_pre_hook(tell, prepend=True)
        yield
        handle.remove()
    assert -(-len(calls) // order) == steps


@contextmanager
def stopped_at(network: Any, call: int) -> Iterator[None]:
    """An interrupt while the network is called for the time `call`, which the block does not survive."""
    calls: list[Any] = []

    def stop(*_: Any) -> None:
        calls.append(_)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = network.mid_block.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        yield
    handle.remove()


@pytest.mark.parametrize(
    ("kind", "scheduler", "made"),
    [
        ("ddpm", "DDPM", "deepcache"),
        *(("sd", name, "both") for name in ("DDIM", "HeunDiscrete", "PNDM", "UniPCMultistep", "LCM")),
    ],
)
@torch.no_grad()
def test_a_pipeline_without_a_schedule_is_cached(kind: str, scheduler: str, made: str, tiny: Any) -> None:
    pipe = tiny.pipeline(kind)
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    plain, order = images(pipe), pipe.scheduler.order
    steps = -(-len(pipe.scheduler.timesteps) // order)
    with told_by_hand(pipe.unet, CACHERS[made](), steps, order):
        expected = images(pipe)
    before, kind = set(vars(pipe.scheduler)), type(pipe.scheduler)
    with attached(pipe, *CACHERS[made]()):
        assert torch.equal(images(pipe), expected) and torch.equal(images(pipe), expected)
    assert not torch.equal(expected, plain) and torch.equal(images(pipe), plain)
    assert set(vars(pipe.scheduler)) == before and type(pipe.scheduler) is kind and not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("scheduler", ["DDIM", "HeunDiscrete"])
@torch.no_grad()
def test_image_to_image_has_the_steps_that_are_left(scheduler: str, tiny: Any) -> None:
    pipe = tiny.pipeline("sd-img2img")
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    call = {"image": [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")], "strength": 0.6}
    with told_by_hand(pipe.unet, CACHERS["both"](), 3, pipe.scheduler.order):
        expected = images(pipe, **call)
    with attached(pipe, *(cachers := CACHERS["both"]())):
        assert torch.equal(images(pipe, **call), expected)
        assert all(cacher.index is None for cacher in cachers)


@torch.no_grad()
def test_a_copy_of_the_scheduler_is_not_heard(tiny: Any) -> None:
    pipe = tiny.pipeline("ddpm")
    cacher = DeepCache(2)
    with attached(pipe, cacher):
        for other in (copy.copy(pipe.scheduler), copy.deepcopy(pipe.scheduler)):
            pipe.scheduler.set_timesteps(STEPS)
            x, t = torch.zeros(ROWS, 1, 8, 8), pipe.scheduler.timesteps[0]
            other.set_timesteps(2)
            assert len(pipe.scheduler.timesteps) == STEPS and len(other.timesteps) == 2
            eps = pipe.unet(x, t).sample
            other.step(eps, other.timesteps[0], x)
            assert (cacher.index, cacher.steps) == (0, STEPS)


@torch.no_grad()
def test_a_pipeline_is_given_all_its_cachers_at_once(tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    with attached(pipe, TGate(3)):
        expected = images(pipe)
        with pytest.raises(TsAdaptError, match="already; give all of them in one"), attached(pipe, DeepCache(2)):
            pass
        assert torch.equal(images(pipe), expected)


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("views", [False, True])
@torch.no_grad()
def test_a_loop_with_several_calls_a_step_is_refused(views: bool, schedule: bool, tiny: Any) -> None:
    """Each with a step of its own, as views of a panorama have, or one for both."""
    pipe = tiny.pipeline("ddpm")
    if schedule:
        attach(pipe, LearnedScheduler.from_grid("karras", "ddim", pipe.scheduler.config))
    x = torch.zeros(ROWS, 1, 8, 8)
    with attached(pipe, DeepCache(2)):
        pipe.scheduler.set_timesteps(STEPS)
        state = copy.deepcopy(vars(pipe.scheduler))
        t = pipe.scheduler.timesteps[0]
        eps = pipe.unet(x, t).sample
        if views:
            pipe.scheduler.step(eps, t, x)
            if schedule:
                vars(pipe.scheduler).update(state)  # as a panorama does
        with pytest.raises(TsAdaptError, match="DDPMPipeline calls its network several times a step"):
            pipe.unet(x, t)
        assert images(pipe).isfinite().all()


@torch.no_grad()
def test_a_schedule_that_is_attached_tells_the_step_itself_and_so_does_one_that_comes_or_goes(tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    schedule = LearnedScheduler.from_grid("karras", "ddim", pipe.scheduler.config)
    with attached(pipe, *CACHERS["both"]()):
        own = images(pipe)
        attach(pipe, schedule)
        learned = images(pipe)
        detach(pipe)
        assert torch.equal(images(pipe), own)
    with attached(attach(pipe, schedule).unet, *CACHERS["both"]()):
        assert torch.equal(images(pipe), learned)
    with attached(pipe, *CACHERS["both"]()):
        assert torch.equal(images(pipe), learned)
        detach(pipe)
        assert torch.equal(images(pipe), own)


@pytest.mark.parametrize("scheduled", [False, True])
@torch.no_grad()
def test_the_run_behind_one_that_was_broken_off_begins_anew(scheduled: bool, tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    if scheduled:
        attach(pipe, tiny.schedule("static", pipe.scheduler.config, (4, 8, 8)))
    with attached(pipe, *CACHERS["both"]()):
        expected = images(pipe, tiny.STEPS)
        with stopped_at(pipe.unet, 3):
            images(pipe, tiny.STEPS)
        assert torch.equal(images(pipe, tiny.STEPS), expected)


@pytest.mark.parametrize("way", ["another pipeline", "detached", "set anew"])
@torch.no_grad()
def test_a_run_that_was_broken_off_leaves_nothing_to_other_uses_of_the_network(way: str, tiny: Any) -> None:
    pipe = tiny.pipeline("ddpm")
    other = DDPMPipeline(pipe.unet, pipe.scheduler)
    expected = images(other)
    attach(pipe, tiny.schedule("static", pipe.scheduler.config, (1, 8, 8)))
    with attached(pipe.unet, DeepCache(3)):
        with stopped_at(pipe.unet, 3):
            images(pipe, tiny.STEPS)
        if way == "detached":
            detach(pipe)
        elif way == "set anew":
            pipe.scheduler.set_timesteps(tiny.STEPS)
        assert torch.equal(images(other), expected)


@torch.no_grad()
def test_a_cacher_that_is_told_no_step_says_so(tiny: Any) -> None:
    pipe = tiny.pipeline("ddpm")
    with attached(pipe.unet, DeepCache(2)), pytest.warns(UserWarning, match="told no step"):
        images(pipe)


def test_a_pipeline_without_a_network_is_refused() -> None:
    with pytest.raises(TsAdaptError, match="object has neither"), attached(object(), DeepCache()):
        pass
