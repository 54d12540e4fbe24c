"""A predictor begins at a static grid with its corrections, and is that grid until it has learned better."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from small_predictors import KINDS, randomised
from test_guidance_factors import FACTORS, LABELS, NOISE, STEPS, TIMES, guided, noise
from ts_adapt import build_solver
from ts_adapt.distances import l2
from ts_adapt.interfaces import COEFFICIENTS, GUIDANCE, HISTORY, MODEL_TIMES, OUTPUT_SCALE, TimeGrid
from ts_adapt.predictors.store import load_predictor, save_predictor
from ts_adapt.search.objective import Batch, Objective

GAPS = TIMES.diff().abs()
HELD = {
    MODEL_TIMES: TIMES[:-1] - torch.tensor([0.0, 0.2, -0.1, 0.3]).double() * torch.minimum(GAPS, GAPS.roll(1)),
    OUTPUT_SCALE: torch.tensor([0.95, 1.1, 1.0, 0.9]).double(),
    COEFFICIENTS: 0.1 * torch.arange(2.0 * STEPS).double().view(STEPS, 2).cos(),
    HISTORY: 0.1 * torch.arange(STEPS * (STEPS + 1.0)).double().view(STEPS, -1).sin(),
    GUIDANCE: FACTORS,
}
NAMES = [field.name for field in HELD]
USERS = ["shift", "scale", "coefficients", "history", "guidance"]


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_solves_as_the_grid_does(kind: Any, tmp_path: Any) -> None:
    grid = TimeGrid.of(TIMES, HELD)
    torch.manual_seed(0)
    predictor = kind(NOISE, grid, (1, 4, 4), corrections=USERS, order=2, width=4, hidden=8)
    objective = Objective(guided(), build_solver("unipc-2", NOISE), l2)
    batch = Batch(torch.arange(3), noise().float(), noise().float(), LABELS)
    expected = objective.student(grid, batch)
    torch.testing.assert_close(objective.student(predictor.policy(), batch), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(objective.student(TIMES, batch), expected, atol=1e-2)

    save_predictor(tmp_path / "kept", predictor, {})
    loaded, _ = load_predictor(tmp_path / "kept", NOISE)
    assert torch.equal(objective.student(loaded.policy(), batch), objective.student(predictor.policy(), batch))

    randomised(predictor).forget(STEPS)
    torch.testing.assert_close(objective.student(predictor.policy(), batch), expected, rtol=0, atol=1e-4)
