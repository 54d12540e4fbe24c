"""Cachers with solvers, times of each sample, guidance, pipelines and each other; taken off without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks.hooks import HookRegistry
from torch import Tensor, nn

from ts_adapt import load
from ts_adapt.assembly import SOLVERS, build_solver
from ts_adapt.cachers import DeepCache, TGate, attached
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser, step_aware_parts
from ts_adapt.denoisers.scheduler_config import noise_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.cost import count_flops
from ts_adapt.grids import fixed
from ts_adapt.noise import BetaTable
from ts_adapt.sampling import initial_noise, integrate, noise_for
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.resolve import build_grid

STEPS, BATCH, SCALE = 6, 3, 3.0
VP = BetaTable.from_config({})
CACHERS: dict[str, Callable[[], list[Any]]] = {
    "deepcache": lambda: [DeepCache(2, branch=1)],
    "quadratic": lambda: [DeepCache(3, refresh="quadratic")],
    "tgate": lambda: [TGate(3, self_attention_interval=2, warm_up=1)],
    "both": lambda: [DeepCache(2, branch=1), TGate(3, self_attention_interval=2, warm_up=0)],
}
CHANGED = pytest.mark.parametrize("made", CACHERS.values(), ids=CACHERS)


def texts(kit: Any) -> Tensor:
    return torch.randn(BATCH, kit.TOKENS, kit.WIDTH, generator=torch.Generator().manual_seed(5))


def own_times() -> Tensor:
    """A grid for each of the samples."""
    first, last = VP.log_snr(fixed.make("log_snr", VP, 1))
    way = torch.linspace(0, 1, STEPS + 1).double()
    bent = torch.stack([first + (last - first) * way**power for power in (0.7, 1, 2)])
    times = VP.time(bent)
    times[:, 0], times[:, -1] = VP.t_max, VP.t_min
    return times


@pytest.mark.parametrize(
    ("solver_name", "made"),
    [*((solver, "both") for solver in SOLVERS), *((s, made) for s in ("heun", "unipc-3") for made in CACHERS)],
)
@torch.no_grad()
def test_with_every_solver_a_batch_of_own_times_is_as_many_single_runs(kit: Any, solver_name: str, made: str) -> None:
    denoiser = NetworkDenoiser(kit.network("attentive"), VP, "v")
    solver, x_T, times = build_solver(solver_name, VP), initial_noise(0, range(BATCH), denoiser.shape), own_times()

    def solve(rows: slice) -> Tensor:
        noise = noise_for(0, range(BATCH)[rows], x_T[rows]) if solver.needs_noise else None
        return integrate(denoiser, solver, times[rows], x_T[rows], step_noise=noise).x

    plain = solve(slice(None))
    with attached(denoiser.network, *CACHERS[made]()):
        whole = solve(slice(None))
        alone = torch.cat([solve(slice(row, row + 1)) for row in range(BATCH)])
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-3)
    assert not torch.equal(whole, plain)
    assert torch.equal(solve(slice(None)), plain)


@CHANGED
@pytest.mark.parametrize("name", ["attentive", "text", "text-deep"])
@torch.no_grad()
def test_nothing_is_left_on_the_network(kit: Any, name: str, made: Any) -> None:
    network = kit.network(name)
    inputs = kit.inputs(network, BATCH)
    marks, exact = kit.marks(network), network(**inputs).sample
    keys = list(network.state_dict())
    for order in (1, -1):
        found = made()
        for cacher in found:
            assert cacher.attach(network) is network
        assert list(network.state_dict()) == keys
        kit.told(network, found[0], [inputs] * 3, BATCH)
        for cacher in found[::order]:
            assert cacher.remove(network) is network
        assert kit.marks(network) == marks
        assert torch.equal(network(**inputs).sample, exact)
        assert all(cacher.network is None for cacher in found)


@pytest.mark.parametrize("count", [0, 1, 5])
@torch.no_grad()
def test_an_interrupt_while_a_cacher_is_attached_leaves_the_network_with_those_that_were_there(
    kit: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """In place of the hook after the first `count` ones."""
    network = kit.network("attentive")
    calls = kit.calls(network, BATCH, STEPS)
    deep, gate = DeepCache(2, branch=4), TGate(STEPS, 2, 0)
    plain, register, left = kit.marks(network), HookRegistry.register_hook, [count]

    def interrupted(registry: HookRegistry, hook: Any, name: str) -> None:
        if name == "tgate" and not left[0]:
            raise KeyboardInterrupt
        left[0] -= name == "tgate"
        register(registry, hook, name)

    with attached(network, deep):
        alone = kit.told(network, deep, calls, BATCH)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(HookRegistry, "register_hook", interrupted)
            gate.attach(network)
        assert gate.network is None and step_aware_parts(network) == (deep,)
        assert all(map(torch.equal, kit.told(network, deep, calls, BATCH), alone))
        with attached(network, gate):
            assert step_aware_parts(network) == (deep, gate)
    assert kit.marks(network) == plain


@pytest.mark.parametrize(("name", "branch"), [("attentive", 0), ("attentive", 4), ("text", 1), ("text-deep", 3)])
@torch.no_grad()
def test_both_cachers_do_the_same_whichever_was_first_and_one_stays_when_the_other_goes(
    kit: Any, name: str, branch: int
) -> None:
    """At branch 4 of the first network both have a hook on the same attention layer."""
    network = kit.network(name)
    calls = kit.calls(network, BATCH, STEPS)
    calls = [kit.twice(inputs) for inputs in calls] if "text" in name else calls

    def run(*made: Any) -> Tensor:
        for cacher in made:
            cacher.begin(STEPS, BATCH)
        found = []
        for index, inputs in enumerate(calls):
            for cacher in made:
                cacher.at(index)
            found.append(network(**inputs).sample)
        for cacher in made:
            cacher.end()
        return torch.stack(found)

    deep, gate = DeepCache(2, branch=branch), TGate(4, self_attention_interval=4, warm_up=1)
    with attached(network, deep, gate):
        both = run(deep, gate)
    with attached(network, gate, deep):
        assert torch.equal(run(gate, deep), both)
    for stays, goes in ((deep, gate), (gate, deep)):
        with attached(network, stays):
            alone = run(stays)
        stays.attach(network)
        with attached(network, goes):
            assert torch.equal(run(stays, goes), both)
        assert torch.equal(run(stays), alone)
        stays.remove(network)
        assert not torch.equal(alone, both)


@pytest.mark.parametrize("name", ["text", "text-deep"])
@torch.no_grad()
def test_after_the_gate_a_guided_denoiser_is_the_conditional_one_at_half_the_batch(kit: Any, name: str) -> None:
    denoiser = NetworkDenoiser(kit.network(name), VP, "epsilon")
    empty = {"encoder_hidden_states": torch.zeros(1, kit.TOKENS, kit.WIDTH)}
    guided, solver = Guided(denoiser, SCALE, empty), build_solver("dpmpp-2m", VP)
    x_T, condition = initial_noise(0, range(BATCH), denoiser.shape), {"encoder_hidden_states": texts(kit)}
    halves: list[tuple[Tensor, Tensor]] = []
    handle = denoiser.network.register_forward_hook(lambda m, args, out: halves.append(out.sample.chunk(2)))
    for made in ([TGate(2)], [TGate(2), DeepCache(3)]):
        with attached(denoiser.network, *made), kit.counted(denoiser.network) as layers:
            solution = integrate(guided, solver, build_grid("karras", VP, STEPS), x_T, condition=condition)
        assert [rows for layer, rows in layers if layer == "conv_in"] == [2 * BATCH] * 2 + [BATCH] * (STEPS - 2)
        assert [torch.equal(none, given) for none, given in halves] == [False] * 2 + [True] * (STEPS - 2)
        assert guided.evaluations == STEPS and solution.x.isfinite().all()
        guided.evaluations = 0
        halves.clear()
    handle.remove()


@pytest.mark.parametrize(
    ("kind", "schedule", "made"),
    [*(("sd", "static", made) for made in CACHERS), ("sd", "one-shot", "both"), ("sdxl", "static", "both")],
)
@torch.no_grad()
def test_a_guided_pipeline_is_told_the_step_and_gives_the_images_of_our_loop(
    tiny: Any, kind: str, schedule: str, made: str
) -> None:
    pipe = tiny.pipeline(kind)
    steps, rows = tiny.STEPS, BATCH
    x_T = initial_noise(0, range(rows), (4, 8, 8))
    text, none = (torch.randn(rows, 3, tiny.WIDTH, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    none = none[:1].expand_as(text)
    call: dict[str, Any] = {"prompt_embeds": text, "negative_prompt_embeds": none}
    condition: dict[str, Any] = {"encoder_hidden_states": text}
    empty: dict[str, Any] = {"encoder_hidden_states": none[:1]}
    if kind == "sdxl":
        pooled = torch.randn(rows, tiny.WIDTH, generator=torch.Generator().manual_seed(3))
        ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(rows, -1)
        call |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": 0 * pooled}
        condition["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        empty["added_cond_kwargs"] = {"text_embeds": 0 * pooled[:1], "time_ids": ids[:1]}
    learned = tiny.schedule(schedule, pipe.scheduler.config, (4, 8, 8))
    noise_schedule, prediction = noise_of(pipe.scheduler.config)
    policy = learned.source.plan(steps, noise_schedule).policy(0)
    guided = Guided(NetworkDenoiser(pipe.unet, noise_schedule, prediction), SCALE, empty)
    attach(pipe, learned)

    def sample() -> Tensor:
        images: Tensor = pipe(
            **call, guidance_scale=SCALE, num_inference_steps=steps, latents=x_T, output_type="latent", height=16,
            width=16,
        ).images  # fmt: skip
        return images

    plain = sample()
    with attached(pipe.unet, *CACHERS[made]()):
        found = sample()
        assert torch.equal(sample(), found)
        ours = integrate(guided, build_solver("unipc-3", noise_schedule), policy, x_T, condition=condition).x
    torch.testing.assert_close(found, ours, rtol=1e-3, atol=1e-3)
    assert torch.equal(sample(), plain) and not torch.equal(found, plain)
    detach(pipe)


@pytest.mark.parametrize("kind", ["ddpm", "ldm"])
@torch.no_grad()
def test_a_pipeline_without_guidance_is_told_the_step_as_well(tiny: Any, kind: str) -> None:
    pipe = tiny.pipeline(kind)
    attach(pipe, LearnedScheduler.from_config(pipe.scheduler.config, grid="karras", solver="ddim"))
    heard: list[Any] = []

    class Listening(DeepCache):
        def begin(self, steps: int, batch: int) -> None:
            heard.append((steps, batch))
            super().begin(steps, batch)

        def at(self, index: int | None) -> None:
            if index is not None:
                heard.append(index)
            super().at(index)

    cacher = Listening(2)
    with attached(pipe.unet, cacher):
        generators = [torch.Generator().manual_seed(row) for row in range(4)]
        pipe(batch_size=4, generator=generators, num_inference_steps=3, output_type="np")
        assert heard == [(3, 4), 0, 1, 2]
        x = torch.randn(4, pipe.unet.config.in_channels, 8, 8)
        stray = pipe.unet(x, 7).sample
    assert torch.equal(stray, pipe.unet(x, 7).sample)


@torch.no_grad()
def test_leaves_may_be_replaced_under_a_cacher(kit: Any) -> None:
    network = kit.network("text")
    inputs = kit.inputs(network, BATCH)
    resnet = network.up_blocks[0].resnets[0]
    before, halved = network(**inputs).sample, nn.Sequential(copy.deepcopy(resnet.conv1))
    halved[0].weight.mul_(0.5)
    with attached(network, *CACHERS["both"]()):
        resnet.conv1 = halved
        with_other_leaf = network(**inputs).sample
    assert torch.equal(network(**inputs).sample, with_other_leaf)
    assert not torch.equal(with_other_leaf, before)


def test_the_state_does_not_outlive_a_run_however_it_ends(kit: Any) -> None:
    denoiser = NetworkDenoiser(kit.network("attentive"), VP, "v")
    grid, solver = build_grid("karras", VP, STEPS), build_solver("unipc-2", VP)
    x_T = initial_noise(0, range(BATCH), denoiser.shape)

    def broken(node: Any, x: Tensor, x0: Tensor) -> None:
        if node.index == 3:
            raise KeyboardInterrupt

    deep, gate = DeepCache(2), TGate(5, 2, 1)
    with attached(denoiser.network, deep, gate), torch.no_grad():
        first = integrate(denoiser, solver, grid, x_T).x
        with pytest.raises(KeyboardInterrupt):
            integrate(denoiser, solver, grid, x_T[:2], callback=broken)
        assert deep.index is gate.index is deep._feature is None and not gate._own
        assert torch.equal(integrate(denoiser, solver, grid, x_T).x, first)


def test_gradient_checkpointing_is_refused_wherever_it_is_switched_on(kit: Any) -> None:
    network = kit.network("attentive")
    denoiser = NetworkDenoiser(network, VP, "v")
    x_T = initial_noise(0, range(BATCH), denoiser.shape)

    def solve(**options: Any) -> None:
        integrate(denoiser, build_solver("ddim", VP), build_grid("karras", VP, 2), x_T, **options)

    for made in (DeepCache(), TGate()):
        network.enable_gradient_checkpointing()
        marks = kit.marks(network)
        with pytest.raises(TsAdaptError, match="cannot be used under gradient checkpointing"):
            made.attach(network)
        assert kit.marks(network) == marks
        network.disable_gradient_checkpointing()
        with attached(network, made):
            with pytest.raises(TsAdaptError, match="cache cannot be used under gradient checkpointing"):
                solve(checkpoint=True)
            network.enable_gradient_checkpointing()
            with pytest.raises(TsAdaptError, match="disable_gradient_checkpointing"):
                solve()
            network.disable_gradient_checkpointing()
            solve()


def test_what_cannot_be_is_refused(kit: Any, tiny: Any) -> None:
    network = kit.network("attentive")
    transformer = tiny.pipeline("dit").transformer
    for kind, make in {"deepcache": DeepCache, "tgate": TGate}.items():
        cacher = make()
        with pytest.raises(TsAdaptError, match=f"this {kind} is not attached to that network"):
            cacher.remove(network)
        with pytest.raises(TsAdaptError, match="UNet2DModel and UNet2DConditionModel; got DiTTransformer2DModel"):
            cacher.attach(transformer)
        with attached(network, cacher):
            with pytest.raises(TsAdaptError, match=f"a {kind} is attached to this network already"):
                make().attach(network)
            with pytest.raises(TsAdaptError, match=f"this {kind} is attached to a network already"):
                cacher.attach(kit.network("attentive"))
            twin = copy.deepcopy(network)
            with pytest.raises(TsAdaptError, match="copy of one with a cacher"):
                twin(**kit.inputs(network, 1))


@torch.no_grad()
def test_the_embedded_model_is_nearer_to_itself_the_more_is_computed() -> None:
    denoiser = load("fashion-ddpm")
    solver, grid = build_solver("unipc-3", denoiser.noise_schedule), build_grid("karras", denoiser.noise_schedule, 10)
    x_T = initial_noise(0, range(4), denoiser.shape)
    exact = integrate(denoiser, solver, grid, x_T).x

    def run(*made: Any) -> tuple[float, float]:
        with attached(denoiser.network, *made):
            flops = count_flops(lambda: integrate(denoiser, solver, grid, x_T))
            return flops, float((integrate(denoiser, solver, grid, x_T).x - exact).square().mean())

    whole = run()
    costs, errors = zip(*(run(DeepCache(3, branch)) for branch in (0, 2, 5)), whole, strict=True)
    assert list(costs) == sorted(costs) and list(errors) == sorted(errors, reverse=True) and whole[1] == 0.0
    reused = run(TGate(6, 2, 1))
    assert reused[0] < whole[0] and 0 < reused[1] < errors[0]
