"""TinyDM: channel balancing and folding, time-grouped activations, quantized attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.layer_inputs import InputRecord, Recorder, record_inputs
from ts_adapt.quantizers.calibration.ranges import least_error
from ts_adapt.quantizers.layers.activations import GroupedActivation
from ts_adapt.quantizers.layers.affine import fake_quantize, power_of_two, scale_and_zero
from ts_adapt.quantizers.layers.attention import TENSORS, QuantizedAttention, attention
from ts_adapt.quantizers.layers.plan import LayerOptions
from ts_adapt.quantizers.methods import time_groups
from ts_adapt.quantizers.methods.balancing import balance, exponents, folds, spearman
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.methods.time_groups import assign
from ts_adapt.quantizers.methods.tinydm import TinyDM, TinyDMOptions
from ts_adapt.quantizers.quantization import begin, quantization_of, quantize, quantized_layers, restore, size_of
from ts_adapt.quantizers.report import report
from ts_adapt.quantizers.storage import load, save


def recorded(times: Tensor, inputs: list[Tensor]) -> InputRecord:
    recorder = Recorder()
    for time, x in zip(times, inputs, strict=True):
        recorder.visit("layer", x, time.expand(len(x)))
    return recorder.records(["layer"])["layer"]


def share(inputs: list[Tensor], rounded: list[Tensor]) -> float:
    """The error, normalised per time."""
    pairs = zip(inputs, rounded, strict=True)
    return sum(float((y - x).square().mean() / x.square().mean()) for x, y in pairs) / len(inputs)


def at_best(values: Tensor, x: list[Tensor], bits: int) -> list[Tensor]:
    """x at the levels of least squared error for `values`."""
    low, high = least_error(values.reshape(1, -1), bits, False, exact_zero=True)
    scale, zero = scale_and_zero(low, high, bits, False, exact_zero=True)
    return [fake_quantize(v, scale, zero, bits, False) for v in x]


def test_groups_find_planted_ranges() -> None:
    """Four ranges over 48 steps, in no order of time."""
    torch.manual_seed(0)
    times = torch.arange(48.0)
    label = torch.randint(0, 4, (48,))
    inputs = [0.1 * 5.0 ** float(g) * torch.randn(4, 512) for g in label]
    record = recorded(times, inputs)
    found = assign(record, 4, 8)
    static = share(inputs, at_best(torch.cat(inputs), inputs, 4))
    oracle = share(inputs, [at_best(x, [x], 4)[0] for x in inputs])
    part = found.quantizer(record, 4, None)
    hard = share(inputs, [_at(part, x, t) for x, t in zip(inputs, times, strict=True)])
    assert static > 0.391 and oracle < 0.0127
    assert hard < 0.0128 and hard < 1.02 * oracle
    assert torch.distributions.Categorical(logits=found.logits).entropy().mean() < 0.1
    for group in part.group.unique():
        assert len(label[part.group == group].unique()) == 1


class _Now:
    def __init__(self, times: Tensor) -> None:
        self.times = times

    def now(self, batch: int) -> Tensor:
        return self.times.expand(batch)


def _at(part: GroupedActivation, x: Tensor, times: Tensor) -> Tensor:
    part.listener = _Now(times)  # type: ignore[assignment]
    out: Tensor = part(x)
    return out


def test_a_time_between_takes_the_nearest_group_and_samples_their_own() -> None:
    times = torch.tensor([0.0, 100.0])
    part = GroupedActivation(4, times, torch.tensor([0, 1]), torch.tensor([0.1, 1.0]), torch.zeros(2), None)
    x = torch.full((3, 2), 0.42)
    assert torch.allclose(_at(part, x, torch.tensor([20.0, 90.0, 400.0]))[:, 0], torch.tensor([0.4, 0.0, 0.0]))


def test_few_timesteps_have_a_quantizer_each() -> None:
    record = recorded(torch.tensor([0.0, 500.0]), [torch.randn(1, 64), 30 * torch.randn(1, 64)])
    assert len(assign(record, 8, 8).low) == 2
    same = recorded(torch.tensor([0.0, 500.0]), [torch.ones(1, 64), torch.ones(1, 64)])
    assert len(assign(same, 8, 8).low) == 1


def test_balancing_spreads_salient_channels() -> None:
    """W8A8 on the planted case of a few large channels; the rounded product with and without."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(256, 64)
    with torch.no_grad():
        x[:, :4] *= 18
        layer.weight[:, :4] /= 18
    k = power_of_two(exponents([layer], recorded(torch.tensor([0.0]), [x])))

    def error(x: Tensor, weight: Tensor) -> float:
        xq = at_minmax(x.reshape(1, -1)).view_as(x)
        target = x @ weight.T
        return float((xq @ at_minmax(weight).T - target).norm() / target.norm())

    plain = error(x, layer.weight.detach())
    assert torch.equal((x * k) / k, x)
    assert plain > 0.12 and error(x * k, layer.weight.detach() / k) < 0.0112


