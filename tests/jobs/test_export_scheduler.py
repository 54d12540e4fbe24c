"""export --format diffusers: what a workspace has learned samples the model's own pipeline as `integrate` does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, EDMEulerScheduler

import ts_adapt
from small_job import Job
from ts_adapt import LearnedGrid, LearnedScheduler, TimeGrid, TsAdaptError, attach
from ts_adapt.assembly import ModelOptions
from ts_adapt.config import Config
from ts_adapt.jobs.export_scheduler import export_scheduler
from ts_adapt.noise import Preconditioned
from ts_adapt.sampling import generator_for
from ts_adapt.schedules.resolve import resolve

SMALL = """
name: small
model: {name: MODEL}
solvers: [unipc-2]
nfe: [2, 3, 5]
derivative: exact
distance: l2
static_samples: 8
label_samples: 16
oracle_samples: 8
label_batch: 16
teacher: {nfe: 8, train_samples: 16, test_samples: 8, shard_size: 16, batch_size: 16}
static: {iterations: 2, evaluations: 8, seed: 3, corrections: []}
per_sample: {iterations: 2, random_starts: 0}
train: {samples: 16, epochs: 1, width: 4, hidden: 16}
"""
ROWS = range(3)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Job:
    """An experiment with a tiny model, for which NFE 2 and 3 have been learned and 5 has not."""
    done = begun(tmp_path_factory.mktemp("job"), tiny.pipeline("ddpm"))
    learned = ("--nfe", "[2, 3]")
    for step in (["teach"], ["search"], ["search", "--method", "per-sample"]):
        assert done.run(*step, *learned) == 0, step
    for kind in ("one-shot", "recursive", "recursive-all"):
        assert done.run("train", "--predictor", kind, *learned) == 0
    return done


def begun(folder: Path, pipe: Any) -> Job:
    pipe.save_pretrained(folder / "model")
    return Job.begun(folder, SMALL.replace("MODEL", str(folder / "model")))


def export(job: Job, out: Path, source: str, *flags: str) -> int:
    return job.run("export", source, "--format", "diffusers", "--out", str(out), *flags)


def by_integrate(done: Job, source: str, nfe: int, solver: str = "unipc-2") -> torch.Tensor:
    """Images in [0, 1] along the workspace's own schedule."""
    job = done.session()
    x_T = ts_adapt.initial_noise(7, ROWS, job.shape)
    with torch.inference_mode():
        policy = job.policy(resolve(source, job), solver, nfe)
        x = ts_adapt.integrate(job.denoiser, job.solver(solver), policy, x_T).x
        return (job.denoiser.decode(x) / 2 + 0.5).clamp(0, 1)


