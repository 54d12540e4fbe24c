"""A correction that the package does not know needs its row in the table and whoever uses it, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from own_loops import by_hand, our_own
from small_job import LABEL, SMALL, Job
from ts_adapt import LearnedGrid, LearnedScheduler
from ts_adapt.assembly import SOLVERS
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.corrections import CORRECTIONS, Correction
from ts_adapt.grids.fixed import make
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import Field, TimeGrid
from ts_adapt.noise import BetaTable
from ts_adapt.numerics import validate_grid
from ts_adapt.search.labels import LabelStore
from ts_adapt.solvers import UniPC

TOY = (
    SMALL.replace("unipc-2", "moved")
    .replace("static_samples: 8", "static_samples: 32")
    .replace("train_samples: 40", "train_samples: 80")
)
CONFIG = DDIMScheduler().config
NOISE = BetaTable.from_config(CONFIG)


class Offset(Correction):
    """Added to every value of x0."""

    field = Field("offsets", "offset")
    unit = 0.1

    def neutral(self, times, width):
        return torch.zeros_like(times)


class Moved(UniPC):
    def update(self, x_t, x0, node, next_node, memory, noise_schedule=None):
        offset = node.held.get(Offset.field)
        if offset is not None:
            x0 = x0 + offset.to(x0).reshape(-1, *[1] * (x0.ndim - 1))
        return super().update(x_t, x0, node, next_node, memory, noise_schedule)


@pytest.fixture(autouse=True)
def offset(monkeypatch):
    monkeypatch.setitem(CORRECTIONS, "offset", Offset())
    monkeypatch.setitem(SOLVERS, "moved", lambda noise_schedule: Moved(noise_schedule, order=2))


@pytest.fixture
def grid() -> TimeGrid:
    space = GridSpace(NOISE, 3, ["shift", "offset"])
    z = space.numbers(TimeGrid(make("log_snr", NOISE, 3)))
    return space.grid(z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).double())


def same(one: TimeGrid, other: TimeGrid) -> bool:
    return (
        torch.equal(one.times, other.times)
        and one.held.keys() == other.held.keys()
        and all(torch.equal(value, other.held[field]) for field, value in one.held.items())
    )


def test_it_is_searched_kept_predicted_and_evaluated(tmp_path: Path) -> None:
    job = Job.begun(tmp_path, TOY).do(
        ("teach",), ("search", "--static.method", "lbfgs"),
        ("search", "--static.corrections", "offset", "--static.method", "forward", "--static.evaluations", "200"),
        (*LABEL, "--split", "test", "--per_sample.iterations", "20"),
        (*LABEL, "--split", "test", "--per_sample.iterations", "20", "--per_sample.corrections", "offset"),
        ("train", "--predictor", "one-shot", "--train.corrections", "offset,shift", "--train.loss", "end_to_end"),
        ("train", "--train.corrections", "offset", "--train.loss", "end_to_end"),
        ("evaluate",),
    )  # fmt: skip
    kept = LearnedGrid.load(job.data / "static+offset/moved-nfe3.json").grid
    assert kept.corrections.keys() == {"offsets"} and bool(kept.corrections["offsets"].any())
    labels = LabelStore.open(job.data / "labels/test+offset/moved-nfe3").load().grid
    assert labels.corrections["offsets"].shape == (10, 3) and bool(labels.corrections["offsets"].std(0).all())
    distances = {row["schedule"]: float(row["distance"]) for row in job.rows(10)}
    assert {"static+offset", "oracle+offset", "one-shot", "recursive"} <= distances.keys()
    assert distances["static+offset"] != distances["static"]
    assert distances["oracle+offset"] < distances["oracle"]
    assert job.run("sample", "--schedule", "static+offset", "--solver", "moved", "--nfe", "3", "--count", "2") == 0


def test_it_travels_through_files_and_the_scheduler(tmp_path: Path, grid: TimeGrid) -> None:
    learned = LearnedGrid(grid, "moved", 3)
    learned.save(tmp_path / "grid.json", NOISE)
    assert same(LearnedGrid.load(tmp_path / "grid.json", NOISE).grid, grid)
    LearnedScheduler.from_schedules([learned], CONFIG).save_pretrained(tmp_path / "scheduler")
    scheduler = LearnedScheduler.from_pretrained(tmp_path / "scheduler")
    assert same(scheduler.source.grids[3], grid)

    found = by_hand(scheduler, 3)
    assert torch.allclose(found, our_own(scheduler, grid), atol=1e-5)
    assert not torch.allclose(found, our_own(scheduler, TimeGrid(grid.times, grid.model_times)), atol=1e-2)


def test_it_is_validated_as_the_others_are(grid: TimeGrid) -> None:
    for wrong, message in (
        (torch.zeros(2), "offsets of the grid have shape"),
        (torch.full((3,), torch.nan), "offsets of the grid hold a NaN"),
        (torch.zeros(4, 3), "offsets of the grid are for 4 samples"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            validate_grid(TimeGrid.of(grid.times, {Offset.field: wrong}), NOISE, 2)
