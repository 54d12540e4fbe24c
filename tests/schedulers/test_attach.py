"""attach and detach: nothing is left behind, nothing else is touched, and what cannot be done is said at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EDMEulerScheduler, UNet2DModel

import ts_adapt
from pipeline_cases import KINDS, STEPS, images
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import BetaTable
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler

SHAPE = (1, 8, 8)


@pytest.fixture
def pipe(tiny: Any) -> Any:
    return tiny.pipeline("ddpm")


def hooks(module: Any) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_pre_hooks_with_kwargs)


def test_the_two_lines_and_the_way_back(pipe: Any, tiny: Any) -> None:
    former, config, before = pipe.scheduler, {**pipe.config}, images(pipe)
    state = set(vars(pipe))
    schedule = tiny.schedule("recursive", former.config, SHAPE)
    assert ts_adapt.attach(pipe, schedule) is pipe
    assert isinstance(pipe.scheduler, LearnedScheduler) and hooks(pipe.unet) == 2
    assert not torch.allclose(images(pipe), before)
    assert ts_adapt.detach(pipe) is pipe
    assert pipe.scheduler is former and hooks(pipe.unet) == 0
    assert {**pipe.config} == config and set(vars(pipe)) == state
    assert torch.equal(images(pipe), before)
    with pytest.raises(TsAdaptError, match="nothing to detach"):
        detach(pipe)


def test_a_second_schedule_replaces_the_first(pipe: Any, tiny: Any) -> None:
    former = pipe.scheduler
    one = tiny.schedule("one-shot", former.config, SHAPE)
    attach(pipe, one)
    expected = images(pipe)
    attach(pipe, LearnedScheduler.from_grid("karras", "unipc"))
    assert hooks(pipe.unet) == 2 and not torch.equal(images(pipe), expected)
    with pytest.raises(TsAdaptError, match="LearnedScheduler is attached; got str"):
        attach(pipe, "a path")  # type: ignore[arg-type]
    assert pipe.scheduler.source.family == "karras"  # a refusal changes nothing
    attach(pipe, one)
    attach(pipe, one)
    assert torch.equal(images(pipe), expected)
    detach(pipe)
    assert pipe.scheduler is former and hooks(pipe.unet) == 0


def test_a_family_takes_over_the_noise_schedule_of_the_pipeline(pipe: Any) -> None:
    schedule = attach(pipe, LearnedScheduler.from_grid("karras", solver="unipc")).scheduler
    assert schedule.prediction == "sample"
    table = BetaTable.from_config(DDPMScheduler().config)
    images(pipe)
    torch.testing.assert_close(schedule.timesteps, fixed.make("karras", table, STEPS)[:-1].float())
    again = LearnedScheduler.from_config(schedule.config)
    assert again.prediction == "sample" and again.config["grid"] == "karras"


class Sliced(DDPMPipeline):
    """From a noised image on, as the video pipelines begin that slice the timesteps and tell the scheduler nothing."""

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, begin: int, tell: bool = False) -> torch.Tensor:  # type: ignore[override]
        self.scheduler.set_timesteps(STEPS)
        if tell:
            self.scheduler.set_begin_index(begin)
        for t in self.scheduler.timesteps[begin:]:
            x = self.scheduler.step(self.unet(x, t.to(x.dtype)).sample, t, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [0, 1, 3])
@pytest.mark.parametrize("kind", ["static", "recursive"])
def test_a_pipeline_that_slices_the_timesteps(kind: str, begin: int, dtype: torch.dtype, pipe: Any, tiny: Any) -> None:
    sliced = Sliced(pipe.unet, pipe.scheduler).to(dtype)
    attach(sliced, tiny.schedule(kind, pipe.scheduler.config, SHAPE))
    x = torch.randn(2, *SHAPE, dtype=dtype)
    assert torch.equal(sliced(x, begin), sliced(x, begin, tell=True))


def test_a_pipeline_that_slices_the_timesteps_of_a_schedule_from_pure_noise(pipe: Any, tiny: Any) -> None:
    sliced = attach(Sliced(pipe.unet, pipe.scheduler), tiny.schedule("one-shot", pipe.scheduler.config, SHAPE))
    with pytest.raises(TsAdaptError, match="cannot begin inside"):
        sliced(torch.randn(2, *SHAPE), 1)


@pytest.mark.parametrize("kind", ["family", "static", "one-shot", "recursive"])
def test_the_schedule_that_is_given_stays_as_it_is(kind: str, pipe: Any, tiny: Any) -> None:
    """One schedule for two pipelines, which run at once and differ in their noise schedules."""
    other = tiny.pipeline("ddim")
    if kind == "family":
        schedule = LearnedScheduler.from_grid("karras")
    else:
        schedule = tiny.schedule(kind, pipe.scheduler.config, SHAPE)
    before, config = set(vars(schedule)), {**schedule.config}
    expected = images(attach(pipe, schedule))
    with torch.no_grad():
        attach(other, schedule, strict=False).scheduler.set_timesteps(STEPS)
    assert torch.equal(images(pipe), expected)
    assert (pipe.scheduler.prediction, other.scheduler.prediction) == ("sample", "v")
    assert other.scheduler.step_index == 0 and pipe.scheduler.step_index == STEPS
    assert set(vars(schedule)) == before and {**schedule.config} == config
    assert schedule.run is None and len(schedule.timesteps) == 0
    assert (schedule.known_noise is None) == (kind == "family")


def test_other_uses_of_the_network_are_left_alone(pipe: Any, tiny: Any) -> None:
    x, elsewhere = torch.randn(3, *SHAPE), torch.tensor(123.0)
    plain = pipe.unet(x, elsewhere).sample
    attach(pipe, tiny.schedule("recursive", pipe.scheduler.config, SHAPE))
    expected = images(pipe)
    assert torch.equal(pipe.unet(x, elsewhere).sample, plain)
    pipe.scheduler.set_timesteps(STEPS)
    assert torch.equal(pipe.unet(x, elsewhere).sample, plain)
    assert torch.equal(images(pipe), expected)
    pipe.scheduler = other = DDPMScheduler()  # not detached, but no longer the pipeline's
    told = pipe.unet(x, torch.tensor(999)).sample
    assert torch.equal(told, pipe.unet(x, torch.tensor(999.0)).sample)
    images(pipe)
    detach(pipe)
    assert pipe.scheduler is not other


def test_a_run_that_was_stopped_does_not_disturb_the_next(pipe: Any, tiny: Any) -> None:
    attach(pipe, tiny.schedule("recursive", pipe.scheduler.config, SHAPE))
    expected = images(pipe)
    calls = []

    def stop(module: Any, args: Any, out: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = pipe.unet.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        images(pipe)
    handle.remove()
    assert torch.equal(images(pipe), expected)
    assert images(pipe, 5).shape[0] == 5


def test_steps_of_ddpm_draw_from_the_pipelines_generator(pipe: Any) -> None:
    from ts_adapt.denoisers.pipeline import from_pipeline
    from ts_adapt.sampling import integrate
    from ts_adapt.solvers import DDIM

    denoiser = from_pipeline(pipe)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(2, *SHAPE, generator=generator)
    times = fixed.make("uniform", denoiser.noise_schedule, STEPS)
    with torch.no_grad():
        ours = integrate(
            denoiser, DDIM(denoiser.noise_schedule, eta=1.0), times, x_T,
            step_noise=lambda step: torch.randn(x_T.shape, generator=generator),
        )  # fmt: skip
    attach(pipe, LearnedScheduler.from_grid("uniform", "ddpm"))
    theirs = images(pipe)
    torch.testing.assert_close(theirs, (ours.x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(images(pipe), theirs)


OFFLOADS: dict[str, Any] = {
    "hook": lambda pipe: add_hook_to_module(pipe.unet, CpuOffload("cpu")),
    "aligned": lambda pipe: add_hook_to_module(pipe.unet, AlignDevicesHook("cpu", io_same_device=True, offload=True)),
    "pipeline": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["attach first", "offload first"])
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offloading_in_either_order(kind: str, order: str, offload: Any, pipe: Any, tiny: Any) -> None:
    """accelerate replaces `module.forward` and diffusers asks its hook for the device to run on."""
    schedule = tiny.schedule(kind, pipe.scheduler.config, SHAPE)
    expected = images(attach(pipe, schedule))
    if order == "offload first":
        detach(pipe)
    offload(pipe)
    if order == "offload first":
        attach(pipe, schedule)
    assert torch.equal(images(pipe), expected) and torch.equal(images(pipe), expected)
    detach(pipe)
    pipe.remove_all_hooks()
    remove_hook_from_module(pipe.unet, recurse=True)
    assert hooks(pipe.unet) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_offloading_from_a_gpu(kind: str, pipe: Any, tiny: Any) -> None:
    expected = images(attach(pipe, tiny.schedule(kind, pipe.scheduler.config, SHAPE)))
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(images(pipe), expected, rtol=1e-3, atol=1e-3)
    assert next(pipe.unet.parameters()).device.type == "cpu"


def test_another_prediction_type_or_beta_table_is_refused_and_named(pipe: Any) -> None:
    grid = TimeGrid(torch.tensor([999.0, 300.5, 0.0]).double())
    other = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear").config
    schedule = LearnedScheduler.from_grid(grid, "unipc-2", other)
    with pytest.raises(
        TsAdaptError,
        match=r"differ in the prediction type \(v, the pipeline's is sample\) and the beta table \(1000 timesteps, .*"
        r"strict=False",
    ):
        attach(pipe, schedule)
    assert isinstance(pipe.scheduler, DDPMScheduler) and hooks(pipe.unet) == 0
    assert attach(pipe, schedule, strict=False).scheduler.prediction == "sample"
    same = LearnedScheduler.from_grid(grid, "unipc-2", DDPMScheduler(prediction_type="sample").config)
    found = images(pipe, num_inference_steps=2)
    attach(pipe, same)
    assert torch.equal(images(pipe, num_inference_steps=2), found)
    short = LearnedScheduler.from_grid(
        TimeGrid(torch.tensor([99.0, 0.0]).double()), "ddim", DDPMScheduler(100, prediction_type="sample").config
    )
    with pytest.raises(TsAdaptError, match=r"run from 99 to 0, the pipeline's from 999 to 0"):
        attach(pipe, short, strict=False)


def test_pipelines_that_cannot_be_attached_to(pipe: Any, tiny: Any) -> None:
    family = LearnedScheduler.from_grid("karras")
    for lacking in (
        {"scheduler": DDPMScheduler()},
        {"unet": pipe.unet},
        {"unet": pipe.unet, "scheduler": object()},
        {"unet": torch.nn.Linear(2, 2), "scheduler": pipe.scheduler},
    ):
        with pytest.raises(TsAdaptError, match="SimpleNamespace has no network that is told a timestep, with a sched"):
            attach(SimpleNamespace(**lacking), family)
    with pytest.raises(TsAdaptError, match="the scheduler that DDPMPipeline was built with knows no noise schedule"):
        attach(DDPMPipeline(pipe.unet, LearnedScheduler.from_grid("karras")), family)
    with pytest.raises(
        TsAdaptError, match="DDPMPipeline shows its network the states as they are, and EDMEulerScheduler"
    ):
        attach(DDPMPipeline(pipe.unet, EDMEulerScheduler()), family)
    with pytest.raises(TsAdaptError, match="looks at 3 channels, the network of DDPMPipeline at 2"):
        attach(DDPMPipeline(tiny.unet(2), pipe.scheduler), tiny.schedule("one-shot", pipe.scheduler.config, (3, 8, 8)))


class Controlled(DDPMPipeline):
    """A second network is asked before the first, as a ControlNet is."""

    def __init__(self, unet: Any, controlnet: Any, scheduler: Any) -> None:
        super().__init__(unet, scheduler)
        self.register_modules(controlnet=controlnet)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            answer = self.controlnet(x, t).sample + self.unet(x, t).sample
            x = self.scheduler.step(answer / 2, t, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("kind", ["one-shot", "recursive"])
def test_a_second_network_is_told_each_images_time_too(kind: str, pipe: Any, tiny: Any) -> None:
    controlled = Controlled(pipe.unet, UNet2DModel.from_config(pipe.unet.config), pipe.scheduler)
    told: dict[str, list[torch.Tensor]] = {"unet": [], "controlnet": []}
    attach(controlled, tiny.schedule(kind, pipe.scheduler.config, SHAPE))
    for name, seen in told.items():
        getattr(controlled, name).register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[1]))
    x = torch.randn(3, *SHAPE)
    together = controlled(x)
    assert torch.equal(torch.stack(told["unet"]), torch.stack(told["controlnet"]))
    assert len(told["unet"][1].unique()) == 3
    torch.testing.assert_close(together, torch.cat([controlled(row[None]) for row in x]), rtol=1e-4, atol=1e-4)
    detach(controlled)
    assert hooks(controlled.unet) == hooks(controlled.controlnet) == 0


def test_pipelines_that_start_from_an_image_or_blend_one_in(pipe: Any, tiny: Any) -> None:
    class Painting(DDPMPipeline):
        def __call__(self, image: Any, mask_image: Any, strength: float = 0.8) -> None: ...

    painting = Painting(pipe.unet, pipe.scheduler)
    with pytest.raises(TsAdaptError, match="Painting starts from a noised image, and this schedule is found from pure"):
        attach(painting, tiny.schedule("one-shot", pipe.scheduler.config, SHAPE))
    with pytest.raises(TsAdaptError, match="blends the known part of the image in at the loop's times"):
        attach(painting, tiny.schedule("recursive", pipe.scheduler.config, SHAPE))
    detach(attach(painting, tiny.schedule("static", pipe.scheduler.config, SHAPE)))


def test_a_batch_that_changes_within_a_run(pipe: Any, tiny: Any) -> None:
    attach(pipe, tiny.schedule("one-shot", pipe.scheduler.config, SHAPE))
    schedule, x = pipe.scheduler, torch.randn(4, *SHAPE)
    schedule.set_timesteps(STEPS)
    out = pipe.unet(x, schedule.timesteps[0]).sample
    x = schedule.step(out, schedule.timesteps[0], x).prev_sample
    with pytest.raises(TsAdaptError, match="began with 4 samples and the network is called with 3"):
        pipe.unet(x[:3], schedule.timesteps[1])
    with pytest.raises(TsAdaptError, match="began with 4 samples and step 1 has 3"):
        pipe.unet(x, schedule.timesteps[1])
        schedule.step(out[:3], schedule.timesteps[1], x[:3])


@pytest.mark.parametrize("order", ["compiled first", "attached first", "compiled in place"])
def test_a_compiled_network(order: str, pipe: Any, tiny: Any) -> None:
    """The hook is left out of the graph: compiled in, it would be traced anew at every step."""
    torch._dynamo.reset()
    schedule = tiny.schedule("one-shot", pipe.scheduler.config, SHAPE)
    attach(pipe, schedule)
    expected = images(pipe)
    if order == "compiled first":
        detach(pipe)
    torch._dynamo.utils.counters.clear()
    if order == "compiled in place":
        pipe.unet.compile(backend="eager", fullgraph=True)
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    if order == "compiled first":
        attach(pipe, schedule)
    for _ in range(2):
        torch.testing.assert_close(images(pipe), expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    detach(pipe)
