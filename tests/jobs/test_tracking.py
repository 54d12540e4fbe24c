"""TensorBoard always; Weights & Biases when it is installed and asked for, by accelerate's tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from small_job import Job
from ts_adapt.commands import Train
from ts_adapt.config import Config
from ts_adapt.jobs import tracking
from ts_adapt.options import hints_of


class Tracker:
    """In the place of accelerate's, which would import wandb."""

    said: ClassVar[list[Any]] = []
    broken = False

    def __init__(self, project: str, **options: Any) -> None:
        self.said.append((project, options))

    def start(self) -> None:
        if self.broken:
            raise ValueError("api_key not configured\nmore")
        self.said.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.said.append(values["name"])

    def finish(self) -> None:
        self.said.append("finish")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    class Own(Tracker):
        said: ClassVar[list[Any]] = []

    monkeypatch.setattr(accelerate.tracking, "WandBTracker", Own)
    monkeypatch.setattr(tracking, "find_spec", lambda name: object())
    return Own


def scalars(folder: Path) -> set[str]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return set(found.Tags()["scalars"])


def test_evaluate_writes_to_tensorboard_and_needs_no_tracker(job: Job) -> None:
    assert job.run("evaluate") == 0
    tags = scalars(job.folder / "logs/small/tensorboard/evaluate")
    assert {"distance/unipc-2/static", "fid_data/unipc-2/recursive", "flops/unipc-2/karras"} <= tags


def test_wandb_follows_what_tensorboard_is_told(job: Job, tracker: type[Tracker]) -> None:
    assert job.run("evaluate", "--trackers", "tensorboard,wandb") == 0
    (project, options), *then = tracker.said
    assert project == "ts_adapt" and options["sync_tensorboard"] and options["name"] == "small evaluate"
    assert options["dir"] == str(job.folder / "logs/small") and then == ["start", "small", "finish"]
    assert scalars(job.folder / "logs/small/tensorboard/evaluate")
    assert job.run("search", "--method", "nonsense", "--trackers", "wandb") == 2
    assert tracker.said[-1] == "finish"


def test_what_cannot_be_tracked_is_said(job: Job, tracker: type[Tracker], monkeypatch: Any, capsys: Any) -> None:
    tracker.broken = True
    message = job.refused(capsys, "evaluate", "--trackers", "wandb")
    assert "wandb cannot begin (api_key not configured more); run `wandb login`, set WANDB_MODE=offline" in message
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    message = job.refused(capsys, "evaluate", "--trackers", "wandb")
    assert "the tracker wandb is not installed; pip install wandb" in message
    assert "did you mean 'wandb'" in job.refused(capsys, "evaluate", "--trackers", "wandbb")


def test_no_key_is_taken_on_the_command_line() -> None:
    assert not [option for option in hints_of(Config) | hints_of(Train) if "key" in option or "token" in option]