def at_minmax(x: Tensor) -> Tensor:
    scale, zero = scale_and_zero(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), 8, True)
    return fake_quantize(x, scale, zero, 8, True)


def test_times_count_most_at_which_large_inputs_do_not_meet_large_weights() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 4.0]])
    with_them, against = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[4.0, 2.0, 1.0]])
    bound = torch.cat([with_them, against])
    assert torch.allclose(spearman(bound, torch.tensor([1.0, 2.0, 4.0])), torch.tensor([1.0, -1.0]))
    record = recorded(torch.tensor([0.0, 1.0]), [with_them, against])
    share = torch.tensor([-1.0, 1.0]).softmax(0)
    s = share[0] * bound[0] + share[1] * bound[1]
    expected = (0.5 * (torch.tensor([1.0, 2.0, 4.0]) / s).log2()).round()
    assert torch.equal(exponents([layer], record).float(), expected)
    layer.weight.data[0, 1] = 0
    assert int(exponents([layer], record)[1]) == 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For whole networks: groups are learned in fewer steps on fewer values."""
    monkeypatch.setattr(time_groups, "FIT_STEPS", 3)
    monkeypatch.setattr(time_groups, "FIT_VALUES", 256)


TEXT = {"encoder_hidden_states": torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))}
CASES = {"unet": (1, {}), "sd": (4, TEXT), "dit": (4, {"class_labels": torch.tensor([1, 2])})}


def calls_of(network: Any, name: str) -> list[Call]:
    channels, condition = CASES[name]
    generator = torch.Generator().manual_seed(0)
    return [
        Call.of(network, torch.randn(2, channels, 8, 8, generator=generator), torch.tensor(time), **condition)
        for time in (900.0, 500.0, 10.0)
    ]


@pytest.mark.parametrize("name", CASES)
def test_folding_leaves_the_full_precision_output_bit_for_bit(make: Any, name: str) -> None:
    network = make(name)
    torch.manual_seed(2)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.GroupNorm | nn.LayerNorm) and norm.weight is not None:
                norm.weight.mul_(torch.exp(2 * torch.randn_like(norm.weight)))
                norm.bias.normal_()
    calls = calls_of(network, name)
    full = [call.run(network) for call in calls]
    to = begin(network, "tinydm", {}, LayerOptions())
    layers = to.layers()
    found = balance(to, layers, record_inputs(network, layers, calls))
    folded = [own for own in found.values() if own.folded]
    assert folded and any(bool(own.columns.any()) for own in folded)
    for call, y in zip(calls, full, strict=True):
        assert torch.equal(call.run(network), y)
    to.undo()
    assert all(torch.equal(call.run(network), y) for call, y in zip(calls, full, strict=True))


def test_folds_are_found_in_the_blocks_of_text_networks(make: Any) -> None:
    found = {fold.producer.rpartition("transformer_blocks.0.")[2] for fold in folds(make("sd"))}
    assert {"norm1", "norm2", "norm3", "attn1.to_v", "attn2.to_v", "ff.net.0.proj"} <= found


def test_a_fold_needs_all_its_consumers(make: Any) -> None:
    network = make("unet")
    to = begin(network, "tinydm", {}, LayerOptions(skip=("mid_block.attentions.0.to_q",)))
    layers = to.layers()
    found = balance(to, layers, record_inputs(network, layers, calls_of(network, "unet")))
    assert not found["mid_block.attentions.0.to_k"].folded and found["mid_block.attentions.0.to_out.0"].folded
    to.undo()


def test_attention_without_rounding_is_torchs() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    plain = dict.fromkeys(TENSORS, lambda x: x)
    mask = torch.rand(5, 5) > 0.3
    mask[:, 0] = True
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": torch.randn(5, 5)}, {"scale": 0.3}):
        ours = attention(plain, q, k, v, enable_gqa=True, **options)
        assert torch.allclose(ours, F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options), atol=1e-5)


def test_flat_attention_needs_calibrated_scales() -> None:
    torch.manual_seed(0)
    p = (0.3 * torch.randn(4, 8, 256, 256)).softmax(-1)
    zero = torch.zeros(())
    fixed = fake_quantize(p, torch.tensor(1 / 15), zero, 4, False)
    record = recorded(torch.tensor([0.0]), [p])
    ours = _at(assign(record, 4, 8).quantizer(record, 4, None), p, torch.tensor([0.0]))

    def error(x: Tensor) -> float:
        return float((x - p).norm() / p.norm())

    assert error(fixed) > 0.99 and error(ours) < 0.067


@pytest.mark.parametrize("name", CASES)
def test_round_trip_and_restoration_are_exact(make: Any, tmp_path: Path, name: str, quick: None) -> None:
    network = make(name)
    calls = calls_of(network, name)
    full = calls[1].run(network)
    before = {key: id(module) for key, module in network.named_modules()}
    quantize(network, build("tinydm-w8a8")[0], calls)
    rounded = calls[1].run(network)
    assert 0 < float((rounded - full).norm() / full.norm()) < 0.2
    assert any(isinstance(module, QuantizedAttention) for module in network.modules())
    save(network, tmp_path)
    twin = load(make(name), tmp_path)
    assert torch.equal(calls[1].run(twin), rounded) and size_of(twin) == size_of(network)
    restore(network)
    assert torch.equal(calls[1].run(network), full)
    assert {key: id(module) for key, module in network.named_modules()} == before


def test_bits_are_true_and_reported_of_the_weights_before_balancing(make: Any, quick: None) -> None:
    network = make("unet")
    calls = calls_of(network, "unet")
    rows = report(quantize(network, build("tinydm-w8a8")[0], calls), calls)
    assert max(row.weight_relative for row in rows if row.reason is None) < 1e-3
    assert 8 < size_of(network).bits < 10
    assert size_of(network).weight_bytes == sum(t.numel() * t.element_size() for t in network.state_dict().values())
    columns = sum(layer.stored.columns.numel() for _, layer in quantized_layers(network))  # type: ignore[operator, union-attr]
    stored = sum(layer.stored.bytes for _, layer in quantized_layers(network))
    codes = sum(layer.numel for _, layer in quantized_layers(network))
    assert stored > codes + columns


def test_parts_can_be_left_out(make: Any, quick: None) -> None:
    network = make("unet")
    calls = calls_of(network, "unet")
    quantize(network, TinyDM(TinyDMOptions(bits=None, balance=False, attention=False)), calls)
    assert not any(isinstance(module, QuantizedAttention) for module in network.modules())
    originals = quantization_of(network).layers()
    assert all(torch.equal(layer.weight, originals[name].weight) for name, layer in quantized_layers(network))
    restore(network)
    quantize(network, TinyDM(TinyDMOptions(bits=None)), calls)
    restore(network)


def test_bad_input_is_explained(make: Any) -> None:
    network = make("unet")
    with pytest.raises(TsAdaptError, match="groups is 0"):
        TinyDM(TinyDMOptions(groups=0))
    with pytest.raises(TsAdaptError, match="probability_bits is 1"):
        TinyDM(TinyDMOptions(probability_bits=1))
    with pytest.raises(TsAdaptError, match="calibration set is empty"):
        quantize(network, TinyDM())
    network.mid_block.attentions[0].set_processor(AttnProcessor())
    with pytest.raises(TsAdaptError, match="does not call scaled_dot_product_attention"):
        quantize(network, TinyDM(), calls_of(network, "unet"))
    assert isinstance(network.mid_block.attentions[0].processor, AttnProcessor)
