"""Search on denoisers that are rough between timesteps: the derivative that leads is found, and so is the optimum of
the smooth problem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from interrupting import interrupted
from rough import Rough, embedded
from ts_adapt.denoisers.analytic import GaussianMixtureDenoiser
from ts_adapt.distances import make
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import ContinuousVP
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.training import train_predictor
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.search.derivative import Agreement, compare, trusted
from ts_adapt.search.journal import Journal
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.per_sample import PerSampleOptions, search_per_sample
from ts_adapt.search.static import StaticResult, search_static
from ts_adapt.search.static_options import Method, StaticOptions
from ts_adapt.solvers import DPMSolverPP, UniPC

STEPS = 4
ROUGH = {
    "smooth": None,
    "period .006, size .02": (0.006, 0.02),
    "period .006, size .05": (0.006, 0.05),
    "period .02, size .05": (0.02, 0.05),
}


@pytest.fixture(scope="module")
def smooth() -> tuple[Objective, Batch]:
    """Two overlapping modes, of which every search finds the same minimum; 192 samples of a fine teacher."""
    means = 2 * torch.rand((2, 1, 4, 4), generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1
    mixture = GaussianMixtureDenoiser(ContinuousVP(), means, torch.tensor([0.3, 0.02], dtype=torch.float64))
    x_T = initial_noise(0, range(192), mixture.shape)
    fine = fixed.make("log_snr", mixture.noise_schedule, 64)
    target = integrate(mixture, UniPC(mixture.noise_schedule, order=3), fine, x_T).x
    solver = DPMSolverPP(mixture.noise_schedule, order=2)
    return Objective(mixture, solver, make("l2")), Batch(torch.arange(192), x_T, target, {})


def roughened(objective: Objective, how: str) -> Objective:
    if how.startswith("embedded"):
        return replace(objective, denoiser=embedded(objective.denoiser, float(how.split()[1])))
    wiggle = ROUGH[how]
    return objective if wiggle is None else replace(objective, denoiser=Rough(objective.denoiser, *wiggle))


def split(batch: Batch) -> tuple[Batch, Batch]:
    return batch.rows(slice(0, 48)), batch.rows(slice(48, 96))


def unseen(batch: Batch) -> Batch:
    return batch.rows(slice(96, None))


def starts(objective: Objective) -> dict[str, TimeGrid]:
    noise_schedule = objective.denoiser.noise_schedule
    names = ("linear", "quadratic", "karras", "log_snr")
    return {name: TimeGrid(fixed.make(name, noise_schedule, STEPS)) for name in names}


def search(objective: Objective, train: Batch, validation: Batch, **options: Any) -> StaticResult:
    """Of the times alone."""
    options = StaticOptions(corrections=[], **options)
    return search_static(objective, train, validation, starts(objective), options, progress=False)


@pytest.fixture(scope="module")
def optimum(smooth) -> float:
    """The least mean distance that the smooth problem has to offer, on the samples that no search has seen."""
    objective, batch = smooth
    held = unseen(batch)
    return search(objective, held, held, method="lbfgs", iterations=100, starts=4, tolerance=1e-9).distance


@pytest.mark.parametrize(
    ("how", "wanted"),
    [*((how, "secant" if wiggle else "exact") for how, wiggle in ROUGH.items()), ("embedded 0.02", "slow"),
     ("embedded 0.05", "slow")],
)  # fmt: skip
def test_the_derivative_that_agrees_with_differences_is_taken(smooth, how, wanted):
    objective, batch = smooth
    agreement = compare(roughened(objective, how), STEPS, batch)
    assert agreement.best == wanted
    assert agreement.leads_down
    if wanted != "exact":
        assert agreement.error["exact"] > 1 > 3 * agreement.error[wanted]


def test_a_place_that_is_nearly_flat_does_not_outvote_the_other(smooth):
    """Differences (4, 3) and (0, .1), a derivative that is right about the first and opposite about the second."""
    objective, batch = smooth
    values = {-1.0: iter([[4.0, 3.0], [0.0, 0.1]])}

    def recorded(what: list[float], _: Any) -> list[float]:
        return next(values.setdefault(what[0], iter([[4.0, 3.0], [0.0, -0.1]])))

    agreement = compare(objective, 2, batch, recall=recorded)
    assert agreement.leads_down
    assert agreement.cosine["exact"] == pytest.approx((25 - 0.01) / 25.01)
    assert agreement.error["exact"] == pytest.approx(0.2 / 25.01**0.5)


@pytest.mark.parametrize("how", [*ROUGH, "embedded 0.05"])
def test_static_search_finds_the_smooth_problem_s_optimum_through_the_wiggle_without_being_told_how(
    smooth, optimum, how
):
    objective, batch = smooth

    def left(grid: TimeGrid) -> float:
        return float(objective.measure(grid, unseen(batch)).mean())

    rough = roughened(objective, how)
    reached = {method: left(search(rough, *split(batch), method=method).grid) for method in get_args(Method)}
    assert reached["auto"] < min(1.12 * optimum, 1.03 * min(reached.values()))
    assert reached["forward"] < 1.2 * optimum < 0.6 * min(map(left, starts(objective).values()))


def test_every_sample_s_search_goes_down_where_the_exact_derivative_hardly_does(smooth):
    objective, batch = smooth
    rough, rows = roughened(objective, "period .006, size .05"), batch.rows(slice(0, 16))
    static, options = starts(objective)["quadratic"], PerSampleOptions(iterations=20, random_starts=0)
    left = {
        way: float(search_per_sample(replace(rough, derivative=way), rows, static, options).distance.mean())
        for way in ("exact", "auto")
    }
    assert left["auto"] < 0.6 * left["exact"]


def test_a_predictor_learns_through_the_wiggle_what_it_learns_without(smooth, tmp_path):
    objective, batch = smooth
    gains = {}
    for how in ("smooth", "embedded 0.05"):
        torch.manual_seed(0)
        here = roughened(objective, how)
        predictor = Recursive(here.denoiser.noise_schedule, starts(here)["quadratic"].times, here.denoiser.shape)
        options = TrainOptions(epochs=16, batch_size=16)
        gains[how] = train_predictor(predictor, here, *split(batch), options, tmp_path / how, progress=False).gain
    assert gains["smooth"] > 0.2
    assert gains["embedded 0.05"] > 0.8 * gains["smooth"], gains


def test_the_derivative_asked_for_is_taken_without_a_comparison(smooth):
    objective, batch = smooth
    counted = replace(objective, derivative="secant")
    before = objective.denoiser.evaluations
    taken, agreement = trusted(counted, STEPS, batch)
    assert (taken.denoiser.way, agreement) == ("secant", None)
    assert objective.denoiser.evaluations == before
    assert taken.differentiated("secant") is taken
    assert taken.differentiated("exact").denoiser.denoiser is objective.denoiser


def test_an_interrupted_search_goes_on_to_the_same_grid(smooth, tmp_path):
    objective, batch = smooth
    rough = roughened(objective, "embedded 0.05")
    options = StaticOptions(iterations=4, starts=1, evaluations=24, corrections=[])

    def run(journal: Journal, **given: Any) -> TimeGrid:
        parts = split(batch)
        return search_static(rough, *parts, starts(rough), options, journal=journal, progress=False, **given).grid

    whole = run(Journal())
    with pytest.raises(KeyboardInterrupt):
        run(Journal(tmp_path / "journal", "key"), on_step=interrupted(lambda step, loss: None, 3))
    before = rough.denoiser.evaluations
    assert torch.equal(run(Journal(tmp_path / "journal", "key")).times, whole.times)
    resumed = rough.denoiser.evaluations - before
    run(Journal())
    assert resumed < 0.9 * (rough.denoiser.evaluations - before - resumed)


def test_a_search_that_found_nothing_says_what_it_tried(smooth):
    objective, batch = smooth
    objective = replace(objective, distance=lambda x, y: torch.ones(len(x)) + 0 * x.flatten(1).sum(1))
    found = search(objective, *split(batch), evaluations=16)
    assert not found.moved
    assert torch.equal(found.grid.times, starts(objective)[found.start].times)
    assert {method for method, _ in found.tried} == {"forward"}  # no derivative agrees with differences that are zero
    assert found.start in found.remarks()[-1]


def test_what_was_compared_is_kept_for_whoever_asks_next(smooth, tmp_path):
    objective, batch = smooth

    def ask(key: str = "of this network") -> tuple[Agreement | None, int]:
        before = objective.denoiser.evaluations
        agreement = trusted(objective, STEPS, batch, recall=Journal(tmp_path / "kept", key).recall)[1]
        return agreement, objective.denoiser.evaluations - before

    found, taken = ask()
    assert taken > 0
    assert ask() == (found, 0)
    assert ask("of another")[1] == taken
