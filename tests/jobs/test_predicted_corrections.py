"""What predictors learn where nothing is said: the guidance too, of models that are guided by two answers."""

from __future__ import annotations

from typing import Any

import pytest

from ts_adapt.assembly import ModelOptions
from ts_adapt.config import Config, TeacherOptions
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.jobs.session import Session
from ts_adapt.predictors.phases import PREDICTED, TrainOptions


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
    assert by_default.predicted_corrections == [*PREDICTED, *(["guidance"] if guides else [])]
    chosen = session(name, prompts if name == "emoji-sd3" else None, train=TrainOptions(corrections=[]), **options)
    assert chosen.predicted_corrections == []


@pytest.mark.parametrize(
    ("name", "options", "scale"),
    [
        ("fashion-ddpm", {}, None),
        ("fashion-ddpm-class", {"guidance": 3.0}, 3.0),
        ("emoji-sd3", {"call": {"guidance_scale": 2.5}}, 2.5),
        ("emoji-sd3", {"call": {"max_sequence_length": 16}}, 7.0),
    ],
)
def test_what_it_was_learned_under_is_known_and_compared(name: str, options: Any, scale: Any, capsys: Any) -> None:
    of = session(name, None, **options)
    assert of.about("unipc-2")["guidance_scale"] == scale
    for then, said in ((scale, 0), (30.0, 1)):
        of.compare("mine", {"guidance_scale": then})
        assert capsys.readouterr().err.count("guidance_scale 30,") == said


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
