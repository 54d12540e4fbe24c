"""The command line itself: its help, what it imports, and the demo's options."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import ts_adapt
from ts_adapt.cli import main, parse
from ts_adapt.commands import COMMANDS
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.options import hints_of
from ts_adapt.parsing import flag_of

ROOT = Path(__file__).parents[1]


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str, flag: str = "--help") -> str:
    with pytest.raises(SystemExit) as left:
        main([*arguments, flag])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_help_names_every_command(capsys) -> None:
    text = help_of(capsys)
    assert all(f"\n    {command} " in text for command in COMMANDS)


def test_the_examples_of_the_help_are_understood(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line.split()[1:] for line in help_of(capsys).splitlines() if line.startswith("  ts-adapt ")]
    assert len(lines) >= 8
    for words in lines:
        last_flag = max(place for place, word in enumerate(words) if word.startswith("--"))
        assert parse(words[: last_flag + 2]).name == words[0]  # behind its value stands a remark


STARTS = """
import sys
import ts_adapt.cli
try:
    ts_adapt.cli.main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"accelerate", "diffusers", "matplotlib", "optuna", "scipy.stats", "tensorboard", "torchvision", "transformers"}
print("imported:", *sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize("words", [["--help"], ["serach"]])
def test_help_and_misspelt_commands_import_no_library_of_a_job(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", STARTS, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize("words", [["search", "--nef", "3"], ["sample", "--help"]])
def test_options_are_read_without_the_libraries_of_a_job(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", STARTS, *words], capture_output=True, text=True, check=True)
    assert not {"diffusers", "scipy.stats", "tensorboard"} & set(done.stdout.splitlines()[-1].split())


def test_the_packages_names_are_listed() -> None:
    assert set(ts_adapt.__all__) <= set(dir(ts_adapt)) and all(hasattr(ts_adapt, name) for name in ts_adapt.__all__)


# --- the demo


def test_the_demo_is_a_config_of_its_own_and_takes_what_it_does_not_set() -> None:
    config = parse(["demo", "--distance", "l2", "--static.lr", "0.02", "--log_root", "x", "--nfe", "[5]"]).config
    assert (config.distance, config.static.lr, config.log_root, config.name) == ("l2", 0.02, "x", "demo")
    alone = parse(["search", "--config", str(ROOT / "configs/demo.yml")]).config
    assert alone == parse(["demo"]).config and alone != Config()


@pytest.mark.parametrize(
    ("option", "value"),
    [("nfe", "[3]"), ("solvers", "[ddim]"), ("name", "mine"), ("teacher.nfe", "40"), ("evaluate.samples", "2000")],
)
def test_the_demo_refuses_what_it_sets_itself(tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(TsAdaptError, match=rf"option {option} is .* but the demo sets it itself"):
        parse(["demo", f"--{option}", value])
    group, _, name = option.rpartition(".")
    (tmp_path / "a.yml").write_text(f"{group}: {{{name}: {value}}}" if group else f"{name}: {value}")
    with pytest.raises(TsAdaptError, match=rf"option {option} is .* but the demo sets it itself"):
        parse(["demo", "--config", str(tmp_path / "a.yml")])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_own_flags_come_first_in_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands in a config is named in short, all of it, and explained where that is asked for."""
    brief, whole = (help_of(capsys, command, flag=flag) for flag in ("--help", "--help-all"))
    own = [flag_of(option.name) for option in fields(COMMANDS[command]) if "positional" not in option.metadata]
    for text in (brief, whole):
        listed = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
        assert {*listed[: len(own) + 3]} == {*own, "--config", "--print_config", "--help-all"}
    assert brief.count("\n") < 75 and f"`ts-adapt {command} --help-all`" in brief
    named = [option.name for option in fields(Config)]
    hints = hints_of(Config)
    missing = [name for name in named if f" --{name}{'.*' if is_dataclass(hints[name]) else ''}" not in f" {brief}"]
    assert not missing
    assert all(f"  --{option} " in whole or f"  --{option}\n" in whole for option in hints if "." in option)
    assert "Keep every state of the solve" in " ".join(whole.split()) and "Keep every state" not in brief


def test_help_is_given_whatever_stands_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_of(capsys, "search", "--nef", "3") == help_of(capsys, "search")
    assert help_of(capsys, "export", flag="-h") == help_of(capsys, "export")


SAYS = """
import sys
from ts_adapt import cli
cli.run = lambda arguments: print("a \N{EN DASH} b \N{SNOWMAN}", file=getattr(sys, arguments[0]))
cli.main(sys.argv[1:])
"""


PRINTS = """
import sys
from ts_adapt import cli
cli.run = lambda arguments: [print("a line", flush=True) for _ in range(10**6)]
sys.exit(cli.main(["export", "static"]))
"""


def test_where_nobody_reads_any_more_it_ends_and_says_so() -> None:
    with subprocess.Popen([sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 141
    assert said == "ts-adapt: nobody reads the output any more; the same command begins anew\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("latin-1", r"a - b \u2603"), ("cp932", r"a - b \u2603"), ("ascii", r"a - b \u2603"), ("utf-8", "a – b ☃")],
)
def test_no_sign_is_lost_on_any_console(stream: str, encoding: str, shown: str) -> None:
    how = {"env": {**os.environ, "PYTHONIOENCODING": encoding}, "capture_output": True, "check": True}
    done = subprocess.run([sys.executable, "-c", SAYS, stream], **how)
    assert getattr(done, stream).decode(encoding).strip() == shown
