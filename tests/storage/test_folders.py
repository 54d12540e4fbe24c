"""folders: one process at a time makes a result, and what a killed one left is put in order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage import files
from ts_adapt.storage.folders import hold, if_free, making, replace_folder


@pytest.mark.parametrize("time", [None, 0, 4e9])
def test_the_lock_is_held_by_one_and_given_back_and_goes_by_no_clock(tmp_path: Path, time: float | None) -> None:
    lock = tmp_path / "folder" / ".lock"
    with hold(lock, "the folder"):
        if time is not None:
            os.utime(lock, (time, time))
        expected = f"the folder is in use .*process {os.getpid()}"
        with pytest.raises(TsAdaptError, match=expected) as error, hold(lock, "the folder"):
            pass
        assert "\n" not in str(error.value)
    with hold(lock, "the folder"):
        pass


def test_the_lock_of_a_process_that_died_is_free(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    script = "import fcntl, os, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script, str(lock)], check=False).returncode == -9
    with hold(lock, "the folder"):
        pass


def test_what_another_process_holds_is_done_without(tmp_path: Path) -> None:
    result = tmp_path / "result"
    with if_free(making(result)) as first, if_free(making(result)) as second:
        assert first and not second
        with pytest.raises(TsAdaptError, match="in use"), making(result):
            pass
    with if_free(making(result)) as again:
        assert again
    (tmp_path / "file").write_text("")
    with pytest.raises(TsAdaptError, match="could not be written"), if_free(making(tmp_path / "file" / "result")):
        pass


def test_what_is_made_is_held_and_only_its_own_leftovers_go(tmp_path: Path) -> None:
    result = tmp_path / "ddim-nfe3.json"
    mine = [".ddim-nfe3.json.01.tmp", ".ddim-nfe3.journal.02.tmp"]
    others = [".ddim-nfe30.json.03.tmp", "ddim-nfe3.journal", "ddim-nfe30.json"]
    for name in (*mine, *others):
        (tmp_path / name).write_text("")
    with making(result):
        assert {p.name for p in tmp_path.iterdir()} == {*others, f".{result.name}.lock"}
        with pytest.raises(TsAdaptError, match=f"{result} is in use"), making(result):
            pass
        with making(tmp_path / "ddim-nfe30.json"):
            pass


def folder_with(path: Path, content: str) -> Path:
    files.write_bytes(path / "config.json", content.encode())
    return path


@pytest.mark.parametrize("step", range(5))
def test_a_folder_is_replaced_whenever_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    folder, new = folder_with(tmp_path / "a", "old"), folder_with(tmp_path / "a.new", "new")
    calls = []

    def stopping(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: object, **options: object) -> object:
            calls.append(name)
            if len(calls) == step + 1:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(f"{module.__name__}.{name}", call)  # type: ignore[attr-defined]

    stopping(shutil, "rmtree")
    stopping(os, "replace")
    with pytest.raises(KeyboardInterrupt):
        replace_folder(folder, new)
        raise KeyboardInterrupt
    monkeypatch.undo()
    with making(folder):
        assert (folder / "config.json").read_text() == ("old" if new.exists() else "new")
        if new.exists():
            replace_folder(folder, new)
    assert (folder / "config.json").read_text() == "new"
    assert {p.name for p in tmp_path.iterdir()} == {"a", ".a.lock"}
