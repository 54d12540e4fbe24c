"""`integrate` on a denoiser small enough to differentiate and to count: evaluations, gradients, errors, noise."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Denoiser, Node, TimeGrid
from ts_adapt.noise import BetaTable, Cosine, VarianceExploding
from ts_adapt.numerics import expand
from ts_adapt.sampling import initial_noise, integrate, noise_for
from ts_adapt.solvers import DDIM, IPNDM, Corrected

NOISE = Cosine()
TIMES = torch.tensor([0.95, 0.6, 0.3, 0.05], dtype=torch.float64)
DEPTH = 3


class Tiny(Denoiser):
    """A time-dependent x0 prediction of a few layers; counts its calls and, apart from that, all forward passes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.noise_schedule, self.evaluations, self.passes = NOISE, 0, 0
        self.weights = [nn.Parameter(torch.randn(4, 4, generator=generator) / 2) for _ in range(DEPTH)]
        self.told: list[tuple[Tensor | None, Tensor | None, dict[str, Any]]] = []

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        model_time: Tensor | None = None,
        output_scale: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        self.evaluations += 1
        self.passes += 1
        self.told.append((model_time, output_scale, condition))
        hidden = x_t * expand(self.noise_schedule.alpha(t), x_t)
        for weight in self.weights:
            hidden = torch.tanh(hidden @ weight)
        return hidden


