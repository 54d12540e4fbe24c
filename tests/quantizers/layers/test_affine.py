"""Codes and scales: exact packing, errors within half a level, gradients straight through and of LSQ."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration import ranges
from ts_adapt.quantizers.layers import affine
from ts_adapt.quantizers.layers.packing import pack, packed_bytes, unpack


@given(bits=st.sampled_from(affine.BITS), count=st.integers(1, 100), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_is_exact_and_dense(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes(count, bits)
    assert torch.equal(unpack(packed, bits, count).long(), codes)
    whole = math.lcm(bits, 8)
    assert packed_bytes(whole, bits) == whole * bits // 8, "no bit is wasted between words"


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_errors_are_within_half_a_level(bits: int, symmetric: bool) -> None:
    x = torch.randn(5, 64, dtype=torch.float64) + 1
    scale, zero = affine.scale_and_zero(*ranges.min_max(x), bits, symmetric)
    codes = affine.quantize(x, scale, zero, bits, symmetric)
    low, high = affine.code_range(bits, symmetric)
    assert bool((codes == codes.round()).all()) and codes.min() >= low and codes.max() <= high
    kept = affine.dequantize(codes, scale, zero)
    assert bool(((kept - x).abs() <= scale / 2 * (1 + 1e-9)).all())
    assert torch.allclose(affine.fake_quantize(kept, scale, zero, bits, symmetric), kept), "levels stay where they are"


def test_zero_has_no_error_where_asked() -> None:
    low, high = torch.tensor([0.3, -1.0, -2.0]), torch.tensor([1.0, 2.7, -0.5])
    scale, zero = affine.scale_and_zero(low, high, 4, False, exact_zero=True)
    assert bool((affine.fake_quantize(torch.zeros(3), scale, zero, 4, False) == 0).all())
    assert bool((zero == zero.round()).all())


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    x = torch.tensor([-9.0, -0.3, 0.2, 0.8, 9.0], requires_grad=True)
    affine.fake_quantize(x, torch.tensor(0.25), torch.tensor(0.0), 4, True).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]


def test_the_gradient_to_the_scale_is_that_of_lsq() -> None:
    x = torch.tensor([-9.0, -0.3, 0.2, 0.8, 9.0], dtype=torch.float64)
    s = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    kept = affine.lsq(x, s, 4)
    assert torch.allclose(kept, affine.fake_quantize(x, s, torch.zeros_like(s), 4, True))
    kept.sum().backward()
    v = x / 0.25
    expected = torch.where(v < -8, -8.0, torch.where(v > 7, 7.0, v.round() - v)).sum() / math.sqrt(5 * 7)
    assert s.grad is not None and torch.allclose(s.grad, expected)


@pytest.mark.parametrize("group", ["tensor", "channel", 8, 7, 1000])
@pytest.mark.parametrize("axis", [0, 1])
def test_groups_are_put_back_in_their_places(group: int | str, axis: int) -> None:
    weight = torch.randn(6, 4, 3, 3)
    rows = affine.to_groups(weight, group, axis)
    assert tuple(rows.shape) == affine.grouped_shape(weight.shape, group)
    assert torch.equal(affine.from_groups(rows, weight.shape, group, axis), weight)


@pytest.mark.parametrize("bits", [1, 9, 0, True, "4"])
def test_bits_that_there_are_not_are_refused(bits: int) -> None:
    with pytest.raises(TsAdaptError, match="expected one of 2, 3, 4"):
        affine.check_bits(bits)


@pytest.mark.parametrize("group", [0, -4, "row", True])
def test_groups_that_there_are_not_are_refused(group: int | str) -> None:
    with pytest.raises(TsAdaptError, match="group"):
        affine.check_group(group)
