"""Training by several processes: the steps of one process, the same weights everywhere, one who writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ts_adapt import distributed
from ts_adapt.storage.files import read_json, read_tensors

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the cases of `trainers.py`, and what was printed on stderr."""
    folder = tmp_path_factory.mktemp("trained")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "predictors/trainers.py"), str(folder)],
        capture_output=True, text=True, timeout=600, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def weights(folder: Path, rank: int = 0) -> dict[str, Tensor]:
    return read_tensors(folder / f"{rank}.safetensors")


def assert_as_one(trained: Path, case: str, count: int) -> None:
    """All processes of `case` hold the same weights, bit for bit, which are those of one process but for rounding."""
    one, first = weights(trained / "one"), weights(trained / case)
    for rank in range(1, count):
        other = weights(trained / case, rank)
        assert all(torch.equal(other[key], value) for key, value in first.items())
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    said: list[Any] = [read_json(trained / folder / "0.json") for folder in ("one", case)]
    assert said[1]["epochs"] == said[0]["epochs"] and said[1]["gain"] == pytest.approx(said[0]["gain"], abs=1e-5)


def test_two_processes_take_the_steps_of_one(trained: Path) -> None:
    assert read_json(trained / "two/codes.json") == [[0, 0]]
    assert_as_one(trained, "two", 2)
    assert read_json(trained / "one/0.json")["gain"] > 0


def test_one_process_writes(trained: Path) -> None:
    for case in ("one", "two"):
        assert len(list((trained / case).rglob("events.out.tfevents*"))) == 1


@pytest.mark.parametrize(("case", "count", "killed"), [("killed, then one", 1, 2), ("killed, then three", 3, 1)])
def test_a_killed_training_goes_on_with_another_number_of_processes(
    trained: Path, case: str, count: int, killed: int
) -> None:
    before, after = read_json(trained / case / "codes.json")
    assert len(before) == killed and all(before) and after == [0] * count
    epochs = read_tensors(trained / case / "kept")["progress/place"][3]
    assert 0 < int(epochs) < read_json(trained / "one/0.json")["epochs"]
    assert_as_one(trained, case, count)


def test_gradients_add_up_where_a_share_is_empty() -> None:
    """A process without rows has no gradient; the sum is that of the others."""
    layer = nn.Linear(2, 1)
    distributed.add_gradients(layer.parameters())
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    distributed.add_gradients(layer.parameters())
    assert torch.equal(layer.weight.grad, torch.ones(1, 2))  # type: ignore[arg-type]
    assert torch.equal(distributed.by_rows(lambda rows: 2.0 * rows, 5, torch.device("cpu")), 2.0 * torch.arange(5))
