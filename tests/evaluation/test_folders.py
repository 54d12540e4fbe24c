"""Intervals from halves against what is known of them, and two sets compared."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ts_adapt.evaluation.folders import Scores, halves_of, scored, write_scores
from ts_adapt.evaluation.quality import Reference


def gaussian(n: int, seed: int, shift: float = 0.0) -> dict[str, Tensor]:
    drawn = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) + shift
    return {"features": drawn, "clip": drawn[:, 0]}


def width(scores: Scores, measure: str) -> float:
    low, high = (scores.end(measure, level) for level in (0.025, 0.975))
    assert low is not None and high is not None
    return high - low


@pytest.mark.parametrize("count", [101, 400])
def test_the_interval_of_a_mean_is_that_of_its_standard_error(count: int) -> None:
    """The CLIP score is a mean: its interval is 2 * 1.96 standard errors wide, and 2^(1/2) of it for a difference."""
    one, other = (scored(str(seed), gaussian(count, seed), None, 1000, seed) for seed in (0, 1))
    values = gaussian(count, 0)["clip"].double()
    error = float(values.std()) / math.sqrt(count)
    assert one.values == {"clip_score": pytest.approx(float(values.mean()))}
    assert width(one, "clip_score") == pytest.approx(2 * 1.96 * error, rel=0.1)
    apart = one.minus(other)
    assert apart.values["clip_score"] == pytest.approx(one.values["clip_score"] - other.values["clip_score"])
    assert width(apart, "clip_score") == pytest.approx(
        math.hypot(width(one, "clip_score"), width(other, "clip_score")), rel=0.1
    )


def test_intervals_are_as_wide_as_measures_of_independent_sets_vary() -> None:
    """Of the Frechet distance, the kernel distance, precision and recall, whose values depend on how many there are."""
    real = Reference.of(gaussian(300, 1000))
    sets = [scored("", gaussian(200, seed, 0.5), real, 40 if seed < 6 else 0, seed) for seed in range(60)]
    for measure in ("fid_data", "kid", "precision", "recall"):
        spread = np.std([one.values[measure] for one in sets], ddof=1)
        assert np.mean([np.std(one.spread[measure]) for one in sets[:6]]) == pytest.approx(spread, rel=0.45), measure
        for one in sets[:6]:
            low, high = one.end(measure, 0.025), one.end(measure, 0.975)
            assert low is not None and high is not None and low < one.values[measure] < high


def test_what_is_written_has_every_value_and_end_and_leaves_empty_what_there_is_not(tmp_path: Path) -> None:
    one = scored("a", gaussian(50, 0), Reference.of(gaussian(60, 1)), 20)
    few = scored("b", gaussian(3, 2), None, 20)
    path = write_scores(tmp_path, [one, few], {"features": "pixels"})
    with path.open() as file:
        first, second = csv.DictReader(file)
    kept = json.loads(path.with_suffix(".json").read_text())
    assert kept["facts"] == {"features": "pixels"} and kept["rows"][0]["images"] == "a"
    for measure in ("fid_data", "kid", "precision", "recall", "clip_score"):
        assert float(first[measure]) == kept["rows"][0][measure] == one.values[measure]
        assert float(first[f"{measure}_low"]) == pytest.approx(one.end(measure, 0.025))
    assert first["sfid"] == "" and second["fid_data"] == second["clip_score_low"] == ""
    assert float(second["clip_score"]) == few.values["clip_score"] and not few.spread


def test_wide_features_have_fewer_halves_by_default() -> None:
    assert halves_of(torch.empty(9, 2048)) < halves_of(torch.empty(9, 1024)) == halves_of(torch.empty(9, 16))
