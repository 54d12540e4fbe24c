"""ts-adapt prune, and the model without what it left out in the other commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from small_job import sentence
from ts_adapt.assembly import ModelOptions
from ts_adapt.cli import main
from ts_adapt.evaluation.cost import count_flops
from ts_adapt.grids import fixed
from ts_adapt.pipelines.load import build_denoiser
from ts_adapt.pruning import removed
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.solvers import DDIM


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler

    folder: Path = tmp_path_factory.mktemp("prune")
    DDPMPipeline(tiny.unet(3), DDPMScheduler(prediction_type="sample")).save_pretrained(folder / "model")
    return folder


def run(folder: Path, command: str, *flags: str) -> int:
    roots = ["--data_root", str(folder / "train_data"), "--log_root", str(folder / "logs"), "--quiet"]
    given = ["--model.name", str(folder / "model"), "--solvers", "ddim", "--nfe", "2", "--distance", "l2"]
    return main([command, *given, *roots, *flags])


def test_what_was_left_out_is_left_out_of_the_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model / "pruned.json"
    limits = ["--prune.samples", "4", "--prune.cost", "0.9", "--evaluate.batch_size", "3"]
    assert run(model, "prune", "--schedule", "karras", *limits, "--out", str(path)) == 0
    kept = json.loads(path.read_text())
    assert kept["removed"] and f"for --model.pruned: {path}" in capsys.readouterr().out
    assert kept["about"]["schedule"] == "karras" and kept["about"]["nfe"] == 2
    cost = []
    for pruned in (None, str(path)):
        denoiser: Any = build_denoiser(ModelOptions(str(model / "model"), pruned=pruned, channels_last=True))
        grid, x_T = fixed.make("karras", denoiser.noise_schedule, 2), initial_noise(0, range(1), denoiser.shape)
        cost.append(count_flops(lambda d=denoiser, g=grid, x=x_T: integrate(d, DDIM(d.noise_schedule), g, x)))
    assert removed(denoiser.network) == kept["removed"]
    assert cost[1] / cost[0] == pytest.approx(kept["rounds"][-1]["cost"]) and cost[1] <= 0.9 * cost[0]


def test_a_pruned_model_is_evaluated_on_a_teacher_of_its_own(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model / "other.json"
    assert run(model, "prune", "--prune.samples", "4", "--prune.cost", "0.95", "--out", str(path)) == 0
    evaluated = ["--evaluate.samples", "4", "--evaluate.features", "pixels", "--evaluate.grids", "karras"]
    evaluated += ["--teacher.test_samples", "4", "--teacher.nfe", "4"]
    real = model / "real"
    assert run(model, "sample", "--schedule", "karras", "--count", "4", "--out", str(real)) == 0
    for overview in real.glob("grid*"):
        overview.unlink()
    evaluated += ["--evaluate.reference", str(real)]
    flops = []
    for name, flags in (("full", []), ("pruned", ["--model.pruned", str(path)])):
        assert run(model, "evaluate", *evaluated, *flags, "--name", name, "--cachers", "none,deepcache-2") == 0
        with open(model / f"logs/{name}/results.csv") as file:
            flops.append([float(row["flops"]) for row in csv.DictReader(file)])
    assert all(less < full for full, less in zip(*flops, strict=True))
    capsys.readouterr()
    assert run(model, "evaluate", *evaluated, "--model.pruned", str(path), "--name", "full") == 2
    assert "weights" in sentence(capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.name", "gaussian-mixture"], "has no network to prune"),
        (["--prune.distance", "0"], "nothing was left out"),
        (["--schedule", "karas"], "did you mean 'karras'"),
        (["--model.pruned", "absent.json"], "there is no file"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(model: Path, capsys: Any, flags: list[str], said: str) -> None:
    capsys.readouterr()
    assert run(model, "prune", "--prune.samples", "2", *flags) == 2
    assert said in sentence(capsys)
