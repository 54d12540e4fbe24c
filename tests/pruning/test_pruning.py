"""Blocks of a UNet are left out and put back exactly; the least useful go first; files say which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiny_networks import ATTENTIVE, said, small
from ts_adapt.assembly import build_cachers
from ts_adapt.cachers import attached
from ts_adapt.denoisers.execution import execute
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.cost import count_flops
from ts_adapt.pruning import PruneOptions, candidates, evolve, pruned, put_back, read, remove, removed, save
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import quantize, restore


def attentive(layers: int = 1) -> Any:
    torch.manual_seed(0)
    return small("UNet2DModel", layers_per_block=layers, attention_head_dim=4, **ATTENTIVE)


def texted(layers: int = 2) -> Any:
    """A network with transformers of several layers."""
    torch.manual_seed(0)
    return small("UNet2DConditionModel", cross_attention_dim=8, transformer_layers_per_block=layers)


def marks(network: nn.Module) -> list[Any]:
    modules = [(name, id(m), sorted(vars(m))) for name, m in network.named_modules()]
    return [modules, [(name, id(p)) for name, p in network.named_parameters()]]


def measures(network: Any) -> tuple[Callable[[], float], Callable[[], float]]:
    """The squared distance of what the network says to what the full one says, and its operations."""
    full = said(network)
    return lambda: float((said(network) - full).square().mean()), lambda: float(count_flops(lambda: said(network)))


@pytest.mark.parametrize(
    ("make", "kinds"),
    [(lambda: attentive(2), {"ResnetBlock2D", "Attention"}),
     (texted, {"ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock"}),
     (lambda: texted(1), {"ResnetBlock2D", "Transformer2DModel"})],
)  # fmt: skip
def test_every_block_can_go_and_comes_back_exactly(make: Callable[[], Any], kinds: set[str]) -> None:
    network = make()
    before, full, names = marks(network), said(network), candidates(network)
    weights = set(network.state_dict())
    assert {type(network.get_submodule(name)).__name__ for name in names} == kinds
    for name in names:
        with pruned(network, name):
            less = said(network)
            assert less.shape == full.shape and not torch.allclose(less, full) and removed(network) == [name]
            assert set(network.state_dict()) < weights
        assert marks(network) == before
    while left := candidates(network):
        remove(network, left[0])
    assert said(network).shape == full.shape and torch.isfinite(said(network)).all()
    assert marks(put_back(network)) == before and torch.equal(said(network), full)


def test_a_block_left_out_is_its_shortcut() -> None:
    """A resnet with another number of channels keeps its convolution, and attention hands on what it is given."""
    network = attentive()
    for name in candidates(network):
        block: Any = network.get_submodule(name)
        channels = getattr(block, "in_channels", None) or block.to_q.in_features
        x, temb = torch.randn(2, channels, 4, 4), torch.randn(2, 32)
        resnet = type(block).__name__ == "ResnetBlock2D"
        last = block.conv2 if resnet else block.to_out[0]
        kept = last.weight.clone(), last.bias.clone()
        last.weight.zero_()
        last.bias.zero_()
        silent = block(x, temb) if resnet else block(x)
        last.weight.copy_(kept[0])
        last.bias.copy_(kept[1])
        with pruned(network, name):
            without: Any = network.get_submodule(name)
            torch.testing.assert_close(without(x, temb) if resnet else without(x), silent)


@pytest.mark.parametrize(("name", "last"), [("mid_block.resnets.1", "conv2"), ("mid_block.attentions.0", "to_out")])
def test_a_block_that_adds_nothing_is_the_first_to_go(name: str, last: str) -> None:
    network = attentive()
    part = getattr(network.get_submodule(name), last)
    for p in (part if last == "conv2" else part[0]).parameters():
        p.zero_()
    before = marks(network)
    rounds = list(evolve(network, *measures(network), PruneOptions(cost=0.99)))
    assert rounds[0].removed == name and rounds[0].distance == pytest.approx(0, abs=1e-12)
    assert marks(network) == before


def test_each_round_takes_the_least_loss_for_what_is_saved() -> None:
    network = attentive()
    distance, cost = measures(network)
    rounds = list(evolve(network, distance, cost, PruneOptions(cost=0.85)))
    full, gone = cost(), []
    for one in rounds:
        with pruned(network, *gone):
            now = distance(), cost() / full
            found = {}
            for name in candidates(network):
                with pruned(network, name):
                    found[name] = (distance() - now[0]) / (now[1] - cost() / full)
        assert one.removed == min(found, key=lambda name: found[name])
        gone.append(one.removed)
    with pruned(network, *gone):
        assert rounds[-1].cost == cost() / full <= 0.85 and rounds[-1].distance == distance()
    assert [one.cost for one in rounds] == sorted((one.cost for one in rounds), reverse=True)
    assert all(one.cost > 0.85 for one in rounds[:-1])


def test_limits_end_it() -> None:
    network = attentive()
    distance, cost = measures(network)
    assert list(evolve(network, distance, cost, PruneOptions(cost=1.0))) == []
    assert list(evolve(network, distance, cost, PruneOptions(cost=0.0, distance=0.0))) == []
    farthest = max(one.distance for one in evolve(network, distance, cost, PruneOptions(cost=0.9)))
    few = list(evolve(network, distance, cost, PruneOptions(cost=0.0, distance=farthest)))
    assert few and all(one.distance <= farthest for one in few)
    with pytest.raises(TsAdaptError, match=r"prune\.distance is -1"):
        list(evolve(network, distance, cost, PruneOptions(distance=-1)))
    with pruned(network, candidates(network)[0]), pytest.raises(TsAdaptError, match="give the full network"):
        list(evolve(network, distance, cost, PruneOptions()))
    before = marks(network)
    going = evolve(network, distance, cost, PruneOptions(cost=0.5))
    next(going)
    going.close()
    assert marks(network) == before


def test_a_pruned_network_is_cached_and_quantized_like_any_other() -> None:
    network = texted(1)
    names = ["mid_block.attentions.0", "down_blocks.0.resnets.0", "up_blocks.0.resnets.1"]
    for name in names:
        remove(network, name)
    without = said(network)
    for cacher in ("deepcache-2", "tgate-1", "tgate-1+deepcache-2"):
        with attached(network, *build_cachers(cacher)):
            assert torch.equal(said(network), without)
            with pytest.raises(TsAdaptError, match="leave blocks out of the plain network"):
                remove(network, candidates(network)[0])
    method, layers = build("hqq4+split")
    quantize(network, method, layers=layers)
    assert 0 < (said(network) - without).abs().max() < 1
    with pytest.raises(TsAdaptError, match="leave blocks out of the plain network"):
        remove(network, candidates(network)[0])
    assert torch.equal(said(restore(network)), without)


def test_the_file_says_which_blocks_went_and_for_what(tmp_path: Path) -> None:
    network, path = attentive(), tmp_path / "pruned.json"
    rounds = list(evolve(network, *measures(network), PruneOptions(cost=0.95)))
    save(path, network, rounds, {"model": "a"})
    before = marks(network)
    assert read(path, network) == read(path) == [one.removed for one in rounds]
    with pruned(network, *read(path, network)):
        assert removed(network) == [one.removed for one in rounds]
    assert marks(network) == before
    with pytest.raises(
        TsAdaptError, match=r"is for the network UNet2DModel of \d+ blocks, and this UNet2DConditionModel has"
    ):
        read(path, texted())
    kept = json.loads(path.read_text())
    for change, message in (
        ({"format": "x"}, "expected 'ts_adapt pruned network'"),
        ({"removed": [kept["removed"][0], "conv_in"]}, "it leaves out what is no block"),
        ({"removed": 2 * kept["removed"][:1]}, "it leaves out what is no block"),
        ({"removed": [["a"]], "blocks": [["a"]]}, "it leaves out what is no block"),
        ({"blocks": 3}, "'blocks' of"),
    ):
        path.write_text(json.dumps(kept | change))
        with pytest.raises(TsAdaptError, match=message):
            read(path)
    with pytest.raises(TsAdaptError, match="there is no file"):
        read(tmp_path / "absent.json")


def test_what_has_no_such_block_is_refused() -> None:
    with pytest.raises(TsAdaptError, match="no block that can be left out"):
        candidates(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TsAdaptError, match="unknown block 'conv_in'"):
        remove(attentive(), "conv_in")


@pytest.mark.parametrize("way", [{"channels_last": True}, {"fused_qkv": True}, {"compile": "eager"}])
def test_a_network_is_pruned_however_it_is_run(way: dict[str, Any]) -> None:
    network = attentive()
    names = candidates(network)[:3]
    full, weights = said(network), {name: id(p) for name, p in network.named_parameters()}
    with pruned(network, *names):
        less = said(network)
    execute(network, **way)
    before = marks(network)
    with pruned(network, *names):
        torch.testing.assert_close(said(network), less)
    assert marks(network) == before
    torch.testing.assert_close(said(network), full)
    assert weights.items() <= {name: id(p) for name, p in network.named_parameters()}.items()
