"""The gradient-free search: it starts at the start, finds a planted optimum, ends the same however it was stopped."""

from __future__ import annotations

import math

import pytest
import torch
from optuna.trial import TrialState

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.parametric import logits_to_times
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import ContinuousVP
from ts_adapt.search.blackbox import SAMPLERS, BlackboxOptions, search_blackbox
from ts_adapt.search.workers import open_study

NOISE = ContinuousVP()
START = TimeGrid(fixed.make("log_snr", NOISE, 3))
GOAL = NOISE.log_snr(logits_to_times(torch.tensor([0.8, -0.4, -0.4]), NOISE))


def planted(grid):
    return float((NOISE.log_snr(grid.times) - GOAL).square().mean())


@pytest.fixture
def url(tmp_path):
    return f"journal:///{tmp_path}/trials.log"


def search(score, storage, alone=False, **options):
    place = {"storage": storage, "study": "a", "alone": alone, "progress": False}
    return search_blackbox(score, NOISE, START, BlackboxOptions(**options), **place)


def test_approaches_a_planted_optimum_and_resumes(url):
    calls = []

    def score(grid):
        calls.append(grid)
        return planted(grid)

    search(score, url, trials=10)
    result = search(score, url, trials=60)
    assert len(calls) == result.trials == 60
    torch.testing.assert_close(calls[0].times, START.times)
    assert result.start_distance == planted(calls[0])
    assert result.distance < 0.2 * result.start_distance
    assert planted(result.grid) == pytest.approx(result.distance)


@pytest.mark.parametrize(("storage", "sampler"), [("sqlite", "cmaes"), *(("journal", sampler) for sampler in SAMPLERS)])
def test_killed_anywhere_it_ends_in_the_same_grid(tmp_path, storage, sampler):
    asked = []

    def run(name, dies_at=None):
        def score(grid):
            if len(asked) == dies_at:
                raise SystemExit
            asked.append(grid.times.tolist())
            return planted(grid)

        return search(score, f"{storage}:///{tmp_path}/{name}", alone=True, trials=14, sampler=sampler, seed=3)

    whole = run("whole")
    wanted, asked[:] = list(asked), []
    for dies_at in (0, 1, 7, 13):
        with pytest.raises(SystemExit):
            run("broken", dies_at)
    open_study("a", f"{storage}:///{tmp_path}/broken", SAMPLERS["random"](0)).ask()  # what SIGKILL leaves
    broken = run("broken")
    assert asked == wanted and len({tuple(times) for times in asked}) == 14
    assert torch.equal(broken.grid.times, whole.grid.times)
    assert (broken.distance, broken.start_distance, broken.trials) == (whole.distance, whole.start_distance, 14)


def test_a_score_that_is_not_a_number_is_the_worst(url):
    scores = iter([2.0, math.nan, math.inf, 1.0])
    result = search(lambda _: next(scores), url, trials=4, sampler="random")
    assert (result.distance, result.start_distance, result.trials) == (1.0, 2.0, 4)


@pytest.mark.parametrize(
    ("options", "said"), [({"sampler": "x"}, "unknown blackbox.sampler 'x'"), ({"trials": 0}, "at least 1")]
)
def test_options_that_cannot_be_worked_with_are_refused(options, said):
    with pytest.raises(TsAdaptError, match=said):
        search(planted, "sqlite://", **options)


@pytest.mark.parametrize("content", [b'{"op_code": 0', b"junk\n" * 3, b"\x00" * 40 + b"\n{}\n"])
def test_of_a_damaged_journal_the_torn_end_is_cut_off_and_anything_else_is_named(url, tmp_path, content):
    path = tmp_path / "trials.log"
    search(planted, url, alone=True, trials=3, sampler="random")
    path.write_bytes(path.read_bytes() + content)
    if content.endswith(b"\n"):
        with pytest.raises(TsAdaptError, match=str(path)):
            search(planted, url, alone=True, trials=5, sampler="random")
    else:
        assert search(planted, url, alone=True, trials=5, sampler="random").trials == 5


def test_the_start_is_known_when_its_worker_died_and_others_were_done_first(url):
    """Draw 0 is then made again behind the others, and is the start all the same."""
    study, asked = open_study("a", url, SAMPLERS["random"](0)), []
    dead = study.ask()

    def score(grid):
        asked.append(grid.times)
        if len(asked) == 13:
            study.tell(dead.number, state=TrialState.FAIL)
        return planted(grid)

    result = search(score, url, trials=14)
    assert not torch.equal(asked[0], START.times)
    torch.testing.assert_close(asked[13], START.times)
    assert (result.start_distance, result.trials) == (planted(START), 14)
