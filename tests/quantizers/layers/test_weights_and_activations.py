"""Weights count all that they keep and survive a change of precision; activations by one scale, or one a sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ts_adapt.quantizers.calibration import ranges
from ts_adapt.quantizers.layers import affine
from ts_adapt.quantizers.layers.activations import DynamicActivation, StaticActivation
from ts_adapt.quantizers.layers.weights import AffineWeight, DenseWeight


@pytest.mark.parametrize("value", [0.0, 0.37, -5e-6, 2e4])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_constant_weights_are_kept(value: float, bits: int) -> None:
    weight = torch.full((3, 40), value)
    scale, zero = affine.scale_and_zero(*ranges.min_max(affine.to_groups(weight, 64)), bits, False)
    part = AffineWeight.nearest(weight, scale, zero, bits, 64)
    assert torch.allclose(part(), weight, rtol=1e-3)


def test_affine_weights_count_all_that_they_keep() -> None:
    weight = torch.randn(32, 64)
    four = _nearest(weight, 4, 64)
    assert four.bytes == 32 * 64 // 2 + 2 * 2 * 32 + 4
    assert _nearest(weight, 3, 64).bytes == 32 * 64 * 3 // 8 + 2 * 2 * 32 + 4
    assert _nearest(weight, 8, "channel", symmetric=True).bytes == 32 * 64 + 4 * 32 + 4
    assert DenseWeight(weight).bytes == 4 * weight.numel()


def _nearest(weight: Tensor, bits: int, group: int | str, symmetric: bool = False) -> AffineWeight:
    scale, zero = affine.scale_and_zero(*ranges.min_max(affine.to_groups(weight, group)), bits, symmetric)
    return AffineWeight.nearest(weight, scale, zero, bits, group, symmetric=symmetric)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_weights_survive_a_change_of_precision_and_small_sizes(bits: int) -> None:
    for size in (1.0, 1e-6, 1e5):
        weight = torch.randn(8, 48) * size
        part = _nearest(weight, bits, 16)
        before = part()
        holder = nn.Sequential(part).to(torch.bfloat16).to(torch.float32)
        assert torch.equal(holder[0](), before)
        span = affine.to_groups(weight, 16)
        step = (span.amax(1) - span.amin(1)).max() / (2**bits - 1)
        assert (before - weight).abs().max() <= 0.55 * step


def test_sixteen_bits_change_nothing_to_speak_of() -> None:
    weight = torch.randn(16, 30)
    assert torch.allclose(_nearest(weight, 16, "channel")(), weight, atol=1e-4)


def test_a_static_activation_has_one_scale_and_a_dynamic_one_for_each_sample() -> None:
    x = torch.randn(3, 4, 5, 5) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    static = StaticActivation.of_range(x.min(), x.max(), 8)
    assert len((static(x) / static.scale).round().unique()) <= 256
    dynamic = DynamicActivation(8)
    assert torch.equal(dynamic(x)[1:2], dynamic(x[1:2])), "a sample's does not depend on the batch"
    for kept in (static(x), dynamic(x)):
        assert kept.dtype == x.dtype and kept.shape == x.shape
    assert (dynamic(x) - x)[0].abs().mean() < 0.1 * (static(x) - x)[0].abs().mean()
