"""What is added to a network's embedding of the time: found in any network, as exact as a bias, gone afterwards."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline_cases import CASES
from small_predictors import KINDS
from tiny_networks import ready, small
from ts_adapt import LearnedGrid, LearnedScheduler, attach, detach
from ts_adapt.assembly import build_solver
from ts_adapt.cachers import attached
from ts_adapt.cachers.tgate import TGate
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.denoisers.pipeline import from_pipeline
from ts_adapt.denoisers.time_embedding import time_embedding
from ts_adapt.distances import l2
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.interfaces import EMBEDDING, TimeGrid
from ts_adapt.noise import BetaTable
from ts_adapt.predictors.diagnosis import predicted
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.sampling import embedding_of, integrate
from ts_adapt.schedulers.attach import network_of
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.static import search_static
from ts_adapt.search.static_options import StaticOptions

STEPS, ROWS = 3, 2
PROMPTS = ["a cat", "the end"]
PLACES = {
    "ddpm": ["time_embedding"],
    "sd": ["time_embedding"],
    "sdxl": ["time_embedding"],
    "sd3": ["time_text_embed.timestep_embedder"],
    "flux": ["time_text_embed.timestep_embedder"],
    "dit": ["transformer_blocks.0.norm1.emb.timestep_embedder"],
}
"""Where the networks of pipelines embed the time; DiT's in every block, of which there is one."""


def noise(denoiser: Any) -> Tensor:
    return torch.randn(ROWS, *denoiser.shape, generator=torch.Generator().manual_seed(1))


def moved(denoiser: Any, width: int, rows: int | None = None) -> TimeGrid:
    """A grid with an offset in every step, of its own for each of `rows`."""
    shape = (STEPS, width) if rows is None else (rows, STEPS, width)
    offset = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return TimeGrid.of(fixed.make("karras", denoiser.noise_schedule, STEPS), {EMBEDDING: offset})


def width_of(unet: Any) -> int:
    return int(unet.time_embedding.linear_2.out_features)


def learned(pipe: Any, grid: TimeGrid) -> LearnedScheduler:
    return LearnedScheduler.from_schedules([LearnedGrid(grid, "unipc-2", STEPS)], pipe.scheduler.config)


def latents(pipe: Any, x: Tensor, scale: float = 1.0) -> Tensor:
    """What a call of the pipeline makes of the noise `x` and the prompts."""
    images: Tensor = pipe(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=scale, output_type="latent", latents=x
    ).images
    return images


def hooked(network: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def of(pipe: Any) -> tuple[NetworkDenoiser, dict[str, Any]]:
    denoiser: Any = from_pipeline(pipe)
    return denoiser, dict(denoiser.encode(PROMPTS)) if denoiser.encode is not None else {}


def solved(denoiser: Any, grid: TimeGrid, x: Tensor, condition: dict[str, Any]) -> Tensor:
    return integrate(denoiser, build_solver("unipc-2", denoiser.noise_schedule), grid, x, condition=condition).x


def close(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).norm() <= 1e-5 * y.norm())


@pytest.mark.parametrize("name", PLACES)
def test_it_is_found_where_networks_have_it(name: str, tiny: Any) -> None:
    case, pipe = CASES[name], tiny.pipeline(name)
    denoiser: Any = case.ours(pipe)
    found = embedding_of(denoiser, noise(denoiser), case.condition(range(ROWS)))
    assert found is not None
    names = {module: key for key, module in network_of(pipe).named_modules()}
    places = [names[module] for module in found.modules]
    assert places == PLACES[name]
    assert all(module.linear_2.out_features == found.width for module in found.modules)  # type: ignore[union-attr]


def test_where_every_block_embeds_it_all_are_added_to() -> None:
    network = small("DiTTransformer2DModel", num_layers=2)
    found = time_embedding(network, lambda: network(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.ones(1).long()))
    blocks = [block.norm1.emb.timestep_embedder for block in network.transformer_blocks]
    assert found is not None and list(found.modules) == blocks


