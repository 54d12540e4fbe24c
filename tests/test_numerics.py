"""Broadcasting in the state's dtype, and validation that names the place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import BetaTable, RectifiedFlow, VarianceExploding
from ts_adapt.numerics import (
    check_finite,
    combine,
    expand,
    finite_log_snr_range,
    scale,
    validate_grid,
    validate_times,
)

TIMES = torch.tensor([4.0, 3.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 5)])
def test_per_sample_coefficients_scale_rows(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float32)
    c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert expand(c, x).shape == (3,) + (1,) * (len(shape) - 1)
    for row, value in zip(scale(c, x), c, strict=True):
        torch.testing.assert_close(row, torch.full_like(row, float(value)))
    assert scale(c, x).dtype == torch.float32
    torch.testing.assert_close(combine((c, x), (torch.tensor(2.0), x), (-c, x)), 2 * x)


def test_gradients_reach_the_coefficients_in_float64() -> None:
    c = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(scale(c, torch.ones(2, 3)).sum(), c)
    assert gradient.tolist() == [3.0, 3.0] and gradient.dtype == torch.float64


def test_the_finite_range_is_that_of_the_ends_where_they_are_finite() -> None:
    noisy, clean = finite_log_snr_range(VarianceExploding())
    assert math.isclose(noisy, -math.log(80)) and math.isclose(clean, -math.log(0.002))
    noisy, clean = finite_log_snr_range(RectifiedFlow())
    assert math.isclose(noisy, math.log(0.001 / 0.999)) and math.isclose(clean, -noisy)
    table = BetaTable.from_config({"rescale_betas_zero_snr": True})
    noisy, clean = finite_log_snr_range(table)
    assert math.isfinite(noisy) and noisy < float(table.log_snr(torch.tensor(998.0))) < clean


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=12, unique=True))
def test_falling_times_pass_unchanged(values: list[float]) -> None:
    times = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assert torch.equal(validate_times(times), times)
    assert torch.equal(validate_times(times.expand(3, -1)), times.expand(3, -1))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([3.0, 1.0, 1.0, 0.0], "twice the same time: 1 then 1 at places 1 and 2;"),
        ([3.0, 1.0, 2.0, 0.0], "not decreasing: 1 then 2 at places 1 and 2;"),
        ([3.0, 1.0, math.nan, 0.0], "nan at place 2;"),
        ([math.inf, 1.0, 0.5, 0.0], "inf at place 0;"),
        ([3.0], r"1 time\(s\); at least 2"),
        (3.0, r"shape \(\)"),
    ],
)
def test_bad_times_are_refused_by_place(times: list[float] | float, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        validate_times(torch.tensor(times))
    if isinstance(times, list) and len(times) > 1:
        batch = torch.stack([TIMES, TIMES, torch.tensor(times, dtype=torch.float64)])
        with pytest.raises(TsAdaptError, match=message.removesuffix(";") + " of sample 2"):
            validate_times(batch)


def test_times_outside_the_noise_schedule_are_refused() -> None:
    noise_schedule = RectifiedFlow()
    validate_times(torch.tensor([1.0, 0.5, 0.0]), noise_schedule)
    for times in ([1.1, 0.5, 0.0], [1.0, 0.5, -0.1]):
        with pytest.raises(TsAdaptError, match=r"the grid runs from .* outside the noise schedule's \[0, 1\]"):
            validate_times(torch.tensor(times), noise_schedule, what="the grid")


def test_the_end_of_every_row_is_that_of_the_noise_schedule() -> None:
    table = BetaTable(torch.linspace(1e-4, 0.02, 1000))
    ends = torch.tensor([[900.0, 500.0, 0.0], [900.0, 500.0, -1.0]], dtype=torch.float64)
    assert torch.equal(validate_times(ends, table), ends)
    for end in (-0.5, -2.0):
        times = torch.tensor([[900.0, 500.0, -1.0], [900.0, 500.0, end]])
        with pytest.raises(TsAdaptError, match=f"from 900 to {end:g} of sample 1, outside"):
            validate_times(times, table)


def test_validation_keeps_the_gradient() -> None:
    times = TIMES.clone().requires_grad_()
    assert validate_times(times).requires_grad


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (TimeGrid(TIMES, model_times=torch.zeros(4)), "model_times .* 3 steps"),
        (TimeGrid(TIMES, output_scale=torch.tensor(1.0)), "output_scale .* 3 steps"),
        (TimeGrid(TIMES, coefficients=torch.zeros(3)), "coefficients .* 3 steps"),
        (TimeGrid(TIMES, output_scale=torch.tensor([1.0, math.nan, 1.0])), "output_scale .* NaN"),
        (TimeGrid(TIMES.expand(2, -1)), "2 grids for a batch of 5"),
        (TimeGrid(TIMES, model_times=torch.zeros(2, 3)), "2 samples; the grid is for 5"),
    ],
)
def test_corrections_that_do_not_fit_are_refused(grid: TimeGrid, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        validate_grid(grid, batch=5)


def test_grids_that_fit_pass() -> None:
    grid = validate_grid(TIMES, batch=5)
    assert grid.steps == 3 and not grid.per_sample
    full = TimeGrid(TIMES.expand(5, -1), torch.zeros(5, 3), torch.ones(3), torch.zeros(3, 2))
    assert validate_grid(full, batch=5).per_sample


def test_nodes_and_rows_of_a_grid() -> None:
    grid = TimeGrid(
        torch.stack([TIMES, TIMES + 1]),
        torch.arange(6.0).reshape(2, 3),
        torch.ones(3),
        torch.arange(12.0).reshape(2, 3, 2),
    )
    node = grid.node(1)
    assert (node.index, node.steps) == (1, 3) and node.t.tolist() == [3.0, 4.0]
    assert node.model_time is not None and node.model_time.tolist() == [1.0, 4.0]
    assert node.output_scale is not None and node.output_scale.shape == ()
    assert node.coefficients is not None and node.coefficients.tolist() == [[0.0, 1.0], [6.0, 7.0]]
    end = grid.node(3)
    assert end.t.tolist() == [0.0, 1.0] and end.model_time is None
    assert end.coefficients is not None and end.coefficients.tolist() == [[4.0, 5.0], [10.0, 11.0]]
    assert grid.node(0).coefficients is None
    row = grid.rows([1])
    assert row.times.tolist() == [[5.0, 4.0, 2.0, 1.0]] and row.output_scale is grid.output_scale
    assert row.model_times is not None and row.model_times.tolist() == [[3.0, 4.0, 5.0]]
    shared = TimeGrid(TIMES, output_scale=torch.arange(6.0).reshape(2, 3)).rows([1])
    assert (
        shared.times is TIMES and shared.output_scale is not None and shared.output_scale.tolist() == [[3.0, 4.0, 5.0]]
    )


def test_non_finite_states_name_the_step_and_the_samples() -> None:
    x = torch.zeros(4, 2, 2)
    check_finite(x, 3, "the state")
    x[1, 0, 0], x[3, 1, 1] = math.nan, math.inf
    with pytest.raises(TsAdaptError, match=r"the state .* at step 3, in sample\(s\) \[1, 3\]"):
        check_finite(x, 3, "the state")


def test_unknown_names_list_the_known_and_suggest_the_near() -> None:
    near = str(unknown("solver", "dimm", ["ddim", "euler"]))
    assert "did you mean 'ddim'" in near and "known: ddim, euler" in near
    assert "did you mean" not in str(unknown("solver", "xyz", ["ddim", "euler"]))
