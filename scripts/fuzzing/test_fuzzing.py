"""A short run that is the same every time, and what the mutations and the loop themselves promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from random import Random

import pytest
import safetensors.torch

from fuzzing import corpus, runner
from fuzzing.mutations import BY_SUFFIX, mutate
from fuzzing.readers import Reader, all_readers
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.corrections import field_names
from ts_adapt.quantizers.layers.weights import TorchAOWeight
from ts_adapt.quantizers.storage import PARTS

FILES, ROOT = 600, Path(__file__).parents[1]


@pytest.fixture(scope="module")
def readers() -> dict[str, Reader]:
    return all_readers()


def test_valid_files_are_accepted(readers: Mapping[str, Reader]) -> None:
    for name, reader in readers.items():
        for variant, files in reader.sets.items():
            assert runner.attempt(reader, files) == "accepted", (name, variant)
            if reader.reseal is not None:
                assert runner.attempt(reader, reader.reseal(files)) == "accepted", (name, variant)


def test_valid_files_have_every_correction_and_every_part_of_a_quantization() -> None:
    schedule = json.loads(corpus.schedules()["corrected"]["s.json"])
    labels = safetensors.torch.load(corpus.labels()["corrected"]["part-00000.safetensors"])
    assert set(field_names()) <= schedule.keys() & labels.keys()
    configs = "".join(files["config.json"].decode() for files in corpus.quantizations().values())
    assert {kind for kind in PARTS if f'"kind": "{kind}"' not in configs} == {TorchAOWeight.kind}


def test_mutated_files_are_read_or_refused(readers: Mapping[str, Reader], tmp_path: Path) -> None:
    tally = runner.fuzz(readers, 12345, FILES, tmp_path, lambda line: None)
    assert not tally.failures, tally.failures
    assert tally.accepted.total() + tally.refused.total() == FILES
    assert all(tally.refused[name] for name in readers if name != "journal")


def test_a_number_and_a_seed_are_always_the_same_files(readers: Mapping[str, Reader]) -> None:
    assert runner.mutated(readers, 1, 7) == runner.mutated(readers, 1, 7)
    assert len({json.dumps(runner.mutated(readers, 1, n)[1], default=repr) for n in range(50)}) > 45


def test_a_file_is_found_again_by_its_reader_alone(readers: Mapping[str, Reader]) -> None:
    for number in range(20):
        name, files = runner.mutated(readers, 1, number)
        assert runner.mutated({name: readers[name]}, 1, number) == (name, files)


@pytest.mark.parametrize("suffix", BY_SUFFIX)
def test_mutations_take_any_bytes(suffix: str) -> None:
    random, huge = Random(0), b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4611686018427387904]}}'
    tensors = len(huge).to_bytes(8, "little") + huge + b"\0" * 4
    number = b'{"a": 1' + b"0" * 400 + b"}"
    for data in (b"", b"\0", b"{}", b"[", b"\xff" * 50, b"8" * 100, b"\x02\0\0\0\0\0\0\0{}", number, tensors):
        for _ in range(200):
            assert isinstance(mutate(f"a.{suffix}", data, random), bytes)


def fails(folder: Path) -> None:
    raise KeyError("k")


def waits(folder: Path) -> None:
    time.sleep(60)


def computes(folder: Path) -> None:
    while True:
        pass


def dies(folder: Path) -> None:
    os._exit(7)


def swells(folder: Path) -> None:
    bytearray(2 * runner.MEMORY)


def refuses(folder: Path) -> None:
    raise TsAdaptError("no")


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (fails, "KeyError"),
        (waits, "waited longer"),
        (computes, "longer than"),
        (dies, "status"),
        (swells, "MemoryError"),
        (refuses, None),
    ],
)
def test_what_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], None], reason: str | None
) -> None:
    monkeypatch.setattr(runner, "SECONDS", 0.5)
    monkeypatch.setattr(runner, "WAIT", 1.0 if read is waits else 60.0)
    tally = runner.fuzz({"a": Reader(read, {"v": {"a.txt": b"x"}})}, 3, 1, tmp_path, lambda line: None)
    if reason is None:
        assert not tally.failures and tally.refused["a"] == 1
        return
    assert reason in tally.failures[0]
    written = json.loads((tmp_path / "a-3-0" / "failure.json").read_text())
    assert (written["reader"], written["seed"], written["file"]) == ("a", 3, 0) and reason in written["reason"]
    assert (tmp_path / "a-3-0" / "a.txt").exists()


def test_a_child_that_died_is_followed_by_another(tmp_path: Path) -> None:
    tally = runner.fuzz({"a": Reader(dies, {"v": {"a.txt": b"x"}})}, 0, 3, None, lambda line: None)
    assert sorted(tally.failures) == [0, 1, 2]


def test_a_reader_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = import_module("fuzzing.__main__")
    monkeypatch.setattr(program, "all_readers", lambda: {"a": Reader(refuses, {"v": {"a.txt": b"x"}})})
    monkeypatch.setattr(sys, "argv", ["fuzzing", "--reader", "b"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2


@pytest.mark.packages
def test_atheris_begins_with_valid_files_and_changes_them(tmp_path: Path) -> None:
    """Its valid files alone make it reach several lines; what it does to them finds no failure."""
    command = [sys.executable, "-m", "fuzzing.guided", "prompts", "--runs", "300", "--out", str(tmp_path)]
    places = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Done 300 runs" in done.stderr and "NEW" in done.stderr
    assert not list(tmp_path.iterdir())