class Split(nn.Module):
    """Sinusoids that are split among three layers, none of which is given them as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.layer = Waves(), nn.Linear(4, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x + self.layer(2 * self.times(timestep))[:, :, None, None])


class Waves(nn.Module):
    def forward(self, timestep: Tensor) -> Tensor:
        return torch.stack([torch.cos(timestep / 10**k) for k in range(1, 5)], -1)


class Timeless(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x + timestep.reshape(-1, 1, 1, 1) / 500)


def own(network: nn.Module) -> NetworkDenoiser:
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    return NetworkDenoiser(ready(network), BetaTable.from_config(DDIMScheduler().config), "epsilon", shape=(1, 4, 4))


def test_without_a_layer_behind_it_is_the_embedding_itself_and_a_network_may_have_none() -> None:
    denoiser = own(Split())
    found = embedding_of(denoiser, noise(denoiser), {})
    assert found is not None and (found.modules, found.width) == ((denoiser.network.times,), 4)
    none = own(Timeless())
    assert embedding_of(none, noise(none), {}) is None
    with pytest.raises(TsAdaptError, match="leave it out of the corrections"):
        solved(none, moved(none, 4), noise(none), {})


@pytest.mark.parametrize("name", ["ddpm", "sd"])
def test_it_is_what_a_bias_of_the_last_layer_is(name: str, tiny: Any) -> None:
    denoiser, condition = of(tiny.pipeline(name))
    x, grid = noise(denoiser), moved(denoiser, width_of(denoiser.network))
    offset = grid.held[EMBEDDING][0]
    same = TimeGrid.of(grid.times, {EMBEDDING: offset.expand(STEPS, -1)})
    found = solved(denoiser, same, x, condition)
    biased: Any = copy.deepcopy(denoiser)
    with torch.no_grad():
        biased.network.time_embedding.linear_2.bias += offset.float()
    torch.testing.assert_close(found, solved(biased, TimeGrid(grid.times), x, condition), rtol=1e-6, atol=1e-5)
    plain, zeros = TimeGrid(grid.times), TimeGrid.of(grid.times, {EMBEDDING: torch.zeros_like(grid.held[EMBEDDING])})
    assert torch.equal(solved(denoiser, plain, x, condition), solved(denoiser, zeros, x, condition))
    assert not torch.allclose(found, solved(denoiser, plain, x, condition), atol=1e-2)


@pytest.mark.parametrize("solver", ["unipc-2", "heun"])
def test_each_sample_has_its_own_guided_or_not(solver: str, tiny: Any) -> None:
    inner, condition = of(tiny.pipeline("sd"))
    x, found = noise(inner), embedding_of(inner, noise(inner), condition)
    assert found is not None
    grid = moved(inner, found.width, ROWS)
    for denoiser in (inner, Guided(inner, 3.0)):
        method = build_solver(solver, inner.noise_schedule)
        together = integrate(denoiser, method, grid, x, condition=condition).x
        for row in range(ROWS):
            rows = slice(row, row + 1)
            given = {key: value[rows] for key, value in condition.items()}
            shared = TimeGrid.of(grid.times, {EMBEDDING: grid.held[EMBEDDING][row]})
            alone = integrate(denoiser, method, shared, x[rows], condition=given).x
            assert close(together[rows], alone)


def test_looking_for_it_is_no_evaluation_and_leaves_no_hook(tiny: Any) -> None:
    denoiser, condition = of(tiny.pipeline("sd"))
    grid = moved(denoiser, width_of(denoiser.network))
    solved(denoiser, grid, noise(denoiser), condition)
    assert denoiser.evaluations == STEPS
    assert not hooked(denoiser.network)


def test_it_is_for_the_thread_that_solves(tiny: Any) -> None:
    denoiser, condition = of(tiny.pipeline("sd"))
    x, found = noise(denoiser), embedding_of(denoiser, noise(denoiser), condition)
    assert found is not None
    plain = TimeGrid(moved(denoiser, found.width).times)
    expected, answers = solved(denoiser, plain, x, condition), []
    with found.adding(torch.ones(found.width)):
        other = threading.Thread(target=lambda: answers.append(solved(denoiser, plain, x, condition)))
        other.start()
        other.join()
        mine = solved(denoiser, plain, x, condition)
    assert torch.equal(answers[0], expected) and not torch.allclose(mine, expected, atol=1e-2)


def test_another_width_and_a_network_that_does_not_meet_it_are_refused(tiny: Any) -> None:
    denoiser, condition = of(tiny.pipeline("sd"))
    x, found = noise(denoiser), embedding_of(denoiser, noise(denoiser), condition)
    assert found is not None
    with pytest.raises(TsAdaptError, match=f"adds 5 numbers .* which has {found.width}"):
        solved(denoiser, moved(denoiser, 5), x, condition)
    with pytest.raises(TsAdaptError, match="was not met in its call"), found.adding(torch.ones(found.width)):
        pass


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("rows", [None, ROWS], ids=["shared", "own"])
def test_a_pipeline_samples_what_integrate_solves_and_is_itself_again(scale: float, rows: int, tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    inner, condition = of(pipe)
    denoiser: Any = inner if scale == 1 else Guided(inner, scale)
    x = noise(inner)
    grid = moved(inner, width_of(inner.network), rows)
    expected = solved(denoiser, grid, x, condition)
    before = latents(pipe, x, scale)
    attach(pipe, learned(pipe, grid))
    for _ in range(2):
        assert close(latents(pipe, x, scale), expected)
    detach(pipe)
    assert torch.equal(latents(pipe, x, scale), before) and not hooked(pipe.unet)


@pytest.mark.parametrize("called_before", [False, True])
def test_a_compiled_network_is_added_to_as_well(called_before: bool, tiny: Any) -> None:
    found = []
    for compiled in (False, True):
        pipe = tiny.pipeline("sd")
        inner, _ = of(pipe)
        x = noise(inner)
        if compiled:
            torch._dynamo.reset()
            pipe.unet.compile(backend="eager", fullgraph=True)
        if called_before:
            latents(pipe, x, 7.5)
        attach(pipe, learned(pipe, moved(inner, width_of(pipe.unet))))
        found.append(latents(pipe, x, 7.5))
    assert close(found[1], found[0])


@pytest.mark.parametrize("rows", [None, ROWS], ids=["shared", "own"])
def test_a_cacher_that_calls_the_network_on_fewer_rows_is_added_to_as_well(rows: int, tiny: Any) -> None:
    """Behind T-GATE's gate the network is called for the samples once; offsets of nothing change nothing there."""
    pipe = tiny.pipeline("sd")
    inner, _ = of(pipe)
    grid = moved(inner, width_of(inner.network), rows)
    found = []
    for each in (grid, TimeGrid.of(grid.times, {EMBEDDING: 0 * grid.held[EMBEDDING]}), TimeGrid(grid.times)):
        attach(pipe, learned(pipe, each))
        with attached(pipe.unet, TGate(2)):
            found.append(latents(pipe, noise(inner), 3.0))
        detach(pipe)
    assert torch.equal(found[1], found[2]) and not torch.allclose(found[0], found[1], atol=1e-2)


