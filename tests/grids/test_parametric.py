"""Logits and times: exact ends, strict monotonicity, inverse, gradients; the same grid over other numbers of steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noise_schedules import NOISES, assert_falls
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import FIXED, make
from ts_adapt.grids.parametric import between, interpolate, logits_to_times, times_to_logits
from ts_adapt.numerics import finite_log_snr_range

schedules = st.sampled_from(sorted(NOISES))


@settings(max_examples=150, deadline=None)
@given(schedules, st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_any_logits_make_a_strict_grid_with_exact_ends(schedule: str, values: list[float]) -> None:
    times = logits_to_times(torch.tensor(values, dtype=torch.float64), NOISES[schedule])
    assert_falls(times, NOISES[schedule], len(values))


@settings(max_examples=100, deadline=None)
@given(schedules, st.lists(st.floats(-4, 4), min_size=1, max_size=30))
def test_logits_come_back_centred(schedule: str, values: list[float]) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    back = times_to_logits(logits_to_times(logits, NOISES[schedule]), NOISES[schedule])
    torch.testing.assert_close(back, logits - logits.mean(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("schedule", sorted(NOISES))
@pytest.mark.parametrize("values", [[60.0, -60.0, 0.0], [1e5, 0.0, -1e5, 3.0]])
def test_grids_at_the_floor_come_back(schedule: str, values: list[float]) -> None:
    noise_schedule = NOISES[schedule]
    times = logits_to_times(torch.tensor(values), noise_schedule)
    again = logits_to_times(times_to_logits(times, noise_schedule), noise_schedule)
    torch.testing.assert_close(again, times, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", sorted(NOISES))
@pytest.mark.parametrize("name", sorted(FIXED))
def test_fixed_grids_come_back_from_their_logits(schedule: str, name: str) -> None:
    times = make(name, NOISES[schedule], 20)
    torch.testing.assert_close(
        logits_to_times(times_to_logits(times, NOISES[schedule]), NOISES[schedule]), times, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("schedule", sorted(NOISES))
def test_equal_logits_are_uniform_in_log_snr(schedule: str) -> None:
    noise_schedule = NOISES[schedule]
    torch.testing.assert_close(logits_to_times(torch.zeros(8), noise_schedule), make("log_snr", noise_schedule, 8))


def test_rows_are_independent_and_a_constant_does_not_matter() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for noise_schedule in NOISES.values():
        batch = logits_to_times(logits, noise_schedule)
        assert batch.shape == (4, 7)
        torch.testing.assert_close(batch, torch.stack([logits_to_times(row, noise_schedule) for row in logits]))
        torch.testing.assert_close(batch, logits_to_times(logits + 3.0, noise_schedule))
        torch.testing.assert_close(times_to_logits(batch, noise_schedule), logits - logits.mean(-1, keepdim=True))


@pytest.mark.parametrize("schedule", sorted(NOISES))
def test_gradients_of_both_directions(schedule: str) -> None:
    noise_schedule = NOISES[schedule]
    logits = torch.tensor([[0.3, -0.8, 0.9, 0.1], [0.0, 0.2, -0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: logits_to_times(x, noise_schedule), logits)
    times = logits_to_times(logits.detach(), noise_schedule)

    def inverse(inside: torch.Tensor) -> torch.Tensor:
        return times_to_logits(torch.cat([times[:, :1], inside, times[:, -1:]], -1), noise_schedule)

    assert torch.autograd.gradcheck(inverse, times[:, 1:-1].clone().requires_grad_(), eps=1e-7, atol=1e-3)


@pytest.mark.parametrize("schedule", sorted(NOISES))
def test_gradients_stay_finite_at_infinite_ends_and_over_one_step(schedule: str) -> None:
    noise_schedule = NOISES[schedule]
    times = make("linear", noise_schedule, 5).requires_grad_()
    for result in (times_to_logits(times, noise_schedule).square().sum(), interpolate(times, noise_schedule, 3).sum()):
        (gradient,) = torch.autograd.grad(result, times)
        assert bool(torch.isfinite(gradient).all())
    single = torch.zeros(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(logits_to_times(single, noise_schedule).sum(), single)
    assert gradient.tolist() == [0.0]


def test_infinite_ends_leave_the_interior_on_the_finite_rest() -> None:
    noise_schedule = NOISES["flow"]
    noisy, clean = finite_log_snr_range(noise_schedule)
    for values in ([-50.0, 0.0, 0.0], [0.0, 0.0, -50.0]):
        inside = noise_schedule.log_snr(logits_to_times(torch.tensor(values), noise_schedule))[1:-1]
        assert bool(((inside > noisy) & (inside < clean)).all())


def test_bad_logits_and_times_are_refused() -> None:
    sd, close = NOISES["sd"], torch.tensor([999.0, 500.0, 500.0 - 1e-7, 0.0], dtype=torch.float64)
    for change, numbers, noise_schedule, message in (
        (logits_to_times, torch.tensor([0.0, float("nan")]), sd, "NaN or infinite"),
        (times_to_logits, make("ddim", sd, 5, native=True), sd, "native=True"),
        (times_to_logits, torch.stack([make("linear", sd, 3), close]), sd, "times 1 and 2 of sample 1 are too close"),
        (times_to_logits, torch.tensor([1.0, 0.9999, 0.5, 0.0]), NOISES["flow"],
         "times 0 and 1 are too close .* only an infinite end"),
    ):  # fmt: skip
        with pytest.raises(TsAdaptError, match=message):
            change(numbers, noise_schedule)


@settings(max_examples=100, deadline=None)
@given(schedules, st.sampled_from(sorted(FIXED)), st.integers(1, 40), st.integers(1, 40))
def test_interpolation_keeps_the_ends_and_the_shape(schedule: str, name: str, steps: int, other: int) -> None:
    noise_schedule = NOISES[schedule]
    times = make(name, noise_schedule, steps)
    assert_falls(interpolate(times, noise_schedule, other), noise_schedule, other)
    refined = interpolate(times, noise_schedule, steps * 3)
    torch.testing.assert_close(refined[::3], times, rtol=1e-8, atol=1e-8)


def test_interpolation_of_a_batch_and_of_a_uniform_grid() -> None:
    noise_schedule = NOISES["sd"]
    batch = torch.stack([make("linear", noise_schedule, 6), make("karras", noise_schedule, 6)])
    rows = torch.stack([interpolate(row, noise_schedule, 9) for row in batch])
    torch.testing.assert_close(interpolate(batch, noise_schedule, 9), rows)
    torch.testing.assert_close(
        interpolate(make("log_snr", noise_schedule, 4), noise_schedule, 11), make("log_snr", noise_schedule, 11)
    )
    native = make("ddim", noise_schedule, 5, native=True)
    assert float(interpolate(native, noise_schedule, 8)[0]) == float(native[0]) < noise_schedule.t_max
    with pytest.raises(TsAdaptError, match="steps is 0"):
        interpolate(batch, noise_schedule, 0)


def test_interpolation_of_grids_that_reach_beyond_the_finite_range() -> None:
    noise_schedule = NOISES["flow"]
    times = torch.tensor([1.0, 0.9999, 0.9, 0.3, 0.0001, 0.0], dtype=torch.float64)
    torch.testing.assert_close(interpolate(times, noise_schedule, 5), times)
    assert bool((interpolate(times.expand(2, -1), noise_schedule, 23).diff() < 0).all())
    for edge in (0.9999, 0.0001):
        assert bool((interpolate(torch.tensor([1.0, edge, 0.0]), noise_schedule, 9).diff() < 0).all())


@pytest.mark.parametrize("name", ["karras", "ddim", "beta", "log_snr"])
def test_sigma_0_beyond_a_table_is_apart_and_the_evaluations_are_interpolated(name: str) -> None:
    """N evaluations and their end become those of another N: inside the table, falling, from the first to the last."""
    noise_schedule = NOISES["sd"]
    native = {n: make(name, noise_schedule, n, native=True) for n in (5, 10)}
    for steps in (1, 2, 3, 4, 5, 7, 40):
        found = interpolate(native[5], noise_schedule, steps)
        assert float(found[-1]) == -1 and torch.equal(found[0], native[5][0])
        if steps > 1:
            torch.testing.assert_close(found[:-1], interpolate(native[5][:-1], noise_schedule, steps - 1))
            assert float(found[-2]) == float(native[5][-2]) >= 0
    torch.testing.assert_close(interpolate(native[5], noise_schedule, 5), native[5])
    own = torch.stack([native[5], make(name, noise_schedule, 5)])
    rows = torch.stack([interpolate(row, noise_schedule, 7) for row in own])
    torch.testing.assert_close(interpolate(own, noise_schedule, 7), rows)
    found = between(native, noise_schedule, 7)
    pair = [noise_schedule.log_snr(interpolate(native[n], noise_schedule, 7)[1:-1]) for n in (5, 10)]
    torch.testing.assert_close(noise_schedule.log_snr(found[1:-1]), 0.6 * pair[0] + 0.4 * pair[1])
    assert float(found[-1]) == -1


def test_one_evaluation_before_sigma_0_becomes_several_down_to_t_min() -> None:
    found = interpolate(torch.tensor([999.0, -1.0]), NOISES["sd"], 4)
    torch.testing.assert_close(found[:-1], make("log_snr", NOISES["sd"], 3))
    assert float(found[-1]) == -1


def test_grids_whose_mean_does_not_fall_are_refused() -> None:
    learned = {2: torch.tensor([200.0, 100.0, 0.0]), 4: torch.tensor([999.0, 998.0, 997.0, 996.0, 0.0])}
    with pytest.raises(TsAdaptError, match="between 2 and 4 steps is not decreasing: 200 then"):
        between(learned, NOISES["sd"], 3)
