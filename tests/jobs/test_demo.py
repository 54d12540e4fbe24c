"""The demo, cut down once more: it ends with what it found and with commands that run on its files as they stand."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ts_adapt.cli import main, parse
from ts_adapt.commands import Demo
from ts_adapt.jobs import demo

SMALL = """
name: demo
solvers: [unipc-3]
nfe: [5]
rescale_published: true
static_samples: 8
oracle_samples: 8
optimized: {samples: 16}
teacher: {nfe: 8, train_samples: 16, test_samples: 12, shard_size: 128}
static: {iterations: 1, starts: 1, corrections: []}
per_sample: {iterations: 1, random_starts: 0}
train: {samples: 12, epochs: 1, width: 4, hidden: 16}
evaluate: {samples: 12, grids: [karras, ays-svd]}
"""


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The demo on a dozen samples."""
    path = tmp_path_factory.mktemp("config") / "demo.yml"
    path.write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Demo, "base", ("--config", str(path)))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        text = folder / "stdout"
        with text.open("w") as file, pytest.MonkeyPatch.context() as output:
            output.setattr(sys, "stdout", file)
            assert main(["demo", "--quiet", "--log_root", "results of mine"]) == 0
    return folder, text.read_text()


def commands(text: str) -> list[list[str]]:
    _, _, offered = text.partition("To go on")
    return [shlex.split(line) for line in offered.splitlines() if line.startswith("    ")]


def test_it_ends_with_its_findings_and_the_next_commands(run: tuple[Path, str]) -> None:
    _, text = run
    findings = text[text.index("unipc-3, NFE 5, paired distance to the teacher:") :]
    better = "(better than|worse than|no different from)"
    share = r"[+-][\d.]+ %"
    found = rf"mean {share} \(95 % interval {share} to {share}\), median {share}, nearer on \d+ % of \d+ samples"
    assert re.search(rf"- static is {better} the best fixed grid, (karras|ays-svd): {found}\.", findings)
    for name in ("static\\+shift", "one-shot", "recursive"):
        assert re.search(rf"- {name} is {better} static: {found}\.", findings)
    assert re.search(rf"- oracle is {better} static: {found}; times alone", findings)
    assert {words[words.index("--config") + 1] for words in commands(findings)} == {"results of mine/demo/config.yml"}


def test_the_next_commands_run_as_they_stand(run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = run
    monkeypatch.chdir(folder)
    printed = commands(text)
    assert {words[3] for words in printed} == {"sample", "export", "search", "evaluate"}
    for words in printed:
        assert words[:3] == [sys.executable, "-m", "ts_adapt.cli"]
        assert main([*words[3:], "--quiet"]) == 0, words
    logs = folder / "results of mine/demo"
    assert (logs / "samples/static+shift-unipc-3-nfe5/grid.png").exists()
    assert (logs / "scheduler/config.json").exists() or list((logs / "scheduler").iterdir())
    assert "dmn" in {row["schedule"] for row in json.loads((logs / "results.json").read_text())["rows"]}


def test_a_command_runs_in_a_process_of_its_own(run: tuple[Path, str]) -> None:
    folder, text = run
    words = next(words for words in commands(text) if "sigmas" in words)
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split(",")) == 6


def test_the_config_is_the_one_it_ran_with(run: tuple[Path, str]) -> None:
    folder, _ = run
    ran = parse(["demo", "--log_root", "results of mine"]).config
    for command in ("sample", "demo"):
        assert parse([command, "--config", str(folder / "results of mine/demo/config.yml")]).config == ran
    assert (ran.teacher.nfe, ran.log_root) == (8, "results of mine")


def test_other_options_are_refused_and_redo_takes_them(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run[0], tmp_path / "demo"))
    monkeypatch.chdir(folder)
    words = ["demo", "--quiet", "--log_root", "results of mine", "--static.lr", "0.02", "--train.lr", "0.02"]
    static, kept = folder / "train_data/demo/static/unipc-3-nfe5.json", folder / "results of mine/demo/config.yml"
    before, options = static.read_bytes(), kept.read_bytes()
    capsys.readouterr()
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "static.lr (0.08, now 0.02)" in message and "--redo" in message and message.count("\n") == 1
    assert static.read_bytes() == before and kept.read_bytes() == options
    monkeypatch.setattr(demo, "evaluate", lambda session: ([], Path("report.html")))
    assert main([*words, "--redo"]) == 0
    assert json.loads(static.read_text())["made_with"]["static"]["lr"] == 0.02
    for kind in ("one-shot", "recursive"):
        config = folder / f"train_data/demo/predictors/{kind}/unipc-3-nfe5/config.json"
        assert json.loads(config.read_text())["made_with"]["train"]["lr"] == 0.02
    assert kept.read_bytes() != options


def test_the_program_is_called_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "ts-adapt"
    script.parent.mkdir()
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "")
    assert shlex.split(demo.next_commands(Path("c.yml"))[0])[0] == str(script)
    monkeypatch.setenv("PATH", str(script.parent))
    assert shlex.split(demo.next_commands(Path("c.yml"))[0])[0] == "ts-adapt"
