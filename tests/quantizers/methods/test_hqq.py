"""HQQ against rounding to the nearest on known distributions, against its definition, and against the hqq package."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.ranges import min_max
from ts_adapt.quantizers.layers import affine
from ts_adapt.quantizers.layers.weights import AffineWeight
from ts_adapt.quantizers.methods.hqq import HQQ, HQQOptions, best_zero, shrink
from ts_adapt.quantizers.quantization import quantize, quantized_layers, size_of


def relative(weight: Tensor, **options: Any) -> float:
    kept = HQQ(HQQOptions(**options)).weight(weight)()
    return float((kept - weight).square().mean().sqrt() / weight.std())


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "gaussian": torch.randn(256, 1024),
        "student": torch.distributions.StudentT(3.0).sample((256, 1024)),  # type: ignore[no-untyped-call]
    }


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("name", "bits", "nearest", "found"),
    [
        ("gaussian", 4, 0.0912, 0.0872),
        ("student", 4, 0.131, 0.124),
        ("student", 3, 0.281, 0.256),
        ("student", 2, 0.658, 0.510),
    ],
)
def test_it_beats_rounding_to_the_nearest(
    weights: dict[str, Tensor], name: str, bits: int, nearest: float, found: float, axis: int
) -> None:
    """RMSE / std at groups of 64, of weights as small as a network's: the norm of the error is not scale-free."""
    weight = 0.02 * weights[name]
    assert relative(weight, bits=bits, axis=axis, iterations=0) == pytest.approx(nearest, rel=0.03)
    assert relative(weight, bits=bits, axis=axis) < 1.02 * found


def test_every_group_keeps_its_best_zero(weights: dict[str, Tensor]) -> None:
    rows = affine.to_groups(weights["student"], 64)
    scale, zero = affine.scale_and_zero(*min_max(rows), 3, False)

    def error(z: Tensor) -> Tensor:
        return (affine.fake_quantize(rows, scale, z, 3, False) - rows).abs().mean(-1)

    found = [error(best_zero(rows, scale, zero, 3, n)) for n in (0, 1, 5, 20)]
    assert torch.equal(found[0], error(zero))
    for former, latter in pairwise(found):
        assert bool((latter <= former).all())


def test_one_step_is_the_equation(weights: dict[str, Tensor]) -> None:
    rows = weights["gaussian"][:4, :64].double()
    scale, zero = affine.scale_and_zero(*min_max(rows), 4, False)
    codes = (rows / scale + zero).round().clamp(0, 15)
    x = rows - scale * (codes - zero)
    sparse = x.sign() * (x.abs() - x.abs() ** (0.7 - 1) / 10).relu()
    expected = (codes - (rows - sparse) / scale).mean(-1, keepdim=True)
    assert torch.allclose(shrink(x, 10.0), sparse)
    found = best_zero(rows, scale, zero, 4, 1)
    better = (rows - affine.fake_quantize(rows, scale, expected, 4, False)).abs().mean(-1, keepdim=True) < x.abs().mean(
        -1, keepdim=True
    )
    assert torch.allclose(found, torch.where(better, expected, zero))


def test_shrinking_removes_small_errors_and_leaves_large_ones() -> None:
    x = torch.tensor([-100.0, -0.01, 0.0, 0.01, 100.0])
    kept = shrink(x, 10.0)
    assert kept[1:4].tolist() == [0, 0, 0] and torch.allclose(kept[[0, 4]], x[[0, 4]], rtol=1e-3)


@pytest.mark.parametrize(("bits", "packed"), [(4, 4.0), (3, 3.0), (2, 2.0)])
def test_storage_is_packed(bits: int, packed: float) -> None:
    part = HQQ(HQQOptions(bits=bits)).weight(torch.randn(64, 32, 3, 3))
    numel = 64 * 32 * 9
    assert part.codes.dtype == torch.uint8 and 8 * part.codes.numel() / numel == packed
    assert 8 * part.bytes / numel == pytest.approx(packed + 2 * 16 / 64, abs=0.01)
    assert part().shape == (64, 32, 3, 3)


def test_groups_with_a_rest_are_filled_up() -> None:
    weight = torch.randn(5, 7)
    part = HQQ(HQQOptions(bits=4)).weight(weight)
    assert part.rows == (1, 64) and part().shape == weight.shape
    assert 8 * part.bytes / 35 > 4 * 64 / 35, "the filling is counted"
    assert (part() - weight).abs().max() < (weight.max() - weight.min()) / 15


@pytest.mark.parametrize("name", ["unet", "sd", "dit"])
def test_networks_are_quantized_without_calls(make: Any, name: str) -> None:
    network = quantize(make(name), HQQ(HQQOptions(bits=4, group=16)))
    assert all(isinstance(layer.stored, AffineWeight) for _, layer in quantized_layers(network))
    assert all(layer.activation is None for _, layer in quantized_layers(network))
    assert 6 < size_of(network).bits < 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits is 1"),
        ({"axis": 2}, "axis is 2"),
        ({"iterations": -1}, "iterations is -1"),
        ({"group": -1}, "group is -1"),
    ],
)
def test_options_that_make_no_sense_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        HQQ(HQQOptions(**options))


@pytest.mark.packages
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("axis", [0, 1])
def test_as_good_as_the_hqq_package(weights: dict[str, Tensor], bits: int, axis: int, monkeypatch: Any) -> None:
    monkeypatch.setenv("DISABLE_CUDA", "1")
    oracle = import_module("hqq.core.quantize").Quantizer
    for weight in weights.values():
        for optimize in (False, True):
            codes, meta = oracle.quantize(
                weight.clone(), nbits=bits, group_size=64, axis=axis, optimize=optimize, round_zero=False,
                compute_dtype=torch.float32, device="cpu",
            )  # fmt: skip
            theirs = float((oracle.dequantize(codes, meta) - weight).square().mean().sqrt() / weight.std())
            ours = relative(weight, bits=bits, axis=axis, iterations=20 if optimize else 0)
            assert ours == pytest.approx(theirs, rel=0.01)


def test_bias_stays(make: Any) -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    before = network[1].bias.detach().clone()
    quantize(network, HQQ())
    assert torch.equal(network[1].bias, before) and network[1].bias is not before