def test_a_network_that_was_called_or_changed_is_looked_at_anew(tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    denoiser, condition = of(pipe)
    x, grid = noise(denoiser), moved(denoiser, width_of(denoiser.network))
    attach(pipe, learned(pipe, grid))
    expected = latents(pipe, x)
    t = torch.tensor([10.0, 500.0])
    plain = pipe.unet.forward(x, t, **condition).sample
    alone = copy.deepcopy(pipe.unet)
    assert torch.equal(alone.forward(x, t, **condition).sample, plain)
    pipe.unet.time_embedding = copy.deepcopy(pipe.unet.time_embedding)
    assert torch.equal(latents(pipe, x), expected)
    detach(pipe)
    assert torch.equal(pipe.unet(x, t, **condition).sample, plain)
    assert close(solved(denoiser, grid, x, condition), expected)


def test_samples_of_one_noise_that_were_taken_for_copies_are_refused(tiny: Any) -> None:
    """DiT guided by nothing, two classes from one noise: the first call was told the offset of one of them twice."""
    pipe, kinds = tiny.pipeline("dit"), [1, 2]
    denoiser: Any = from_pipeline(pipe)
    width = pipe.transformer.transformer_blocks[0].norm1.emb.timestep_embedder.linear_2.out_features
    predictor = tiny.predictor(
        Recursive, denoiser.noise_schedule, denoiser.shape, STEPS, classes=1000, corrections=["embedding"],
        embedding=width,
    )  # fmt: skip
    attach(pipe, LearnedScheduler.from_predictors(predictor, "unipc-2", pipe.scheduler.config))
    options = {"guidance_scale": 1.0, "num_inference_steps": STEPS, "output_type": "np"}
    with pytest.raises(TsAdaptError, match="could not be told from their noise"):
        pipe(kinds, generator=[torch.Generator().manual_seed(0) for _ in kinds], **options)
    images = pipe(kinds, generator=[torch.Generator().manual_seed(seed) for seed in kinds], **options).images
    assert len(images) == len(kinds)


def test_draws_leave_it_as_it_is() -> None:
    denoiser = own(Split())
    x, grid = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(3)), moved(denoiser, 4)
    batch = Batch(torch.arange(8), x, solved(denoiser, TimeGrid(0.9 * grid.times), x, {}), {})
    objective = Objective(denoiser, build_solver("unipc-2", denoiser.noise_schedule), l2)
    options = StaticOptions("forward", evaluations=60, corrections=["embedding"])
    found = search_static(objective, batch, batch, {"moved": grid}, options, progress=False)
    assert torch.equal(found.grid.held[EMBEDDING], grid.held[EMBEDDING]) and found.distance < found.start_distance


