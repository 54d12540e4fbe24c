"""Predictors that are told the scale of guidance: they depend on it, within the range that they were learned for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from small_job import edit
from small_predictors import KINDS, build, randomised
from ts_adapt.errors import TsAdaptError
from ts_adapt.noise import ContinuousVP
from ts_adapt.predictors.diagnosis import predicted
from ts_adapt.predictors.predictor import Predictor
from ts_adapt.predictors.store import load_predictor, save_predictor
from ts_adapt.search.objective import Batch, Objective

LOW, HIGH = 1.5, 8.0
NOISE = ContinuousVP()


class Deaf:
    """A denoiser that does nothing with the scale."""

    def __init__(self, denoiser: Any, guidance_scale: float | None = None) -> None:
        self.denoiser, self.guidance_scale = denoiser, guidance_scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(self, *args: Any, guidance_scale: Any = None, **told: Any) -> Tensor:
        x0: Tensor = self.denoiser(*args, **told)
        return x0


def told(kind: type[Predictor], problem: Any) -> tuple[Predictor, Objective, Batch]:
    """A predictor of random weights, and four samples of equal noise."""
    objective, batch = problem
    predictor = randomised(build(kind, objective.denoiser.noise_schedule, scales=[LOW, HIGH]))
    few = batch.rows(torch.zeros(4, dtype=torch.long))
    return predictor, Objective(Deaf(objective.denoiser), objective.solver, objective.distance), few  # type: ignore[arg-type]


def times(predictor: Predictor, objective: Objective, batch: Batch, scale: Any) -> Tensor:
    few = Batch(batch.index, batch.x_T, batch.target, {"guidance_scale": scale})
    return predicted(predictor, objective, few).times  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_is_told_its_own_scale_and_none_beyond_the_range(kind: type[Predictor], problem: Any) -> None:
    of = told(kind, problem)
    scales = torch.tensor([2.0, 5.0, HIGH, 40.0], dtype=torch.float64)
    found = times(*of, scales)
    assert not torch.allclose(found[0], found[1], rtol=1e-4) and torch.equal(found[2], found[3])
    for row, scale in zip(found, scales, strict=True):
        torch.testing.assert_close(times(*of, float(scale))[0], row, rtol=1e-5, atol=1e-7)
    assert torch.equal(times(*of, 0.0), times(*of, LOW))


def test_what_it_is_told_is_standardised() -> None:
    encoder = build(KINDS[0], NOISE, scales=[LOW, HIGH]).encoder
    z = encoder.standard(LOW * (HIGH / LOW) ** torch.linspace(0, 1, 10_001, dtype=torch.float64))
    assert float(z.mean()) == pytest.approx(0, abs=1e-9) and float(z.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_range_nothing_is_there_for_it(kind: type[Predictor], problem: Any) -> None:
    plain = build(kind, NOISE)
    own = build(kind, NOISE, scales=[LOW, HIGH])
    assert "scales" not in plain.options and own.state_dict().keys() - plain.state_dict().keys() == {
        "encoder.guidance.weight", "encoder.guidance.bias"
    }  # fmt: skip
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in plain.state_dict().items())
    _, objective, batch = told(kind, problem)
    assert torch.equal(times(plain, objective, batch, 2.0), times(plain, objective, batch, 7.0))


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_told_nothing_says_what_it_wants(kind: type[Predictor], problem: Any) -> None:
    predictor, objective, batch = told(kind, problem)
    with pytest.raises(TsAdaptError, match="learned for scales of guidance from 1"):
        predicted(predictor, objective, Batch(batch.index, batch.x_T, batch.target, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_scale_for_all_the_denoiser_tells(kind: type[Predictor], problem: Any) -> None:
    predictor, objective, batch = told(kind, problem)
    of_three = replace(objective, denoiser=Deaf(objective.denoiser, 3.0))  # type: ignore[arg-type]
    few = replace(batch, condition={})
    assert torch.equal(predicted(predictor, of_three, few).times, times(predictor, objective, batch, 3.0))  # type: ignore[arg-type]
    assert torch.equal(times(predictor, of_three, batch, 5.0), times(predictor, objective, batch, 5.0))


@pytest.mark.parametrize("kind", KINDS)
def test_on_disk_it_keeps_its_range(kind: type[Predictor], problem: Any, tmp_path: Path) -> None:
    predictor, objective, batch = told(kind, problem)
    save_predictor(tmp_path, predictor, {"solver": "ddim", "nfe": [4]})  # type: ignore[arg-type]
    kept, config = load_predictor(tmp_path, NOISE)
    assert torch.equal(times(kept, objective, batch, 3.0), times(predictor, objective, batch, 3.0))
    network = config["network"]
    for damaged in ([HIGH, LOW], [0.0, 1.0], [LOW], "wide", [LOW, LOW], None):
        edit(tmp_path / "config.json", network={**network, "scales": damaged})
        with pytest.raises(TsAdaptError, match="no valid predictor"):
            load_predictor(tmp_path, NOISE)
