"""Shared by the tests of the jobs: one small experiment that is finished, and copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from small_job import WHOLE_JOB, Job


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An experiment in which the whole job has run once; what a test changes there, it changes for all."""
    return Job.begun(tmp_path_factory.mktemp("job")).do(*WHOLE_JOB)


@pytest.fixture
def job(finished: Job, tmp_path: Path) -> Job:
    """A copy of the finished experiment, free to be damaged."""
    return Job(Path(shutil.copytree(finished.folder, tmp_path / "job")))


@pytest.fixture(scope="session")
def whole(finished: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The finished experiment, with a blackbox grid too, evaluated."""
    job = Job(Path(shutil.copytree(finished.folder, tmp_path_factory.mktemp("whole") / "job")))
    with open(job.folder / "small.yml", "a") as config:
        config.write("blackbox: {trials: 3}\n")
    assert job.run("search", "--method", "blackbox") == job.run("evaluate") == 0
    return job


@pytest.fixture
def spoiled(whole: Job, tmp_path: Path) -> Job:
    return Job(Path(shutil.copytree(whole.folder, tmp_path / "job")))
