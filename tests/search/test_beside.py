"""What is minimised beside the distance to the teacher, whatever it is: refusals, who may not judge, what is said."""

from __future__ import annotations

import pytest

from small_job import SMALL, Job
from small_predictors import build, start
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.training import train_predictor
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.search.static import search_static
from ts_adapt.search.static_options import StaticOptions

ADAM = {"method": "adam"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({what: 1.0}, "set static.method to adam") for what in ("distribution", "adversarial")),
        ({"distribution": 1.0, **ADAM, "target": "geometric"}, "static.target to mean"),
        ({"adversarial": 1.0, **ADAM, "target": "capped"}, "static.target to mean"),
        ({"adversarial": 1.0, **ADAM, "soft_teacher": True}, "static.soft_teacher to false"),
        ({"caption": 1.0, "target": "geometric"}, "static.target to mean"),
        *(({what: 1.0, **ADAM}, "none were given") for what in ("distribution", "adversarial", "caption")),
    ],
)
def test_what_a_search_cannot_learn_from_is_refused(problem, options, message):
    objective, batch = problem
    with pytest.raises(TsAdaptError, match=message):
        search_static(objective, batch, batch, start(objective, 3), StaticOptions(**options), progress=False)


@pytest.mark.parametrize("what", ["distribution", "adversarial", "caption"])
def test_what_a_training_cannot_learn_from_is_refused_before_any_work(problem, what, tmp_path):
    objective, batch = problem
    predictor, before = build(OneShot, objective.denoiser.noise_schedule), objective.denoiser.evaluations
    for loss, message in (("labels", rf"train\.{what} to 0"), ("end_to_end", "none were given")):
        with pytest.raises(TsAdaptError, match=message):
            train_predictor(predictor, objective, batch, batch, TrainOptions(loss=loss, **{what: 1.0}), tmp_path / "a")
    assert objective.denoiser.evaluations == before and not (tmp_path / "a").exists()


@pytest.mark.parametrize(("group", "what"), [("static", "distribution"), ("train", "adversarial")])
def test_images_that_are_learned_from_may_not_judge(group, what, tmp_path):
    config = Config()
    setattr(getattr(config, group), what, 1.0)
    config.distribution.data, config.evaluate.reference = str(tmp_path / "real"), str(tmp_path)
    with pytest.raises(TsAdaptError, match="folders apart"):
        config.validate()
    config.evaluate.reference = str(tmp_path / "others")
    config.validate()


def test_it_is_a_job_that_says_what_was_minimised(tmp_path, capsys):
    config = SMALL.replace("features: pixels", "features: inception")
    job = Job.begun(tmp_path, config + "distribution: {images: 50}\n").do(("teach",))
    flags = ("--static.method", "adam", "--static.distribution", "2.0", "--static.adversarial", "0.5")
    refused = job.refused(capsys, "search", *flags, "--evaluate.features", "pixels")
    assert "may not judge; give --evaluate.features" in refused
    job.do(("search", *flags))
    said = capsys.readouterr().out
    assert "2 times the unbiased MMD^2" in said and "at most 50 images of the model's own law" in said
    assert "0.5 times the relativistic loss of a discriminator" in said
    kept = LearnedGrid.load(job.static).about["made_with"]
    assert kept["distribution"] == {"weight": 2.0, "data": None, "images": 50}
    assert kept["adversarial"] == {"weight": 0.5, "data": None, "images": 50}
    for others, said in ((flags[:4], "adversarial"), (flags[:2] + flags[4:], "distribution")):
        assert f"made with another {said}" in job.refused(capsys, "search", *others)
    job.do(("train", *flags, "--train.loss", "end_to_end", "--train.distribution", "1", "--train.adversarial", "1"))
    said = capsys.readouterr().out
    assert "1 times the unbiased MMD^2" in said and "1 times the relativistic loss" in said
    assert not [*job.data.rglob("*training*")]
    assert job.run("evaluate", "--evaluate.features", "pixels") == 2
    assert "static was learned to match a distribution in pixels features" in capsys.readouterr().err
