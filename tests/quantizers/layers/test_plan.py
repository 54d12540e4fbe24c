"""Which layers are quantized and which are not, on the networks of diffusers and on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.layers.plan import (
    FIRST_REASON,
    LAST_REASON,
    TIME_REASON,
    LayerOptions,
    plan,
    split_points,
    summary,
)


@pytest.mark.parametrize(
    ("name", "first", "last", "time"),
    [
        ("unet", ["conv_in"], ["conv_out"], 2),
        ("sd", ["conv_in"], ["conv_out"], 2),
        ("sdxl", ["conv_in"], ["conv_out"], 4),
        ("dit", ["pos_embed.proj"], ["proj_out_1", "proj_out_2"], 2),
        ("pixart", ["pos_embed.proj", "caption_projection.linear_1", "caption_projection.linear_2"], ["proj_out"], 3),
        ("sd3", ["pos_embed.proj", "context_embedder"], ["norm_out.linear", "proj_out"], 4),
        ("flux", ["context_embedder", "x_embedder"], ["norm_out.linear", "proj_out"], 4),
    ],
)
def test_ends_and_time_embedding_stay(make: Callable[..., Any], name: str, first: Any, last: Any, time: int) -> None:
    planned = plan(make(name))
    assert [layer.name for layer in planned if layer.reason == FIRST_REASON] == first
    assert [layer.name for layer in planned if layer.reason == LAST_REASON] == last
    assert sum(layer.reason == TIME_REASON for layer in planned) == time
    assert all(layer.kind in ("Linear", "Conv2d") for layer in planned if layer.reason is None)
    inside = [layer.name for layer in planned if layer.reason is None]
    assert any("time_emb_proj" in name or "norm" in name or "attn" in name for name in inside)


def test_every_matrix_is_in_the_plan_and_counted(make: Callable[..., Any]) -> None:
    network = make("unet")
    planned = plan(network)
    matrices = {name.removesuffix(".weight") for name, p in network.named_parameters() if p.ndim >= 2}
    assert {layer.name for layer in planned} == matrices
    text = summary(planned)
    assert text.startswith(f"{sum(layer.reason is None for layer in planned)} quantized")
    assert "2 time embedding" in text and "1 first layer" in text


class Odd(nn.Module):
    """Layers of several kinds under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(4, 8)
        self.table = nn.Embedding(5, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.end = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.end(self.two(self.one(self.start(x))))  # type: ignore[no-any-return]


def test_what_cannot_be_quantized_is_named_left_and_counted() -> None:
    network = Odd()
    with torch.no_grad():
        network.two.weight[0, 0] = float("nan")
    reasons = {layer.name: layer.reason for layer in plan(network)}
    assert reasons["start"] == FIRST_REASON and reasons["end"] == LAST_REASON and reasons["one"] is None
    assert reasons["table"] == "Embedding, which cannot be quantized"
    assert reasons["up"] == "ConvTranspose2d, which cannot be quantized"
    assert reasons["two"] is not None and "NaN" in reasons["two"]
    assert "1 Embedding, which cannot be quantized" in summary(plan(network))


def test_options_choose() -> None:
    assert {layer.name for layer in plan(Odd(), LayerOptions(keep_ends=False)) if layer.reason is None} == {
        "start", "one", "two", "end",
    }  # fmt: skip
    skipped = plan(Odd(), LayerOptions(skip=("t*",)))
    assert next(layer for layer in skipped if layer.name == "two").reason == "skipped by name"
    with pytest.raises(TsAdaptError, match="no layer of Odd has a name like 'three"):
        plan(Odd(), LayerOptions(skip=("three.*",)))


def test_a_network_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(TsAdaptError, match="no layer to quantize: 0 quantized"):
        plan(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(TsAdaptError, match="no layer to quantize"):
        plan(nn.Sequential(nn.ReLU()))


def test_shortcuts_are_split_where_the_skip_connection_begins(make: Callable[..., Any]) -> None:
    network = make("unet")
    points = split_points(network, plan(network))
    assert points == {
        "up_blocks.0.resnets.0.conv_shortcut": 16,
        "up_blocks.0.resnets.1.conv_shortcut": 16,
        "up_blocks.1.resnets.0.conv_shortcut": 16,
        "up_blocks.1.resnets.1.conv_shortcut": 8,
    }
    seen: dict[str, tuple[int, int]] = {}
    cat = torch.cat

    def spy(tensors: Any, dim: int = 0, **options: Any) -> torch.Tensor:
        if dim == 1 and len(tensors) == 2 and tensors[0].ndim == 4:
            seen[str(len(seen))] = (tensors[0].shape[1], tensors[1].shape[1])
        return cat(tensors, dim, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", spy)
        network(torch.randn(1, 1, 8, 8), torch.tensor([3.0]))
    assert [below for below, _ in seen.values()] == list(points.values())
    with pytest.raises(TsAdaptError, match="no decoder with shortcuts"):
        split_points(make("dit"), plan(make("dit")))
