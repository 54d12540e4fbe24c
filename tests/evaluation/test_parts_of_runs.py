"""A run is joined of its parts, which outlive whoever sampled them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import make_extractor
from ts_adapt.evaluation.records import Entry, kept_run, parts_of
from ts_adapt.evaluation.sample import join_parts, missing_parts, sample_part
from ts_adapt.interfaces import TimeGrid
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.storage.files import read_tensors, write_tensors
from ts_adapt.storage.layout import PARTS

SIZE = 2


@pytest.fixture
def entry(problem: tuple[Objective, Batch]) -> Entry:
    times = torch.linspace(1, 1e-3, 4, dtype=torch.float64)
    return Entry("unipc-3", 3, "linear", "fixed", TimeGrid(times), "this entry", 20)


def test_parts_cover_the_samples_whatever_the_last_one_is(entry: Entry) -> None:
    assert [list(rows) for rows in parts_of(entry, SIZE)] == [list(range(i, min(i + 8, 20))) for i in (0, 8, 16)]


def test_only_what_is_missing_is_sampled_and_the_run_is_that_of_one_pass(
    problem: tuple[Objective, Batch], entry: Entry, tmp_path: Path
) -> None:
    (objective, batch), extractor = problem, make_extractor("pixels")
    for rows in reversed(parts_of(entry, SIZE)):
        with pytest.raises(TsAdaptError, match="run the same command again"):
            join_parts(entry, objective, batch, tmp_path, batch_size=SIZE)
        assert rows in missing_parts(entry, tmp_path, SIZE)
        sample_part(entry, objective, batch, extractor, tmp_path, rows, batch_size=SIZE)
        assert rows not in missing_parts(entry, tmp_path, SIZE)
    assert missing_parts(entry, tmp_path, SIZE + 1) == parts_of(entry, SIZE + 1), "other batches are another part"
    join_parts(entry, objective, batch, tmp_path, batch_size=SIZE)
    run = kept_run(entry, tmp_path)
    assert run is not None and run.cost.peak_memory > 0 and not list((tmp_path / PARTS).iterdir())
    assert missing_parts(entry, tmp_path, SIZE) == []
    expected = objective.measure(entry.policy, batch.rows(slice(0, 20)), SIZE)
    torch.testing.assert_close(run.distance, expected)
    assert run.features.shape[0] == 20 and run.pictures.shape[0] == 16 and run.times.shape == (20, 4)
    kept = read_tensors(tmp_path / entry.file)
    for changed in ({"features": kept["features"].half()}, {"seconds": -kept["seconds"]}, {"cost": -kept["cost"]}):
        write_tensors(tmp_path / entry.file, kept | changed)
        assert kept_run(entry, tmp_path) is None
