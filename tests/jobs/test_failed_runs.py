"""A run that fails while it is sampled: it is skipped and told, the rest of the product goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation import records, sample
from ts_adapt.jobs.evaluate import evaluate
from ts_adapt.jobs.runs import _made, generate
from ts_adapt.jobs.session import Session
from ts_adapt.storage.layout import PARTS

FAILED = "ddim-nfe4-linear.safetensors"


@pytest.fixture
def session(tmp_path: Path) -> Session:
    config = Config(name="failing", distance="l2", solvers=["ddim"], nfe=[4])
    config.model.name = "gaussian-mixture"
    config.teacher.nfe, config.teacher.test_samples = 8, 20
    config.evaluate = replace(config.evaluate, samples=20, batch_size=2, grids=["karras", "linear"], features="pixels")
    config.data_root, config.log_root = str(tmp_path / "data"), str(tmp_path / "logs")
    config.validate()
    return Session(config, progress=False)


def failing(monkeypatch: pytest.MonkeyPatch, bad: Callable[[Any, range], bool]) -> None:
    """Let the parts of a schedule fail as numbers that are not finite do."""
    former = sample._sampled

    def sampled(schedule: Any, objective: Any, batch: Any, extractor: Any, rows: range, *rest: Any) -> Any:
        if bad(schedule, rows):
            raise TsAdaptError("the solve gave numbers that are not finite")
        return former(schedule, objective, batch, extractor, rows, *rest)

    monkeypatch.setattr(sample, "_sampled", sampled)


def of_linear(session: Session) -> Callable[[Any, range], bool]:
    """Whether it is the second part of the linear grid."""
    times = session.fixed_grids(session.steps("ddim", 4))["linear"].times
    return lambda schedule, rows: torch.equal(schedule.times, times) and rows.start == 8


def facts(session: Session) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((session.workspace.logs / "results.json").read_text())["facts"]["skipped"]
    return found


def test_the_others_are_measured_and_the_reason_is_told_until_it_succeeds(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, of_linear(session))
        rows, _ = evaluate(session)
    assert [row.schedule for row in rows] == ["karras"]
    reason = "ddim, NFE 4, linear: the solve gave numbers that are not finite"
    assert facts(session) == [
        {"pruned": "none", "cacher": "none", "quantizer": "none", "run": FAILED, "reason": reason}
    ]
    said = capsys.readouterr()
    assert f"skipped: the full network: {reason}" in said.out and "runs are missing" not in said.err
    rows, _ = evaluate(session)
    assert [row.schedule for row in rows] == ["karras", "linear"] and facts(session) == []


def test_where_every_run_fails_the_first_reason_ends_the_evaluation(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda schedule, rows: True)
    with pytest.raises(TsAdaptError, match="could be measured: ddim, NFE 4, karras: the solve gave numbers"):
        evaluate(session)


def test_a_reason_stays_while_other_nfes_are_measured(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing(patch, of_linear(session))
        evaluate(session)
    (first,) = facts(session)
    session.config.nfe = [5]
    evaluate(Session(session.config, progress=False))
    assert facts(session) == [first]


def test_a_disk_that_is_full_ends_the_job(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(session)
    (session.workspace.runs / FAILED).unlink()

    def full(path: Path, tensors: Any) -> None:
        raise TsAdaptError(f"{path} cannot be written: no space left")

    monkeypatch.setattr(records, "write_tensors", full)
    with pytest.raises(TsAdaptError, match="no space left") as raised:
        generate(session)
    assert not isinstance(raised.value, sample.RunError)


def test_processes_tell_one_another_which_runs_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int]] = []

    def make(place: int, unit: int) -> None:
        tried.append((place, unit))
        if place == 0:
            raise sample.RunError("mine")

    units = [(0, 1), (0, 2), (1, 1)]
    assert _made(units, make) == {0: "mine"} and tried == [(0, 1), (1, 1)], "what has failed is not tried again"
    monkeypatch.setattr("ts_adapt.distributed.gathered", lambda value: [value, {0: "theirs", 2: "theirs"}])
    assert _made(units, make) == {0: "mine", 2: "theirs"}


def test_one_that_was_killed_between_a_run_and_the_end_of_its_parts_leaves_none(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*arguments: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as once, pytest.raises(Killed):
        once.setattr(sample, "remove_parts", killed)
        generate(session)
    parts = session.workspace.runs / PARTS
    assert list(parts.iterdir())
    generate(session)
    assert not list(parts.iterdir())
