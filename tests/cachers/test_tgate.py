"""T-GATE: what is reused is what attention gave, the gate is where it should be, and half the batch is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ts_adapt.cachers import TGate, attached
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.cost import count_flops

BATCH, STEPS, GATE = 2, 5, 3
TEXTS = ["text", "text-deep"]


def attentions(network: nn.Module, cross: bool) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, Attention) and m.is_cross_attention == cross]


def seen(network: nn.Module, inputs: dict[str, Any], cross: bool) -> list[tuple[Any, Tensor, Tensor]]:
    """(layer, input, output) of the attention layers, in their order, in a plain call of the network."""
    found: list[tuple[Any, Tensor, Tensor]] = []
    handles = [
        m.register_forward_hook(lambda m, args, out: found.append((m, args[0], out)))
        for m in attentions(network, cross)
    ]
    network(**inputs)
    for handle in handles:
        handle.remove()
    return found


def forced(
    network: nn.Module, inputs: dict[str, Any], cross: bool, outputs: list[Callable[[Any, Tensor], Tensor]]
) -> Tensor:
    """The prediction of a plain call in which the attention layers give `outputs`, as functions of their input."""
    left = list(outputs)
    handles = [
        m.register_forward_hook(lambda m, args, out: left.pop(0)(m, args[0])) for m in attentions(network, cross)
    ]
    prediction: Tensor = network(**inputs).sample
    for handle in handles:
        handle.remove()
    return prediction


def guided_calls(kit: Any, network: Any) -> list[dict[str, Any]]:
    return [kit.twice(kit.inputs(network, BATCH, place)) for place in range(STEPS)]


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_after_the_gate_the_mean_of_both_halves_serves_the_conditional_half_alone(kit: Any, name: str) -> None:
    network = kit.network(name)
    calls = guided_calls(kit, network)
    found = kit.run(network, TGate(GATE), calls, BATCH)
    for prediction, inputs in zip(found[:GATE], calls[:GATE], strict=True):
        assert torch.equal(prediction, network(**inputs).sample)
    means = [(out[:BATCH] + out[BATCH:]) / 2 for _, _, out in seen(network, calls[GATE - 1], cross=True)]
    assert means
    for prediction, inputs in zip(found[GATE:], calls[GATE:], strict=True):
        conditional = kit.rows(inputs, slice(BATCH, None))
        expected = forced(network, conditional, True, [lambda m, x, mean=mean: mean for mean in means])
        none, given = prediction.chunk(2)
        assert torch.equal(none, given)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_without_guidance_the_whole_batch_reuses_its_own_cross_attention(kit: Any, name: str) -> None:
    network = kit.network(name)
    calls = kit.calls(network, BATCH, STEPS)
    found = kit.run(network, TGate(GATE), calls, BATCH)
    kept = [out for _, _, out in seen(network, calls[GATE - 1], cross=True)]
    expected = forced(network, calls[-1], True, [lambda m, x, out=out: out for out in kept])
    torch.testing.assert_close(found[-1], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[GATE - 1], network(**calls[GATE - 1]).sample)


@pytest.mark.parametrize("name", ["attentive", "text"])
@torch.no_grad()
def test_self_attention_is_reused_before_its_residual_between_its_steps(kit: Any, name: str) -> None:
    """Warm-up 1, every 2nd after it, before the gate at 4: computed at 0, 1, 3 and 4, reused at 2."""
    network = kit.network(name)
    for attention in attentions(network, cross=False)[:1]:
        attention.rescale_output_factor = 1.3
    calls = kit.calls(network, BATCH, STEPS)
    found = kit.run(network, TGate(4, self_attention_interval=2, warm_up=1), calls, BATCH)
    exact = [network(**inputs).sample for inputs in calls]
    same = [torch.equal(a, b) for a, b in zip(found, exact, strict=True)]
    assert same == [True, True, False, True, name == "attentive"]

    def reusing(before: Tensor, out: Tensor) -> Callable[[Any, Tensor], Tensor]:
        def give(m: Any, x: Tensor) -> Tensor:
            plain = out * m.rescale_output_factor - (before if m.residual_connection else 0)
            return (plain + (x if m.residual_connection else 0)) / m.rescale_output_factor

        return give

    pairs = seen(network, calls[1], cross=False)
    expected = forced(network, calls[2], False, [reusing(before, out) for _, before, out in pairs])
    torch.testing.assert_close(found[2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_guidance_switched_off_before_the_gate_leaves_the_conditional_half_as_if_it_had_been_alone(
    kit: Any, name: str
) -> None:
    network = kit.network(name)
    guided = guided_calls(kit, network)
    conditional = [kit.rows(inputs, slice(BATCH, None)) for inputs in guided]
    with attached(network, cacher := TGate(STEPS, self_attention_interval=STEPS, warm_up=1)):
        switched = kit.told(network, cacher, [*guided[:2], *conditional[2:]], BATCH)
        alone = kit.told(network, cacher, conditional, BATCH)
    for found, expected in zip(switched[2:], alone[2:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["attentive", *TEXTS])
@torch.no_grad()
def test_a_gate_at_the_end_changes_nothing_and_so_does_a_call_outside_a_run(kit: Any, name: str) -> None:
    network = kit.network(name)
    calls = guided_calls(kit, network)
    exact = [network(**inputs).sample for inputs in calls]
    for gate in (STEPS, STEPS + 3):
        assert all(map(torch.equal, kit.run(network, TGate(gate), calls, BATCH), exact))
    with attached(network, cacher := TGate(1, 2, 0)):
        kit.told(network, cacher, calls, BATCH)
        assert all(torch.equal(network(**inputs).sample, out) for inputs, out in zip(calls, exact, strict=True))


def test_the_gate_is_where_it_was_published() -> None:
    assert [TGate().gate(steps) for steps in (15, 25, 50)] == [6, 10, 20]
    assert [TGate().gate(steps) for steps in (1, 2, 3, 5)] == [1, 1, 1, 2]
    assert TGate(7).gate(100) == 7


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_a_run_costs_half_a_batch_without_cross_attention_after_the_gate(kit: Any, name: str) -> None:
    network = kit.network(name)
    calls = guided_calls(kit, network)
    conditional = kit.rows(calls[0], slice(BATCH, None))
    text = conditional["encoder_hidden_states"]
    cross = [
        count_flops(lambda m=m, x=x: m(x, encoder_hidden_states=text))
        for m, x, _ in seen(network, conditional, cross=True)
    ]
    guided, half = (count_flops(lambda c=c: network(**c)) for c in (calls[0], conditional))
    assert guided == 2 * half
    spent = count_flops(lambda: kit.run(network, TGate(GATE), calls, BATCH))
    assert spent == GATE * guided + (STEPS - GATE) * (half - sum(cross))


@torch.no_grad()
def test_every_form_of_condition_loses_its_first_half(kit: Any) -> None:
    network = kit.texted(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=4 * 6 + 5,
        class_embed_type="timestep",
    )  # fmt: skip
    calls = guided_calls(kit, network)
    rows = 2 * BATCH
    added = {"text_embeds": torch.randn(rows, 5), "time_ids": torch.arange(float(6 * rows)).reshape(rows, 6)}
    rest = {"class_labels": torch.arange(float(rows)), "encoder_attention_mask": torch.ones(rows, kit.TOKENS)}
    for inputs in calls:
        inputs.update(added_cond_kwargs=added, cross_attention_kwargs={}, **rest)
    with attached(network, cacher := TGate(1)), kit.counted(network) as layers:
        found = kit.told(network, cacher, calls[:1] * 2, BATCH)
    assert {count for name, count in layers if name == "conv_in"} == {rows, BATCH}
    means = [(out[:BATCH] + out[BATCH:]) / 2 for _, _, out in seen(network, calls[0], cross=True)]
    conditional = {**kit.rows({k: calls[0][k] for k in ("sample", "timestep", "encoder_hidden_states", *rest)},
                              slice(BATCH, None)),
                   "added_cond_kwargs": kit.rows(added, slice(BATCH, None))}  # fmt: skip
    expected = forced(network, conditional, True, [lambda m, x, mean=mean: mean for mean in means])
    torch.testing.assert_close(found[1][BATCH:], expected, rtol=1e-5, atol=1e-5)
    with attached(network, cacher := TGate(1)):
        cacher.begin(2, BATCH)
        for index in range(2):
            cacher.at(index)
            (as_tuple,) = network(**calls[0], return_dict=False)
            assert torch.equal(as_tuple, found[index])


@torch.no_grad()
def test_a_batch_is_as_many_single_runs(kit: Any) -> None:
    for name in ("attentive", *TEXTS):
        network = kit.network(name)
        calls = kit.calls(network, BATCH, STEPS)
        with attached(network, cacher := TGate(GATE, 2, 1)):
            whole = kit.told(network, cacher, [kit.twice(inputs) for inputs in calls], BATCH)
            for row in range(BATCH):
                alone = kit.told(
                    network, cacher, [kit.twice(kit.rows(inputs, slice(row, row + 1))) for inputs in calls], 1
                )
                for many, one in zip(whole, alone, strict=True):
                    torch.testing.assert_close(many[[row, BATCH + row]], one, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_cannot_be_is_refused(kit: Any) -> None:
    for options, message in (
        ({"gate_step": 0}, "gate_step is 0; expected a whole number of at least 1"),
        ({"gate_step": 0.5}, "gate_step is 0.5"),
        ({"self_attention_interval": 0}, "self_attention_interval is 0"),
        ({"warm_up": -1}, "warm_up is -1"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            TGate(**options)  # type: ignore[arg-type]
    plain = ("DownBlock2D",) * 3, ("UpBlock2D",) * 3
    bare = kit.attentive(down_block_types=plain[0], up_block_types=plain[1], add_attention=False)
    with pytest.raises(TsAdaptError, match="reuses attention, and this UNet2DModel has none; use deepcache"):
        TGate().attach(bare)
    mixed = kit.texted(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    )  # fmt: skip
    with pytest.raises(TsAdaptError, match="looks at text and image in one"):
        TGate().attach(mixed)
    network = kit.network("text")
    with attached(network, cacher := TGate(1)):
        cacher.begin(3, BATCH)
        cacher.at(0)
        with pytest.raises(TsAdaptError, match="told of 2 samples and the network is called with 5"):
            network(**kit.inputs(network, 5))
        network(**kit.inputs(network, BATCH))
        cacher.at(1)
        with pytest.raises(TsAdaptError, match="has kept 2 rows and the network is called with 4"):
            cacher.batch = 4
            network(**kit.inputs(network, 4))
