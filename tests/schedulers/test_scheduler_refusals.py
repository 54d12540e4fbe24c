"""What the scheduler refuses, each in one sentence: bad configs, and runs that are not used as they should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from own_loops import CONFIG, NOISE, V_CONFIG, X_T, grid, learned
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import GUIDANCE, TimeGrid
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.schedulers.scheduler import LearnedScheduler

NO_CONFIG = r"pass config=pipe.scheduler.config"


@pytest.mark.parametrize("solver", ["deis-2", "deis-3+corrector"])
def test_a_solver_that_cannot_reach_the_end_is_refused_before_the_run(solver: str) -> None:
    schedule = LearnedScheduler.from_grid("karras+native", solver, CONFIG)
    with pytest.raises(TsAdaptError, match="DEIS cannot step to sigma = 0"):
        schedule.set_timesteps(5)
    assert schedule.run is None
    LearnedScheduler.from_grid("karras", solver, CONFIG).set_timesteps(5)
    LearnedScheduler.from_grid("karras+native", "unipc-2", CONFIG).set_timesteps(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun"}, "Heun evaluates the network 2 times a step"),
        ({"solver": "unipc-9"}, "unknown solver 'unipc-9'; did you mean"),
        ({"solver": 3}, "expected a solver's name"),
        ({"grid": "karas"}, "unknown grid 'karas'; did you mean 'karras'"),
        ({"grid": "karras", "predictors": [5]}, "more than one was given"),
        ({"grids": {}}, "`grids` of the schedule has no grid"),
        ({"grids": [1, 2]}, "`grids` of a schedule are"),
        ({"grids": {"5": {"times": [3, 2]}}}, "the grid for 5 steps has 1"),
        ({"grids": {"1": {"times": [2, 3]}}}, "not decreasing"),
        ({"grids": {"1": {"times": [1e9, 3]}}}, "outside the noise schedule"),
        ({"grids": {"1": {"tmes": [3, 2]}}}, "`grids` of a schedule are"),
        ({"grids": {"x": {"times": [3, 2]}}}, "`grids` of a schedule are"),
        ({"grids": {"1": {"times": [3, "a"]}}}, "`grids` of a schedule are"),
        ({"predictors": 5}, "lists numbers of steps"),
        ({"predictors": [0]}, "lists numbers of steps"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000; expected"),
        ({"beta_start": "x"}, "the betas of LearnedScheduler are no numbers"),
        ({"beta_schedule": "cubic"}, "beta_schedule 'cubic' is unknown"),
        ({"prediction_type": "noise"}, "prediction_type 'noise'"),
        ({"prediction_type": []}, r"prediction_type is \[\]; expected a name"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True; expected a whole number"),
        ({"beta_start": float("nan")}, r"betas lie in \(0, 1\)"),
        ({"beta_start": -1.0, "beta_schedule": "scaled_linear"}, "betas"),
        ({"trained_betas": "abc"}, "the betas of LearnedScheduler are no numbers"),
        ({"trained_betas": [1e-3] * 1_000_001}, "expected a list of at most 1000000 numbers"),
        ({"solver": "unipc-2+corrector"}, "UniPC cannot be corrected"),
        ({"grid": ["karras"]}, "unknown grid"),
        ({"grids": {"2": {"times": [3, 2, 1]}, "02": {"times": [3, 2, 1]}}}, "`grids` of a schedule are"),
        ({"grids": {"2": {"times": [999, float("nan"), 0]}}}, "holds nan at place 1"),
        ({"grids": {"2": {"times": [10**400, 5, 1]}}}, "`grids` of a schedule are"),
        ({"grids": {"2": {"times": [999, 500, 0], "output_scale": [1]}}}, "its 2 steps need as many places"),
        ({"grids": {"100000": {"times": [3, 2]}}}, "`grids` of a schedule are"),
        ({"grids": {"1": {"times": [3, 2]}}, "beta_schedule": None}, "no noise schedule: give it betas"),
        ({"predictors": "5"}, "lists numbers of steps"),
        ({"predictors": [True]}, "lists numbers of steps"),
        ({"predictors": [[4, 6], 6]}, "lists numbers of steps"),
        ({"predictors": [[]]}, "lists numbers of steps"),
        ({"learned_for": 5}, "learned_for 5; expected true or false, and an object"),
        ({"clip_x0": "yes"}, "clip_x0 is 'yes'"),
    ],
)
def test_a_bad_config_is_refused_in_one_sentence(options: Any, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message) as caught:
        LearnedScheduler(**options)
    assert "\n" not in str(caught.value)


def test_a_run_is_used_as_it_should_be() -> None:
    schedule = LearnedScheduler.from_grid(grid(), "unipc-2", CONFIG)
    for method in (
        lambda: schedule.step(X_T, 0, X_T),
        lambda: schedule.network_timesteps(X_T),
        lambda: schedule.set_begin_index(1),
    ):
        with pytest.raises(TsAdaptError, match=r"was called before set_timesteps\(num_inference_steps\)"):
            method()
    schedule.set_timesteps(5)
    t = schedule.timesteps
    schedule.step(X_T, t[0], X_T)
    with pytest.raises(TsAdaptError, match="began with 3 samples and step 1 has 2"):
        schedule.step(X_T[:2], t[1], X_T[:2])
    with pytest.raises(TsAdaptError, match="the run has begun"):
        schedule.set_begin_index(3)
    for later in t[1:]:
        schedule.step(X_T, later, X_T)
    for method in (lambda: schedule.step(X_T, t[0], X_T), lambda: schedule.network_timesteps(X_T)):
        with pytest.raises(TsAdaptError, match=r"steps are done; call set_timesteps\(\)"):
            method()
    schedule.set_timesteps(5)
    schedule.step(X_T[:2], t[0], X_T[:2])  # another batch, another run
    assert (schedule.step_index, schedule.begin_index) == (1, 0)
    with pytest.raises(TsAdaptError, match="place 5 of 5 steps"):
        schedule.set_timesteps(5)
        schedule.set_begin_index(5)
    for begin in (-1, 1.5, "x"):
        with pytest.raises(TsAdaptError, match="would begin at place"):
            schedule.set_begin_index(begin)  # type: ignore[arg-type]
    with pytest.raises(TsAdaptError, match="solver='ddpm' draws noise"):
        schedule.step(X_T, 0, X_T, eta=0.5)


@pytest.mark.parametrize("raw", [(1, 1, 4, 4), (2, 1, 4, 4), (3, 3, 4, 4), (3, 1, 4)])
def test_an_answer_of_another_shape_than_the_sample(raw: tuple[int, ...]) -> None:
    """Torch would broadcast some of them, silently."""
    schedule = LearnedScheduler.from_grid(grid(), "unipc-2", CONFIG)
    schedule.set_timesteps(5)
    t = schedule.timesteps
    with pytest.raises(TsAdaptError, match=r"answered with shape .* to a sample of shape"):
        schedule.step(torch.zeros(raw), t[0], X_T)
    schedule.step(X_T, t[0], X_T)
    with pytest.raises(TsAdaptError, match=r"began with samples of shape \(1, 4, 4\) and step 1 has \(1, 8, 8\)"):
        schedule.step(torch.zeros(3, 1, 8, 8), t[1], torch.zeros(3, 1, 8, 8))


def test_a_first_step_with_another_batch_than_the_network_saw() -> None:
    rows = grid().times.expand(4, -1)
    schedule = LearnedScheduler.from_grid(rows, "unipc-2", CONFIG)
    for others in (X_T[:2], torch.cat([X_T, X_T])):
        schedule.set_timesteps(5)
        schedule.network_timesteps(torch.cat([X_T, X_T[:1]]))
        with pytest.raises(TsAdaptError, match=rf"4 (samples and step 0 has|grids for a batch of) {len(others)}"):
            schedule.step(others, 999, others)


def test_times_of_its_own_have_to_reach_the_network(tiny: Any) -> None:
    predictor = tiny.predictor(OneShot, NOISE, (1, 4, 4))
    schedule = LearnedScheduler.from_predictors(predictor, "unipc-3", CONFIG)
    schedule.set_timesteps(4)
    with pytest.raises(TsAdaptError, match=r"ts_adapt.attach\(pipe, schedule\), or scheduler.network_timesteps"):
        schedule.step(X_T, 999, X_T)
    wider = torch.zeros(2, 1, 4, 5)
    for use, message in (
        (lambda: schedule.set_begin_index(1), "cannot begin inside"),
        (lambda: schedule.set_timesteps(5), "number of steps is 5; this schedule was learned for 4"),
        (lambda: schedule.set_timesteps(timesteps=[900, 100]), "chooses the times of each image by itself"),
        (lambda: schedule.set_timesteps(sigmas=[14.0, 1.0, 0.0]), "chooses the times of each image by itself"),
        (lambda: schedule.network_timesteps(wider), r"samples of shape \(1, 4, 4\), the pipeline's are \(1, 4, 5\)"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            use()
    untold = LearnedScheduler.from_grid(TimeGrid(grid().times, model_times=0.9 * grid().times[:-1]), "ddim", CONFIG)
    untold.set_timesteps(5)
    with pytest.raises(TsAdaptError, match="other times than the loop's timesteps"):
        untold.step(X_T, 999, X_T)
    alone = LearnedScheduler.from_grid(TimeGrid.of(grid().times, {GUIDANCE: torch.ones(5)}), "ddim", CONFIG)
    alone.set_timesteps(5)
    alone.network_timesteps(X_T)
    with pytest.raises(TsAdaptError, match="guided by two answers of its network"):
        alone.step(X_T, 999, X_T)
    bare = LearnedScheduler.from_config(schedule.config)
    with pytest.raises(TsAdaptError, match="holds no weights of predictors"):
        bare.set_timesteps(4)


def test_constructors_refuse_what_does_not_go_together(tiny: Any) -> None:
    one, other = tiny.predictor(OneShot, NOISE, (1, 4, 4)), tiny.predictor(Recursive, NOISE, (1, 4, 4), 5)
    flat = torch.tensor(5.0)
    for make, message in (
        (lambda: LearnedScheduler.from_predictors([one, other], "unipc-3", CONFIG), "predictors of one kind"),
        (lambda: LearnedScheduler.from_predictors([one, one], "unipc-3", CONFIG), "for the same NFE"),
        (lambda: LearnedScheduler.from_predictors(one, "unipc-3", V_CONFIG), "with another noise: the beta table"),
        (lambda: LearnedScheduler.from_schedules([learned(4), learned(4)], CONFIG), "share a solver and differ in NFE"),
        (lambda: LearnedScheduler.from_schedules([], CONFIG), "at least one of learned schedules"),
        (lambda: LearnedScheduler.from_schedules("a path", CONFIG), "learned schedules.* got str"),  # type: ignore[arg-type]
        (lambda: LearnedScheduler.from_predictors(torch.nn.Linear(2, 2), "unipc", CONFIG), "predictors.* got Linear"),  # type: ignore[arg-type]
        (lambda: LearnedScheduler.from_policy("x", grid().times, "unipc", CONFIG), "got str, which has not"),  # type: ignore[arg-type]
        (lambda: LearnedScheduler.from_config("a path"), "from_config takes a config.* got str"),
        (lambda: LearnedScheduler.from_config({"num_train_timesteps": "x"}), "num_train_timesteps is 'x'"),
        (lambda: LearnedScheduler.from_grid(flat, "unipc", CONFIG), r"has shape \(\); expected"),
        (lambda: LearnedScheduler.from_grid("karras", "unipc", "x"), NO_CONFIG),  # type: ignore[arg-type]
        (lambda: LearnedScheduler.from_grid(grid()), NO_CONFIG),
        (lambda: LearnedScheduler.from_schedules(learned(4), None), NO_CONFIG),  # type: ignore[arg-type]
        (lambda: LearnedScheduler.from_predictors(one, "unipc-3", None), NO_CONFIG),  # type: ignore[arg-type]
        (lambda: LearnedScheduler.from_grid("karras").set_timesteps(5), "has no noise schedule yet; attach it"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            make()
    for grids in (None, ["a"], object(), TimeGrid(None)):  # type: ignore[arg-type]
        with pytest.raises(TsAdaptError, match="a grid is a family's name, a TimeGrid or a tensor of times; got"):
            LearnedScheduler.from_grid(grids, "unipc", CONFIG)  # type: ignore[arg-type]
