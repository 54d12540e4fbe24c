"""One predictor for all NFEs of an experiment, from train to evaluate, sample and export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from small_job import SMALL, Job, edit
from ts_adapt.interfaces import TimeGrid
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.storage.files import read_json, read_tensors

CONFIG = SMALL.replace("nfe: [3]", "nfe: [3, 2]").replace("loss: both", "loss: end_to_end")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job.begun(tmp_path_factory.mktemp("served"), CONFIG)
    for step in (("teach",), ("search",), ("train", "--predictor", "recursive-all")):
        assert job.run(*step) == 0, step
    assert job.run("train", "--predictor", "recursive", "--nfe", "3") == 0
    return job


def folder_of(job: Job) -> Path:
    return job.data / "predictors/recursive/unipc-2-all"


def test_one_network_is_kept_and_stays(served: Job, capsys: Any) -> None:
    config = read_json(folder_of(served) / "config.json")
    assert (config["nfe"], config["network"]["steps"], config["kind"]) == ([2, 3], [2, 3], "recursive")
    assert set(config["measured"]["static"]) == {"2", "3"}
    for nfe in ("[3, 2]", "2"):
        capsys.readouterr()
        assert served.run("train", "--predictor", "recursive-all", "--nfe", nfe) == 0
        assert "is there already" in capsys.readouterr().out
    said = served.refused(capsys, "train", "--predictor", "recursive-all", "--nfe", "[2, 3, 5]")
    assert "is for unipc-2, NFE 2, 3, not for unipc-2, NFE 5" in said


def test_rows_of_both_are_told_apart(served: Job) -> None:
    assert served.run("evaluate") == 0
    rows = json.loads((served.folder / "logs/small/results.json").read_text())["rows"]
    found = {(row["nfe"], row["schedule"], row["kind"]) for row in rows if row["kind"] == "recursive"}
    assert found == {
        (2, "recursive-all", "recursive"),
        (3, "recursive-all", "recursive"),
        (3, "recursive", "recursive"),
    }
    shared, own = (
        read_tensors(served.folder / f"logs/small/runs/unipc-2-nfe3-{name}.safetensors")
        for name in ("recursive-all", "recursive")
    )
    assert shared["times"].shape == own["times"].shape


def test_it_is_sampled_and_exported_by_its_name(served: Job, tmp_path: Path, capsys: Any) -> None:
    for nfe in ("2", "3"):
        flags = ("--steps", nfe, "--count", "2", "--out", str(tmp_path / nfe))
        assert served.run("sample", "--schedule", "recursive-all", *flags) == 0
        capsys.readouterr()
        for source in ("recursive-all", str(folder_of(served))):
            assert served.run("export", source, "--format", "json", "--steps", nfe) == 0
            grid = json.loads(capsys.readouterr().out)
            static = json.loads((served.data / f"static/unipc-2-nfe{nfe}.json").read_text())
            assert (grid["nfe"], grid["times"]) == (int(nfe), static["times"])
    said = served.refused(capsys, "sample", "--schedule", "recursive-all", "--steps", "4")
    assert "is for unipc-2, NFE 2, 3, not for unipc-2, NFE 4" in said


def test_another_static_grid_at_one_nfe_is_refused(served: Job, tmp_path: Path, capsys: Any) -> None:
    job = Job(Path(shutil.copytree(served.folder, tmp_path / "job")))
    sample = ("sample", "--schedule", "recursive-all", "--steps", "2")
    edit(folder_of(job) / "config.json", nfe=[3, 2])
    assert "has 3 steps; unipc-2 with NFE 2 takes 2" in job.refused(capsys, *sample)
    edit(folder_of(job) / "config.json", nfe=[2, 3])
    static = job.data / "static/unipc-2-nfe2.json"
    schedule = LearnedGrid.load(static)
    times = schedule.grid.times * torch.tensor([1, 0.9, 1])
    replace(schedule, grid=TimeGrid(times), log_snr=None).save(static)
    said = job.refused(capsys, *sample)
    assert "corrects another static grid" in said and "--predictor recursive-all --solvers unipc-2 --redo`" in said
    assert job.run("train", "--predictor", "recursive-all", "--redo") == 0
    assert job.run(*sample, "--count", "2") == 0
