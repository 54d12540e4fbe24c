"""Labels on disk: round trip, resuming, another teacher, damage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import TimeGrid
from ts_adapt.search.labels import LabelStore
from ts_adapt.search.per_sample import LabelBatch

SPEC = {"teacher": "abc", "solver": "unipc-3", "nfe": 3}


def part(first: int) -> LabelBatch:
    times = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64).repeat(4, 1)
    return LabelBatch(
        torch.arange(first, first + 4), TimeGrid(times), torch.rand(4), torch.rand(4), torch.zeros(4, dtype=torch.long)
    )


def test_round_trip_in_the_order_of_parts(tmp_path):
    store = LabelStore.create(tmp_path, SPEC)
    store.write(1, part(4))
    store.write(0, part(0))
    loaded = LabelStore.open(tmp_path, "abc").load()
    assert loaded.index.tolist() == list(range(8))
    assert loaded.grid.times.dtype == torch.float64
    assert store.has(0, torch.arange(4)) and store.has(0, torch.arange(2)) and not store.has(2, torch.arange(4))
    assert not store.has(0, torch.arange(5)) and not store.has(1, torch.arange(4))


def test_labels_that_are_missing_damaged_or_of_another_teacher_are_refused(tmp_path):
    store = LabelStore.create(tmp_path, SPEC)
    store.write(0, part(0))
    store.path(0).write_bytes(store.path(0).read_bytes()[:100])
    for ask, message in (
        (lambda: LabelStore.open(tmp_path / "none"), "ts-adapt search"),
        (lambda: LabelStore.create(tmp_path / "new", SPEC).load(), "has not finished"),
        (lambda: LabelStore.open(tmp_path, "xyz"), "belong to the teacher abc, not to xyz"),
        (lambda: LabelStore.create(tmp_path, {**SPEC, "teacher": "xyz"}), "another teacher"),
        (store.load, "part-00000"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            ask()


def test_corrections_are_kept_with_the_times_and_a_part_without_them_does_not_join(tmp_path):
    store, plain = LabelStore.create(tmp_path, SPEC), part(0)
    grid = TimeGrid(plain.grid.times, plain.grid.times[:, :-1] + 0.01, None, torch.rand(4, 3, 2, dtype=torch.float64))
    store.write(0, replace(plain, grid=grid))
    loaded = store.load()
    assert loaded.grid.corrections.keys() == {"model_times", "coefficients"}
    assert all(torch.equal(value, vars(loaded.grid)[name]) for name, value in grid.corrections.items())
    store.write(1, part(4))
    with pytest.raises(TsAdaptError, match=r"grids of 4 times, .* of 4 times, model_times, coefficients"):
        store.load()
    store.write(1, replace(part(4), grid=TimeGrid(grid.times, 2 * grid.times, None, grid.coefficients)))
    with pytest.raises(TsAdaptError, match=r"part-00001.*model_times.*3 steps"):
        store.load()