def test_a_loop_of_ones_own_is_refused(tiny: Any) -> None:
    pipe = tiny.pipeline("sd")
    denoiser, condition = of(pipe)
    schedule = learned(pipe, moved(denoiser, width_of(denoiser.network)))
    schedule.set_timesteps(STEPS)
    x = noise(denoiser)
    timestep = schedule.network_timesteps(x)
    answer = denoiser.network(x, timestep, **condition).sample
    with pytest.raises(TsAdaptError, match="attach"):
        schedule.step(answer, schedule.timesteps[0], x)


def test_a_search_finds_what_the_teacher_was_offset_by() -> None:
    denoiser = own(Split())
    x, grid = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(3)), moved(denoiser, 4)
    batch = Batch(torch.arange(32), x, solved(denoiser, grid, x, {}), {})
    objective = Objective(denoiser, build_solver("unipc-2", denoiser.noise_schedule), l2, derivative="exact")
    options = StaticOptions("adam", iterations=150, batch_size=32, corrections=["embedding"])
    start = {"karras": TimeGrid(grid.times)}
    found = search_static(objective, batch, batch, start, options, progress=False)
    assert found.grid.held[EMBEDDING].shape == (STEPS, 4)
    assert found.distance < 0.05 * found.start_distance


@pytest.mark.parametrize("kind", KINDS)
def test_predictors_choose_it_for_each_sample(kind: Any, tiny: Any) -> None:
    denoiser, _ = of(tiny.pipeline("ddpm"))
    x, width = noise(denoiser), width_of(denoiser.network)
    grid = moved(denoiser, width)
    objective = Objective(denoiser, build_solver("unipc-2", denoiser.noise_schedule), l2)
    batch = Batch(torch.arange(ROWS), x, x, {})
    predictor = kind(
        denoiser.noise_schedule, grid, denoiser.shape, corrections=["embedding"], width=8, hidden=16, embedding=width
    )
    offsets = predicted(predictor, objective, batch).held[EMBEDDING]
    torch.testing.assert_close(offsets, grid.held[EMBEDDING].expand(ROWS, -1, -1), rtol=0, atol=1e-6)
    assert close(objective.student(predictor.policy(), batch), objective.student(grid, batch))
    torch.nn.init.normal_(predictor.encoder.weight, 0, 0.3)
    offsets = predicted(predictor, objective, batch).held[EMBEDDING]
    assert bool((offsets.std(0) > 0).all())
    alone = TimeGrid.of(predicted(predictor, objective, batch).times, {EMBEDDING: offsets})
    assert close(objective.student(predictor.policy(), batch), objective.student(alone, batch))
