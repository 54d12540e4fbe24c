"""Which times `set_timesteps` settles on: any number of steps, numbers in between, lists of times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from own_loops import CONFIG, FLOW, NOISE, by_hand, grid, learned, our_own
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.between import grid_between
from ts_adapt.grids.parametric import interpolate
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import edm_sigma
from ts_adapt.schedulers.plan import Source
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.file import LearnedGrid


@pytest.mark.parametrize("solver", ["unipc-2", "deis-2", "ipndm-4"])
def test_any_real_times_in_solvers_that_diffusers_gives_none(solver: str) -> None:
    times = torch.tensor([998.75, 700.9, 420.25, 60.5])
    schedule = LearnedScheduler.from_grid("uniform", solver, CONFIG)
    found = by_hand(schedule, 4, timesteps=times)
    assert torch.equal(schedule.timesteps, times)
    whole = torch.cat([times.double(), torch.zeros(1).double()])
    torch.testing.assert_close(found, our_own(schedule, whole), rtol=1e-6, atol=1e-6)
    sigmas = edm_sigma(NOISE, times.double())
    torch.testing.assert_close(by_hand(schedule, 4, sigmas=[*sigmas.tolist(), 0.0]), found, rtol=1e-5, atol=1e-5)


def test_what_flux_passes_stands_for_the_number_of_steps() -> None:
    learned = fixed.make("log_snr", LearnedScheduler.from_config(FLOW).noise_schedule, 4)
    schedule = LearnedScheduler.from_grid(learned, "unipc-2", FLOW)
    schedule.set_timesteps(sigmas=torch.linspace(1, 0.25, 4).numpy(), mu=1.15)
    torch.testing.assert_close(schedule.timesteps, (1000 * learned[:-1]).float())
    schedule.set_timesteps(sigmas=[0.9, 0.5])
    torch.testing.assert_close(schedule.timesteps, torch.tensor([900.0, 500.0]))


def test_between_learned_nfe_log_snr_is_interpolated() -> None:
    schedule = LearnedScheduler.from_schedules([learned(4), learned(8)], CONFIG)
    assert schedule.config["solver"] == "unipc-3"
    assert schedule.config["learned_for"] == {"model": "tiny", "distance": "l2"}
    for steps in (4, 8):
        schedule.set_timesteps(steps)
        torch.testing.assert_close(schedule.timesteps, grid(steps).times[:-1].float())
    with pytest.warns(UserWarning, match="^5 steps were not learned") as said:
        schedule.set_timesteps(5)
    assert len(said) == 1
    low, high = (NOISE.log_snr(interpolate(grid(n).times, NOISE, 5)) for n in (4, 8))
    expected = NOISE.time(0.75 * low + 0.25 * high)
    torch.testing.assert_close(schedule.timesteps.double(), expected[:-1], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(by_hand(schedule, 5), our_own(schedule, expected), rtol=1e-4, atol=1e-4)
    for steps, nearest in ((3, 4), (9, 8)):
        with pytest.warns(UserWarning, match=f"^{steps} steps were not learned.* for {nearest}; .*export --steps"):
            schedule.set_timesteps(steps)
        expected = interpolate(grid(nearest).times, NOISE, steps)[:-1]
        torch.testing.assert_close(schedule.timesteps.double(), expected, rtol=1e-6, atol=1e-4)


def test_the_number_that_a_pipeline_asks_for_by_itself_is_refused() -> None:
    schedule = LearnedScheduler.from_schedules([learned(4), learned(8)], CONFIG)
    with pytest.raises(TsAdaptError, match=r"is 50, more than 2 times .*\(4, 8\): ask for 8.*num_inference_steps"):
        schedule.set_timesteps(50)
    with pytest.raises(TsAdaptError, match="is 17"):
        schedule.set_timesteps(17)
    with pytest.warns(UserWarning, match="^16 steps were not learned"):
        schedule.set_timesteps(16)
    LearnedScheduler.from_grid("karras", "unipc-3", CONFIG).set_timesteps(50)


@settings(max_examples=25, deadline=None)
@pytest.mark.filterwarnings("ignore:.*were not learned")
@given(first=st.integers(1, 6), more=st.integers(1, 6), seed=st.integers(0, 9))
def test_grids_in_between_fall_and_share_their_ends(first: int, more: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for steps in (first, first + more):
        inside = 998 * torch.rand(steps - 1, generator=generator, dtype=torch.float64).sort(descending=True)[0] + 0.5
        pair.append(LearnedGrid(TimeGrid(torch.tensor([999.0, *inside.tolist(), 0.0]).double()), "ddim", steps))
    schedule = LearnedScheduler.from_schedules(pair, CONFIG)
    for steps in range(max(1, first - 1), first + more + 2):
        schedule.set_timesteps(steps)
        times = schedule.run.plan.times  # type: ignore[union-attr]
        assert len(times) == steps + 1 and bool((times[1:] < times[:-1]).all())
        assert (float(times[0]), float(times[-1])) == (999.0, 0.0)


def test_corrections_are_interpolated_and_grids_per_image_are_not() -> None:
    scaled = {n: TimeGrid(grid(n).times, output_scale=torch.full((n,), 1 + n / 100)) for n in (4, 6)}
    schedule = LearnedScheduler.from_schedules([LearnedGrid(each, "ddim", n) for n, each in scaled.items()], CONFIG)
    with pytest.warns(UserWarning, match="^5 steps were not learned"):
        schedule.set_timesteps(5)
    found = schedule.run.plan.grid  # type: ignore[union-attr]
    assert found is not None and 1.04 < float(found.output_scale.min()) <= float(found.output_scale.max()) < 1.06
    expected = grid_between(scaled, NOISE, 5)
    torch.testing.assert_close(found.output_scale.double(), expected.output_scale.double())
    each = {n: TimeGrid(grid(n).times.expand(2, -1)) for n in (4, 6)}
    with pytest.raises(TsAdaptError, match="grids per image are not interpolated"):
        Source.of_grids(each, NOISE).plan(5, NOISE)


def test_corrections_of_numbers_that_are_not_next_do_not_matter() -> None:
    scaled = LearnedGrid(TimeGrid(grid(10).times, output_scale=torch.ones(10)), "ddim", 10)
    plain = [LearnedGrid(grid(n), "ddim", n) for n in (3, 5)]
    schedule = LearnedScheduler.from_schedules([*plain, scaled], CONFIG)
    with pytest.warns(UserWarning, match="^4 steps were not learned.* for 3, 5; "):
        schedule.set_timesteps(4)
    pair = [NOISE.log_snr(interpolate(grid(n).times, NOISE, 4)) for n in (3, 5)]
    expected = NOISE.time((pair[0] + pair[1]) / 2)[:-1]
    torch.testing.assert_close(schedule.timesteps.double(), expected, rtol=1e-6, atol=1e-4)


def test_published_sigmas_begin_a_hair_above_the_table() -> None:
    schedule = LearnedScheduler.from_grid("karras", "dpmpp-2m", CONFIG)
    for sigmas, steps in (([14.615, 3.0, 0.5], 3), ([14.615, 3.0, 0.5, 0.0], 3), ([14.615, 3.0, 0.5, 0.0292, 0.0], 4)):
        schedule.set_timesteps(sigmas=sigmas)
        assert float(schedule.timesteps[0]) == 999 and schedule.num_inference_steps == steps
    assert 0 <= float(schedule.timesteps[-1]) < 0.01 and float(schedule.sigmas[-1]) == 0
    with pytest.raises(TsAdaptError, match=r"holds the sigma 20, outside the model's \[0.02917, 14.6146\]"):
        schedule.set_timesteps(sigmas=[20.0, 3.0, 0.0])


def test_numbers_of_steps_of_other_libraries() -> None:
    schedule = LearnedScheduler()
    for steps in (np.int64(4), torch.tensor(4)):
        schedule.set_timesteps(steps)
        assert schedule.num_inference_steps == 4 and type(schedule.num_inference_steps) is int
    schedule.set_timesteps(2, timesteps=[999, 500])
    with pytest.raises(TsAdaptError, match="is 3 and the times given are those of 2 steps"):
        schedule.set_timesteps(3, timesteps=[999, 500])


@pytest.mark.parametrize("steps", [0, -1, 2.5, "5", None, True, 10**9])
def test_bad_numbers_of_steps(steps: Any) -> None:
    with pytest.raises(TsAdaptError, match="expected a whole number from 1 to"):
        LearnedScheduler().set_timesteps(steps)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timesteps": []}, r"list of 1 to 10000 numbers; got shape \(0,\)"),
        ({"timesteps": [[1.0]]}, r"list of 1 to 10000 numbers; got shape \(1, 1\)"),
        ({"timesteps": range(10001, 0, -1)}, r"got shape \(10001,\)"),
        ({"timesteps": "abc"}, "timesteps is a list of numbers; got str"),
        ({"timesteps": ["a"]}, "timesteps is a list of numbers; got list"),
        ({"timesteps": [[1], [2, 3]]}, "timesteps is a list of numbers; got list"),
        ({"timesteps": object()}, "timesteps is a list of numbers; got object"),
        ({"timesteps": [5, 7]}, "timestep 5 at place 0 is followed by 7"),
        ({"timesteps": [0]}, "at least 2 are needed, for one step"),
        ({"timesteps": [2000, 5]}, "the timestep 2000; those of the model run from 999 down to 0"),
        ({"sigmas": "abc"}, "sigmas is a list of numbers; got str"),
        ({"sigmas": [float("inf"), 1]}, "holds the sigma inf at place 0"),
        ({"timesteps": [900], "sigmas": [3.0]}, "timesteps and sigmas were given; give one of them"),
    ],
)
def test_bad_times_given_by_hand(given: Any, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message) as caught:
        LearnedScheduler().set_timesteps(**given)
    assert "\n" not in str(caught.value)
