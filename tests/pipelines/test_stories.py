"""The whole job on a pipeline in a folder, by its commands, to an attached run that ends where the student does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tiny_families import family, last_state
from ts_adapt import cli
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation import comparison
from ts_adapt.evaluation.metrics import FeatureStatistics
from ts_adapt.jobs.learn import steps_of
from ts_adapt.jobs.search import search
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.teach import teach
from ts_adapt.jobs.train import train
from ts_adapt.pipelines.arguments import Arguments
from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.sampling import integrate
from ts_adapt.schedulers.attach import attach
from ts_adapt.schedulers.scheduler import LearnedScheduler

STEPS, SOLVER = 3, "unipc-2"
PROMPTS = ["a cat", "the big dog", "nothing", "a red house"]
SEVEN = ("sd15", "sdxl", "sd35", "flux", "qwen-image", "sana", "wan")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL: dict[str, Any] = {
    "name": "story", "solvers": [SOLVER], "nfe": [STEPS], "distance": "l2", "static_samples": 4, "static_validation": 4,
    "label_samples": 4,
    "oracle_samples": 4, "label_batch": 4,
    "model": {"device": "cpu", "dtype": "float32"},
    "teacher": {"solver": "dpmpp-2m", "nfe": 6, "train_samples": 10, "test_samples": 6, "batch_size": 5},
    "static": {"iterations": 2, "evaluations": 8, "batch_size": 4},
    "train": {"samples": 10, "epochs": 1, "batch_size": 5, "width": 4, "hidden": 8},
    "evaluate": {"samples": 6, "batch_size": 3, "features": "pixels", "grids": ["karras", "uniform"]},
}  # fmt: skip
"""What is small in place of the options of a config."""
EXPLICIT: dict[str, Any] = {"corrections": ["shift"], "method": "adam"}
"""Options of the static search that take other times than those of a loop."""


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    inner = {key: overlaid(below[key], value) for key, value in above.items() if isinstance(value, dict)}
    return {**below, **above, **inner}


class Story:
    """A folder with a tiny pipeline, prompts, and the published config of its family, in small; runs commands on it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.pipe, self.call = family(name)
        self.pipe.save_pretrained(folder / "model")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        places = {
            "data_root": str(folder / "data"), "log_root": str(folder / "logs"),
            "teacher": {"prompts": str(folder / "prompts.txt")}, "model": {"name": str(folder / "model")},
        }  # fmt: skip
        published = yaml.safe_load((CONFIGS / f"{name}.yml").read_text())
        options = overlaid(overlaid(published, SMALL), places)
        self.call = options["model"]["call"] = {**published["model"]["call"], **self.call}
        self.config = folder / "config.yml"
        self.config.write_text(yaml.safe_dump(options))

    def __call__(self, command: str, *flags: str) -> int:
        return cli.main([command, "--config", str(self.config), "--quiet", *flags])

    @property
    def session(self) -> Session:
        return Session(cli.parse(["teach", "--config", str(self.config)]).config, progress=False)


@pytest.mark.parametrize("name", SEVEN)
def test_a_published_config_gives_the_call_what_it_takes(name: str) -> None:
    pipe, _ = family(name)
    config = cli.parse(["teach", "--config", str(CONFIGS / f"{name}.yml")]).config
    assert config.model.call and Arguments(pipe, config.model.call).shared == config.model.call
    assert config.teacher.train_samples >= config.static_samples + config.static_validating


