"""Conversions of predictions: inverses, definitions, agreement with diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_adapt.errors import TsAdaptError
from ts_adapt.noise import BetaTable
from ts_adapt.parameterization import PARAMETERIZATIONS, PREDICTION_TYPES, from_x0, to_epsilon, to_x0

kinds = st.sampled_from(PARAMETERIZATIONS)
levels = st.floats(0.05, 5.0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@settings(max_examples=100, deadline=None)
@given(kinds, levels, levels, st.booleans())
def test_from_x0_inverts_to_x0(kind: str, alpha: float, sigma: float, per_sample: bool) -> None:
    x_t, prediction = draw(3, 2, 4), draw(3, 2, 4) + 1
    a = torch.tensor([alpha, 1.3 * alpha, 0.7 * alpha] if per_sample else alpha, dtype=torch.float64)
    s = torch.tensor([sigma, 0.9 * sigma, 1.6 * sigma] if per_sample else sigma, dtype=torch.float64)
    x0 = to_x0(prediction, x_t, a, s, kind)
    torch.testing.assert_close(from_x0(x0, x_t, a, s, kind), prediction, rtol=1e-8, atol=1e-8)


@settings(max_examples=50, deadline=None)
@given(levels, levels)
def test_every_kind_finds_the_clean_sample(alpha: float, sigma: float) -> None:
    clean, eps = draw(2, 5), draw(2, 5) - 0.5
    x_t = alpha * clean + sigma * eps
    a, s = torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    predictions = {"epsilon": eps, "sample": clean, "v": alpha * eps - sigma * clean, "velocity": eps - clean}
    predictions["minus_v"] = -predictions["v"]
    assert set(predictions) == set(PARAMETERIZATIONS)
    for kind, prediction in predictions.items():
        torch.testing.assert_close(to_x0(prediction, x_t, a, s, kind), clean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(from_x0(clean, x_t, a, s, kind), prediction, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(to_epsilon(clean, x_t, a, s), eps, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [1, 400, 999])
def test_x0_equals_that_of_diffusers(prediction_type: str, t: int) -> None:
    scheduler: Any = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    noise_schedule = BetaTable.from_config(scheduler.config)
    x_t, output = draw(2, 3, 4).float(), draw(2, 3, 4).float() + 0.2
    expected = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(0)).pred_original_sample
    time = torch.tensor(float(t))
    x0 = to_x0(output, x_t, noise_schedule.alpha(time), noise_schedule.sigma(time), PREDICTION_TYPES[prediction_type])
    torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_states_keep_their_dtype_and_times_their_gradient(kind: str) -> None:
    alpha = torch.tensor([0.6, 0.8], dtype=torch.float64, requires_grad=True)
    x0 = to_x0(draw(2, 3).float().requires_grad_(), draw(2, 3).float(), alpha, (1 - alpha**2).sqrt(), kind)
    assert x0.dtype == torch.float32
    if kind != "sample":
        (gradient,) = torch.autograd.grad(x0.sum(), alpha)
        assert gradient.shape == (2,) and gradient.dtype == torch.float64


@pytest.mark.parametrize("convert", [to_x0, from_x0])
def test_an_unknown_kind_is_refused(convert: Callable[..., torch.Tensor]) -> None:
    one = torch.ones(())
    with pytest.raises(TsAdaptError, match="'flow' is not known; expected one of epsilon, sample, v, minus_v"):
        convert(torch.zeros(1, 2), torch.zeros(1, 2), one, one, "flow")