class BreaksAt(Tiny):
    """Returns NaN in sample 1 at its `step`-th evaluation."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def __call__(self, x_t: Tensor, t: Tensor, **rest: Any) -> Tensor:
        x0 = super().__call__(x_t, t, **rest)
        broken = torch.zeros(len(x0), 1)
        broken[1] = math.nan
        return x0 + broken if self.evaluations == self.step + 1 else x0


def noise(batch: int = 5, seed: int = 0) -> Tensor:
    return initial_noise(seed, range(batch), (4,))


def test_evaluations_are_counted_and_shapes_are_those_promised() -> None:
    denoiser = Tiny()
    solution = integrate(denoiser, DDIM(NOISE), TIMES, noise(), keep_trajectory=True)
    assert denoiser.evaluations == 3
    assert solution.x.shape == (5, 4) and torch.equal(solution.times, TIMES)
    assert solution.states is not None and solution.states.shape == (5, 4, 4)
    assert solution.x0 is not None and solution.x0.shape == (5, 3, 4)
    assert torch.equal(solution.states[:, 0], noise()) and torch.equal(solution.states[:, -1], solution.x)
    brief = integrate(Tiny(), DDIM(NOISE), TIMES, noise())
    assert brief.states is None and brief.x0 is None and torch.equal(brief.x, solution.x)


def test_the_trajectory_obeys_the_update() -> None:
    solution = integrate(Tiny(), DDIM(NOISE), TIMES, noise(), keep_trajectory=True)
    assert solution.states is not None and solution.x0 is not None
    for i in range(3):
        alpha, sigma = NOISE.alpha(TIMES), NOISE.sigma(TIMES)
        eps = (solution.states[:, i] - alpha[i] * solution.x0[:, i]) / sigma[i]
        expected = alpha[i + 1] * solution.x0[:, i] + sigma[i + 1] * eps
        torch.testing.assert_close(solution.states[:, i + 1], expected.float(), rtol=1e-5, atol=1e-6)


def test_a_batch_of_grids_equals_runs_of_one() -> None:
    rows = torch.stack([TIMES, TIMES * 0.9, TIMES.sqrt() * 0.97, TIMES * 0.8, TIMES - 0.01])
    together = integrate(Tiny(), DDIM(NOISE), rows, noise(), keep_trajectory=True)
    assert torch.equal(together.times, rows)
    for i, row in enumerate(rows):
        alone = integrate(Tiny(), DDIM(NOISE), row, noise()[i : i + 1])
        torch.testing.assert_close(alone.x[0], together.x[i])


def test_samples_that_are_solved_one_by_one_have_their_own_noise_drawn_once_a_step() -> None:
    x_T, solver, drawn = noise(), DDIM(NOISE, eta=1.0), list[int]()
    draw = noise_for(3, range(len(x_T)), x_T)

    def noted(step: int) -> Tensor:
        drawn.append(step)
        return draw(step)

    single = Tiny()
    single.alone = True
    together = integrate(single, solver, TIMES, x_T, step_noise=noted).x
    assert drawn == list(range(len(TIMES) - 1))
    for i in range(len(x_T)):
        alone = integrate(Tiny(), solver, TIMES, x_T[i : i + 1], step_noise=noise_for(3, [i], x_T)).x
        assert torch.equal(together[i : i + 1], alone)


def test_corrections_and_conditions_reach_the_denoiser() -> None:
    denoiser = Tiny()
    grid = TimeGrid(TIMES, model_times=TIMES[:-1] / 2, output_scale=torch.tensor([1.0, 0.5, 2.0]))
    integrate(denoiser, DDIM(NOISE), grid, noise(), condition={"label": 7})
    assert [float(told[0]) for told in denoiser.told if told[0] is not None] == (TIMES[:-1] / 2).tolist()
    assert [float(told[1]) for told in denoiser.told if told[1] is not None] == [1.0, 0.5, 2.0]
    assert all(told[2] == {"label": 7} for told in denoiser.told)


def gradients(checkpoint: bool) -> tuple[list[Tensor], Tiny]:
    denoiser, x_T, times = Tiny(), noise().requires_grad_(), TIMES.expand(5, -1).clone().requires_grad_()
    solution = integrate(denoiser, DDIM(NOISE), times, x_T, checkpoint=checkpoint)
    return list(torch.autograd.grad(solution.x.square().sum(), [x_T, times, *denoiser.weights])), denoiser


def test_checkpointing_gives_the_same_gradients_and_counts_no_recomputation() -> None:
    (plain, _), (saved, denoiser) = gradients(False), gradients(True)
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b)
    assert denoiser.evaluations == 3 and denoiser.passes == 6


def test_checkpointing_without_gradients_recomputes_nothing() -> None:
    denoiser = Tiny()
    with torch.no_grad():
        integrate(denoiser, DDIM(NOISE), TIMES, noise(), checkpoint=True)
    assert denoiser.evaluations == denoiser.passes == 3


def test_gradcheck_in_the_times() -> None:
    denoiser, x_T = Tiny(), noise(2).double()
    denoiser.weights = [nn.Parameter(weight.detach().double()) for weight in denoiser.weights]

    def solve(times: Tensor) -> Tensor:
        return integrate(denoiser, DDIM(NOISE), times, x_T).x

    assert torch.autograd.gradcheck(solve, torch.stack([TIMES, TIMES * 0.9]).requires_grad_())


@pytest.mark.parametrize("step", [0, 2])
def test_a_non_finite_output_names_the_step_and_the_sample(step: int) -> None:
    with pytest.raises(TsAdaptError, match=rf"denoiser's output .* at step {step}, in sample\(s\) \[1\]"):
        integrate(BreaksAt(step), DDIM(NOISE), TIMES, noise())
    assert not bool(torch.isfinite(integrate(BreaksAt(step), DDIM(NOISE), TIMES, noise(), check=False).x[1]).any())


def test_stochastic_solvers_need_noise_and_are_reproducible_in_any_batch() -> None:
    solver = DDIM(NOISE, eta=1.0)
    with pytest.raises(TsAdaptError, match="DDIM is stochastic: pass step_noise=noise_for"):
        integrate(Tiny(), solver, TIMES, noise())

    def solve(index: list[int]) -> Tensor:
        x_T = initial_noise(3, index, (4,))
        return integrate(Tiny(), solver, TIMES, x_T, step_noise=noise_for(3, index, x_T)).x

    torch.testing.assert_close(solve([0, 1, 2, 3])[[3, 1]], solve([3, 1]))
    assert not torch.allclose(solve([0]), integrate(Tiny(), DDIM(NOISE), TIMES, initial_noise(3, [0], (4,))).x)


def test_the_callback_sees_every_evaluation() -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []

    def callback(node: Node, x_t: Tensor, x0: Tensor) -> None:
        seen.append((node.index, x_t, x0))

    solution = integrate(Tiny(), DDIM(NOISE), TIMES, noise(), callback=callback, keep_trajectory=True)
    assert [index for index, _, _ in seen] == [0, 1, 2]
    assert solution.states is not None and solution.x0 is not None
    torch.testing.assert_close(torch.stack([x_t for _, x_t, _ in seen], 1), solution.states[:, :-1])
    torch.testing.assert_close(torch.stack([x0 for _, _, x0 in seen], 1), solution.x0)


class Recorder:
    runs = 0

    def __init__(self) -> None:
        self.heard: list[tuple[int, ...]] = []

    def begin(self, steps: int, batch: int) -> None:
        self.heard.append((steps, batch))

    def at(self, index: int | None) -> None:
        self.heard.append((index,))

    def end(self) -> None:
        self.heard.append(())


def test_step_aware_parts_are_told_and_refused_under_checkpointing() -> None:
    recorder = Recorder()
    integrate(Tiny(), DDIM(NOISE), TIMES, noise(), step_aware=[recorder])
    assert recorder.heard == [(3, 5), (0,), (1,), (2,), ()]
    with pytest.raises(TsAdaptError, match="cache cannot be used under gradient checkpointing"):
        integrate(Tiny(), DDIM(NOISE), TIMES, noise(), step_aware=[recorder], checkpoint=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True), st.randoms())
def test_initial_noise_depends_on_seed_and_sample_only(seed: int, index: list[int], random: Any) -> None:
    drawn = dict(zip(index, initial_noise(seed, index, (2, 3)), strict=True))
    shuffled = random.sample(index, len(index))
    assert torch.equal(initial_noise(seed, shuffled, (2, 3)), torch.stack([drawn[i] for i in shuffled]))
    assert torch.equal(initial_noise(seed, torch.tensor(index[:1]), (2, 3))[0], drawn[index[0]])
    assert len({tuple(x.flatten().tolist()) for x in drawn.values()}) == len(index)
    assert not torch.equal(initial_noise(seed + 1, index, (2, 3)), initial_noise(seed, index, (2, 3)))


def test_initial_noise_is_standard_normal_and_streams_are_unrelated() -> None:
    x = initial_noise(0, range(200), (10, 10)).flatten(1)
    assert abs(float(x.mean())) < 0.03 and abs(float(x.std()) - 1) < 0.03
    between = torch.corrcoef(x)[~torch.eye(200, dtype=torch.bool)]
    assert abs(float(between.mean())) < 0.01 and float(between.abs().max()) < 0.6
    steps = torch.stack([noise_for(0, range(200), x)(step).flatten() for step in range(2)] + [x.flatten()])
    assert float((torch.corrcoef(steps) - torch.eye(3)).abs().max()) < 0.03


def test_no_samples_is_an_empty_batch() -> None:
    assert initial_noise(0, [], (3, 2)).shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("solver", "schedule", "made"), [("ddim", "karras", "solver"), (DDIM(NOISE), "karras", "grid")]
)
def test_a_name_is_told_what_it_stands_for(solver: Any, schedule: Any, made: str) -> None:
    with pytest.raises(TsAdaptError, match=rf"is the name of a {made}; .*build_{made}\("):
        integrate(Tiny(), solver, schedule, torch.zeros(2, 4))


@pytest.mark.parametrize("factor", [0.01, 1.0, 80.0, 6400.0])
def test_noise_of_another_scale_is_noticed(factor: float) -> None:
    denoiser = Tiny()
    denoiser.noise_schedule = VarianceExploding(t_min=0.002, t_max=80.0)
    times, x_T = torch.tensor([80.0, 0.002], dtype=torch.float64), initial_noise(0, range(300), (4,))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        integrate(denoiser, DDIM(denoiser.noise_schedule), times, factor * x_T)
        integrate(denoiser, DDIM(denoiser.noise_schedule), times, factor * x_T, check=False)
    assert [f"{80.0:.3g}" in str(warning.message) for warning in told] == ([] if factor == 80.0 else [True])


def test_solvers_grids_and_denoisers_say_what_they_are() -> None:
    assert all(part in repr(DDIM(NOISE, eta=0.5)) for part in ("DDIM(", "eta=0.5", "Cosine("))
    assert all(part in repr(Corrected(IPNDM(NOISE, order=3))) for part in ("Corrected(", "IPNDM(", "order=3"))
    assert repr(TimeGrid(TIMES)) == "TimeGrid(3 steps: 0.95, 0.6, 0.3, 0.05)"
    each = TimeGrid(TIMES.expand(7, 4), model_times=TIMES[:-1])
    assert repr(each) == "TimeGrid(3 steps for each of 7 samples: 0.95 to 0.05; model_times)"
    network = NetworkDenoiser(nn.Identity(), BetaTable(torch.full((10,), 0.1)), "v", shape=(3, 8, 8))
    assert all(
        part in repr(Guided(network, 2.0, {"class_labels": 0}))
        for part in ("Guided(", "(3, 8, 8)", "predicts v", "t from 9 to 0")
    )