def tell(name: str, folder: Path) -> Story:
    """Teach, learn, compare and export; what is exported ends in the pipeline where the student does."""
    story = Story(name, folder)
    session = story.session
    shared = session.static_name
    learned = [shared] if session.denoiser.loop_times_only else [shared, "recursive"]
    training = [("train", "--predictor", kind) for kind in learned[1:]]
    for step in (("teach",), ("search",), *training, ("evaluate",)):
        assert story(*step) == 0, step
    table = json.loads((folder / "logs" / "story" / "results.json").read_text())
    assert {"karras", "uniform", *learned} <= {row["schedule"] for row in table["rows"]}
    _, batch = session.teacher("test")
    policies: dict[str, Any] = {shared: session.shared(shared, SOLVER, STEPS).grid}
    for kind in learned[1:]:
        policies[kind] = session.predictor(kind, SOLVER, STEPS).predictor.policy(STEPS)
    prompts = [PROMPTS[int(i) % len(PROMPTS)] for i in batch.index]
    for kind, policy in policies.items():
        with torch.no_grad():
            end = integrate(session.denoiser, session.solver(SOLVER), policy, batch.x_T, condition=batch.condition).x
        out = folder / kind
        assert story("export", kind, "--format", "diffusers", "--out", str(out)) == 0
        attach(story.pipe, LearnedScheduler.from_pretrained(out))
        found = last_state(story.pipe, story.call, prompts, batch.x_T, STEPS)
        assert (found - end).norm() <= 1e-5 * end.norm()
    return story


def between_means(first: FeatureStatistics, second: FeatureStatistics) -> float:
    return float(((first.mean - second.mean) ** 2).sum())


def test_the_whole_job_on_stable_diffusion_xl(tmp_path: Path) -> None:
    tell("sdxl", tmp_path)


def test_what_takes_other_times_is_left_out_of_a_network_that_cannot_be_told_them_and_refused_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PipelineDenoiser, "loop_times_only", "it has one loop for all; attach another")
    session = Story("sdxl", tmp_path).session
    assert [step.name for step in steps_of(session)] == ["teach", "static", "static+history", "evaluate"]
    static = session.config.static
    shift, adam = (session.changed(static=replace(static, **{name: value})) for name, value in EXPLICIT.items())
    asked: list[Callable[[], Any]] = [
        *(partial(steps_of, session.changed(learn=[name])) for name in ("recursive", "oracle", "static+shift")),
        *(partial(search, each, "static") for each in (shift, adam)), partial(steps_of, adam),
        partial(search, session, "per-sample"), partial(train, session, "recursive"),
    ]  # fmt: skip
    for job in asked:
        with pytest.raises(TsAdaptError, match=r"alone \(it has one loop for all\); leave it out"):
            job()
    assert not (tmp_path / "data").exists()
    for each in (shift, adam):
        each.check()  # as other jobs do
    teach(session, ("train",))
    search(session, "static")
    assert session.shared_names(SOLVER, STEPS) == ["static", "static+history"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SEVEN if name != "sdxl"])
def test_the_whole_job_on_the_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "frechet", between_means)  # roots of covariances of whole films take minutes
    tell(name, tmp_path)


@pytest.mark.slow
def test_every_other_command(tmp_path: Path) -> None:
    story = Story("sdxl", tmp_path)
    for step in (
        ("teach", "--save-png"),
        ("search", "--static.corrections", "shift,scale,coefficients"),
        ("search",),
        ("search", "--static.corrections", "[]"),
        ("search", "--method", "per-sample", "--per_sample.iterations", "2"),
        ("search", "--method", "per-sample", "--split", "test", "--per_sample.iterations", "2"),
        ("search", "--method", "blackbox", "--blackbox.trials", "3"),
        ("search", "--method", "dmn"),
        ("search", "--method", "gits", "--optimized.samples", "8"),
        ("train", "--predictor", "one-shot", "--train.loss", "both", "--train.label_epochs", "1"),
        ("train", "--predictor", "recursive-all"),
        ("sample", "--schedule", "recursive-all", "--count", "2"),
        ("quantize", "--quantizer", "hqq4"),
        ("search", "--student.quantizer", "hqq4"),
        ("search", "--student.cacher", "deepcache-2", "--checkpointing", "false"),
        ("prune", "--out", str(tmp_path / "pruned.json"), "--prune.cost", "0.9"),
        ("evaluate", "--cachers", "none,deepcache-2", "--quantizers", "none,hqq4"),
    ):
        assert story(*step) == 0, step
    rows = json.loads((tmp_path / "logs" / "story" / "results.json").read_text())["rows"]
    assert {"static", "static+shift+scale+coefficients", "oracle", "blackbox", "dmn", "gits", "one-shot"} <= {
        row["schedule"] for row in rows
    }
    assert len(list((tmp_path / "logs").rglob("*.png"))) > 2
