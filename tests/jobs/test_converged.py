"""The teacher is compared with its own solve of twice the evaluations before anything is learned from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from small_job import Job
from ts_adapt import build_grid, build_solver, integrate
from ts_adapt.assembly import ANALYTIC
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.comparison import Results
from ts_adapt.evaluation.tables import once
from ts_adapt.jobs.converged import too_near, work
from ts_adapt.jobs.session import Session
from ts_adapt.storage.files import read_json
from ts_adapt.teacher.store import TeacherStore


def kept(job: Job) -> Path:
    return job.data / "teacher/train/convergence.json"


def test_what_is_kept_is_the_distance_to_the_solve_with_twice_the_evaluations(tmp_path: Path) -> None:
    job = Job.begun(tmp_path)
    assert job.run("teach") == 0
    found = read_json(kept(job))
    denoiser = ANALYTIC["gaussian-mixture"]()
    data = TeacherStore.open(job.data / "teacher/train").load(range(len(found["moved"])))
    for key, solver, evaluations in (("moved", "unipc-3", 24), ("missed", "unipc-2", 3)):
        grid = build_grid("log_snr", denoiser.noise_schedule, evaluations)
        x = integrate(denoiser, build_solver(solver, denoiser.noise_schedule), grid, data["x_T"]).x
        expected = (x - data["target"]).square().flatten(1).mean(1)
        torch.testing.assert_close(torch.tensor(found[key]), expected, rtol=1e-4, atol=1e-12)


def test_a_coarse_teacher_is_warned_of_each_time_and_a_fine_one_never(tmp_path: Path, capsys: Any) -> None:
    job = Job.begun(tmp_path)
    for nfe, warned in (("4", True), ("4", True), ("40", False)):
        assert job.run("teach", "--teacher.nfe", nfe, "--name", f"of{nfe}") == 0
        assert ("warning" in capsys.readouterr().err) == warned


def test_it_is_measured_once_for_a_teacher_and_a_distance(tmp_path: Path) -> None:
    job = Job.begun(tmp_path)
    assert job.run("teach") == 0
    first = kept(job).stat().st_mtime_ns
    assert job.run("teach", "--teacher.train_samples", "48") == 0
    assert kept(job).stat().st_mtime_ns == first
    assert job.run("teach", "--distance", "l1") == 0
    assert read_json(kept(job))["distance"] == "l1"


@pytest.mark.parametrize("values", [[], ["1"], [[1.0]], [True]])
def test_what_holds_no_distances_is_refused(tmp_path: Path, capsys: Any, values: list[Any]) -> None:
    job = Job.begun(tmp_path)
    assert job.run("teach") == 0
    kept(job).write_text(json.dumps({**read_json(kept(job)), "moved": values}))
    capsys.readouterr()
    assert job.run("teach") == 2 and "'moved'" in capsys.readouterr().err


def test_a_teacher_that_draws_noise_has_no_limit_of_its_own(tmp_path: Path) -> None:
    job = Job.begun(tmp_path)
    assert job.run("teach", "--teacher.solver", "ddpm") == 0
    assert not kept(job).exists()


def test_a_grid_without_twice_as_many_steps_keeps_the_teacher(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    job, grid_of = Job.begun(tmp_path), Session.teacher_grid

    def rounded(self: Session, nfe: int | None = None) -> Any:
        if nfe == 24:
            raise TsAdaptError(f"{nfe} whole timesteps are not distinct")
        return grid_of(self, nfe)

    monkeypatch.setattr(Session, "teacher_grid", rounded)
    assert job.run("teach") == 0
    assert "is not measured: 24 whole timesteps are not distinct" in capsys.readouterr().err
    assert not kept(job).exists() and len(TeacherStore.open(job.data / "teacher/train").indices) == 40


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_schedule_that_is_as_near_as_the_teacher_to_its_own_limit_is_named(
    job: Job, capsys: Any, share: float
) -> None:
    found, rows = read_json(kept(job)), once(Results.read(job.logs).rows)
    nearest = min(rows, key=lambda row: row.distance)
    kept(job).write_text(json.dumps({**found, "moved": [share * nearest.distance] * len(found["moved"])}))
    said = too_near(job.session(), rows)
    assert (f"{nearest.schedule} of {nearest.sampler}, NFE 3" in said) == (share == 0.3)
    assert job.run("evaluate") == 0
    assert said in capsys.readouterr().out and said in (job.logs / "report.html").read_text()


def test_test_samples_may_have_a_finer_teacher(tmp_path: Path, capsys: Any) -> None:
    job, finer = Job.begun(tmp_path), ("--teacher.test_nfe", "24")
    assert job.run("learn", "--plan", *finer) == 0
    counted = capsys.readouterr().out
    assert f" {40 * 12 + 20 * 24 + work(job.session()).plain:,} " in counted
    assert job.run("learn", *finer) == 0
    assert "12-step and 24-step solves" in capsys.readouterr().out
    assert "teacher unipc-3 with 24 evaluations" in (job.logs / "report.html").read_text()
    denoiser = ANALYTIC["gaussian-mixture"]()
    for split, steps in (("train", 12), ("test", 24)):
        store = TeacherStore.open(job.data / "teacher" / split)
        data = store.load(store.indices)
        grid = build_grid("log_snr", denoiser.noise_schedule, steps)
        found = integrate(denoiser, build_solver("unipc-3", denoiser.noise_schedule), grid, data["x_T"]).x
        torch.testing.assert_close(found, data["target"])
    assert "test_nfe" in job.refused(capsys, "evaluate")
