"""What a schedule is worth in evaluations along the best fixed grid."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ts_adapt.evaluation.records import Row
from ts_adapt.evaluation.tables import as_text
from ts_adapt.evaluation.worth import evaluations_of, worth_tables

FIXED = {4: 0.8, 8: 0.2, 16: 0.05}
"""D(N) = 12.8 / N^2."""


@pytest.mark.parametrize("n", [4, 5, 8, 11.3, 16])
def test_a_power_law_is_inverted_exactly(n):
    low, high = evaluations_of(12.8 / n**2, FIXED)
    assert low == high == pytest.approx(n)


def test_what_lies_outside_is_a_bound():
    assert evaluations_of(0.04, FIXED) == (16, math.inf)
    assert evaluations_of(0.9, FIXED) == (0, 4)


def test_a_grid_that_gets_worse_with_more_evaluations_is_not_taken_there():
    assert evaluations_of(0.2, {4: 0.8, 8: 0.2, 16: 0.3}) == (8, 8)
    assert evaluations_of(0.1, {4: 0.8, 8: 0.2, 16: 0.3}) == (16, math.inf)


def rows(data: float | None) -> list[Row]:
    fixed = Row("model", "unipc-3", 4, "karras", "fixed", 100, 1.0, 1.0, 0.8, 0.7, 0.9, 0.01, 0, 0.8)
    fixed = replace(fixed, fid_data=data)
    more = [replace(fixed, nfe=n, distance=d) for n, d in FIXED.items() if n > 4]
    worse = [replace(row, schedule="linear", distance=2 * row.distance) for row in (fixed, *more)]
    learned = [replace(fixed, schedule="static", kind="static", nfe=n, distance=FIXED[n] / 4) for n in FIXED]
    return [fixed, *more, *worse, *learned]


def test_a_schedule_with_half_the_evaluations_is_worth_twice_as_many():
    (table,) = worth_tables(rows(None), "zoo")
    assert [cell.text for cell in table.rows[0]] == ["static", "8.0", "16.0", "> 16"]
    assert "karras" not in as_text(table)


def test_fixed_grids_with_one_number_of_evaluations_say_nothing():
    assert list(worth_tables([row for row in rows(1.0) if row.nfe == 4], "zoo")) == []
