"""Scales of guidance that are the samples' own: kept with the teacher's, told to predictors, sampled by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from small_job import Job, edit
from tiny_families import family
from ts_adapt.assembly import ModelOptions
from ts_adapt.config import Config, TeacherOptions
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.errors import TsAdaptError
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.train import check_predicted
from ts_adapt.sampling import integrate
from ts_adapt.storage.files import read_json

RANGE = [1.5, 8.0]
CLASSES = """
name: small
model: {name: fashion-ddpm-class}
guidance: [1.5, 8]
solvers: [ddim]
nfe: [2]
derivative: exact
distance: l2
static_samples: 4
label_samples: 4
oracle_samples: 3
label_batch: 4
teacher: {solver: ddim, nfe: 3, train_samples: 12, test_samples: 5, shard_size: 4, batch_size: 4}
static: {method: adam, iterations: 1, corrections: [guidance]}
per_sample: {iterations: 1, random_starts: 0}
train: {samples: 12, epochs: 1, width: 4, hidden: 16}
evaluate: {samples: 5, batch_size: 3, features: pixels, grids: [karras]}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job.begun(tmp_path_factory.mktemp("job"), CLASSES).do(
        ["teach"], ["search"], ["search", "--static.corrections", "[]"],
        ["search", "--method", "per-sample", "--split", "test"], ["train"], ["evaluate"],
    )  # fmt: skip


def test_a_teachers_sample_is_the_solve_under_its_own_scale(done: Job) -> None:
    session = done.session()
    (store, batch), (_, tests) = session.teacher("train"), session.teacher("test")
    scales = batch.condition["guidance_scale"]
    assert store.config["guidance"] == RANGE and len(set(scales.tolist())) == 12
    assert not set(scales.tolist()) & set(tests.condition["guidance_scale"].tolist())
    plain, solver = session.denoiser.denoiser, session.solver("ddim")
    for row in (0, 7):
        one = batch.rows(slice(row, row + 1))
        guided, labels = Guided(plain, float(scales[row])), {"class_labels": one.condition["class_labels"]}
        with torch.no_grad():
            end = integrate(guided, solver, session.teacher_grid(), one.x_T, condition=labels).x
        torch.testing.assert_close(end, one.target, atol=1e-4, rtol=1e-4)


def test_what_was_learned_is_for_the_range_and_compared_under_it(done: Job) -> None:
    grid, config = (
        read_json(done.data / "static+guidance/ddim-nfe2.json"),
        read_json(done.data / "predictors/recursive/ddim-nfe2/config.json"),
    )
    assert grid["guidance_scale"] == config["guidance_scale"] == config["network"]["scales"] == RANGE
    assert config["network"]["classes"] == 10
    assert {row["schedule"] for row in done.rows()} >= {"karras", "static", "static+guidance", "recursive", "oracle"}
    teacher = [row for row in done.rows(5) if row["schedule"] == "static"]
    assert teacher and all(float(row["distance"]) > 0 for row in teacher)


def test_images_have_scales_of_their_own_or_the_one_that_is_asked_for(done: Job, capsys: Any) -> None:
    def made(name: str, *flags: str, schedule: str = "recursive") -> list[bytes]:
        out = done.folder / name
        assert done.run("sample", "--schedule", schedule, "--count", "3", "--out", str(out), *flags) == 0
        return [Image.open(path).tobytes() for path in sorted((out / "images").glob("*.png"))]

    own, low, high = made("own"), made("low", "--scale", "2"), made("high", "--scale", "8")
    folder = str(done.data / "predictors/recursive/ddim-nfe2")
    assert high == made("of 8", "--guidance", "8", schedule=folder)
    assert own == made("again") and len({*map(tuple, (own, low, high))}) == 3
    assert "found under guidance_scale" not in capsys.readouterr().err
    folder = str(done.data / "predictors/recursive/ddim-nfe2")
    assert made("config", "--guidance", "8", schedule=folder) == high  # of an experiment with one scale
    made("beyond", "--scale", "12")
    assert "found under guidance_scale 1.5 to 8, and these samples are guided by 12" in capsys.readouterr().err
    for flags in (["--pipeline", "fashion-ddpm"], ["--guidance", "1"]):
        assert "scale" in done.refused(capsys, "sample", "--schedule", "karras", "--scale", "2", *flags)
    assert "one scale" in done.refused(capsys, "sample", "--schedule", "karras", "--pipeline", "fashion-ddpm")


