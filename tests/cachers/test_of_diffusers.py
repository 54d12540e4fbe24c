"""The caches of diffusers: nothing is changed where nothing is skipped, else less is run; as diffusers has them."""

from __future__ import annotations

import ts_adapt  # noqa: F401  isort: skip

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import hooks
from torch import Tensor, nn

from tiny_families import family, last_state
from tiny_networks import small
from ts_adapt.assembly import build_cachers, build_solver
from ts_adapt.cachers import FasterCache, FirstBlock, MagCache, attached
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Denoiser
from ts_adapt.noise import BetaTable, RectifiedFlow
from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.resolve import build_grid

STEPS, BATCH, WIDTH, LAYERS = 8, 2, 16, 3
RATIOS = [1.0] + [1.01] * 9
NETWORKS: dict[str, Callable[[], Any]] = {
    "dit": lambda: small("DiTTransformer2DModel", num_layers=LAYERS, num_embeds_ada_norm=10),
    "sd3": lambda: small("SD3Transformer2DModel", num_layers=LAYERS),
    "flux": lambda: small("FluxTransformer2DModel", num_layers=2, num_single_layers=2),
    "wan": lambda: small("WanTransformer3DModel", num_layers=LAYERS),
}
EVERY: dict[str, Callable[[], Any]] = {
    "firstblock": lambda: build_cachers("firstblock-10")[0],
    "magcache": lambda: MagCache(1.0, ratios=RATIOS),
    "taylorseer": lambda: build_cachers("taylorseer-3-warmup2")[0],
    "pab": lambda: build_cachers("pab-3-cross2")[0],
    "fastercache": lambda: build_cachers("fastercache-2-uncond3")[0],
    "seacache": lambda: build_cachers("seacache-10")[0],
}
NOTHING: dict[str, Callable[[], Any]] = {
    "firstblock": lambda: build_cachers("firstblock-0")[0],
    "magcache": lambda: MagCache(max_skip=0, ratios=RATIOS),
    "taylorseer": lambda: build_cachers("taylorseer-1")[0],
    "pab": lambda: build_cachers("pab-1-cross1")[0],
    "fastercache": lambda: build_cachers("fastercache-1-uncond1")[0],
    "seacache": lambda: build_cachers("seacache-0")[0],
}
"""Settings by which all is computed."""
NOT_FOR = {("dit", "fastercache"), ("dit", "seacache"), ("sd3", "seacache"), ("flux", "seacache")}
PAIRS = [pair for pair in product(NETWORKS, EVERY) if pair not in NOT_FOR]


def network(name: str) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name]()


def latte() -> Any:
    return small("LatteTransformer3DModel", num_layers=2, sample_size=8, caption_channels=WIDTH, video_length=2)


def problem(name: str, guided: bool = False) -> tuple[Any, Tensor, dict[str, Any]]:
    """A denoiser, its starting noise and its condition."""
    made, generator = network(name), torch.Generator().manual_seed(1)
    shape = (4, 3, 8, 8) if name == "wan" else (4, 8, 8)
    condition: dict[str, Any] = {"encoder_hidden_states": torch.randn(BATCH, 3, WIDTH, generator=generator)}
    if name in ("sd3", "flux"):
        condition["pooled_projections"] = torch.randn(BATCH, 6, generator=generator)
    none = {key: torch.zeros_like(value[:1]) for key, value in condition.items()}
    if name == "dit":
        condition, none = {"class_labels": torch.tensor([3, 5])}, {"class_labels": torch.tensor([10])}
    how: tuple[Any, str] = (BetaTable.from_config({}), "epsilon") if name == "dit" else (RectifiedFlow(), "velocity")
    denoiser = NetworkDenoiser(made, *how, shape=shape)
    return Guided(denoiser, 3.0, none) if guided else denoiser, initial_noise(0, range(BATCH), shape), condition


def solve(denoiser: Denoiser, x_T: Tensor, condition: Any, solver: str = "unipc-2", **options: Any) -> Tensor:
    schedule = denoiser.noise_schedule
    grid = build_grid("uniform", schedule, STEPS)
    return integrate(denoiser, build_solver(solver, schedule), grid, x_T, condition=condition, **options).x


