"""Codes, scales and ranges: exact packing, errors within half a level, gradients straight through and of LSQ."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ts_adapt.interfaces import TsAdaptError
from ts_adapt.quantizers import affine, ranges
from ts_adapt.quantizers.packing import pack, packed_bytes, unpack
from ts_adapt.quantizers.parts import AffineWeight, DenseWeight, DynamicActivation, StaticActivation


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


@pytest.mark.parametrize("value", [0.0, 0.37, -5e-6, 2e4])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_constant_weights_are_kept(value: float, bits: int) -> None:
    weight = torch.full((3, 40), value)
    scale, zero = affine.scale_and_zero(*ranges.min_max(affine.to_groups(weight, 64)), bits, False)
    part = AffineWeight.nearest(weight, scale, zero, bits, 64)
    assert torch.allclose(part(), weight, rtol=1e-3)


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


def test_ranges_without_outliers_have_less_error() -> None:
    x = torch.cat([torch.randn(4, 4000), torch.full((4, 1), 60.0)], 1)

    def error(found: tuple[Tensor, Tensor]) -> Tensor:
        scale, zero = affine.scale_and_zero(*found, 4, False)
        return (affine.fake_quantize(x, scale, zero, 4, False) - x).square().mean()

    assert error(ranges.mse(x, 4, False)) < 0.7 * error(ranges.min_max(x))
    inside = ranges.percentile(x, 0.999)
    assert inside[1].max() < 5 and inside[0].max() < 0
    with pytest.raises(TsAdaptError, match="minmax"):
        ranges.find_range("minmx", x, 4, False)


def test_a_higher_power_cuts_less_off() -> None:
    assert [ranges.power_of(bits) for bits in (2, 4, 6, 8, 16)] == [2, 2, 2.5, 3, 5]
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((1, 20_000))
    widths = [
        float((high - low).squeeze()) for low, high in (ranges.mse(x, 4, False, power=p) for p in (2.0, 3.0, 5.0))
    ]
    assert widths[0] < widths[1] < widths[2] <= float(x.max() - x.min())
    tiny = [torch.cat(ranges.mse(1e-12 * x, 16, False, power=5.0)), torch.cat(ranges.mse(x, 16, False, power=5.0))]
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


@pytest.mark.parametrize("bits", [1, 9, 0, True, "4"])
def test_bits_that_there_are_not_are_refused(bits: int) -> None:
    with pytest.raises(TsAdaptError, match="expected one of 2, 3, 4"):
        affine.check_bits(bits)


@pytest.mark.parametrize("group", [0, -4, "row", True])
def test_groups_that_there_are_not_are_refused(group: int | str) -> None:
    with pytest.raises(TsAdaptError, match="group"):
        affine.check_group(group)
