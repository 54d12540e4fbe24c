"""What predictors learn where nothing is said: the guidance too, of models that are guided by two answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from small_job import Job, edit
from ts_adapt.assembly import ModelOptions
from ts_adapt.config import Config, TeacherOptions
from ts_adapt.errors import TsAdaptError, TsAdaptWarning
from ts_adapt.interfaces import Denoiser
from ts_adapt.jobs.session import Session
from ts_adapt.predictors.phases import PREDICTED, TrainOptions
from ts_adapt.storage.files import read_json


def session(name: str, prompt: Any, **options: Any) -> Session:
    call = options.pop("call", {})
    teacher = TeacherOptions(prompts=None if prompt is None else str(prompt))
    return Session(Config(model=ModelOptions(name=name, call=call), teacher=teacher, **options), progress=False)


@pytest.mark.parametrize(
    ("name", "options", "guides"),
    [
        ("fashion-ddpm-class", {}, False),
        ("fashion-ddpm-class", {"guidance": 3.0}, True),
        ("emoji-sd3", {"call": {"guidance_scale": 1.0, "max_sequence_length": 16}}, False),
        ("emoji-sd3", {"call": {"guidance_scale": 3.0, "max_sequence_length": 16}}, True),
    ],
)
def test_the_guidance_is_among_them_where_there_is_one(name: str, options: Any, guides: bool, tmp_path: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fluent red heart\n")
    by_default = session(name, prompts if name == "emoji-sd3" else None, **options)
    of_grids = [*PREDICTED, *(["guidance"] if guides else []), "embedding"]
    assert by_default.corrections_of("recursive") == [*of_grids, "residual"]
    assert by_default.corrections_of("one-shot") == [*of_grids, "start"]
    chosen = session(name, prompts if name == "emoji-sd3" else None, train=TrainOptions(corrections=[]), **options)
    assert chosen.corrections_of("recursive") == chosen.corrections_of("one-shot") == []


def test_the_changes_are_those_of_pictures_that_are_learned_through_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = session("fashion-ddpm-class", None, train=TrainOptions(loss="labels"))
    assert labels.corrections_of("recursive") == list(PREDICTED)
    monkeypatch.setattr(Session, "seen_shape", (3, 8, 8))
    assert session("fashion-ddpm-class", None).corrections_of("one-shot") == [*PREDICTED, "embedding"]


@pytest.mark.parametrize(
    ("name", "options", "scale"),
    [
        ("fashion-ddpm", {}, None),
        ("fashion-ddpm-class", {}, 1.0),
        ("fashion-ddpm-class", {"guidance": 3.0}, 3.0),
        ("fashion-ddpm-class", {"guidance": -2.0}, -2.0),
        ("emoji-sd3", {"call": {"guidance_scale": 2.5}}, 2.5),
        ("emoji-sd3", {"call": {"guidance_scale": 0}}, 0.0),
        ("emoji-sd3", {"call": {"max_sequence_length": 16}}, 7.0),
    ],
)
def test_what_it_is_learned_under_is_known_and_compared(
    name: str, options: Any, scale: Any, recwarn: pytest.WarningsRecorder
) -> None:
    of = session(name, None, **options)
    assert of.guidance_scale == scale
    for then, said in ((scale, 0), (30.0, scale is not None)):
        recwarn.clear()
        of.compare("mine", {"guidance_scale": then})
        found = [one.category for one in recwarn if "of mine: the schedule was found under" in str(one.message)]
        assert found == [TsAdaptWarning] * said


CLASSES = """
name: small
model: {name: fashion-ddpm-class}
guidance: 3.0
solvers: [ddim]
nfe: [2]
derivative: exact
distance: l2
static_samples: 2
teacher: {solver: ddim, nfe: 3, train_samples: 12, test_samples: 2}
static: {method: adam, iterations: 1, corrections: []}
train: {samples: 12, epochs: 1}
"""


def test_what_was_learned_keeps_its_guidance_wherever_it_goes(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fixed grids, and lists from elsewhere, were found under none."""
    more = {"true_cfg_scale": 4.0}
    monkeypatch.setattr(Denoiser, "other_scales", more)
    job = Job.begun(tmp_path, CLASSES).do(
        ["teach", "--split", "train"], ["search"], ["search", "--method", "dmn"], ["train"]
    )
    grid, predictor = job.data / "static/ddim-nfe2.json", job.data / "predictors/recursive/ddim-nfe2"
    assert [read_json(file)["guidance_scale"] for file in (grid, predictor / "config.json")] == [3.0, 3.0]
    assert [read_json(file)["other_scales"] for file in (grid, predictor / "config.json")] == [more, more]
    now = ("--guidance", "9")
    monkeypatch.setattr(Denoiser, "other_scales", {"true_cfg_scale": 1.0})
    for name in ("karras", "dmn"):
        assert job.run("export", name, "--out", str(tmp_path / f"{name}.json")) == 0
    assert job.run("export", str(predictor), "--format", "diffusers", "--out", str(tmp_path / "folder"), *now) == 0
    assert job.run("export", str(grid), "--format", "sigmas", "--out", str(tmp_path / "list.txt")) == 0
    imported = tmp_path / "imported.json"
    assert job.run("import", str(tmp_path / "list.txt"), "--format", "sigmas", "--out", str(imported)) == 0
    for source, said in (
        (grid, 1), (predictor, 1), (tmp_path / "folder", 1),
        (imported, 0), (tmp_path / "karras.json", 0), (tmp_path / "dmn.json", 0),
    ):  # fmt: skip
        capsys.readouterr()
        assert job.run("sample", "--schedule", str(source), "--count", "1", *now) == 0
        err = capsys.readouterr().err
        assert err.count("found under guidance_scale 3, and these samples are guided by 9") == said
        assert err.count("found under true_cfg_scale 4, and these samples are guided by 1") == said
    edit(predictor / "config.json", guidance_scale="three")
    assert "'guidance_scale' of" in job.refused(capsys, "sample", "--schedule", str(predictor))


def test_a_pipeline_that_does_not_guide_is_refused_before_any_work(tmp_path: Any) -> None:
    (tmp_path / "prompts.txt").write_text("fluent red heart\n")
    call = {"guidance_scale": 1.0, "max_sequence_length": 16}
    train = TrainOptions(corrections=["guidance"])
    with pytest.raises(TsAdaptError, match="nothing guides the model"):
        session("emoji-sd3", tmp_path / "prompts.txt", call=call, train=train).check()


def test_a_step_that_fails_for_another_reason_says_that_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("fluent red heart\n")
    of = session("emoji-sd3", tmp_path / "prompts.txt", call={"guidance_scale": 3.0, "max_sequence_length": 16})

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no room for this picture")

    monkeypatch.setattr(of.denoiser.network, "forward", failing)
    with pytest.raises(TsAdaptError, match="no room for this picture"):
        _ = of.predicted_corrections
