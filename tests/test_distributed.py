"""Several processes at one job: the same bytes as one, whoever is killed; one message where one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from small_job import SMALL, Job
from ts_adapt import distributed
from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.files import read_tensors

TESTS = Path(__file__).parent
MEASURED = {"seconds", "cost"}
"""What a run file holds that is no function of the config."""


def launched(folder: Path, *cases: str) -> tuple[dict[str, Any], str]:
    """What `launched.py` says of its cases, and what their processes printed on stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, str(TESTS / "launched.py"), str(folder), *cases],
        capture_output=True, text=True, timeout=600, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def made(job: Job) -> dict[str, Any]:
    """Everything that a job has made, by its path: bytes, of runs what is a function of the config."""
    found: dict[str, Any] = {
        str(path.relative_to(job.data)): path.read_bytes()
        for path in sorted(job.data.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }
    for path in sorted((job.folder / "logs/small/runs").glob("*")):
        if path.is_file():
            tensors = {k: v for k, v in read_tensors(path).items() if k not in MEASURED}
            found[f"runs/{path.name}"] = {name: (t.dtype, t.shape, t.tolist()) for name, t in tensors.items()}
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of the same job by one process and by two, and of one that fails."""
    folder = tmp_path_factory.mktemp("launched")
    return folder, *launched(folder, "counts 1 2", "failing")


def test_two_processes_make_the_bytes_of_one(two: tuple[Path, dict[str, Any], str]) -> None:
    folder, said, _ = two
    assert said["counts"] == {"1": [0], "2": [0, 0]}
    alone, together = (made(Job(folder / count)) for count in ("1", "2"))
    assert alone == together
    names = set(alone)
    assert {f"teacher/train/shard-{i:05d}.safetensors" for i in range(5)} <= names
    assert {f"labels/train/unipc-2-nfe3/part-{i:05d}.safetensors" for i in range(5)} <= names
    assert {"static/unipc-2-nfe3.json", "static/ddim-nfe3.json", "runs/unipc-2-nfe3-oracle.safetensors"} <= names
    assert len(list((Job(folder / "2").data / "teacher/train/images").iterdir())) == 40
    assert not list(folder.glob("[12]/**/shard-*.json")), "receipts are entered in the manifest"
    assert not list(folder.glob("[12]/**/parts/*")), "parts are joined to runs"


def test_an_error_of_one_process_ends_all_with_one_message(two: tuple[Path, dict[str, Any], str]) -> None:
    _, said, stderr = two
    assert said["failing"]["before"] == [0] and said["failing"]["together"] == [2, 2]
    assert said["failing"]["kept"] == [f"part-{i:05d}.safetensors" for i in (0, 2, 4)], "what the other did is kept"
    assert stderr.count("this part cannot be made") == 1
    assert said["failing"]["alike"] == [2, 2] and stderr.count("set it back") == 1


@pytest.mark.slow
@pytest.mark.parametrize("at_last", [1, 4])
def test_killed_processes_are_followed_by_any_number_of_others(tmp_path: Path, at_last: int) -> None:
    said, _ = launched(tmp_path, f"killed 4 {at_last}")
    said = said["killed"]
    assert said["unbroken"] == [0, 0] and said["kills"] >= 2 and said["codes"] == [0] * at_last
    assert made(Job(tmp_path / "killed")) == made(Job(tmp_path / "unbroken"))


@pytest.mark.slow
def test_four_processes_make_the_bytes_of_one(tmp_path: Path) -> None:
    said, _ = launched(tmp_path, "counts 1 4")
    assert said["counts"] == {"1": [0], "4": [0] * 4}
    assert made(Job(tmp_path / "1")) == made(Job(tmp_path / "4"))


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"],
}
JOBS = {
    "torchrun": [("teach",), ("search",), ("search", "--method", "blackbox", "--blackbox.trials", "7"), ("evaluate",)],
    "accelerate": [("teach",), ("search",), ("train", "--train.loss", "end_to_end")],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_real_launchers(tmp_path: Path, launcher: str) -> None:
    job = Job.begun(tmp_path, SMALL)
    for name, *flags in JOBS[launcher]:
        words = [name, "--config", str(tmp_path / "small.yml"), "--quiet", *job.roots, *flags]
        done = subprocess.run(
            [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "ts_adapt.cli", *words],
            capture_output=True, text=True, timeout=600, check=False, cwd=TESTS.parent,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stdout.splitlines() if line.startswith(("teacher, ", "unipc-2", "recursive"))]
        assert said and len(set(said)) == len(said)
    if launcher == "torchrun":
        table = (tmp_path / "logs/small/results.csv").read_text()
        assert {"static", "blackbox"} <= {line.split(",")[3] for line in table.splitlines()}
    else:
        assert (job.predictor / "config.json").exists()


def test_a_process_on_its_own_is_the_first_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert (distributed.rank(), distributed.world(), distributed.launched()) == (0, 1, False)
    assert distributed.own_share([1, 2, 3]) == [1, 2, 3] and distributed.gathered("a") == ["a"]
    assert distributed.first(lambda: 4) == 4 and distributed.label("teach") == "teach"
    with distributed.quiet(), distributed.together():
        print("heard")
    assert capsys.readouterr().out == "heard\n"


def test_processes_that_would_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    try:
        with pytest.raises(TsAdaptError, match="give cuda"):
            distributed.join("cuda:0", threads)
    finally:
        torch.set_num_threads(threads)


def test_an_error_that_others_tell_of_is_the_first_ones_to_print(monkeypatch: pytest.MonkeyPatch) -> None:
    told, own = distributed.Told("it failed"), TsAdaptError("it failed")
    assert distributed.is_told_here(told) and distributed.is_told_here(own)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "GRACE", 0.0)
    assert not distributed.is_told_here(told) and not distributed.is_told_here(KeyboardInterrupt())
    assert distributed.is_told_here(own), "nobody has ended this process in the meantime: no other one failed"
