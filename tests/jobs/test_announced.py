"""What a job says that it will evaluate is what it evaluates, counted by the denoiser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ts_adapt.cli import main
from ts_adapt.denoisers.analytic import AnalyticDenoiser

OPTIONS = """
name: small
model: {name: gaussian-mixture}
solvers: [ddim]
nfe: [3]
derivative: exact
distance: l2
static_samples: 48
label_samples: 48
oracle_samples: 24
label_batch: 24
teacher: {nfe: 24, train_samples: 96, test_samples: 40, shard_size: 16, batch_size: 16}
static: {iterations: 20, evaluations: 40, batch_size: 16, tolerance: 0}
per_sample: {iterations: 6, random_starts: 1, candidates: 2}
optimized: {samples: 8, places: 20}
blackbox: {trials: 6}
train: {samples: 96, epochs: 2, width: 4, hidden: 16}
evaluate: {samples: 40, features: pixels, batch_size: 16, grids: [karras, uniform]}
"""
JOBS: list[tuple[list[str], float]] = [
    (["teach"], 0.0),
    (["search", "--static.method", "forward"], 0.3),
    (["search", "--static.method", "adam", "--derivative", "auto", "--redo"], 0.3),
    (["search", "--static.method", "adam", "--redo"], 0.3),
    (["search", "--static.method", "lbfgs", "--static.iterations", "6", "--redo"], 0.4),
    (["search", "--method", "blackbox"], 0.3),
    (["search", "--method", "oss"], 0.3),
    (["search", "--method", "gits"], 0.3),
    (["search", "--method", "per-sample"], 0.3),
    (["train", "--predictor", "one-shot"], 0.3),
    (["train", "--predictor", "recursive", "--derivative", "auto"], 0.3),
    (["search", "--static.method", "forward", "--nfe", "2,5"], 0.3),
    (["train", "--predictor", "one-shot-all", "--nfe", "2,5"], 0.3),
    (["evaluate"], 0.3),
]
"""Commands, and by what share what is said may be off."""


def test_a_job_says_before_it_begins_how_much_it_will_evaluate(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yml").write_text(OPTIONS)
    met, call = [0], AnalyticDenoiser.__call__

    def counting(self: Any, x_t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        met[0] += len(x_t)
        return call(self, x_t, *args, **kwargs)

    monkeypatch.setattr(AnalyticDenoiser, "__call__", counting)
    roots = ["--data_root", str(tmp_path / "data"), "--log_root", str(tmp_path / "logs")]
    for (command, *flags), share in JOBS:
        met[0] = 0
        assert main([command, "--config", str(tmp_path / "small.yml"), *flags, *roots]) == 0
        said = re.findall(r"about ([\d,]+) evaluations of the network to do", capsys.readouterr().out)
        announced = sum(int(number.replace(",", "")) for number in said)
        assert abs(announced - met[0]) <= share * met[0], (command, flags, announced, met[0])
    for command in ("teach", "search", "evaluate"):  # what is finished is not announced again
        flags = ["--static.method", "lbfgs", "--static.iterations", "6"]
        assert main([command, "--config", str(tmp_path / "small.yml"), *flags, *roots]) == 0
        assert "evaluations of the network" not in capsys.readouterr().out
