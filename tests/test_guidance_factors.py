"""The learned factors on the guidance scale: nothing at one, another scale in each step else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from small_predictors import KINDS, build
from ts_adapt import LearnedGrid, integrate
from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.analytic import GaussianDenoiser
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.time_derivative import TimeDerivative
from ts_adapt.distances import l2
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.corrections import GUIDANCE_BOUND
from ts_adapt.grids.fixed import make
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import GUIDANCE, TimeGrid
from ts_adapt.noise import ContinuousVP
from ts_adapt.predictors.diagnosis import predicted
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.static import search_static
from ts_adapt.search.static_options import StaticOptions

STEPS, SCALE, SHAPE = 4, 3.0, (1, 4, 4)
NOISE = ContinuousVP()
TIMES = make("log_snr", NOISE, STEPS)
LABELS = {"label": torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)}
FACTORS = torch.tensor([0.5, 1.4, 0.8, 1.0], dtype=torch.float64)
OWN = torch.stack([FACTORS, FACTORS.flip(0), 1.2 * FACTORS])


class Labelled(GaussianDenoiser):
    """Pictures of one variance about their label, bent by it, so that guidance depends on the state."""

    def __call__(self, x_t: Tensor, t: Tensor, *, label: Tensor, **told: Any) -> Tensor:
        x0 = super().__call__(x_t, t, **told)
        label = label.to(x0).reshape(-1, 1, 1, 1)
        return x0 + label * (1 + 0.2 * torch.tanh(x0))


def guided(scale: float | Tensor = SCALE) -> Guided:
    return Guided(Labelled(NOISE, 0.0, 0.5, SHAPE), scale, {"label": 0.0})


def noise(rows: int = 3) -> Tensor:
    return torch.randn(rows, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def steered(factors: Tensor) -> TimeGrid:
    return TimeGrid.of(TIMES, {GUIDANCE: factors})


def solved(schedule: Any, denoiser: Any = None, solver: str = "unipc-3") -> Tensor:
    return integrate(denoiser or guided(), build_solver(solver, NOISE), schedule, noise(), condition=LABELS).x


class Stepwise(Guided):
    """Guided by the scales `(N,)` or `(N, B)`, one after the other."""

    scales: Tensor

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        return super().__call__(*args, guidance_scale=self.scales[self.evaluations], **options)


@pytest.mark.parametrize("factors", [FACTORS, OWN], ids=["shared", "own"])
def test_each_step_has_the_scale_times_its_factor(factors: Tensor) -> None:
    expected = Stepwise(Labelled(NOISE, 0.0, 0.5, SHAPE), SCALE, {"label": 0.0})
    expected.scales = SCALE * factors.movedim(-1, 0)
    assert torch.allclose(solved(steered(factors)), solved(TIMES, expected), rtol=1e-12)


@pytest.mark.parametrize("solver", ["unipc-3", "heun"])
def test_ones_change_no_bit_and_others_do(solver: str) -> None:
    plain, ones, other = (
        solved(grid, solver=solver) for grid in (TIMES, steered(torch.ones(STEPS).double()), steered(FACTORS))
    )
    assert torch.equal(plain, ones) and not torch.allclose(plain, other, rtol=1e-2)


@pytest.mark.parametrize("way", ["exact", "checkpointed"])
def test_the_gradient_is_that_of_differences(way: str) -> None:
    space = GridSpace(NOISE, STEPS, ["scale", "guidance"])
    spread = torch.randn(3, space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = space.numbers(TimeGrid(TIMES)) + 0.2 * spread
    denoiser, solver = TimeDerivative(guided(), "exact"), build_solver("unipc-2", NOISE)

    def end(z: Tensor) -> Tensor:
        recomputed = way == "checkpointed"
        x = integrate(denoiser, solver, space.grid(z), noise(), condition=LABELS, checkpoint=recomputed).x
        return x[:, 0, 0, :2]

    assert torch.autograd.gradcheck(end, z.requires_grad_())


def test_a_schedule_file_keeps_them(tmp_path: Any) -> None:
    LearnedGrid(steered(FACTORS), "unipc-3", STEPS).save(tmp_path / "grid.json", NOISE)
    loaded = LearnedGrid.load(tmp_path / "grid.json", NOISE).grid
    assert torch.equal(loaded.held[GUIDANCE], FACTORS) and torch.equal(solved(loaded), solved(steered(FACTORS)))


def test_what_is_not_guided_refuses_them() -> None:
    with pytest.raises(TsAdaptError, match="nothing guides this denoiser"):
        solved(steered(FACTORS), Labelled(NOISE, 0.0, 0.5, SHAPE))
    assert torch.isfinite(solved(TIMES, Labelled(NOISE, 0.0, 0.5, SHAPE))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_predictors_choose_them_for_each_sample(kind: Any) -> None:
    predictor = build(kind, NOISE, corrections=["guidance"])
    objective = Objective(guided(), build_solver("unipc-3", NOISE), l2)
    batch = Batch(torch.arange(3), noise().float(), noise().float(), LABELS)
    assert torch.equal(predicted(predictor, objective, batch).held[GUIDANCE], torch.ones(3, STEPS))
    untrained = objective.student(predictor.policy(), batch)
    torch.testing.assert_close(untrained, objective.student(predictor.static_times, batch), rtol=0, atol=1e-5)
    torch.nn.init.normal_(predictor.encoder.weight, 0, 0.3)
    factors = predicted(predictor, objective, batch).held[GUIDANCE]
    begin = 0 if kind.kind == "one-shot" else 1
    assert bool((factors[:, begin:].std(0) > 0).all()) and bool(((factors - 1).abs() <= GUIDANCE_BOUND).all())
    assert not torch.allclose(objective.student(predictor.policy(), batch), untrained, atol=1e-3)


def test_a_search_finds_the_scale_that_the_teacher_had() -> None:
    x_T = noise(32)
    labels = {"label": torch.linspace(-1, 1, 32, dtype=torch.float64)}
    solver = build_solver("unipc-3", NOISE)
    target = integrate(guided(0.6 * SCALE), solver, TIMES, x_T, condition=labels).x
    batch, objective = Batch(torch.arange(32), x_T, target, labels), Objective(guided(), solver, l2)
    start, options = {"log_snr": TimeGrid(TIMES)}, StaticOptions("lbfgs", iterations=30, corrections=["guidance"])
    found = search_static(objective, batch, batch, start, options, progress=False)
    assert found.distance < 1e-3 * found.start_distance
