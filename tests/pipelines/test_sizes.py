"""Where a pipeline's own scheduler shifts its times by the size, a schedule says for which size it was found."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from ts_adapt.cli import main
from ts_adapt.schedulers.attach import attach
from ts_adapt.schedulers.scheduler import LearnedScheduler

SOLVER, STEPS = "ddim", 2


def option(call: dict[str, Any]) -> list[str]:
    return ["--model.call", json.dumps(call)]


def test_another_size_is_said_once_and_the_same_is_not(family: Any, tmp_path: Path, capsys: Any) -> None:
    pipe, call = family("flux")
    pipe.save_pretrained(tmp_path / "flux")
    words = ["--model.name", str(tmp_path / "flux"), "--data_root", str(tmp_path), "--log_root", str(tmp_path)]
    words += ["--name", "sizes", "--nfe", str(STEPS), "--solvers", SOLVER, "--quiet"]
    assert main(["search", "--method", "dmn", *words, *option(call)]) == 0
    (file,) = (tmp_path / "sizes").rglob(f"{SOLVER}-nfe{STEPS}.json")
    assert json.loads(file.read_text())["shape"] == [16, 16]  # an image of 16 pixels is 16 tokens of 16 channels
    larger, said = {**call, "height": 32}, {}
    for name, given in (("same", call), ("larger", larger)):
        made = ["--schedule", str(file), "--prompt", "a cat", "--count", "2", "--out", str(tmp_path / name)]
        assert main(["sample", *words, *option(given), *made]) == 0
        said[name] = capsys.readouterr().err.count("samples of shape (16, 16)")
    assert said == {"same": 0, "larger": 1}

    folder = tmp_path / "schedule"
    assert main(["export", str(file), "--format", "diffusers", "--out", str(folder), *words, *option(call)]) == 0
    attach(pipe, LearnedScheduler.from_pretrained(folder))
    for given, count in ((call, 0), (larger, 1)):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("default")
            for _ in range(2):
                pipe("a cat", **given, num_inference_steps=STEPS, output_type="latent")
        assert sum("samples of shape (16, 16)" in str(one.message) for one in heard) == count


@pytest.mark.parametrize("shape", [7, ["a"], [16, 16, 16]])
def test_a_config_may_say_anything_of_its_size(shape: Any, family: Any) -> None:
    pipe, call = family("flux")
    schedule = LearnedScheduler.from_grid("uniform", SOLVER, pipe.scheduler.config, learned_for={"shape": shape})
    attach(pipe, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe("a cat", **call, num_inference_steps=STEPS, output_type="latent")
