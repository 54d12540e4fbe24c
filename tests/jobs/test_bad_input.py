"""Bad input of every kind: one sentence, exit code 2, and nothing that was finished or not yet begun is spoiled."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from small_job import LABEL, Job, sentence
from ts_adapt.cli import main


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sample", "--label", "cat"], "label"),
        (["sample", "--label", "3"], "has no classes"),
        (["sample", "--steps", "0"], "at least 1"),
        (["evaluate", "--evaluate.samples", "5"], "below the 10 samples of the oracle"),
        (["search", "--guidance", "2"], "leave guidance at 1"),
        (["search", "--static.corrections", "guidance"], "nothing guides the model"),
        (["search", "--model.prediction", "foo"], "leave it out"),
        (["sample", "--out", "/proc/x"], "/proc/x"),
        (["sample", "--out", "/dev/full"], "/dev/full"),
        (["search", "--nfe", "[4]", "--log_root", "/proc/x"], "/proc/x"),
        ([*LABEL, "--per_sample.lr", "0.2"], "another per_sample.lr (0.1, now 0.2); set it back, or "),
    ],
)
def test_bad_options_are_one_sentence(finished: Job, capsys, arguments, expected) -> None:
    assert expected in finished.refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--solvers", "[ddim, deis-2]", "--evaluate.grids", "[karras, karras+native]"],
            "DEIS .* the grid karras.native",
        ),
        (["--teacher.solver", "heun", "--teacher.grid", "ddim+native"], "Heun .* the teacher's grid"),
    ],
)
def test_a_solver_that_cannot_reach_the_end_of_a_grid_is_refused_before_any_work(
    tmp_path: Path, capsys, options, expected
) -> None:
    roots = ["--data_root", str(tmp_path / "data"), "--log_root", str(tmp_path / "logs")]
    assert main(["teach", "--model.name", "fashion-ddpm", "--nfe", "[4]", *options, *roots]) == 2
    assert re.search(expected, sentence(capsys))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("storage", ["foo", "sqlite:////nope/a/b.db", "mysql://x/y", "junk"])
def test_a_storage_that_cannot_be_used_is_named(job: Job, capsys, storage: str) -> None:
    job.static.unlink()
    flags = ["--blackbox.storage", storage]
    if storage == "junk":
        flags = []
        (job.folder / "train_data/small/blackbox").mkdir()
        (job.folder / "train_data/small/blackbox/optuna.db").write_bytes(b"junk" * 500)
    assert "cannot be used" in job.refused(capsys, "search", "--method", "blackbox", *flags)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe\x00\x01", "is no YAML text"),
        (b"", "is empty"),
        (b"- a", "holds a list"),
        (b"name: null", "option name is None"),
        (b"teacher:\n  nef: 3\n", "did you mean 'teacher.nfe'"),
        (b"a: [", "is no YAML text"),
        (b"[" * 20_000, "nested too deeply"),
    ],
)
def test_bad_config_files_say_what_to_do(tmp_path: Path, capsys, content: bytes, expected: str) -> None:
    (tmp_path / "bad.yml").write_bytes(content)
    assert main(["teach", "--config", str(tmp_path / "bad.yml"), "--data_root", str(tmp_path / "data")]) == 2
    assert expected in sentence(capsys)
    assert not (tmp_path / "data").exists()


def test_a_refused_command_leaves_nothing_behind(job: Job, capsys) -> None:
    job.refused(capsys, "teach", "--name", "new", "--teacher.batch_size", "0")
    assert not (job.folder / "train_data/new").exists()
    shutil.rmtree(job.labels())
    job.refused(capsys, *LABEL, "--label_batch", "-1")
    job.refused(capsys, *LABEL, "--label_samples", "0")
    assert not job.labels().exists()


def test_a_failure_before_anything_is_finished_does_not_bind_the_options(job: Job, monkeypatch) -> None:
    shutil.rmtree(job.labels())

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("ts_adapt.jobs.labels.search_per_sample", fail)
        patch.setattr("ts_adapt.jobs.teach.generate", lambda *_, **__: fail())
        assert job.run(*LABEL, "--label_batch", "20") == 2
        assert job.run("teach", "--name", "new", "--teacher.batch_size", "8") == 2
    assert job.run(*LABEL) == 0
    assert job.run("teach", "--name", "new") == 0


def test_more_labels_are_searched_and_fewer_are_used(job: Job, capsys) -> None:
    assert job.run(*LABEL, "--label_samples", "25") == 0
    assert "over 25 samples" in capsys.readouterr().out
    assert job.run(*LABEL, "--label_samples", "30") == 0
    assert "over 30 samples" in capsys.readouterr().out
    assert job.run(*LABEL, "--label_samples", "12") == 0
    assert "over 12 samples" in capsys.readouterr().out
    shutil.rmtree(job.predictor)
    assert "30 of 40" in job.refused(capsys, "train", "--label_samples", "40")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "/a/b"), "/a/b: No space left"),
        (MemoryError(), "the memory does not suffice"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "the memory does not suffice"),
        (RecursionError(), "nested too deeply"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(finished: Job, capsys, monkeypatch, error, expected) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ts_adapt.jobs.teach.teach", fail)
    assert expected in finished.refused(capsys, "teach")


def test_a_fault_of_the_program_is_not_hidden(finished: Job, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("ts_adapt.jobs.teach.teach", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        finished.run("teach")