@pytest.mark.parametrize(("name", "cacher"), PAIRS)
@torch.no_grad()
def test_a_cacher_runs_less_of_the_network_or_changes_nothing_and_is_taken_off_exactly(
    kit: Any, name: str, cacher: str
) -> None:
    for guided in (False, True):
        if guided and (name, cacher) == ("flux", "fastercache"):
            continue
        solved = problem(name, guided)
        made: nn.Module = solved[0].network
        marks, keys = kit.marks(made), list(made.state_dict())
        with kit.counted(made) as whole:
            plain = solve(*solved)
        with attached(made, NOTHING[cacher]()):
            assert torch.equal(solve(*solved), plain)
        with attached(made, EVERY[cacher]()), kit.counted(made) as fewer:
            cached = solve(*solved)
            assert list(made.state_dict()) == keys
        assert 0 < sum(rows for _, rows in fewer) < sum(rows for _, rows in whole)
        assert cached.isfinite().all() and not torch.equal(cached, plain)
        assert kit.marks(made) == marks and torch.equal(solve(*solved), plain)


@pytest.mark.parametrize("cacher", EVERY)
@torch.no_grad()
def test_a_run_begins_anew_after_one_that_ended_and_one_that_was_broken_off(cacher: str) -> None:
    denoiser, x_T, condition = problem("wan")

    def broken(node: Any, x: Tensor, x0: Tensor) -> None:
        if node.index == 3:
            raise KeyboardInterrupt

    inputs = {"hidden_states": x_T, "timestep": torch.tensor([500.0] * BATCH), **condition}
    outside = denoiser.network(**inputs).sample
    with attached(denoiser.network, made := EVERY[cacher]()):
        first = solve(denoiser, x_T, condition)
        assert torch.equal(solve(denoiser, x_T, condition), first)
        with pytest.raises(KeyboardInterrupt):
            solve(denoiser, x_T[:1], {key: value[:1] for key, value in condition.items()}, callback=broken)
        assert made.index is None and not made._states
        assert torch.equal(denoiser.network(**inputs).sample, outside)
        assert torch.equal(solve(denoiser, x_T, condition), first)


@pytest.mark.parametrize("cacher", ["firstblock", "taylorseer", "pab"])
@torch.no_grad()
def test_heuns_two_evaluations_have_caches_of_their_own(cacher: str) -> None:
    """With the step told, each is the cache of a network that is called once a step."""
    denoiser, _, condition = problem("dit")
    both: dict[str, list[Tensor]] = {"first": [], "second": []}
    states = [torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2 * STEPS)]

    def call(index: int) -> Tensor:
        made: Tensor = denoiser.network(states[index], timestep=torch.full((BATCH,), 900 - 50 * index), **condition)[0]
        return made

    with attached(denoiser.network, made := EVERY[cacher]()):
        made.begin(STEPS, BATCH)
        for index in range(STEPS):
            made.at(index)
            both["first"].append(call(2 * index))
            both["second"].append(call(2 * index + 1))
        for which, found in enumerate(both.values()):
            made.begin(STEPS, BATCH)
            for index in range(STEPS):
                made.at(index)
                assert torch.equal(call(2 * index + which), found[index])
        made.end()


CONFIGS: dict[str, Callable[[Any], Any]] = {
    "firstblock": lambda place: hooks.FirstBlockCacheConfig(10.0),
    "magcache": lambda place: hooks.MagCacheConfig(1.0, mag_ratios=RATIOS, num_inference_steps=STEPS),
    "taylorseer": lambda place: hooks.TaylorSeerCacheConfig(3, 2, taylor_factors_dtype=torch.float32),
    "pab": lambda place: hooks.PyramidAttentionBroadcastConfig(3, current_timestep_callback=place),
    "fastercache": lambda place: hooks.FasterCacheConfig(
        2, is_guidance_distilled=True, current_timestep_callback=place
    ),
}


