"""The loss that asks images for what their prompts say: its gradient, what it leads to, who may not judge it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from small_job import Job
from small_predictors import build, split, start, train
from tiny_clip import tiny_clip
from ts_adapt import dual_encoders
from ts_adapt.assembly import ModelOptions
from ts_adapt.config import Config
from ts_adapt.distances import l2
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import TimeGrid
from ts_adapt.jobs.runs import listed
from ts_adapt.jobs.session import Session
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.search.captions import Captions, asking
from ts_adapt.search.distribution import Real, matching, shares_of
from ts_adapt.search.static import search_static
from ts_adapt.search.static_options import StaticOptions

STEPS = 3
PROMPTS = ["red heart", "blue bird", "red apple"]


class Contrast:
    """Sees the mean square of a picture, and reads a prompt as a number."""

    def pictures(self, images):
        found = images.square().flatten(1).mean(1)
        return F.normalize(torch.stack([found, torch.ones_like(found)], 1), dim=1)

    rounded = pictures

    def captions(self, prompts):
        wanted = torch.tensor([float(prompt) for prompt in prompts], dtype=torch.float64)
        return F.normalize(torch.stack([wanted, torch.ones_like(wanted)], 1), dim=1)


FLAT = Captions(Contrast(), ["0.0", "0.1"])


@pytest.fixture(params=["zoo", "clip"])
def encoder(request, tmp_path, tiny):
    """In float64: a gradient against differences of the ninth place."""
    name = "zoo" if request.param == "zoo" else str(tiny_clip(tmp_path, tiny.tokenizer()))
    found = dual_encoders.load(name, "cpu", "caption")
    (found.net if name == "zoo" else found.model).double()
    return found


def test_the_gradient_is_that_of_differences_and_the_loss_one_minus_the_score(encoder):
    generator = torch.Generator().manual_seed(0)
    images, towards = 0.5 * torch.randn(2, 3, 3, 64, 64, generator=generator, dtype=torch.float64).clamp(-1.9, 1.9)
    images.requires_grad_()
    loss = Captions(encoder, PROMPTS).towards(torch.tensor([0, 1, 2]))
    (slope,) = torch.autograd.grad(loss(images).sum(), images)
    with torch.no_grad():
        up, down = (loss(images + sign * 1e-4 * towards).sum() for sign in (1, -1))
        score = (encoder.rounded(images) * encoder.captions(PROMPTS)).sum(1)
    assert float((slope * towards).sum()) == pytest.approx(float(up - down) / 2e-4, rel=1e-3)
    assert torch.allclose(1 - score, loss(images), atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 2, 64), (1, 3, 5, 64, 64)])
def test_what_is_no_picture_is_refused(encoder, shape):
    with pytest.raises(TsAdaptError, match=r"knows pictures of .* leave it out|leave caption out"):
        encoder.pictures(torch.zeros(shape))


def test_a_sample_is_asked_for_its_own_prompt_whatever_the_batch():
    images = torch.linspace(-0.9, 0.9, 5, dtype=torch.float64).reshape(5, 1, 1, 1)
    index = torch.tensor([1, 0, 2, 3, 6])
    whole = FLAT.towards(index)(images)
    for place in range(5):
        assert torch.allclose(FLAT.towards(index[place : place + 1])(images[place : place + 1]), whole[place])
    wanted, square = torch.tensor([0.1, 0.0, 0.0, 0.1, 0.0], dtype=torch.float64), images.flatten().square()
    cosine = (1 + wanted * square) / ((1 + wanted**2) * (1 + square**2)).sqrt()
    assert torch.allclose(whole, 1 - cosine)


def test_the_gradient_reaches_the_grid_through_the_solver(problem):
    objective, batch = problem
    objective = replace(asking(objective, FLAT, 0.7).differentiated("exact"), distance=lambda x, y: 0 * l2(x, y))
    space = GridSpace(objective.denoiser.noise_schedule, STEPS)
    z = space.numbers(start(objective, STEPS)["log_snr"])
    few = batch.rows(slice(0, 8))
    few = replace(few, x_T=few.x_T.double(), target=few.target.double())
    z.requires_grad_()
    (slope,) = torch.autograd.grad(objective(space.grid(z), few).sum(), z)
    for place in range(STEPS):
        step = torch.zeros_like(z)
        step[place] = 1e-4
        with torch.no_grad():
            up, down = (objective(space.grid(z + sign * step), few).sum() for sign in (1, -1))
        assert float(slope[place]) == pytest.approx(float(up - down) / 2e-4, rel=1e-4, abs=1e-8)


def test_it_stands_beside_the_distance_and_a_distribution(problem):
    objective, batch = problem
    grid = start(objective, STEPS)["log_snr"]
    real = Real(objective.denoiser.draw(50, 1), l2)
    ends = objective.denoiser.decode(objective.student(grid, batch))
    found = ends.flatten(1).double()
    paired, asked = objective.measure(grid, batch), FLAT.towards(batch.index)(ends)
    both = matching(asking(objective, FLAT, 0.7), real, 0.3)
    wanted = paired + 0.7 * asked + 0.3 * shares_of(found, found, real)
    assert torch.allclose(both.measure(grid, batch, 13), wanted.float(), rtol=1e-4)


def asked_of(objective, schedule, batch):
    with torch.no_grad():
        return float(FLAT.towards(batch.index)(objective.denoiser.decode(objective.student(schedule, batch))).mean())


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
def test_a_search_shows_more_of_the_prompts(problem, method):
    objective, batch = problem
    train, validation = split(batch)
    shown = {}
    for weight in (0.0, 10.0):
        options = StaticOptions(method=method, iterations=15, lr=0.15, corrections=["scale", "history"], caption=weight)
        given = FLAT if weight else None
        result = search_static(
            objective, train, validation, start(objective, STEPS), options, captions=given, progress=False
        )
        shown[weight] = asked_of(objective, result.grid, validation)
        paired = float(objective.measure(result.grid, validation).mean())
        assert result.distance == pytest.approx(paired + weight * shown[weight], rel=1e-3)
    assert shown[10.0] < 0.9 * shown[0.0]


def test_a_predictor_learns_it_too(problem, tmp_path):
    objective, batch = problem
    shown = {}
    for weight in (0.0, 10.0):
        predictor = build(OneShot, objective.denoiser.noise_schedule, STEPS, corrections=["scale", "history"])
        options = TrainOptions(epochs=8, lr=0.03, batch_size=16, caption=weight)
        train(predictor, problem, tmp_path / str(weight), options, captions=FLAT if weight else None)
        shown[weight] = asked_of(objective, predictor.policy(), batch)
    assert shown[10.0] < 0.9 * shown[0.0]


def test_without_a_weight_it_is_no_part_of_what_a_training_is():
    """So that what was begun before there was such a loss goes on."""
    assert TrainOptions().record["caption"] is None and TrainOptions(caption=0.5).record["caption"] == 0.5


@pytest.mark.parametrize("group", ["static", "train"])
def test_the_network_that_is_learned_by_may_not_judge(group, tmp_path):
    config = Config()
    getattr(config, group).caption = 1.0
    with pytest.raises(TsAdaptError, match=r"teacher\.prompts"):
        config.validate()
    config.teacher.prompts = "prompts.txt"
    config.validate()
    for caption, clip in (("zoo", "zoo"), (str(tmp_path / "clip"), str(tmp_path / "others" / ".." / "clip"))):
        config.caption, config.evaluate.clip = caption, clip
        with pytest.raises(TsAdaptError, match="who is learned by may not judge"):
            config.validate()
    config.evaluate.clip = "owner/another"
    config.validate()


SMALL = """
name: small
model: {name: emoji-sd}
guidance: 4.0
solvers: [ddim]
nfe: [2]
static_samples: 2
teacher: {prompts: prompts.txt, solver: ddim, nfe: 4, train_samples: 4, test_samples: 2}
static: {method: adam, iterations: 1, corrections: []}
evaluate: {samples: 2, features: judge, clip: zoo}
"""


def test_it_is_a_job_whose_result_its_network_does_not_judge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    job = Job.begun(tmp_path, SMALL)
    assert job.run("teach", "--split", "train") == 0
    flags = ("--static.caption", "0.5")
    assert "caption and evaluate.clip are both zoo" in job.refused(capsys, "search", *flags)
    assert job.run("search", *flags, "--evaluate.clip", "null") == 0
    assert "0.5 times one minus the score of image and prompt" in capsys.readouterr().out
    grid = LearnedGrid.load(job.data / "static/ddim-nfe2.json")
    assert grid.about["made_with"]["caption"] == {"weight": 0.5, "by": "zoo"}
    session = Session(Config())
    session.config.evaluate.clip = "zoo"
    with pytest.raises(TsAdaptError, match="may not judge it too"):
        session.check_judge("static", grid.about)
    assert "made with another caption" in job.refused(capsys, "search")
    lost = ("--caption", str(tmp_path / "nowhere"), "--evaluate.clip", "null", "--redo")
    assert job.run("search", *lost) == 0  # which asks for no prompts, and so for no network that reads them
    assert job.run("search", "--method", "dmn", *flags, *lost) == 0
    for command in (("search", *flags), ("learn", "--train.caption", "0.5")):
        assert "nowhere' cannot be had" in job.refused(capsys, *command, *lost)


@pytest.mark.parametrize(
    ("pleased", "judges"),
    [({"caption": {"weight": 0.5, "by": "zoo"}}, {"clip": "zoo"}), ({"distribution": {"weight": 0.5}}, {})],
)
def test_who_a_file_was_learned_to_please_does_not_judge_it(pleased, judges, tmp_path):
    """Wherever it was learned."""
    session = Session(Config(model=ModelOptions("gaussian-mixture"), solvers=["ddim"], nfe=[STEPS], distance="l2"))
    times, options = fixed.make("karras", session.noise_schedule, STEPS), session.config.evaluate
    for name, made_with in (("pleased", pleased), ("paired", {})):
        about = {"made_with": made_with, "distance": "l2"}
        LearnedGrid(TimeGrid(times), "ddim", STEPS, about).save(tmp_path / f"{name}.json", session.noise_schedule)
    options.features, options.clip = "pixels", judges.get("clip")
    options.schedules = [str(tmp_path / "paired.json")]
    assert listed(session)["ddim", STEPS].keys() == {"paired"}
    options.schedules = [str(tmp_path / "pleased.json")]
    with pytest.raises(TsAdaptError, match="may not judge it too"):
        listed(session)
