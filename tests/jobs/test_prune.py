"""ts-adapt prune, and images of the network without what it left out."""

from __future__ import annotations

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
from ts_adapt.pruning import pruned, read
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


def test_what_was_left_out_is_left_out_of_the_images(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model / "small.json"
    limits = ["--prune.samples", "4", "--prune.cost", "0.9", "--evaluate.batch_size", "3"]
    assert run(model, "prune", "--schedule", "karras", *limits, "--out", str(path)) == 0
    kept = json.loads(path.read_text())
    assert kept["removed"] and f"--student.pruned {path}" in capsys.readouterr().out
    assert kept["about"]["schedule"] == "karras" and kept["about"]["nfe"] == 2
    denoiser: Any = build_denoiser(ModelOptions(str(model / "model")))
    grid, x_T = fixed.make("karras", denoiser.noise_schedule, 2), initial_noise(0, range(1), denoiser.shape)

    def cost() -> int:
        return count_flops(lambda: integrate(denoiser, DDIM(denoiser.noise_schedule), grid, x_T))

    full = cost()
    with pruned(denoiser.network, *read(path, denoiser.network)):
        assert cost() / full == pytest.approx(kept["rounds"][-1]["cost"]) and cost() <= 0.9 * full
    made = []
    for name, flags in (("full", []), ("pruned", ["--student.pruned", str(path), "--model.channels_last", "true"])):
        of_model = ["--schedule", "karras", "--count", "2", "--seed", "3", *flags]
        of_pipeline = [*of_model, "--pipeline", str(model / "model"), "--steps", "2"]
        for words, out in ((of_model, model / name), (of_pipeline, model / f"{name}-pipe")):
            assert run(model, "sample", *words, "--out", str(out)) == 0
            made.append([(out / f"images/{number:05d}.png").read_bytes() for number in range(2)])
    assert made[0] != made[2] and made[0] == made[1] and made[2] == made[3]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.name", "gaussian-mixture"], "has no network to prune"),
        (["--prune.distance", "0"], "nothing was left out"),
        (["--schedule", "karas"], "did you mean 'karras'"),
        (["--out", "two words.json"], "would be called 'two words'; rename the file"),
        (["--out", "hqq4.json"], "neither none nor the name of a cacher or quantizer"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(model: Path, capsys: Any, flags: list[str], said: str) -> None:
    capsys.readouterr()
    assert run(model, "prune", "--prune.samples", "2", *flags) == 2
    assert said in sentence(capsys)


def test_the_full_network_is_pruned_not_a_student(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model / "of-a-student.json"
    student = ["--student.quantizer", "hqq4", "--out", str(path)]
    assert run(model, "prune", "--schedule", "karras", *student) == 2
    assert "the student is hqq4" in sentence(capsys) and not path.exists()
