"""search: optimised grids cost what they need and no more; the oracle with corrections stands beside the plain one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interrupting import interrupted
from small_job import LABEL, Job
from ts_adapt.jobs import labels
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.storage.files import read_tensors

CORRECTED = (*LABEL, "--per_sample.corrections", "shift,scale")


def shared(job: Job, name: str) -> Path:
    return job.data / name / "unipc-2-nfe3.json"


def test_dmn_needs_no_teacher_and_no_model(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("ts_adapt.sampling._evaluate", lambda *_: pytest.fail("the network was evaluated"))
    job = Job.begun(tmp_path)
    assert job.run("search", "--method", "dmn") == 0
    assert LearnedGrid.load(shared(job, "dmn")).about["measured"] == {}
    assert "distance" not in capsys.readouterr().out
    assert job.run("search", "--method", "dmn") == 0
    assert "is there already" in capsys.readouterr().out
    monkeypatch.undo()
    assert job.run("sample", "--schedule", "dmn", "--count", "1") == 0


@pytest.mark.parametrize("method", ["dmn", "klub"])
def test_an_optimised_grid_is_measured_beside_the_best_fixed_one_alone(job: Job, monkeypatch, method) -> None:
    from ts_adapt.search.objective import Objective

    measure, measured = Objective.measure, []

    def counted(self, schedule, batch, *more):
        measured.append(len(batch))
        return measure(self, schedule, batch, *more)

    monkeypatch.setattr(Objective, "measure", counted)
    flags = ("search", "--method", method, "--optimized.samples", "8", "--optimized.places", "8")
    assert job.run(*flags) == 0
    assert measured == [8, 8]
    kept, static = (json.loads(shared(job, name).read_text())["measured"] for name in (method, "static"))
    assert kept["best_fixed_distance"] == static["best_fixed_distance"]
    assert kept["distance"]["value"] != static["distance"]["value"]
    shared(job, method).unlink()
    assert job.run(*flags, "--static_samples", "4") == 0
    assert "best_fixed_distance" not in json.loads(shared(job, method).read_text())["measured"]


def test_the_oracle_with_corrections_has_a_row_of_its_own(job: Job, capsys) -> None:
    plain = {path: path.read_bytes() for path in job.labels("test").iterdir()}
    assert job.run(*CORRECTED, "--split", "test") == 0
    folder = job.data / "labels/test+shift+scale/unipc-2-nfe3"
    part = read_tensors(folder / "part-00000.safetensors")
    assert part["model_times"].shape == part["output_scale"].shape == (10, 3) and "coefficients" not in part
    assert bool((part["distance"] <= part["static_distance"]).all())
    assert {path: path.read_bytes() for path in job.labels("test").iterdir()} == plain
    assert job.run("evaluate") == 0
    table = {row["schedule"]: row for row in job.rows(10)}
    assert table["oracle+shift+scale"]["kind"] == table["oracle"]["kind"] == "oracle"
    assert float(table["oracle+shift+scale"]["distance"]) < float(table["oracle"]["distance"])
    assert float(table["oracle+shift+scale"]["distance"]) == pytest.approx(float(part["distance"].mean()), rel=1e-4)
    assert job.run("train") == 0  # labels for regression are those without corrections


def test_the_oracle_with_corrections_starts_from_the_static_grid_with_them_where_there_is_one(job: Job, capsys) -> None:
    static = ("search", "--static.corrections", "shift,scale", "--static.iterations", "20", "--static.method")
    assert job.run(*static, "lbfgs") == 0
    assert job.run(*CORRECTED, "--split", "test") == 0
    assert "the static+shift+scale grid's" in capsys.readouterr().out
    kept = json.loads(shared(job, "static+shift+scale").read_text())
    folder = job.data / "labels/test+shift+scale/unipc-2-nfe3"
    start = json.loads((folder / "labels.json").read_text())["start"]
    assert start == {name: kept[name] for name in ("model_times", "output_scale")} | {"name": "static+shift+scale"}
    part = read_tensors(folder / "part-00000.safetensors")
    assert bool((part["distance"] <= part["static_distance"]).all())
    assert job.run(*static, "forward", "--redo") == 0
    assert json.loads(shared(job, "static+shift+scale").read_text())["model_times"] != kept["model_times"]
    assert job.run("evaluate") == 2
    message = capsys.readouterr().err
    assert "another static grid" in message and "--per_sample.corrections shift,scale --split test" in message


def test_an_interrupted_search_with_corrections_goes_on_to_the_same_labels(job: Job, monkeypatch) -> None:
    assert job.run(*CORRECTED) == 0
    folder = job.data / "labels/train+shift+scale/unipc-2-nfe3"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    monkeypatch.setattr(labels, "search_per_sample", interrupted(labels.search_per_sample, 2))
    assert job.run(*CORRECTED) == 130
    assert len(list(folder.iterdir())) == 2  # labels.json and one of two parts
    assert job.run(*CORRECTED) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_missing_static_grid_is_asked_for_without_the_corrections_of_the_config(job: Job, capsys) -> None:
    message = job.refused(capsys, "search", "--method", "per-sample", "--nfe", "4", "--static.corrections", "shift")
    assert "--method static --static.corrections '[]' --solvers unipc-2 --nfe 4" in message
    assert job.run("search", "--nfe", "4", "--static.corrections", "[]") == 0
    assert job.run("search", "--method", "per-sample", "--nfe", "4", "--static.corrections", "shift") == 0


def test_a_static_search_makes_times_alone_and_then_corrections_unless_told_which(job: Job) -> None:
    assert job.run("search", "--nfe", "4", "--static.corrections", "null") == 0
    for name, held in (("static", set()), ("static+shift+history", {"model_times", "history"})):
        grid = LearnedGrid.load(job.data / name / "unipc-2-nfe4.json").grid
        assert grid.corrections.keys() == held
