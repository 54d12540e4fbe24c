"""The portable JSON: what is written comes back, old files are read, and anything else is one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from noise_schedules import NOISES
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.interfaces import NoiseSchedule, TimeGrid
from ts_adapt.noise import BetaTable, ContinuousVP, RectifiedFlow, VarianceExploding
from ts_adapt.schedules.file import ABOUT, MAX_BYTES, LearnedGrid, guidance_remarks, other_scales, scale_remark

TABLE = BetaTable.from_config({})
ZERO_SNR = BetaTable.from_config({"rescale_betas_zero_snr": True})
KNOWN: dict[str, Any] = {
    "order": 2,
    "model": "some/model",
    "prediction": "v",
    "method": "static",
    "source": "a",
    "seed": 3,
    "distance": "l2",
    "teacher": "0f3a",
    "teacher_solver": "unipc-3",
    "teacher_nfe": 40,
    "teacher_grid": "log_snr",
    "teacher_seed": 0,
    "measured": {"fid": {"value": 3.5, "evaluator": "inception", "samples": 50_000}},
}


def corrected(noise_schedule: NoiseSchedule, steps: int = 4) -> LearnedGrid:
    times = fixed.make("log_snr", noise_schedule, steps)
    ones = torch.ones(steps, dtype=torch.float64)
    return LearnedGrid(TimeGrid(times, times[:-1] * 0.99, 0.9 * ones, torch.zeros(steps, 2)), "unipc-2", steps, KNOWN)


@pytest.mark.parametrize("noise_schedule", [TABLE, ZERO_SNR, ContinuousVP(), VarianceExploding(), RectifiedFlow()])
def test_what_is_written_comes_back(tmp_path: Path, noise_schedule: NoiseSchedule) -> None:
    path, schedule = tmp_path / "a.json", corrected(noise_schedule)
    schedule.save(path, noise_schedule)
    for read in (LearnedGrid.load(path, noise_schedule), LearnedGrid.load(path)):
        for name in ("times", "model_times", "output_scale", "coefficients"):
            assert torch.equal(getattr(read.grid, name), getattr(schedule.grid, name).double()), name
        assert (read.solver, read.nfe, read.about) == ("unipc-2", 4, KNOWN)
        assert torch.equal(read.log_snr, noise_schedule.log_snr(schedule.grid.times))
        assert read.text() == read.text(noise_schedule) == path.read_text()


def test_the_file_is_json_for_any_reader(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    schedule = LearnedGrid(
        corrected(RectifiedFlow()).grid, "euler", 4, {"measured": {"fid": {"value": math.nan, "evaluator": "x"}}}
    )
    content = json.loads(schedule.text(RectifiedFlow()), parse_constant=refuse)
    assert (
        content["log_snr"][0] is None and content["log_snr"][-1] is None and content["measured"]["fid"]["value"] is None
    )
    assert content["edm_sigmas"][0] is None and content["edm_sigmas"][-1] == 0.0


def test_what_a_file_holds_beside_travels_along(tmp_path: Path) -> None:
    given = {
        "format": "ts_adapt-schedule", "version": 1, "solver": "unipc-3", "nfe": 2, "times": [999.0, 400.0, 0.0],
        "edm_sigmas": None, "log_snr": None, "model": "m", "own": [1],
    }  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(given))
    schedule = LearnedGrid.load(tmp_path / "own.json", TABLE)
    assert schedule.log_snr is None and schedule.about["own"] == [1]
    written = json.loads(schedule.text(TABLE))
    assert written["own"] == [1] and written["times"] == given["times"] and written["log_snr"] is not None


def test_a_schedule_of_another_noise_schedule_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    corrected(TABLE).save(path, TABLE)
    other = NOISES["sd"]
    with pytest.raises(TsAdaptError, match=r"a\.json is for another noise schedule, that of some/model: at time 999"):
        LearnedGrid.load(path, other)


def test_grids_per_sample_are_no_schedule() -> None:
    times = corrected(TABLE).grid.times.expand(3, -1)
    with pytest.raises(TsAdaptError, match="kept as labels"):
        LearnedGrid(TimeGrid(times), "ddim", 4).text(TABLE)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"format": "other"}, "of the format 'other', version 1; expected 'ts_adapt-schedule', version 1"),
    ({"version": 2}, "version 2; expected"),
    ({"solver": 5}, "'solver' of .* is a int"),
    ({"nfe": "4"}, "'nfe' of .* is a str"),
    ({"nfe": True}, "'nfe' of .* is a bool"),
    ({"nfe": 3}, "4 steps and nfe 3"),
    ({"times": None}, "'times' of"),
    ({"times": []}, "at least 2"),
    ({"times": [5.0]}, "at least 2"),
    ({"times": [3, 2, None, 0]}, "no valid schedule file"),
    ({"times": [3, 2, "1", 0]}, "no valid schedule file"),
    ({"times": [3, 2, {}, 0]}, "no valid schedule file"),
    ({"times": [3, 2, 2, 1, 0]}, "twice the same time"),
    ({"times": [3, 2, 4, 1, 0]}, "not decreasing"),
    ({"times": [1000, 2, 1, 0.5, 0]}, "outside the noise schedule"),
    (
        {"times": [[4, 3, 2, 1, 0]] * 2, "model_times": None, "output_scale": None, "coefficients": None},
        "holds 2 grids",
    ),
    ({"model_times": [1, 2]}, "model_times"),
    ({"output_scale": {}}, "no valid schedule file"),
    ({"log_snr": [1, 2]}, "log_snr has to hold 5 numbers"),
    ({"log_snr": {}}, "'log_snr' of .* is a dict"),
    ({"log_snr": [[1], [2], [3], [4], [5]]}, "log_snr does not rise"),
    ({"log_snr": [1, 2, None, 4, 5]}, "log_snr does not rise"),
    ({"log_snr": [5, 4, 3, 2, 1]}, "log_snr does not rise"),
    ({"log_snr": [1, 2, "3", 4, 5]}, "no valid schedule file"),
    ({"prediction": "eps"}, "unknown prediction 'eps'"),
    ({"measured": [1]}, "'measured' of"),
    *(({"measured": {"fid": value}}, "measured.fid of .* holds a") for value in ([1], 0.5)),
    ({"measured": {"fid": {"value": 1.0}}}, "measured.fid of .* has no 'evaluator'"),
    ({"measured": {"fid": {"value": "low", "evaluator": "x"}}}, "'value' of measured.fid"),
    *(({key: [1]}, f"'{key}' of .* is a list") for key in ABOUT if key not in ("measured", "shape", "guidance_scale")),
    *(({"guidance_scale": given}, "'guidance_scale' of .*; expected a number") for given in ([1], [8, 2], ["a", 2])),
    ({"shape": 3}, "'shape' of .* is a int"),
]


@pytest.mark.parametrize(("change", "expected"), WRONG)
def test_a_damaged_file_is_one_sentence_that_names_it(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**json.loads(corrected(TABLE).text(TABLE)), **change}))
    with pytest.raises(TsAdaptError, match=expected) as caught:
        LearnedGrid.load(path, TABLE)
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_scale_counts_where_it_guides_and_is_compared_with_its_like() -> None:
    assert other_scales({"guidance_scale": 3.5, "prompt": "a"}) == {}
    assert other_scales({"true_cfg_scale": 4, "negative_prompt": None}) == {"true_cfg_scale": 1.0}
    assert other_scales({"true_cfg_scale": 4, "guidance_scale_2": None, "negative_prompt": ""}) == {
        "true_cfg_scale": 4.0
    }
    assert other_scales({"guidance_scale": 5.0, "guidance_scale_2": 3.0}) == {"guidance_scale_2": 3.0}
    about = {"guidance_scale": 3.5, "other_scales": {"true_cfg_scale": 1.0, "guidance_scale_2": 3.0}}
    assert guidance_remarks(about, 3.5, {"true_cfg_scale": 2.0}) == []
    (said,) = guidance_remarks(about, 3.5, {"true_cfg_scale": 4.0, "guidance_scale_2": 2.0})
    assert "found under true_cfg_scale 1, and these samples are guided by 4" in said
    assert len(guidance_remarks(about, 9.0, {"guidance_scale_2": 9.0})) == 2
    for known in ({}, {"other_scales": None}, {"other_scales": [4]}, {"other_scales": {"true_cfg_scale": "high"}}):
        assert guidance_remarks(known, 3.5, {"true_cfg_scale": 9.0}) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"14.6, 0", b"[]", b"null", b"[" * 100_000, b"\x00" * 100])
def test_a_foreign_file_is_one_sentence_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(TsAdaptError, match=r"a\.json") as caught:
        LearnedGrid.load(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("then", "holds", "not_so"),
    [
        (4, [2, 4.0, 8, [2, 8]], [1.9, 8.1, 0, [1, 8]]),
        (1, [1, 0, 0.3, 2], [2.5]),
        ([1.5, 8], [1.5, 3, 8, [2, 7], [1.5, 8]], [1.4, 8.1, 0, [1, 8]]),
        ([1, 8], [1, 0, 0.5], [9]),
        ([0.5, 8], [0.5, 1], [0.4, 0, -3, 9]),
        (None, [3, [1, 2]], []),
        ("high", [3], []),
    ],
)
def test_a_schedule_holds_about_its_scale_of_guidance_and_within_its_range(then: Any, holds: Any, not_so: Any) -> None:
    assert [now for now in holds if scale_remark("guidance_scale", then, now)] == []
    assert [now for now in not_so if not scale_remark("guidance_scale", then, now)] == []


def test_an_absurdly_long_grid_is_refused(tmp_path: Path) -> None:
    times = torch.arange(10_001, -1, -1, dtype=torch.float64)
    (tmp_path / "a.json").write_text(LearnedGrid(TimeGrid(times), "ddim", 10_001, {}, -times).text())
    with pytest.raises(TsAdaptError, match=r"a\.json has 10001 steps; between 1 and 10000"):
        LearnedGrid.load(tmp_path / "a.json")


def test_an_absurdly_long_file_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)  # sparse: a file that would not fit into memory
    with pytest.raises(TsAdaptError, match=f"more than {MAX_BYTES} bytes"):
        LearnedGrid.load(tmp_path / "a.json")
