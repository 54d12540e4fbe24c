"""Learned changes of pictures: of x_T for the first step, of x0 in every step; nothing before training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from noise_schedules import PLAIN
from own_loops import by_hand, our_own
from small_job import Job
from small_predictors import KINDS, STEPS, build, train, walked
from ts_adapt import LearnedScheduler, integrate
from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.analytic import GaussianDenoiser, example_mixture
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.cost import count_flops
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import HISTORY, RESIDUAL, START, Node, TimeGrid
from ts_adapt.noise import BetaTable
from ts_adapt.policies import Around, FollowGrid
from ts_adapt.predictors.changes import BOUND, DILATIONS, WIDTH, Change, Moved
from ts_adapt.predictors.encoder import Encoder
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.store import load_predictor, save_predictor

NOISES = {name: PLAIN[name] for name in ("vp", "flow", "edm")}
CONFIG = DDIMScheduler().config


MOVING = [*((kind, "start") for kind in KINDS), (Recursive, "residual")]
"""Which predictors have which change."""


def moving(kind, noise_schedule, name="start", **options):
    """A predictor whose change is at random weights, and everything else as before training."""
    predictor = build(kind, noise_schedule, corrections=[name], **options)
    torch.nn.init.normal_(getattr(predictor, name).weight, 0, 0.3)
    return predictor


def times_of(noise_schedule):
    """Evenly from pure noise almost to the end."""
    span = noise_schedule.t_max - noise_schedule.t_min
    return noise_schedule.t_min + span * torch.linspace(1, 0.05, STEPS + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Added(Around):
    """A policy whose every step has the residual `change`."""

    change: torch.Tensor

    def init(self, x_T, condition):
        return self.policy.init(x_T, condition)

    def next(self, x_t, x0, node, state):
        found, state = self.policy.next(x_t, x0, node, state)
        return Node.of(found.index, found.steps, found.t, {**found.held, RESIDUAL: self.change}), state


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpmpp-3m", "unipc-3", "ipndm-4"])
@pytest.mark.parametrize("noise_schedule", NOISES.values(), ids=NOISES)
def test_where_x0_does_not_depend_on_the_state_it_is_another_noise(noise_schedule, solver):
    """Of data in one point: then the solve from x_T, moved, is the solve from the moved x_T."""
    denoiser, solver = GaussianDenoiser(noise_schedule, 0.5, 1e-20, (1, 4, 4)), build_solver(solver, noise_schedule)
    grid = FollowGrid(times_of(noise_schedule))
    x_T, change = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    noise = lambda step: torch.ones_like(x_T)  # noqa: E731
    moved = integrate(denoiser, solver, Moved(grid, lambda *_: change), x_T, step_noise=noise, check=False).x
    torch.testing.assert_close(moved, integrate(denoiser, solver, grid, x_T + change, step_noise=noise, check=False).x)
    assert not torch.allclose(moved, integrate(denoiser, solver, grid, x_T, step_noise=noise, check=False).x, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpmpp-3m", "unipc-3", "ipndm-4", "ddpm"])
@pytest.mark.parametrize("noise_schedule", NOISES.values(), ids=NOISES)
def test_a_residual_is_another_prediction(noise_schedule, solver):
    """The solve whose every x0 is changed is that of data in another point, with weights of a history too."""
    solver = build_solver(solver, noise_schedule)
    x_T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    change, noise = torch.full_like(x_T, 0.25), lambda step: torch.ones_like(x_T)

    def solve(mean, policy):
        denoiser = GaussianDenoiser(noise_schedule, mean, 1e-20, (1, 4, 4))
        return integrate(denoiser, solver, policy, x_T, step_noise=noise, check=False).x

    for held in ({}, {HISTORY: torch.full((STEPS, STEPS + 1), 0.1, dtype=torch.float64)}):
        grid = FollowGrid(TimeGrid.of(times_of(noise_schedule), held))
        torch.testing.assert_close(solve(0.5, Added(grid, change)), solve(0.75, grid))
        assert not torch.allclose(solve(0.5, grid), solve(0.75, grid), atol=1e-2)


@pytest.mark.parametrize(("kind", "name"), MOVING)
def test_untrained_it_changes_no_bit_and_trained_it_is_bounded(kind, name, problem):
    objective, batch = problem
    noise_schedule = objective.denoiser.noise_schedule
    plain, changed = (build(kind, noise_schedule, corrections=names) for names in ([], [name]))
    changed.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(*(objective.student(predictor.policy(), batch) for predictor in (plain, changed)))
    torch.nn.init.normal_(getattr(changed, name).weight, 0, 100)
    policy = changed.policy()
    node, state = policy.init(batch.x_T, {})
    held = policy.next(batch.x_T, batch.target, node, state)[0].held
    reach = BOUND * float(noise_schedule.sigma(node.t).max()) if name == "start" else BOUND
    change = held[START if name == "start" else RESIDUAL]
    assert 0.9 * reach < float(change.abs().max()) <= reach * (1 + 1e-6)
    assert not torch.allclose(*(objective.student(predictor.policy(), batch) for predictor in (plain, changed)))


@pytest.mark.parametrize("size", [(16, 16), (28, 28), (64, 64)])
def test_every_pixel_of_it_sees_all_of_the_state(size):
    torch.manual_seed(0)
    encoder, start = Encoder(1, 1, size=size), Change(1, 1, 128, 1)
    torch.nn.init.normal_(start.weight)
    picture = torch.randn(1, 1, *size, requires_grad=True)
    start(picture, encoder.features(picture, 0), 0)[0, 0, 0, 0].backward()
    assert bool((picture.grad != 0).all())


@pytest.mark.parametrize("first", [0, 1])
def test_a_start_is_the_first_steps_and_none_inside_and_every_step_has_a_residual_of_its_own(first, problem):
    objective, batch = problem
    start, residual = (
        walked(moving(Recursive, objective.denoiser.noise_schedule, name).policy(first=first), batch)
        for name in ("start", "residual")
    )
    assert [START in node.held for node in start] == [not first, *[False] * (STEPS - first - 1)]
    assert len(residual) == STEPS - first
    assert all(not torch.allclose(a.held[RESIDUAL], b.held[RESIDUAL]) for a, b in pairwise(residual))


def test_every_weight_of_a_residual_is_used_by_the_steps_of_one_number_of_them(problem):
    objective, batch = problem
    predictor = moving(Recursive, objective.denoiser.noise_schedule, "residual", served=(2, 4))
    used = {}
    for steps in (2, 4):
        predictor.zero_grad()
        objective(predictor.policy(steps), batch).sum().backward()
        used[steps] = predictor.residual.weight.grad.flatten(1).any(1).tolist()
    assert used == {2: [True] * 2 + [False] * 4, 4: [False] * 2 + [True] * 4}


def test_a_predictor_that_is_asked_once_has_no_residual():
    with pytest.raises(TsAdaptError, match="train a recursive one"):
        build(OneShot, NOISES["vp"], corrections=["residual"])


@pytest.mark.parametrize(("kind", "name"), MOVING)
def test_the_condition_and_for_recursive_ones_x0_reach_it(kind, name, problem):
    objective, batch = problem
    predictor = moving(kind, objective.denoiser.noise_schedule, name, classes=2)

    def change(label, x0):
        policy = predictor.policy()
        node, state = policy.init(batch.x_T, {"class_labels": torch.full((len(batch),), label)})
        return policy.next(batch.x_T, x0, node, state)[0].held[START if name == "start" else RESIDUAL]

    assert not torch.allclose(change(0, batch.target), change(1, batch.target))
    assert torch.equal(change(0, batch.target), change(0, -batch.target)) == (kind is not Recursive)


@pytest.mark.parametrize(("kind", "name"), MOVING)
def test_each_number_of_steps_has_its_own(kind, name, problem, tmp_path):
    objective, batch = problem
    predictor = moving(kind, objective.denoiser.noise_schedule, name, served=(2, 4))
    save_predictor(tmp_path, predictor, {})
    loaded, _ = load_predictor(tmp_path, objective.denoiser.noise_schedule)
    before = {steps: objective.student(loaded.policy(steps), batch) for steps in (2, 4)}
    assert all(torch.equal(before[n], objective.student(predictor.policy(n), batch)) for n in before)
    loaded.forget(2)
    assert torch.equal(before[4], objective.student(loaded.policy(4), batch))
    assert not torch.allclose(before[2], objective.student(loaded.policy(2), batch), atol=1e-4)
    static = TimeGrid(loaded.static(2))
    torch.testing.assert_close(objective.student(loaded.policy(2), batch), objective.student(static, batch))


@pytest.mark.parametrize("name", ["start", "residual"])
def test_it_is_learned(name, problem, tmp_path):
    objective, batch = problem
    predictor = build(Recursive, objective.denoiser.noise_schedule, corrections=[name])
    with torch.no_grad():
        before = float(objective.measure(predictor.policy(), batch).mean())
    train(predictor, problem, tmp_path, TrainOptions(epochs=20, batch_size=8))
    assert bool(getattr(predictor, name).weight.any())
    assert float(objective.measure(predictor.policy(), batch).mean()) < 0.9 * before


def test_its_operations_are_counted(problem):
    objective, batch = problem

    def counted(*names):
        predictor = build(Recursive, objective.denoiser.noise_schedule, corrections=names)
        return count_flops(lambda: objective.student(predictor.policy(), batch))

    convolutions = 2 * len(batch) * 2 * 2 * WIDTH * 9 * (3 + len(DILATIONS) * WIDTH)  # a state of 4x4 is 2x2 inside
    assert counted("start") - counted() >= convolutions
    assert counted("residual") - counted() >= STEPS * convolutions


@pytest.mark.parametrize(("kind", "name"), [("one-shot", "start"), ("recursive", "start"), ("recursive", "residual")])
def test_it_is_trained_by_name_and_no_grid_has_it(kind, name, tmp_path, capsys):
    job = Job.begun(tmp_path)
    assert job.run("teach") == job.run("search") == 0
    wanted = ("--predictor", kind, "--train.corrections", f"shift,{name}", "--train.loss", "end_to_end")
    assert job.run("train", *wanted) == 0
    folder = job.data / "predictors" / kind / "unipc-2-nfe3"
    assert load_predictor(folder, example_mixture().noise_schedule)[0].options["corrections"] == ["shift", name]
    assert name in job.refused(capsys, "search", "--static.corrections", name, "--redo")
    with pytest.raises(TsAdaptError, match="train a predictor"):
        GridSpace(NOISES["vp"], 3, [name])


@pytest.mark.parametrize(("kind", "name"), MOVING)
def test_the_scheduler_does_what_a_solve_does(kind, name, tmp_path):
    noise_schedule = BetaTable.from_config(CONFIG)
    predictor = moving(kind, noise_schedule, name)
    LearnedScheduler.from_predictors(predictor, "unipc-3", CONFIG).save_pretrained(tmp_path)
    scheduler = LearnedScheduler.from_pretrained(tmp_path)
    with torch.no_grad():
        found = by_hand(scheduler, STEPS)
        torch.testing.assert_close(found, our_own(scheduler, predictor.policy()), rtol=1e-4, atol=1e-4)
        predictor.forget(STEPS)
        assert not torch.allclose(found, our_own(scheduler, predictor.policy()), atol=1e-2)


def test_states_that_are_no_pictures_are_refused():
    noise_schedule = NOISES["vp"]
    denoiser = GaussianDenoiser(noise_schedule, 0.5, 0.3, (4, 4))
    grid, x_T = FollowGrid(torch.tensor([1.0, 0.5, 0.1])), torch.randn(2, 4, 4)
    for policy in (Moved(grid, lambda x_T, *_: x_T[:, None]), Added(grid, x_T[:, None])):
        with pytest.raises(TsAdaptError, match=r"of shape \(1, 4, 4\), as pictures, and the solve's are \(4, 4\)"):
            integrate(denoiser, build_solver("ddim", noise_schedule), policy, x_T)