def test_another_range_is_another_teacher_and_a_damaged_one_is_named(done: Job, capsys: Any) -> None:
    assert "made with guidance" in done.refused(capsys, "search", "--guidance", "1.5,9", "--redo")
    copy = done.folder / "static.json"
    copy.write_bytes((done.data / "static/ddim-nfe2.json").read_bytes())
    for damaged in ([8.0, 1.5], [1.5], ["a", "b"], [1, 2, 3]):
        edit(copy, guidance_scale=damaged)
        assert "'guidance_scale' of" in done.refused(capsys, "sample", "--schedule", str(copy))


def session(name: str, folder: Path, **options: Any) -> Session:
    (folder / "prompts.txt").write_text("fluent red heart\nblob sad face\n")
    teacher = TeacherOptions(prompts=str(folder / "prompts.txt"))
    model = ModelOptions(name=name, call=options.pop("call", {}))
    return Session(Config(model=model, teacher=teacher, guidance=RANGE, **options), progress=False)


def test_a_pipeline_is_called_with_one_samples_scale_after_the_other(tmp_path: Path) -> None:
    short = {"max_sequence_length": 16}
    of = session("emoji-sd3", tmp_path, call=short)
    _, x_T, condition = of.training_noises(2)
    assert "guidance" in of.predicted_corrections and of.guidance_scale == RANGE
    with torch.no_grad():
        solver, grid = of.solver("euler"), of.starts(2)["linear"]
        both = integrate(of.denoiser, solver, grid, x_T, condition=condition).x
        for row, scale in enumerate(condition["guidance_scale"].tolist()):
            alone = Session(Config(model=ModelOptions("emoji-sd3", call={**short, "guidance_scale": scale})))
            own = {key: value[row : row + 1] for key, value in condition.items() if key != "guidance_scale"}
            expected = integrate(alone.denoiser, solver, grid, x_T[row : row + 1], condition=own).x
            torch.testing.assert_close(both[row : row + 1], expected)
        rows = torch.full((2,), 4.0)
        one, each = (
            integrate(of.denoiser, solver, grid, x_T, condition={**condition, "guidance_scale": scale}).x
            for scale in (4.0, rows)
        )
        torch.testing.assert_close(one, each)
    seen = of.denoiser.shown(x_T, condition)[1]
    assert torch.equal(seen["guidance_scale"], condition["guidance_scale"])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("emoji-sd3", {"call": {"guidance_scale": 4.0}}, "leave out one of them"),
        ("fashion-ddpm", {}, "no unconditional part"),
    ],
)
def test_what_cannot_be_guided_by_a_range_is_refused(name: str, options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(TsAdaptError, match=said):
        _ = session(name, tmp_path, **options).denoiser


@pytest.mark.parametrize(
    ("name", "grids", "said"),
    [("qwen-image", False, "makes the same of guidance_scale 1.5 and 8"), ("pixart", True, "does not say with which")],
)
def test_what_a_pipeline_does_with_its_scale_is_seen_before_any_work(
    name: str, grids: bool, said: str, tmp_path: Path
) -> None:
    """Qwen-Image is guided by another argument; PixArt, which keeps its scale to itself, tells predictors nothing."""
    pipe, call = family(name)
    pipe.save_pretrained(tmp_path / "model")
    of = session(str(tmp_path / "model"), tmp_path, call=call)
    if grids:
        of.check()
    with pytest.raises(TsAdaptError, match=said):
        check_predicted(of, ["recursive"]) if grids else of.check()
