"""Results and the options that they were made with: others are refused or announced, and --redo replaces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from interrupting import interrupted
from small_job import LABEL, Job, edit
from ts_adapt.jobs import labels, search, train
from ts_adapt.schedules.file import LearnedGrid


def content(path: Path) -> dict[Path, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {file: file.read_bytes() for file in files if file.is_file()}


CASES = [
    (("search",), "static", ("--static.iterations", "3"), "static.iterations (2, now 3)"),
    (("train",), "predictor", ("--train.epochs", "3"), "train.epochs (1, now 3)"),
    (LABEL, "labels", ("--per_sample.iterations", "3"), "per_sample.iterations (2, now 3)"),
]


def place(job: Job, what: str) -> Path:
    return {"static": job.static, "predictor": job.predictor, "labels": job.labels()}[what]


@pytest.mark.parametrize(("command", "what", "changed", "expected"), CASES, ids=["static", "predictor", "labels"])
def test_other_options_are_named_and_redo_replaces(job: Job, capsys, command, what, changed, expected) -> None:
    path = place(job, what)
    before = content(path)
    message = job.refused(capsys, *command, *changed)
    assert str(path) in message and expected in message and "--redo" in message
    assert content(path) == before
    assert job.run(*command, *changed, "--redo") == 0
    after = content(path)
    assert after != before and after.keys() == before.keys()
    assert job.run(*command, *changed) == 0
    assert job.run(*command, *changed, "--redo") == 0  # nothing is left to be replaced
    assert content(path) == after
    assert {file.name for file in path.parent.glob("[!.]*")} == {path.name}


@pytest.mark.parametrize(("command", "what", "changed", "expected"), CASES, ids=["static", "predictor", "labels"])
def test_the_old_result_stays_until_the_new_one_is_complete(
    job: Job, monkeypatch, command, what, changed, expected
) -> None:
    path = place(job, what)
    before = content(path)
    module, name, at = {
        "static": (search, "search_static", 1),
        "predictor": (train, "save_predictor", 1),
        "labels": (labels, "search_per_sample", 2),
    }[what]
    monkeypatch.setattr(module, name, interrupted(getattr(module, name), at))
    assert job.run(*command, *changed, "--redo") == 130
    assert content(path) == before
    monkeypatch.undo()
    assert job.run(*command, *changed, "--redo") == 0
    assert content(path) != before


def test_what_follows_from_a_replaced_result_is_refused_until_it_is_made_anew(job: Job, capsys) -> None:
    changed, before = ("--static_samples", "16", "--static.iterations", "9"), LearnedGrid.load(job.static).grid.times
    assert job.run("search", *changed, "--redo") == 0
    assert not torch.equal(LearnedGrid.load(job.static).grid.times, before)
    for command in (("train",), ("evaluate",)):
        message = job.refused(capsys, *command, *changed)
        assert "another static grid than today's" in message and "--redo`" in message
    assert "another static grid" in job.refused(capsys, *LABEL, *changed)
    assert job.run(*LABEL, *changed, "--redo") == 0
    assert job.run("train", *changed, "--redo") == 0
    assert job.run(*LABEL, "--split", "test", *changed, "--redo") == 0
    assert job.run("evaluate", *changed) == 0


def test_a_predictor_of_other_labels_is_refused(job: Job, capsys) -> None:
    changed = ("--per_sample.lr", "0.2")
    assert job.run(*LABEL, *changed, "--redo") == 0
    assert "other labels than today's; give --redo" in job.refused(capsys, "train", *changed)
    assert job.run("train", *changed, "--redo") == 0


def test_other_options_are_announced_where_the_result_is_used(job: Job, capsys) -> None:
    capsys.readouterr()
    assert job.run("sample", "--static.iterations", "9", "--count", "1") == 0
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "warning" in message and "static.iterations (2, now 9)" in message
    assert job.run("sample", "--count", "1") == 0
    assert capsys.readouterr().err == ""


def test_a_result_that_does_not_say_how_it_was_made_is_damaged(job: Job, capsys) -> None:
    kept = json.loads(job.static.read_text())
    del kept["made_with"]["static"]["iterations"]
    job.static.write_text(json.dumps(kept))
    assert "static.iterations (None, now 2)" in job.refused(capsys, "search")
    del kept["made_with"]
    job.static.write_text(json.dumps(kept))
    assert "has no 'made_with'; it is damaged" in job.refused(capsys, "search")
    assert job.run("search", "--redo") == 0


def test_blackbox_is_searched_anew_by_another_sampler(job: Job, capsys) -> None:
    flags = ("search", "--method", "blackbox", "--blackbox.sampler", "random", "--blackbox.trials")
    assert job.run(*flags, "3") == 0
    assert "blackbox.trials (3, now 4)" in job.refused(capsys, *flags, "4")
    assert job.run(*flags, "4", "--redo") == 0
    path = job.data / "blackbox/unipc-2-nfe3.json"
    assert LearnedGrid.load(path).about["made_with"]["blackbox"]["trials"] == 4
    assert "blackbox.seed (0, now 1)" in job.refused(capsys, *flags, "4", "--blackbox.seed", "1")
    assert job.run(*flags, "4", "--blackbox.storage", f"sqlite:///{job.folder}/other.db") == 0


def test_options_that_a_result_does_not_depend_on_refuse_nothing(job: Job, capsys) -> None:
    """Also where it is from a time when they were recorded, and what was left open was not."""
    idle = {
        "static": {"starts": 5, "tolerance": 0.5, "smoothing": 1.0},
        "per_sample": {"candidates": 9, "spread": 0.1, "seed": 3},
    }
    named = [(f"--{group}.{name}", str(value)) for group, given in idle.items() for name, value in given.items()]
    flags = [word for pair in named for word in pair]
    learned = ["shift", "scale", "history", "residual"]
    as_used = ("--static_validation", "8", "--train.validation", "4", "--train.corrections", ",".join(learned))
    kept = json.loads(job.static.read_text())["made_with"]
    assert kept["static_validation"] == 8 and not idle["static"].keys() & kept["static"].keys()
    made = json.loads((job.predictor / "config.json").read_text())["made_with"]
    assert (made["train"]["validation"], made["train"]["corrections"]) == (4, learned)
    losses = {"distribution", "adversarial", "caption"}
    assert made.keys() == {"train", "derivative", "derivative_width", "label_samples"} | losses
    for command in (("search",), LABEL, ("train",)):
        before = job.content()
        assert job.run(*command, *flags, *as_used) == 0 and job.content() == before
    made["train"] |= {"validation": None, "corrections": None}
    edit(job.predictor / "config.json", made_with=made)
    edit(job.static, made_with={**kept, "static_validation": None, "static": {**kept["static"], **idle["static"]}})
    for command in (("search",), ("train",)):
        before = job.content()
        assert job.run(*command, *as_used) == 0 and job.content() == before
    assert "static_validation (8, now 7)" in job.refused(capsys, "search", "--static_validation", "7")
    assert "train.corrections" in job.refused(capsys, "train", "--train.corrections", "shift")


IDLE = {
    "end_to_end": {
        "train.label_epochs": 9, "train.label_lr": 0.5, "train.validate_every": 3, "label_samples": 10,
        "distribution.images": 7, "caption": "none", "derivative_width": 0.1, "train.validation": 4,
        "train.corrections": "shift,scale,history,start",
    },
    "labels": {"train.epochs": 9, "train.lr": 0.5, "derivative": "slow", "train.corrections": "shift,scale,history"},
}  # fmt: skip


@pytest.mark.parametrize("loss", IDLE)
def test_a_half_done_training_goes_on_unless_what_it_depends_on_is_another(job: Job, monkeypatch, loss) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def left(*flags: str) -> dict[Path, bytes]:
        assert job.run(*training, *flags) == 130
        return content(folder)

    training = ("train", "--predictor", "one-shot", "--train.loss", loss, "--derivative", "exact")
    folder, idle = job.data / "predictors/one-shot", [f"--{name}={value}" for name, value in IDLE[loss].items()]
    monkeypatch.setattr("ts_adapt.jobs.train.save_predictor", interrupted)
    begun = left()
    (checkpoint,) = (path for path in begun if path.suffix == ".training")
    assert left(*idle) == begun
    used = "--train.lr" if loss == "end_to_end" else "--train.label_lr"
    assert left(used, "0.01").keys() > begun.keys()
    if loss == "labels":
        before = content(folder)
        assert job.run(*LABEL, "--per_sample.lr", "0.2", "--redo") == 0
        assert left().keys() > before.keys()
        return
    monkeypatch.undo()
    assert job.run(*training, *idle) == 0 and not checkpoint.exists()


def test_corrections_that_were_left_open_are_those_that_the_network_has(job: Job, capsys) -> None:
    fewer = ("--train.corrections", "shift,scale,history")
    assert job.run("train", *fewer, "--redo") == 0
    made = json.loads((job.predictor / "config.json").read_text())["made_with"]
    edit(job.predictor / "config.json", made_with={**made, "train": {**made["train"], "corrections": None}})
    before = job.content()
    assert job.run("train", *fewer) == 0 and job.content() == before
    for command in (("train",), ("learn", "--plan", "--learn", "recursive")):
        assert "train.corrections" in job.refused(capsys, *command)
