"""A run killed by SIGKILL, at random moments and around every write, and started again: the same bytes.

As a program it is the process that imports torch and forks (one thread, so forking is safe); its children generate and
are killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from forked import codes, fork
from small_teacher import content, make

FINE = torch.linspace(1, 1e-3, 21, dtype=torch.float64)


def die_at(call: int) -> None:
    """Be killed before or after one of the calls that bring files to the disk: two moments a call, from 0 on."""
    moments = iter(range(sys.maxsize))

    def die() -> None:
        if next(moments) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> None:
            die()
            function(*args)
            die()

        return wrapper

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def begun(folder: Path, samples: int, call: int | None = None) -> list[int]:
    """The process that generates in `folder`, and dies at a `call`."""

    def part(rank: int) -> None:
        if call is not None:
            die_at(call)
        make(folder, samples, grid=FINE)

    return fork(1, part)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    random.seed(0)
    make(folder / "small", 6, grid=FINE)  # in this process: what is imported late, the children need not import again
    start = time.monotonic()
    make(folder / "whole", 120, grid=FINE)
    duration, kills, calls = time.monotonic() - start, 0, 0
    while True:
        child = begun(folder / "random", 120)
        time.sleep(random.uniform(0, 0.05 * duration))
        if kills < 15:
            os.kill(child[0], signal.SIGKILL)
        if (code := codes(child)[0]) == 0:
            break
        assert code == -signal.SIGKILL, code
        kills += 1
    while (code := codes(begun(folder / f"call-{calls}", 6, calls))[0]) != 0:
        assert code == -signal.SIGKILL, code
        assert codes(begun(folder / f"call-{calls}", 6)) == [0]
        calls += 1
    print(json.dumps({"kills": kills, "calls": calls}))


def test_killed_at_any_moment_and_resumed_the_files_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    assert counted["kills"] >= 5 and counted["calls"] >= 15
    assert len(content(tmp_path / "whole")) == 31
    assert content(tmp_path / "random") == content(tmp_path / "whole")
    for call in range(counted["calls"] + 1):
        assert content(tmp_path / f"call-{call}") == content(tmp_path / "small"), call


if __name__ == "__main__":
    main(Path(sys.argv[1]))
