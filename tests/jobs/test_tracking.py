"""TensorBoard always; Weights & Biases when it is installed and asked for, by accelerate's tracker."""

from __future__ import annotations

import shutil
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
        self.said.append(values)

    def finish(self) -> None:
        self.said.append("finish")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    class Own(Tracker):
        said: ClassVar[list[Any]] = []

    monkeypatch.setattr(accelerate.tracking, "WandBTracker", Own)
    monkeypatch.setattr(tracking, "find_spec", lambda name: object())
    return Own


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def scalars(folder: Path) -> set[str]:
    return set(events(folder).Tags()["scalars"])


def test_evaluate_writes_to_tensorboard_and_needs_no_tracker(job: Job) -> None:
    """Every number of results.csv, pictures of every schedule, the run's name and its config."""
    assert job.run("evaluate") == 0
    found = events(job.logs / "tensorboard/evaluate")
    tags = set(found.Tags()["scalars"])
    assert {"distance/unipc-2/static", "fid_data/unipc-2/recursive", "flops/unipc-2/karras"} <= tags
    rows = job.rows(20)
    assert {row["schedule"] for row in rows} >= {"karras", "static", "recursive"}
    for row in rows:
        for column in ("kid", "precision", "recall", "distance_median", "wins", "fid_teacher"):
            if row[column]:
                *_, point = found.Scalars(f"{column}/unipc-2/{row['schedule']}")
                assert point.value == pytest.approx(float(row[column]), rel=1e-6) and point.step == 3
    assert found.Tags()["images"] == ["samples/unipc-2"]
    said = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert said["run/text_summary"] == "small evaluate" and "nfe: 12" in said["config/text_summary"]


def test_a_training_has_a_point_a_validation_in_one_folder(job: Job) -> None:
    folder = job.logs / "tensorboard/recursive/unipc-2-nfe3"
    shutil.rmtree(folder)
    assert job.run("train", "--train.label_epochs", "5", "--train.validate_every", "2", "--redo") == 0
    found, files = events(folder), [path for path in folder.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {folder}
    validated = [point.step for point in found.Scalars("validation/relative")]
    assert [point.step for point in found.Scalars("train/labels")] == [2, 4, 5]
    trained = [point.step for name in ("labels", "end-to-end") for point in found.Scalars(f"train/{name}")]
    assert trained == validated


def test_wandb_follows_what_tensorboard_is_told(job: Job, tracker: type[Tracker]) -> None:
    assert job.run("evaluate", "--trackers", "tensorboard,wandb") == 0
    (project, options), *then = tracker.said
    assert project == "ts_adapt" and options["sync_tensorboard"] and options["name"] == "small evaluate"
    begun, told, ended = then
    assert options["dir"] == str(job.logs) and (begun, ended) == ("start", "finish")
    assert told["name"] == "small" and told["blackbox"]["seed"] == 0
    assert scalars(job.logs / "tensorboard/evaluate")
    assert job.run("search", "--method", "nonsense", "--trackers", "wandb") == 2
    assert tracker.said[-1] == "finish"


def test_no_tracker_is_told_the_password_of_a_database(tracker: type[Tracker], tmp_path: Path) -> None:
    config = Config(name="small", log_root=str(tmp_path), trackers=["wandb"])
    config.blackbox.storage = "postgresql://me:secret@host/studies"
    with tracking.board(config, "search", tmp_path / "board"), tracking.tracked(config, "search"):
        pass
    written = b"".join(path.read_bytes() for path in (tmp_path / "board").iterdir())
    assert b"trials: 100" in written and b"secret" not in written
    told = next(said for said in tracker.said if isinstance(said, dict))
    assert told["blackbox"]["trials"] == 100 and "secret" not in str(told)


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