def by_pipeline(done: Job, schedule: Any, nfe: int) -> torch.Tensor:
    pipe = DDPMPipeline.from_pretrained(done.folder / "model")
    attach(pipe, schedule)
    generators = [generator_for(7, i) for i in ROWS]
    images = pipe(len(ROWS), generators, num_inference_steps=nfe, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("source", ["static", "one-shot", "recursive", "recursive-all"])
def test_what_was_learned_samples_the_models_own_pipeline(done: Job, tmp_path: Path, capsys, source: str) -> None:
    assert export(done, tmp_path / "out", source) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n"
    assert printed.err.startswith(f"ts-adapt: warning: {source} was not learned for NFE 5, ")
    assert printed.err.count("\n") == 1
    schedule = LearnedScheduler.from_pretrained(tmp_path / "out")
    assert schedule.source.learned == (2, 3) and schedule.config["solver"] == "unipc-2"
    for nfe in (2, 3):
        expected = by_integrate(done, source, nfe)
        assert float(expected.std()) > 0.01
        torch.testing.assert_close(by_pipeline(done, schedule, nfe), expected, atol=1e-4, rtol=1e-4)


def test_the_schedule_knows_what_it_was_learned_for(done: Job, tmp_path: Path) -> None:
    file = json.loads((done.static).read_text())
    for source, seed in (("static", 3), ("one-shot", 0)):
        assert export(done, tmp_path / source, source) == 0
        config = LearnedScheduler.from_pretrained(tmp_path / source).config
        assert config["learned_for"] == {
            "model": str(done.folder / "model"), "method": source, "teacher": file["teacher"], "distance": "l2",
            "seed": seed,
        }  # fmt: skip
        assert (config["prediction_type"], config["beta_schedule"]) == ("sample", "linear")


def test_one_nfe_alone(done: Job, tmp_path: Path, capsys) -> None:
    assert export(done, tmp_path / "out", "static", "--steps", "3") == 0
    assert capsys.readouterr().err == ""
    assert LearnedScheduler.from_pretrained(tmp_path / "out").source.learned == (3,)


def test_corrections_travel_along(done: Job, tmp_path: Path) -> None:
    learned = LearnedGrid.load(done.static)
    times = learned.grid.times
    grid = TimeGrid(times, times[:-1] * 0.97, torch.linspace(0.9, 1.1, 3).double())
    kept = replace(learned, grid=grid)
    kept.save(done.data / "static+shift+scale/unipc-2-nfe3.json")
    assert export(done, tmp_path / "out", "static+shift+scale", "--steps", "3") == 0
    found = by_pipeline(done, LearnedScheduler.from_pretrained(tmp_path / "out"), 3)
    torch.testing.assert_close(found, by_integrate(done, "static+shift+scale", 3), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, by_integrate(done, "static", 3), atol=1e-3)


def test_files_and_folders(done: Job, tmp_path: Path) -> None:
    file = done.static
    folder = done.data / "predictors/one-shot/unipc-2-nfe3"
    assert export(done, tmp_path / "file", str(file)) == 0
    assert export(done, tmp_path / "folder", str(folder), "--steps", "3", "--solver", "unipc-2") == 0
    loaded = LearnedScheduler.from_pretrained(tmp_path / "file")
    assert torch.equal(loaded.source.grids[3].times, LearnedGrid.load(file).grid.times)
    assert loaded.config["learned_for"]["seed"] == 3
    loaded = LearnedScheduler.from_pretrained(tmp_path / "folder")
    assert loaded.source.learned == (3,) and loaded.config["learned_for"]["method"] == "one-shot"


def test_fixed_grids(done: Job, tmp_path: Path) -> None:
    def exported(*flags: str) -> Any:
        assert export(done, tmp_path / "out", *flags) == 0
        return LearnedScheduler.from_pretrained(tmp_path / "out")

    family = exported("karras+rounded", "--solver", "dpmpp-2m")
    assert (family.config["grid"], family.config["solver"]) == ("karras+rounded", "dpmpp-2m")
    expected = by_integrate(done, "karras+rounded", 4, "dpmpp-2m")
    torch.testing.assert_close(by_pipeline(done, family, 4), expected, atol=1e-4, rtol=1e-4)
    one = exported("karras", "--steps", "4")
    assert one.config["grid"] is None and one.source.learned == (4,)
    fitted = exported("ays-sd15", "--rescale_published", "true")
    assert fitted.source.learned == (2, 3, 5)


def test_a_schedule_written_before_is_replaced(done: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(done, out, "one-shot") == 0
    assert (out / "nfe2/model.safetensors").exists()
    assert export(done, out, "static") == 0
    assert [path.name for path in out.iterdir()] == ["scheduler_config.json"]
    assert export(done, out, "one-shot", "--steps", "2") == 0
    assert {path.name for path in out.iterdir()} == {"scheduler_config.json", "config.json", "model.safetensors"}
    assert LearnedScheduler.from_pretrained(out).source.learned == (2,)


def test_a_guided_model_keeps_its_scheduler_config(tmp_path: Path) -> None:
    config = Config(model=ModelOptions("fashion-ddpm-class"), guidance=2.0)
    export_scheduler(config, "karras", out=str(tmp_path / "out"))
    assert LearnedScheduler.from_pretrained(tmp_path / "out").prediction == "v"


def test_another_prediction_goes_into_the_config(done: Job, tmp_path: Path) -> None:
    assert export(done, tmp_path / "out", "karras", "--model.prediction", "v") == 0
    schedule = LearnedScheduler.from_pretrained(tmp_path / "out")
    assert schedule.prediction == "v"
    with pytest.raises(TsAdaptError, match=r"the prediction type \(v, the pipeline's is sample\)"):
        by_pipeline(done, schedule, 3)


def filled(folder: Path, kind: str, done: Job) -> None:
    """Folders that hold something else than a schedule."""
    folder.mkdir()
    if kind == "notes":
        (folder / "notes.txt").write_text("mine")
    elif kind == "scheduler":
        DDIMScheduler().save_pretrained(folder)
    elif kind == "predictor":
        shutil.copytree(done.data / "predictors/one-shot/unipc-2-nfe3", folder, dirs_exist_ok=True)
    elif kind == "schedule and more":
        LearnedScheduler.from_grid("karras").save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize("kind", ["notes", "scheduler", "predictor", "schedule and more"])
def test_a_folder_that_holds_something_else_is_left_alone(done: Job, tmp_path: Path, capsys, kind: str) -> None:
    folder = tmp_path / "out"
    filled(folder, kind, done)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = done.refused(capsys, "export", "static", "--format", "diffusers", "--out", str(folder))
    assert "which is of no schedule that could be replaced" in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_schedule_for_edms_noise(tmp_path: Path, tiny: Any) -> None:
    pipe = tiny.pipeline("ddpm")
    pipe.scheduler = EDMEulerScheduler(sigma_max=40.0)
    assert export(begun(tmp_path, pipe), tmp_path / "out", "karras") == 0
    schedule = LearnedScheduler.from_pretrained(tmp_path / "out")
    assert schedule.noise_schedule == Preconditioned(0.002, 40.0, 0.5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["static"], "name it with --out FOLDER"),
        (["static", "--out", "FILE"], "has to be a folder"),
        (["static", "--out", "/proc/x"], "/proc/x"),
        (["static", "--out", "NEW", "--steps", "7"], "there is no static grid at"),
        (["static", "--out", "NEW", "--solver", "ddim"], "there is no static grid at"),
        (["recursive", "--out", "NEW", "--nfe", "[8, 9]"], "--predictor recursive --solvers unipc-2 --nfe 8`"),
        (["blackbox", "--out", "NEW"], "--method blackbox --solvers unipc-2 --nfe 2`"),
        (["FILE", "--out", "NEW"], "ts_adapt-schedule"),
        (["JSON", "--out", "NEW", "--steps", "2"], "is for NFE 3, not for 2; leave --steps out"),
        (["karras", "--out", "NEW", "--solver", "heun", "--nfe", "[4]"], "evaluates the network 2 times a step"),
        (["ays-sd15", "--out", "NEW"], "rescale"),
        (["karras", "--out", "NEW", "--model.name", "gaussian-mixture"], "is in no pipeline of diffusers"),
        (["karras", "--out", "NEW", "--model.prediction", "velocity"], "prediction_type 'flow_prediction' of DDPM"),
    ],
)
def test_bad_input_is_one_sentence(done: Job, tmp_path: Path, capsys, arguments, expected) -> None:
    (tmp_path / "file.json").write_text("{}")
    names = {
        "FILE": tmp_path / "file.json",
        "NEW": tmp_path / "new",
        "JSON": done.static,
    }
    words = [str(names.get(word, word)) for word in arguments]
    assert expected in done.refused(capsys, "export", "--format", "diffusers", *words)
    assert not (tmp_path / "new").exists()
