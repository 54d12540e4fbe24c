"""What an error tells to run works as it stands; an interrupt says what is kept, and it is."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path

import pytest

from small_job import SMALL, Job, sentence
from ts_adapt.cli import main
from ts_adapt.commands import COMMANDS


def follow(capsys, words: list[str], depth: int = 0) -> list[str]:
    """Run the command `words`; as long as it is refused, do first what it says. The commands run besides."""
    capsys.readouterr()
    done: list[str] = []
    while (code := main(words)) != 0:
        assert code == 2 and depth < 6
        (command,) = re.findall("`ts-adapt (.*?)`", sentence(capsys))
        assert command not in done, "the same remedy twice"
        done += [*follow(capsys, [*shlex.split(command), "--quiet"], depth + 1), command]
        capsys.readouterr()
    return done


@pytest.fixture
def fresh(tmp_path: Path) -> Job:
    (tmp_path / "a folder").mkdir()
    return Job.begun(tmp_path / "a folder", SMALL)


@pytest.mark.parametrize(
    ("command", "steps"),
    [
        (["train", "--predictor", "recursive", "--nfe", "4"], {"teach", "search"}),
        (
            ["sample", "--schedule", "static+scale", "--solver", "ddim", "--steps", "4", "--count", "1"],
            {"teach", "search"},
        ),
        (["sample", "--schedule", "one-shot", "--steps", "4", "--count", "1"], {"teach", "search", "train"}),
        (["export", "blackbox", "--blackbox.trials", "2", "--steps", "2"], {"teach", "search"}),
        (["evaluate", "--evaluate.samples", "24"], {"teach"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_remedies_lead_to_the_goal(fresh: Job, capsys, command: list[str], steps: set[str]) -> None:
    config = ["--config", str(fresh.folder / "small.yml"), "--quiet", *fresh.roots, "--name", "mine"]
    done = follow(capsys, [command[0], *config, *command[1:]])
    assert {line.split()[0] for line in done} == steps
    assert all("--name mine" in line and "'" in line for line in done)  # the folder's name has a space
    assert not (fresh.data.parent / "small").exists()


def test_the_remedy_for_labels_names_their_split(job: Job, capsys) -> None:
    part = job.labels("test") / "part-00000.safetensors"
    part.rename(job.labels("test") / "part-00007.safetensors")
    message = job.refused(capsys, "evaluate")
    (command,) = re.findall("`ts-adapt (.*?)`", message)
    assert "--method per-sample" in command and str(job.folder / "small.yml") in command


@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
@pytest.mark.parametrize(
    ("command", "called"),
    [
        ("teach", "ts_adapt.jobs.teach.teach"),
        ("search", "ts_adapt.jobs.search.search"),
        ("train", "ts_adapt.jobs.train.train"),
        ("evaluate", "ts_adapt.jobs.evaluate.evaluate"),
        ("sample", "ts_adapt.jobs.sample.sample_to_folder"),
        ("import", "ts_adapt.jobs.import_schedule.import_schedule"),
        ("search", "ts_adapt.cli.read_line"),
    ],
)
def test_an_interrupt_says_what_is_kept(
    fresh: Job, capsys, monkeypatch, command: str, called: str, number: str, code: int, word: str
) -> None:
    monkeypatch.setattr(called, lambda *_, **__: signal.raise_signal(getattr(signal, number)))
    former = signal.getsignal(signal.SIGTERM)
    assert fresh.run(command, *(["-"] if command == "import" else [])) == code
    assert sentence(capsys) == f"ts-adapt: {word}; {COMMANDS[command].kept}"
    assert signal.getsignal(signal.SIGTERM) == former


def test_a_terminated_search_goes_on_with_what_is_missing(job: Job, capsys, monkeypatch) -> None:
    from ts_adapt.jobs import search

    original, found = search.search_static, []

    def second(*args: object, **options: object) -> object:
        if found:
            signal.raise_signal(signal.SIGTERM)
        found.append(args)
        return original(*args, **options)

    monkeypatch.setattr(search, "search_static", second)
    assert job.run("search", "--nfe", "3,4,5") == 143
    monkeypatch.setattr(
        search, "search_static", lambda *args, **options: found.append(args) or original(*args, **options)
    )
    assert job.run("search", "--nfe", "3,4,5") == 0
    assert len(found) == 2 and {path.name for path in job.static.parent.glob("*.json")} == {
        f"unipc-2-nfe{nfe}.json" for nfe in (3, 4, 5)
    }
