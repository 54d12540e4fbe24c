"""Schedules for diffusers, of a folder or the zoo, without a pipeline: sampled, exported, and which NFE is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ts_adapt import zoo
from ts_adapt.assembly import ModelOptions
from ts_adapt.cli import main
from ts_adapt.config import Config
from ts_adapt.pipelines.load import build_denoiser
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.schedules.resolve import SCHEDULER, Found, build_grid
from ts_adapt.storage.files import read_tensors

ZOO = "fashion-ddpm-unipc-3"
SCHEDULE = LearnedScheduler.from_pretrained(zoo.schedules()[ZOO])
LEARNED = SCHEDULE.source.learned


def run(out: Path, command: str, *flags: str) -> int:
    return main([command, *flags, "--quiet", "--log_root", str(out), "--data_root", str(out / "data")])


def images(folder: Path) -> torch.Tensor:
    files = sorted((folder / "images").iterdir())
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).float() for file in files])


def test_a_schedule_of_the_zoo_samples_as_its_folder_and_as_its_pipeline_do(tmp_path: Path, capsys) -> None:
    found = []
    for number, words in enumerate(
        (
            ["--schedule", ZOO],
            ["--schedule", str(zoo.schedules()[ZOO])],
            ["--schedule", ZOO, "--pipeline", "fashion-ddpm"],
        )
    ):
        out = tmp_path / str(number)
        capsys.readouterr()
        assert run(tmp_path, "sample", *words, "--steps", "3", "--count", "2", "--out", str(out)) == 0
        assert ", unipc-3, NFE 3: " in capsys.readouterr().out
        found.append(images(out))
    assert float(found[0].std()) > 2
    assert all(float((other - found[0]).abs().max()) <= 1 for other in found[1:])


def test_the_nfe_that_is_taken_is_said_with_the_others(tmp_path: Path, capsys) -> None:
    most = max(LEARNED)
    for flags, taken in (((), 5), (("--nfe", "3,5"), most)):
        assert run(tmp_path, "export", ZOO, *flags, "--out", str(tmp_path / "a.json")) == 0
        assert LearnedGrid.load(tmp_path / "a.json").nfe == taken
        message = capsys.readouterr().err
        assert f"this is NFE {taken} (of" in message and message.count("\n") == 1
        assert all(f"{n}" in message for n in LEARNED)
    assert run(tmp_path, "export", ZOO, "--steps", "3", "--out", str(tmp_path / "a.json")) == 0
    assert capsys.readouterr().err == ""
    flags = ["--model.name", "gaussian-mixture", "--schedule", "karras", "--count", "1"]
    assert run(tmp_path, "sample", *flags, "--nfe", "4,6") == 0
    assert "NFE 6 (of 4, 6; --steps takes another): " in capsys.readouterr().out
    assert run(tmp_path, "sample", *flags, "--nfe", "4,6", "--steps", "4") == 0
    assert "NFE 4: " in capsys.readouterr().out
    for asked in (3, 4):
        assert run(tmp_path, "export", ZOO, "--nfe", str(asked), "--out", str(tmp_path / "a.json")) == 0
        assert LearnedGrid.load(tmp_path / "a.json").nfe == asked and "this is NFE" not in capsys.readouterr().err
    assert run(tmp_path, "export", ZOO, "--nfe", "4", "--model.name", "gaussian-mixture") == 0
    assert "unmeasured: it is for the model fashion-ddpm, and the config's is gaussian" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("learned", "asked", "configured", "expected"),
    [
        ((3, 5), 4, [5], 4),
        ((3, 5), None, [3], 3),
        ((3, 5), None, [4], 5),
        ((3, 5), None, [3, 5], 5),
        ((3,), None, [4], 3),
        (None, None, [7, 9], 9),
        (None, None, [7], 7),
    ],
)
def test_the_choice_of_an_nfe(learned: Any, asked: int | None, configured: list[int], expected: int) -> None:
    found = Found("a", SCHEDULER, lambda solver, nfe: pytest.fail("it was loaded"), "ddim", learned)
    solver, nfe, others = found.choose(None, asked, Config(nfe=configured))
    assert (solver, nfe) == ("ddim", expected)
    assert (others == "") == (asked is not None or len(learned or configured) == 1)


def test_what_is_exported_is_the_grid_with_its_origin(tmp_path: Path, capsys) -> None:
    assert run(tmp_path, "export", ZOO, "--steps", "5") == 0
    content = json.loads(capsys.readouterr().out)
    grid = SCHEDULE.source.grids[5]
    assert content["times"] == grid.times.tolist()
    assert (content["solver"], content["nfe"], content["model"]) == ("unipc-3", 5, "fashion-ddpm")
    assert (content["source"], content["method"], content["prediction"]) == (ZOO, "static", "v")
    for kind in ("sigmas", "timesteps"):
        assert run(tmp_path, "export", ZOO, "--steps", "5", "--format", kind) == 0
        assert len(capsys.readouterr().out.split(",")) in (5, 6)


COMPARED = (
    "--solvers", "unipc-3", "--nfe", "3,4,5", "--teacher.nfe", "6", "--teacher.test_samples", "2",
    "--evaluate.samples", "2", "--evaluate.grids", "karras", "--distance", "l2", "--evaluate.schedules",
)  # fmt: skip


def test_evaluate_compares_them_at_the_nfes_that_they_were_learned_for(tmp_path: Path) -> None:
    mine = shutil.copytree(zoo.schedules()[ZOO], tmp_path / "v1.5")
    assert run(tmp_path, "evaluate", "--generate-only", *COMPARED, f"{ZOO},{mine}") == 0
    runs = tmp_path / "fashion/runs"
    names = {path.name.removesuffix(".safetensors") for path in runs.glob("unipc-3-*")}
    learned = {f"unipc-3-nfe{nfe}-{name}" for nfe in {3, 4, 5} & set(LEARNED) for name in (ZOO, "v1.5")}
    assert learned and names == learned | {f"unipc-3-nfe{nfe}-karras" for nfe in (3, 4, 5)}
    grids = SCHEDULE.source.grids
    for nfe in {3, 4, 5} & set(LEARNED):
        first, second = (read_tensors(runs / f"unipc-3-nfe{nfe}-{name}.safetensors") for name in (ZOO, "v1.5"))
        assert torch.equal(first["times"][0], grids[nfe].times)
        assert torch.equal(first["distance"], second["distance"])


def test_what_evaluate_cannot_compare_is_one_sentence(tmp_path: Path, capsys) -> None:
    denoiser = build_denoiser(ModelOptions("fashion-ddpm"))
    predictor = Recursive(
        denoiser.noise_schedule, build_grid("log_snr", denoiser.noise_schedule, 5).times, denoiser.shape
    )
    config = SCHEDULE.config
    LearnedScheduler.from_predictors(predictor, "unipc-3", config).save_pretrained(tmp_path / "predictor")
    LearnedScheduler.from_grid("karras", solver="unipc-3").save_pretrained(tmp_path / "fixed")
    shutil.copytree(zoo.schedules()[ZOO], tmp_path / ZOO)
    shutil.copytree(zoo.schedules()[ZOO], tmp_path / "static")
    for schedules, expected in (
        (str(tmp_path / "predictor"), "holds no shared learned grids"),
        (str(tmp_path / "fixed"), "holds no shared learned grids"),
        ("fashion-ddpm-unipc-4", "did you mean 'fashion-ddpm-unipc-3'"),
        ("fashion-ddpm-dpmpp-2m", "which is not evaluated; add --solvers [dpmpp-2m] --nfe ["),
        (f"{ZOO},{tmp_path / ZOO}", "as is another one of evaluate.schedules; rename the file or folder"),
        (str(tmp_path / "static"), "as is a schedule of the comparison; rename the file or folder"),
    ):
        assert run(tmp_path, "evaluate", *COMPARED, schedules) == 2
        printed = capsys.readouterr()
        assert expected in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sample", "--schedule", "fashion-ddpm-unipc-4"], "did you mean 'fashion-ddpm-unipc-3'"),
        (["sample", "--schedule", ZOO, "--solver", "ddim"], "is for unipc-3, not for ddim; leave --solver out"),
        (["sample", "--schedule", f"{ZOO}-recursive", "--steps", "99"], "was learned for 3"),
        (["sample", "--schedule", f"{ZOO}-recursive", "--nfe", "99"], "and serves 2 to 11"),
        (["sample", "--schedule", ZOO, "--solvers", "ddim"], "is for unipc-3, not for ddim"),
        (["sample", "--schedule", ZOO, "--model.name", "gaussian-mixture"], "was learned for another model"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], expected: str, tmp_path: Path, capsys) -> None:
    assert run(tmp_path, *words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.err.count("\n") == 1 and printed.out == ""
