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
from ts_adapt.assembly import FULL, ModelOptions
from ts_adapt.config import Config
from ts_adapt.grids.parametric import between
from ts_adapt.interfaces import TimeGrid
from ts_adapt.jobs.runs import planned
from ts_adapt.jobs.session import Session
from ts_adapt.pipelines.load import build_denoiser
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.storage.files import make_folder, read_json, read_tensors, write_json

CONFIG = SMALL.replace("nfe: [3]", "nfe: [3, 2, 5]").replace("loss: both", "loss: end_to_end")
MIXTURE = build_denoiser(ModelOptions(name="gaussian-mixture")).noise_schedule


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job.begun(tmp_path_factory.mktemp("served"), CONFIG).do(
        ("teach",),
        ("search",),
        ("train", "--predictor", "recursive-all"),
        ("train", "--predictor", "recursive", "--nfe", "3"),
    )


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


def test_what_is_kept_between_is_chosen_without_a_training_where_it_is_missing(served: Job, capsys: Any) -> None:
    path = folder_of(served) / "config.json"
    config, train = read_json(path), ("train", "--predictor", "recursive-all")
    assert config["network"]["kept"].keys() == {"4", "6"}
    edit(path, network={**config["network"], "kept": {"6": 0.3}})
    weights = (path.parent / "model.safetensors").read_bytes()
    plan = ("learn", "--plan", "--learn", "recursive-all", "--static.corrections", "[]")
    assert planned_for(served, capsys, *plan) == 5 * (4 + 6) * 4
    assert served.run(*train) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not trained for" in line]
    assert len(said) == 1 and "4 steps, not trained for" in said[0]
    kept = {**config["network"]["kept"], "6": 0.3}
    assert read_json(path) == {**config, "network": {**config["network"], "kept": kept}}
    assert (path.parent / "model.safetensors").read_bytes() == weights
    assert planned_for(served, capsys, *plan) == 0
    other = ("--nfe", "[2, 3, 4]")
    assert "for unipc-2, NFE 2, 3, 5, not for" in served.refused(capsys, *plan, *other)
    exact = ("--derivative", "exact")  # else only the other has derivatives to compare
    anew = [planned_for(served, capsys, *plan, *other, *exact, *more) for more in (["--redo"], ["--name", "another"])]
    assert anew[0] == anew[1] > 0
    edit(path, network=config["network"])


def planned_for(job: Job, capsys: Any, *words: str) -> int:
    """The evaluations of the network that a plan counts for `recursive-all`."""
    capsys.readouterr()
    assert job.run(*words) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("recursive-all "))
    return int(row[1].replace(",", "")) + int(row[2].replace(",", ""))


def test_rows_of_both_are_told_apart(served: Job) -> None:
    assert served.run("evaluate") == 0
    found = {(r["nfe"], r["schedule"], r["kind"]) for r in served.results["rows"] if r["kind"] == "recursive"}
    assert found == {(nfe, "recursive-all", "recursive") for nfe in (2, 3, 5)} | {(3, "recursive", "recursive")}
    shared, own = (
        read_tensors(served.runs / f"unipc-2-nfe3-{name}.safetensors") for name in ("recursive-all", "recursive")
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


def test_an_nfe_between_is_sampled_and_compared_by_every_name(served: Job, tmp_path: Path, capsys: Any) -> None:
    """Trained for 2, 3 and 5: 4 is a line of remark, one more too, and further off it is refused."""
    images = {}
    for name, source in (("word", "recursive-all"), ("folder", str(folder_of(served)))):
        for nfe in ("4", "6"):
            capsys.readouterr()
            out = tmp_path / name / nfe
            assert served.run("sample", "--schedule", source, "--steps", nfe, "--count", "2", "--out", str(out)) == 0
            said = [line for line in capsys.readouterr().err.splitlines() if "was not trained for" in line]
            near = {"4": "3 and 5", "6": "5"}[nfe]
            assert len(said) == 1 and f"for {nfe} steps: this is interpolated from {near}" in said[0]
            images[name, nfe] = [path.read_bytes() for path in sorted((out / "images").iterdir())]
        assert "which serves 2 to 6, not for 8" in served.refused(
            capsys, "sample", "--schedule", str(folder_of(served)), "--steps", "8"
        )
    assert images["word", "4"] == images["folder", "4"] and images["word", "6"] == images["folder", "6"]
    said = served.refused(capsys, "sample", "--schedule", "recursive-all", "--steps", "8")
    assert "was learned for NFE 2, 3, 5 and serves 2 to 6, not 8" in said
    assert served.run("evaluate", "--nfe", "4") == 0
    rows = {row["schedule"]: row for row in served.results["rows"] if row["nfe"] == 4}
    assert rows["recursive-all"]["kind"] == "recursive"
    times = read_tensors(served.runs / "unipc-2-nfe4-recursive-all.safetensors")["times"]
    static = {nfe: LearnedGrid.load(served.data / f"static/unipc-2-nfe{nfe}.json").grid.times for nfe in (3, 5)}
    k = read_json(folder_of(served) / "config.json")["network"]["kept"]["4"]
    assert torch.equal(times, between(static, MIXTURE, 4).expand_as(times)) == (k == 0)


@pytest.mark.parametrize(("solver", "nfes"), [("unipc-2", [*range(3, 10)]), ("heun", [4, 6, 8, 10])])
def test_one_beside_is_a_step_of_the_solver(solver: str, nfes: list[int], tmp_path: Path) -> None:
    session = Session(Config(model=ModelOptions("gaussian-mixture"), data_root=str(tmp_path)), progress=False)
    write_json(make_folder(session.workspace.predictor("recursive-all", solver, 4)) / "config.json", {"nfe": [4, 8]})
    assert [nfe for nfe in range(1, 14) if session.predictor_names(solver, nfe)] == nfes


@pytest.mark.filterwarnings("ignore:.*was not trained for")
def test_a_run_between_is_of_the_share_that_is_kept_there(served: Job, tmp_path: Path) -> None:
    job = Job(Path(shutil.copytree(served.folder, tmp_path / "job")))
    network = read_json(folder_of(job) / "config.json")["network"]

    def prints(nfe: int, share: float) -> list[str]:
        edit(folder_of(job) / "config.json", network={**network, "kept": {"4": share}})
        entries = planned(job.session().changed(nfe=[nfe]))[FULL]
        return [entry.fingerprint for entry in entries if entry.schedule == "recursive-all"]

    assert prints(3, 0.25) == prints(3, 0.5) and len({*prints(4, 0.25), *prints(4, 0.5)}) == 2


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
        for source in ("recursive-all", folder_of(served)):
            assert exported(source, nfe)[0]["times"] == expected.tolist()
    content, said = exported(served.data / "static/unipc-2-nfe3.json", 5)
    assert content["times"] == between({3: static[3].grid.times}, MIXTURE, 5).tolist()
    own = static[5].about["measured"]["distance"]["value"]
    assert f"the {own:.5f} of the static grid learned for NFE 5" in said[1]
    _, said = exported(served.data / "static/unipc-2-nfe3.json", 4, "--data_root", str(tmp_path))
    assert len(said) == 2 and "unmeasured" in said[1] and "has not the teacher's samples" in said[1]


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
