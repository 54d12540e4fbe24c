"""Full disks, folders that cannot be written to, two commands at once, clocks that jump: nothing finished is lost."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from small_job import LABEL, Job
from ts_adapt.storage import files
from ts_adapt.storage.folders import hold, making

BLACKBOX = ("search", "--method", "blackbox")
COMMANDS = {
    "teacher": ("teach",),
    "static": ("search",),
    "labels": LABEL,
    "blackbox": BLACKBOX,
    "predictor": ("train",),
    "runs": ("evaluate",),
}


def place(job: Job, what: str) -> Path:
    """Where the command leaves what it makes."""
    return {
        "teacher": job.data / "teacher/train", "static": job.static, "labels": job.labels(), "runs": job.runs,
        "blackbox": job.data / "blackbox/unipc-2-nfe3.json", "predictor": job.predictor,
    }[what]  # fmt: skip


def remove(job: Job, what: str) -> None:
    path = place(job, what)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (job.data / "blackbox/optuna.db").unlink(missing_ok=True)


FULL, FORBIDDEN = (errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written")


@pytest.mark.parametrize(
    ("what", "at", "number", "said"),
    [
        *((what, 1, *FORBIDDEN) for what in ("teacher", "static", "runs")),
        *((what, 1, *FULL) for what in ("blackbox", "predictor")),
        *((what, at, *FULL) for what, at in {"teacher": 4, "labels": 3, "runs": 4}.items()),
    ],
)
def test_a_write_that_fails_loses_nothing_of_those_before(
    spoiled: Job, whole: Job, capsys, monkeypatch: pytest.MonkeyPatch, what: str, at: int, number: int, said: str
) -> None:
    wanted = whole.content()
    remove(spoiled, what)
    left, replace, writes = spoiled.content(), os.replace, []

    def failing(*paths: Path) -> None:
        writes.append(paths)
        if len(writes) == at:
            raise OSError(number, os.strerror(number))
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", failing)
        assert said in spoiled.refused(capsys, *COMMANDS[what])
    kept = spoiled.content()
    assert left.keys() <= kept.keys()
    before = {path: path.stat().st_mtime_ns for path in spoiled.folder.rglob("*.safetensors")}
    assert spoiled.run(*COMMANDS[what]) == 0
    assert spoiled.content() == wanted
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not [path for path in spoiled.folder.rglob(".*.tmp")]


@pytest.mark.parametrize("what", COMMANDS)
def test_a_second_command_on_the_same_result_is_refused_at_once(spoiled: Job, whole: Job, capsys, what: str) -> None:
    remove(spoiled, what)
    left, path = spoiled.content(), place(spoiled, what)
    lock = {"teacher": path / ".lock", "runs": path.parent / ".lock"}.get(what)
    with making(path) if lock is None else hold(lock, "it"):
        message = spoiled.refused(capsys, *COMMANDS[what])
        assert "in use by another process" in message and f"process {os.getpid()}" in message
        assert left.items() <= spoiled.content().items()
        if what == "blackbox":
            shared = ("--blackbox.storage", f"journal:///{spoiled.folder}/trials.log")
            assert spoiled.run(*BLACKBOX, *shared) == 0
    assert spoiled.run(*COMMANDS[what]) == 0
    assert spoiled.content() == whole.content()


@pytest.mark.parametrize("year", [1970.5, 2100])
def test_clocks_that_jump_change_nothing(
    spoiled: Job, whole: Job, monkeypatch: pytest.MonkeyPatch, year: float
) -> None:
    then = (year - 1970) * 365.25 * 86400
    for path in spoiled.folder.rglob("*"):
        os.utime(path, (then, then))
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: then - 1000.0 * next(ticks))
    (spoiled.labels() / "part-00001.safetensors").unlink()
    assert spoiled.run(*LABEL) == 0
    monkeypatch.setattr("ts_adapt.sampling._evaluate", lambda *_: pytest.fail("the network was evaluated again"))
    for command in COMMANDS.values():
        assert spoiled.run(*command) == 0
    assert spoiled.content() == whole.content()
