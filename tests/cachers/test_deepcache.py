"""DeepCache: shallow passes are those computed unit by unit, at the steps where they should be, at their price."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_adapt.cachers import DeepCache, attached
from ts_adapt.cachers.deepcache import quadratic_steps
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.cost import count_flops

BATCH, STEPS = 3, 5
CASES = [
    *(("attentive", branch) for branch in range(9)),
    *(("resnet-ways", branch) for branch in range(6)),
    *(("text", branch) for branch in range(6)),
    *(("text-deep", branch) for branch in range(4)),
]


@pytest.mark.parametrize(("name", "branch"), CASES)
@torch.no_grad()
def test_every_step_is_the_pass_computed_unit_by_unit(kit: Any, name: str, branch: int) -> None:
    network = kit.network(name)
    inputs = kit.calls(network, BATCH, STEPS)
    by_hand = kit.UnitByUnit(network, branch)
    found = kit.run(network, DeepCache(interval=3, branch=branch), inputs, BATCH)
    feature = None
    for index, (prediction, given_) in enumerate(zip(found, inputs, strict=True)):
        expected, feature = by_hand.run(given_, None if index in (0, 3) else feature)
        torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)
    exact = [network(**given_).sample for given_ in inputs]
    assert [torch.equal(a, b) for a, b in zip(found, exact, strict=True)] == [True, False, False, True, False]


@pytest.mark.parametrize(("name", "branch"), CASES)
@torch.no_grad()
def test_a_run_costs_its_full_passes_and_its_shallow_ones(kit: Any, name: str, branch: int) -> None:
    network = kit.network(name)
    inputs = kit.calls(network, BATCH, STEPS)
    by_hand = kit.UnitByUnit(network, branch)
    feature = by_hand.run(inputs[0])[1]
    full, shallow = (count_flops(lambda f=f: by_hand.run(inputs[0], f)) for f in (None, feature))
    assert count_flops(lambda: network(**inputs[0])) == full > shallow
    cacher = DeepCache(interval=2, branch=branch)
    assert count_flops(lambda: kit.run(network, cacher, inputs, BATCH)) == 3 * full + 2 * shallow


@pytest.mark.parametrize("name", ["attentive", "resnet-ways", "text", "text-deep"])
@torch.no_grad()
def test_interval_one_changes_nothing_and_so_does_a_call_outside_a_run(kit: Any, name: str) -> None:
    network = kit.network(name)
    inputs = kit.calls(network, BATCH, STEPS)
    exact = [network(**given_).sample for given_ in inputs]
    for refresh in ("uniform", "quadratic"):
        found = kit.run(network, DeepCache(interval=1, refresh=refresh), inputs, BATCH)
        assert all(map(torch.equal, found, exact))
    cacher = DeepCache(interval=5)
    with attached(network, cacher):
        assert all(torch.equal(network(**given_).sample, out) for given_, out in zip(inputs, exact, strict=True))
        kit.told(network, cacher, inputs, BATCH)
        assert all(torch.equal(network(**given_).sample, out) for given_, out in zip(inputs, exact, strict=True))


@torch.no_grad()
def test_a_network_may_be_called_in_any_of_its_ways(kit: Any) -> None:
    network = kit.network("text-deep")
    x, t, text = kit.inputs(network, BATCH).values()
    found = []
    with attached(network, cacher := DeepCache(interval=2)):
        for call in (
            lambda: network(x, t, text).sample,
            lambda: network(x, t, encoder_hidden_states=text, return_dict=False)[0],
            lambda: network(sample=x, timestep=t, encoder_hidden_states=text).sample,
        ):
            cacher.begin(2, BATCH)
            cacher.at(0)
            first = call()
            cacher.at(1)
            found.append((first, call()))
    for first, second in found:
        assert torch.equal(first, found[0][0]) and torch.equal(second, found[0][0])


@torch.no_grad()
def test_sizes_that_do_not_halve_evenly_fit(kit: Any) -> None:
    network = kit.network("text")
    network.register_to_config(sample_size=9)
    inputs = kit.calls(network, BATCH, STEPS)
    found = kit.run(network, DeepCache(interval=2, branch=1), [inputs[0], inputs[0]], BATCH)
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_freeu_writes_into_its_features_and_not_into_the_kept_one(kit: Any) -> None:
    network = kit.network("text-deep")
    network.enable_freeu(0.9, 0.2, 1.2, 1.4)
    inputs = kit.inputs(network, BATCH)
    for branch in range(4):
        found = kit.run(network, DeepCache(interval=4, branch=branch), [inputs] * 4, BATCH)
        for prediction in found[1:]:
            torch.testing.assert_close(prediction, found[0])


@torch.no_grad()
def test_a_batch_is_as_many_single_runs(kit: Any) -> None:
    for name in kit.networks:
        network = kit.network(name)
        inputs = kit.calls(network, BATCH, STEPS)
        with attached(network, cacher := DeepCache(interval=2, branch=1)):
            whole = torch.stack(kit.told(network, cacher, inputs, BATCH), 1)
            for row in range(BATCH):
                alone = kit.told(network, cacher, [kit.rows(i, slice(row, row + 1)) for i in inputs], 1)
                torch.testing.assert_close(torch.stack(alone, 1)[0], whole[row], rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_what_is_kept(kit: Any) -> None:
    network = kit.network("attentive")
    inputs = kit.calls(network, BATCH, STEPS)[:2]
    first = inputs[0]["sample"].requires_grad_()
    last = kit.run(network, DeepCache(interval=2), inputs, BATCH)[-1]
    by_hand = kit.UnitByUnit(network, 0)
    feature = by_hand.run(inputs[0])[1]
    expected = torch.autograd.grad(by_hand.run(inputs[1], feature)[0].square().sum(), first)[0]
    found = torch.autograd.grad(last.square().sum(), first)[0]
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(1, 12), st.floats(0, 0.95), st.floats(1.01, 2.0))
def test_quadratic_refresh_has_as_many_full_steps_as_uniform(
    steps: int, interval: int, center: float, power: float
) -> None:
    uniform = DeepCache(interval).full_steps(steps)
    quadratic = DeepCache(interval, refresh="quadratic", center=center, power=power).full_steps(steps)
    assert uniform == tuple(range(0, steps, interval))
    assert len(quadratic) == len(uniform) and quadratic[0] == 0
    assert list(quadratic) == sorted(set(quadratic)) and quadratic[-1] < steps


def test_quadratic_refresh_is_densest_at_its_center() -> None:
    found = torch.tensor(quadratic_steps(200, 20, 0.3, 1.5))
    gaps = found.diff()
    middle = found[:-1] + gaps / 2
    near = (middle - 60).abs() < 25
    assert gaps[near].float().mean() < 0.6 * gaps[~near].float().mean()
    assert abs(float(middle[gaps.argmin()]) - 60) < 20


def test_options_out_of_range_are_refused(kit: Any) -> None:
    for options, message in (
        ({"interval": 0}, "interval is 0; expected a whole number of at least 1"),
        ({"interval": 2.5}, "interval is 2.5"),
        ({"interval": True}, "interval is True"),
        ({"branch": -1}, "branch is -1"),
        ({"refresh": "quadratik"}, "did you mean 'quadratic'"),
        ({"center": 1.0}, "0 <= center < 1"),
        ({"power": 1.0}, "power > 1"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            DeepCache(**options)  # type: ignore[arg-type]
    network = kit.network("attentive")
    with pytest.raises(TsAdaptError, match="branch is 9, and this UNet2DModel has 9 skip connections; expected 0 to 8"):
        DeepCache(branch=9).attach(network)


def test_blocks_that_are_not_known_are_refused_by_name(kit: Any) -> None:
    before = kit.attentive(
        down_block_types=("DownBlock2D", "SkipDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SkipUpBlock2D", "UpBlock2D"), block_out_channels=(32, 32, 32), norm_num_groups=8,
    )  # fmt: skip
    marks = kit.marks(before)
    with pytest.raises(TsAdaptError, match="way through a SkipDownBlock2D among the down_blocks of this UNet2DModel"):
        DeepCache().attach(before)
    assert kit.marks(before) == marks


@torch.no_grad()
def test_residuals_of_a_controlnet_are_refused(kit: Any) -> None:
    network = kit.network("text")
    inputs = kit.inputs(network, BATCH)
    with (
        attached(network, DeepCache()),
        pytest.raises(TsAdaptError, match="a ControlNet or an adapter adds to"),
    ):
        network(**inputs, mid_block_additional_residual=torch.zeros(BATCH, 16, 4, 4))


@torch.no_grad()
def test_another_batch_in_the_same_run_is_refused_and_a_new_run_takes_it(kit: Any) -> None:
    network = kit.network("attentive")
    with attached(network, cacher := DeepCache(interval=3)):
        cacher.begin(3, 3)
        cacher.at(0)
        network(**kit.inputs(network, 3))
        cacher.at(1)
        with pytest.raises(TsAdaptError, match="has kept 3 rows and the network is called with 2"):
            network(**kit.inputs(network, 2))
        cacher.begin(3, 2)
        cacher.at(1)
        alone = network(**kit.inputs(network, 2)).sample
    assert torch.equal(alone, network(**kit.inputs(network, 2)).sample)
