"""The soak, with two kills a job: nothing is lost, nothing differs. And what would count as such."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import soak
from ts_adapt.storage.files import write_tensors


def test_jobs_killed_twice_end_as_if_they_had_not_been() -> None:
    jobs = ["search per-sample", "search blackbox", "train", "evaluate"]
    done = subprocess.run(
        [sys.executable, soak.__file__, "--kills", "2", "--jobs", *jobs],
        capture_output=True, text=True, timeout=600, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"kills": 8, "lost": 0, "differing": 0}


def test_numbers_count_and_times_do_not(tmp_path: Path) -> None:
    def made(seconds: float, distance: float) -> dict[str, str]:
        runs = {"distance": torch.tensor([distance]), "seconds": torch.tensor(seconds)}
        write_tensors(tmp_path / "logs/runs/a.safetensors", runs)
        (tmp_path / "logs/results.csv").write_text(f"distance,seconds_per_image\n{distance},{seconds}\n")
        rows = {"rows": [{"distance": distance, "seconds_per_image": seconds}]}
        (tmp_path / "logs/results.json").write_text(json.dumps(rows))
        (tmp_path / "static.json").write_text(f"{distance}")
        (tmp_path / ".static.json.lock").write_text(f"process {seconds}")
        found: dict[str, str] = soak.content(tmp_path)
        return found

    first = made(1.0, 2.0)
    assert len(first) == 4 and made(3.0, 2.0) == first
    assert all(text != first[name] for name, text in made(1.0, 2.5).items())


def test_what_a_killed_job_leaves_out_or_behind_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, work = tmp_path / "before", tmp_path / "after", tmp_path / "work"
    for folder in (before, after):
        folder.mkdir()
    for name in ("a", "b", "c"):
        (after / name).write_text(name)
    codes = iter([-9, -9, 0])

    def run(arguments: list[str], folder: Path, delay: float | None = None) -> int:
        code = next(codes)
        (folder / "a").write_text("a") if not (folder / "b").exists() else (folder / "a").unlink(missing_ok=True)
        (folder / "b").write_text("b")
        if code == 0:
            (folder / "a").write_text("A")
            (folder / ".c.tmp").write_text("")
        return code

    monkeypatch.setattr(soak, "run", run)
    tally = soak.soak("teach", before, after, 1.0, 2, work, lambda: 0.5)
    assert (tally.kills, tally.lost, tally.differing) == (2, 2, 2)
    assert tally.found == ["lost: teach: a", "lost: teach: c", "differing: teach: .c.tmp", "differing: teach: a"]
