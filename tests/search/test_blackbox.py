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
from ts_adapt.search.blackbox import SAMPLERS, BlackboxOptions, search_blackbox
from ts_adapt.search.workers import open_study


def planted(noise_schedule):
    goal = noise_schedule.log_snr(logits_to_times(torch.tensor([0.8, -0.4, -0.4]), noise_schedule))

    def score(grid):
        return float((noise_schedule.log_snr(grid.times) - goal).square().mean())

    return score


@pytest.fixture
def start(mixture):
    return TimeGrid(fixed.make("log_snr", mixture.noise_schedule, 3))


def test_approaches_a_planted_optimum_and_resumes(mixture, start, tmp_path):
    noise_schedule, calls = mixture.noise_schedule, []

    def score(grid):
        calls.append(grid)
        return planted(noise_schedule)(grid)

    place = {"storage": f"journal:///{tmp_path}/trials.log", "study": "a", "progress": False}
    search_blackbox(score, noise_schedule, start, BlackboxOptions(trials=10), **place)
    result = search_blackbox(score, noise_schedule, start, BlackboxOptions(trials=60), **place)
    assert len(calls) == result.trials == 60
    torch.testing.assert_close(calls[0].times, start.times)
    assert result.start_distance == planted(noise_schedule)(calls[0])
    assert result.distance < 0.2 * result.start_distance
    assert planted(noise_schedule)(result.grid) == pytest.approx(result.distance)


@pytest.mark.parametrize(("storage", "sampler"), [("sqlite", "cmaes"), *(("journal", sampler) for sampler in SAMPLERS)])
def test_killed_anywhere_it_ends_in_the_same_grid(mixture, start, tmp_path, storage, sampler):
    noise_schedule, options = mixture.noise_schedule, BlackboxOptions(trials=14, sampler=sampler, seed=3)
    asked = []

    def search(name, dies_at=None):
        def score(grid):
            if len(asked) == dies_at:
                raise SystemExit
            asked.append(grid.times.tolist())
            return planted(noise_schedule)(grid)

        url = f"{storage}:///{tmp_path}/{name}"
        return search_blackbox(
            score, noise_schedule, start, options, storage=url, study="a", alone=True, progress=False
        )

    whole = search("whole")
    wanted, asked[:] = list(asked), []
    for dies_at in (0, 1, 7, 13):
        with pytest.raises(SystemExit):
            search("broken", dies_at)
    open_study("a", f"{storage}:///{tmp_path}/broken", SAMPLERS["random"](0)).ask()  # what SIGKILL leaves
    broken = search("broken")
    assert asked == wanted and len({tuple(times) for times in asked}) == 14
    assert torch.equal(broken.grid.times, whole.grid.times)
    assert (broken.distance, broken.start_distance, broken.trials) == (whole.distance, whole.start_distance, 14)


def test_a_score_that_is_not_a_number_is_the_worst(mixture, start, tmp_path):
    scores = iter([2.0, math.nan, math.inf, 1.0])
    options = BlackboxOptions(trials=4, sampler="random")
    url = f"journal:///{tmp_path}/trials.log"
    result = search_blackbox(
        lambda _: next(scores), mixture.noise_schedule, start, options, storage=url, study="a", progress=False
    )
    assert (result.distance, result.start_distance, result.trials) == (1.0, 2.0, 4)


@pytest.mark.parametrize(
    ("options", "said"), [({"sampler": "x"}, "unknown blackbox.sampler 'x'"), ({"trials": 0}, "at least 1")]
)
def test_options_that_cannot_be_worked_with_are_refused(mixture, start, options, said):
    with pytest.raises(TsAdaptError, match=said):
        search_blackbox(
            planted(mixture.noise_schedule),
            mixture.noise_schedule,
            start,
            BlackboxOptions(**options),
            storage="sqlite://",
            study="b",
        )


@pytest.mark.parametrize("content", [b'{"op_code": 0', b"junk\n" * 3, b"\x00" * 40 + b"\n{}\n"])
def test_of_a_damaged_journal_the_torn_end_is_cut_off_and_anything_else_is_named(mixture, start, tmp_path, content):
    path = tmp_path / "trials.log"
    place = {"storage": f"journal:///{path}", "study": "a", "progress": False, "alone": True}
    options = BlackboxOptions(trials=3, sampler="random")
    search_blackbox(planted(mixture.noise_schedule), mixture.noise_schedule, start, options, **place)
    path.write_bytes(path.read_bytes() + content)
    more = BlackboxOptions(trials=5, sampler="random")
    if content.endswith(b"\n"):
        with pytest.raises(TsAdaptError, match=str(path)):
            search_blackbox(planted(mixture.noise_schedule), mixture.noise_schedule, start, more, **place)
    else:
        assert (
            search_blackbox(planted(mixture.noise_schedule), mixture.noise_schedule, start, more, **place).trials == 5
        )


def test_the_start_is_known_when_its_worker_died_and_others_were_done_first(mixture, start, tmp_path):
    """Draw 0 is then made again behind the others, and is the start all the same."""
    url, options, asked = f"journal:///{tmp_path}/trials.log", BlackboxOptions(trials=14), []
    study = open_study("a", url, SAMPLERS["random"](0))
    dead = study.ask()

    def score(grid):
        asked.append(grid.times)
        if len(asked) == 13:
            study.tell(dead.number, state=TrialState.FAIL)
        return planted(mixture.noise_schedule)(grid)

    result = search_blackbox(score, mixture.noise_schedule, start, options, storage=url, study="a", progress=False)
    assert not torch.equal(asked[0], start.times)
    torch.testing.assert_close(asked[13], start.times)
    assert (result.start_distance, result.trials) == (planted(mixture.noise_schedule)(start), 14)
