"""One predictor for all NFEs of an experiment, from train to evaluate, sample and export."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from small_job import SMALL, Job, edit
from ts_adapt.assembly import ModelOptions
from ts_adapt.grids.parametric import between
from ts_adapt.interfaces import TimeGrid
from ts_adapt.pipelines.load import build_denoiser
from ts_adapt.sampling import generator_for
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.storage.files import read_json, read_tensors, write_tensors

CONFIG = SMALL.replace("nfe: [3]", "nfe: [3, 2, 5]").replace("loss: both", "loss: end_to_end, between: true")
MIXTURE = build_denoiser(ModelOptions(name="gaussian-mixture")).noise_schedule


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job.begun(tmp_path_factory.mktemp("served"), CONFIG)
    for step in (("teach",), ("search",), ("train", "--predictor", "recursive-all")):
        assert job.run(*step) == 0, step
    assert job.run("train", "--predictor", "recursive", "--nfe", "3", "--train.between", "false") == 0
    return job


def folder_of(job: Job) -> Path:
    return job.data / "predictors/recursive/unipc-2-all"


def test_one_network_is_kept_and_stays(served: Job, capsys: Any) -> None:
    config = read_json(folder_of(served) / "config.json")
    assert (config["nfe"], config["network"]["steps"], config["kind"]) == ([2, 3, 5], [2, 3, 5], "recursive")
    assert set(config["measured"]["static"]) == {"2", "3", "5"}
    for nfe in ("[3, 2]", "2"):
        capsys.readouterr()
        assert served.run("train", "--predictor", "recursive-all", "--nfe", nfe) == 0
        assert "is there already" in capsys.readouterr().out
    said = served.refused(capsys, "train", "--predictor", "recursive-all", "--nfe", "[2, 3, 4]")
    assert "is for unipc-2, NFE 2, 3, 5, not for unipc-2, NFE 4" in said


def test_rows_of_both_are_told_apart(served: Job) -> None:
    assert served.run("evaluate") == 0
    rows = json.loads((served.folder / "logs/small/results.json").read_text())["rows"]
    found = {(row["nfe"], row["schedule"], row["kind"]) for row in rows if row["kind"] == "recursive"}
    assert found == {(nfe, "recursive-all", "recursive") for nfe in (2, 3, 5)} | {(3, "recursive", "recursive")}
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
    said = served.refused(capsys, "sample", "--schedule", "recursive-all", "--steps", "6")
    assert "is for unipc-2, NFE 2, 3, 5, not for unipc-2, NFE 6" in said
    assert "learned for 2, 3, 5 steps, not for 6" in served.refused(
        capsys, "sample", "--schedule", str(folder_of(served)), "--steps", "6"
    )


def test_an_nfe_between_those_learned_is_sampled_and_compared(served: Job, tmp_path: Path, capsys: Any) -> None:
    for number, source in enumerate(("recursive-all", str(folder_of(served)))):
        out = tmp_path / str(number)
        assert served.run("sample", "--schedule", source, "--steps", "4", "--count", "2", "--out", str(out)) == 0
    assert (tmp_path / "0/images/00001.png").read_bytes() == (tmp_path / "1/images/00001.png").read_bytes()
    roots = ("--nfe", "4", "--log_root", str(tmp_path / "logs"))
    assert served.run("evaluate", *roots) == 0
    rows = json.loads((tmp_path / "logs/small/results.json").read_text())["rows"]
    assert {row["schedule"] for row in rows} == {"karras", "linear", "recursive-all"}


def test_a_list_for_an_nfe_that_was_not_learned_says_what_it_costs(served: Job, tmp_path: Path, capsys: Any) -> None:
    static = {nfe: LearnedGrid.load(served.data / f"static/unipc-2-nfe{nfe}.json") for nfe in (2, 3, 5)}

    def exported(source: object, nfe: int, *flags: str) -> tuple[dict[str, Any], list[str]]:
        capsys.readouterr()
        assert served.run("export", str(source), "--steps", str(nfe), *flags) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err.splitlines()

    for nfe, near in ((4, "3, 5"), (8, "5")):
        expected = between({n: grid.grid.times for n, grid in static.items()}, MIXTURE, nfe)
        content, said = exported("static", nfe)
        assert content["times"] == expected.tolist() and content["nfe"] == nfe
        assert f"interpolated in log-SNR from {near} steps" in said[0] and "8 validation noises" in said[1]
        measured = content["measured"]
        assert {each["split"] for each in measured.values()} == {"validation"}
        assert f"{measured['distance']['value']:.5f}" in said[1] and "best fixed grid's" in said[1]
    content, said = exported(served.data / "static/unipc-2-nfe3.json", 5)
    assert content["times"] == between({3: static[3].grid.times}, MIXTURE, 5).tolist()
    own = static[5].about["measured"]["distance"]["value"]
    assert f"the {own:.5f} of the static grid learned for NFE 5" in said[1]
    _, said = exported(served.data / "static/unipc-2-nfe3.json", 4, "--data_root", str(tmp_path))
    assert len(said) == 2 and "unmeasured" in said[1] and "has not the teacher's samples" in said[1]


def test_a_list_of_a_predictor_is_the_mean_of_its_grids_where_that_is_nearer(
    served: Job, tmp_path: Path, capsys: Any
) -> None:
    job = Job(Path(shutil.copytree(served.folder, tmp_path / "job")))
    tensors = read_tensors(folder_of(job) / "model.safetensors")
    tensors["encoder.bias"] = 0.02 * torch.randn(tensors["encoder.bias"].shape, generator=generator_for(0, 0))
    write_tensors(folder_of(job) / "model.safetensors", tensors)
    capsys.readouterr()
    assert job.run("export", "recursive-all", "--steps", "4") == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    ((interpolated, mean, taken),) = re.findall(r"is ([\d.]+), .* chooses ([\d.]+): this is the (\w+)", printed.err)
    assert taken == ("mean" if float(mean) < float(interpolated) else "interpolated")
    value = content["measured"]["distance"]["value"]
    assert value == pytest.approx(min(float(mean), float(interpolated)), abs=1e-5)
    statics = {nfe: LearnedGrid.load(served.data / f"static/unipc-2-nfe{nfe}.json").grid.times for nfe in (2, 3, 5)}
    same = content["times"] == between(statics, MIXTURE, 4).tolist()
    assert same == (taken == "interpolated")


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