@pytest.mark.parametrize("cacher", CONFIGS)
@torch.no_grad()
def test_it_is_what_diffusers_enables(kit: Any, cacher: str) -> None:
    """Twice a step, with and without a condition, where diffusers tells the two apart."""
    made, (_, _, condition) = network("flux"), problem("flux")
    names = ["cond"] if cacher in ("pab", "fastercache") else ["cond", "uncond"]
    place = [1000.0]
    common = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(3, 3)}
    conditions = {"cond": condition, "uncond": {key: 0 * value for key, value in condition.items()}}
    states = [torch.randn(BATCH, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]

    def run(at: Callable[[int], None]) -> list[Tensor]:
        found = []
        for index, x in enumerate(states):
            at(index)
            time = torch.full((BATCH,), 1 - index / STEPS)
            for name in names:
                with made.cache_context(name):
                    found.append(made(x, timestep=time, **conditions[name], **common).sample)
        return found

    def moved(index: int) -> None:
        place[0] = 1000 * (1 - index / STEPS)

    plain = run(moved)
    made.enable_cache(CONFIGS[cacher](lambda: place[0]))
    theirs = run(moved)
    made.disable_cache()
    with attached(made, ours := EVERY[cacher]()):
        ours.begin(STEPS, BATCH)
        found = run(ours.at)
        ours.end()
    assert all(map(torch.equal, found, theirs)) and not all(map(torch.equal, found, plain))


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline of the family whose network has more blocks than one."""
    pipe, call = family(name)
    kind: Any = type(pipe.transformer)
    config = dict(pipe.transformer.config)
    torch.manual_seed(0)
    more = {key: LAYERS for key in ("num_layers", "num_single_layers") if key in config}
    pipe.register_modules(transformer=kind.from_config({**config, **more}).eval().requires_grad_(False))
    return pipe, call


@pytest.mark.parametrize(
    ("name", "cacher"),
    [("sd35", "fastercache"), ("flux", "firstblock")],
)
@torch.no_grad()
def test_a_pipeline_is_cached_by_whatever_tells_it_the_step(name: str, cacher: str) -> None:
    """With a schedule attached, as a denoiser, and by its own scheduler."""
    pipe, call = pipeline(name)
    denoiser, prompts = PipelineDenoiser(pipe, call), ["a cat", "the big dog"]
    schedule = LearnedScheduler.from_grid("uniform", "unipc-2", pipe.scheduler.config)
    x_T = initial_noise(0, range(BATCH), denoiser.shape)

    def sample() -> Tensor:
        return last_state(pipe, call, prompts, x_T, STEPS)

    def learned() -> Tensor:
        attach(pipe, schedule)
        try:
            return sample()
        finally:
            detach(pipe)

    def student() -> Tensor:
        return solve(denoiser, x_T, denoiser.encode(prompts))

    plain = learned(), student(), sample()
    with attached(pipe.transformer, EVERY[cacher]()):
        found = learned()
        ours = student()
        assert torch.equal(learned(), found)
    with attached(pipe, EVERY[cacher]()):
        own = sample()
        assert torch.equal(sample(), own) and torch.equal(learned(), found)
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    for cached, exact, again in zip((found, ours, own), plain, (learned(), student(), sample()), strict=True):
        assert torch.equal(again, exact) and not torch.allclose(cached, exact) and cached.isfinite().all()


@torch.no_grad()
def test_a_pipelines_own_loop_is_as_with_diffusers_own_cache() -> None:
    pipe, call = pipeline("qwen-image")
    x_T = torch.randn(BATCH, 16, 16, generator=torch.Generator().manual_seed(0))

    def sample() -> Tensor:
        return last_state(pipe, call, ["a cat", "dog"], x_T, STEPS)

    pipe.transformer.enable_cache(CONFIGS["firstblock"](None))
    theirs = sample()
    pipe.transformer.disable_cache()
    with attached(pipe, EVERY["firstblock"]()):
        assert torch.equal(sample(), theirs)
    assert not torch.allclose(sample(), theirs)


@pytest.mark.parametrize("cacher", EVERY)
def test_gradients_pass_or_are_refused(cacher: str) -> None:
    denoiser, x_T, condition = problem("wan", guided=True)
    x_T = x_T.requires_grad_()
    with attached(denoiser.network, EVERY[cacher]()):
        if cacher in ("fastercache", "seacache"):
            with pytest.raises(TsAdaptError, match="gradient"):
                solve(denoiser, x_T, condition)
        else:
            (gradient,) = torch.autograd.grad(solve(denoiser, x_T, condition).square().mean(), x_T)
            assert gradient.isfinite().all() and gradient.abs().sum() > 0
        with pytest.raises(TsAdaptError, match="cache cannot be used under gradient checkpointing"):
            solve(denoiser, x_T, condition, checkpoint=True)
        denoiser.network.enable_gradient_checkpointing()
        with pytest.raises(TsAdaptError, match="disable_gradient_checkpointing"):
            solve(denoiser, x_T, condition)


@torch.no_grad()
def test_ratios_are_measured_by_a_whole_run() -> None:
    denoiser, x_T, condition = problem("sd3")
    plain, measuring = solve(denoiser, x_T, condition), MagCache(measure=True)
    with attached(denoiser.network, measuring):
        assert torch.equal(solve(denoiser, x_T, condition), plain)
    assert measuring.ratios is not None and len(measuring.ratios) == STEPS and measuring.ratios[0] == 1.0
    assert all(0 < ratio < 10 for ratio in measuring.ratios) and len({*measuring.ratios}) > 2
    with attached(denoiser.network, MagCache(10.0, ratios=measuring.ratios)):
        assert not torch.equal(solve(denoiser, x_T, condition), plain)


@pytest.mark.parametrize("cacher", EVERY)
def test_what_it_does_not_work_on_is_refused_and_left_as_it_was(kit: Any, cacher: str) -> None:
    one = kit.network("text")
    for other, expected in ((one, "deepcache and tgate are for UNets"), (nn.Linear(2, 2), "got Linear")):
        marks = kit.marks(other)
        with pytest.raises(TsAdaptError, match=expected):
            EVERY[cacher]().attach(other)
        assert kit.marks(other) == marks
    made = network("wan")
    with attached(made, EVERY[cacher]()), pytest.raises(TsAdaptError, match="it takes one"):
        EVERY["firstblock"]().attach(made)
    made.enable_cache(hooks.FirstBlockCacheConfig(0.1))
    with pytest.raises(TsAdaptError, match="disable_cache"):
        EVERY[cacher]().attach(made)


@pytest.mark.parametrize(
    ("make", "cacher", "expected"),
    [
        (lambda: family("sana")[0].transformer, "firstblock", "has one"),
        (lambda: pipeline("sana")[0].transformer, "firstblock", "does not know the blocks"),
        (lambda: pipeline("sana")[0].transformer, "magcache", "does not know the blocks"),
        (latte, "firstblock", "by turns"),
        (latte, "magcache", "by turns"),
        (lambda: network("sd3"), "magcache-.1", "ratios of the model"),
        (lambda: network("sd3"), "seacache", "Wan's networks"),
        (lambda: network("dit"), "fastercache", "gives it first"),
    ],
)  # fmt: skip
def test_networks_that_lack_what_is_needed_are_refused(kit: Any, make: Any, cacher: str, expected: str) -> None:
    made = make()
    marks = kit.marks(made)
    found = MagCache(ratios=RATIOS) if cacher == "magcache" else build_cachers(cacher)[0]
    with pytest.raises(TsAdaptError, match=expected):
        found.attach(made)
    assert kit.marks(made) == marks


@torch.no_grad()
def test_what_is_added_to_a_guided_batch_is_not_halved_with_it() -> None:
    denoiser, x_T, condition = problem("sd3")
    twice = {key: torch.cat([value, value]) for key, value in condition.items()}
    with attached(denoiser.network, cacher := FasterCache()):
        cacher.begin(STEPS, BATCH)
        cacher.at(0)
        with pytest.raises(TsAdaptError, match="a ControlNet or the like"):
            denoiser.network(
                torch.cat([x_T, x_T]), timestep=torch.full((2 * BATCH,), 900.0), **twice,
                block_controlnet_hidden_states=[torch.zeros(2 * BATCH, 16, 8)] * LAYERS,
            )  # fmt: skip


@torch.no_grad()
def test_tokens_have_no_frequencies() -> None:
    denoiser, x_T, condition = problem("flux", guided=True)
    with attached(denoiser.network, FasterCache()), pytest.raises(TsAdaptError, match="splits images into frequencies"):
        solve(denoiser, x_T, condition)


@torch.no_grad()
def test_the_first_block_decides_for_a_batch_as_a_whole(kit: Any) -> None:
    """A sample that stays as it is is computed again beside one that changes, and alone it is not."""
    made = network("dit")
    before = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    after = before * torch.tensor([1.0, -1.0]).reshape(-1, 1, 1, 1)

    def layers_of_the_second_step(rows: slice) -> int:
        with attached(made, cacher := FirstBlock(0.1)):
            cacher.begin(2, len(before[rows]))
            for index, x in enumerate((before[rows], after[rows])):
                cacher.at(index)
                with kit.counted(made) as layers:
                    made(x, timestep=torch.full((len(x),), 500), class_labels=torch.full((len(x),), 3))
        return len(layers)

    assert layers_of_the_second_step(slice(0, 1)) < layers_of_the_second_step(slice(1, 2))
    assert layers_of_the_second_step(slice(None)) == layers_of_the_second_step(slice(1, 2))
