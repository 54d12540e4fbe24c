"""Ranges: less error without outliers, less cut off at a higher power, weighted values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration import ranges
from ts_adapt.quantizers.layers import affine


def test_ranges_without_outliers_have_less_error() -> None:
    x = torch.cat([torch.randn(4, 4000), torch.full((4, 1), 60.0)], 1)

    def error(found: tuple[Tensor, Tensor]) -> Tensor:
        scale, zero = affine.scale_and_zero(*found, 4, False)
        return (affine.fake_quantize(x, scale, zero, 4, False) - x).square().mean()

    assert error(ranges.least_error(x, 4, False)) < 0.7 * error(ranges.min_max(x))
    inside = ranges.percentile(x, 0.999)
    assert inside[1].max() < 5 and inside[0].max() < 0
    with pytest.raises(TsAdaptError, match="minmax"):
        ranges.find_range("minmx", x, 4, False)


def test_a_higher_power_cuts_less_off() -> None:
    assert [ranges.activation_power(bits) for bits in (2, 4, 6, 8, 16)] == [2, 2, 2.5, 3, 5]
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((1, 20_000))
    widths = [
        float((high - low).squeeze())
        for low, high in (ranges.least_error(x, 4, False, power=p) for p in (2.0, 3.0, 5.0))
    ]
    assert widths[0] < widths[1] < widths[2] <= float(x.max() - x.min())
    tiny = [
        torch.cat(ranges.least_error(1e-12 * x, 16, False, power=5.0)),
        torch.cat(ranges.least_error(x, 16, False, power=5.0)),
    ]
    assert torch.allclose(tiny[0], 1e-12 * tiny[1])


def test_a_weight_is_how_often_a_value_counts() -> None:
    torch.manual_seed(0)
    x, counts = torch.randn(1, 300), torch.randint(1, 9, (1, 300))
    repeated, weights = x[0].repeat_interleave(counts[0])[None], counts.float()
    for name in ("minmax", "mse"):
        alike = ranges.find_range(name, repeated, 3, False, exact_zero=True)
        assert ranges.find_range(name, x, 3, False, exact_zero=True, weights=weights) == alike
    low, high = ranges.percentile(x, 0.9, weights)
    assert float((repeated < low).float().mean()) < 0.1 <= float((repeated <= low).float().mean())
    assert float((repeated < high).float().mean()) < 0.9 <= float((repeated <= high).float().mean())
