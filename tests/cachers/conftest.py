"""Small UNets with random weights, their evaluation unit by unit, and runs told by hand."""

from __future__ import annotations

import ts_adapt  # noqa: F401  isort: skip

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tiny_networks import small
from ts_adapt.cachers import attached

WIDTH, TOKENS = 8, 3


def attentive(**options: Any) -> Any:
    """UNet2DModel with attention on the way down, in the middle and on the way up, two resnets a block."""
    own = {
        "layers_per_block": 2, "block_out_channels": (8, 8, 16), "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return small("UNet2DModel", **own | options)


def texted(**options: Any) -> Any:
    """UNet2DConditionModel, as in Stable Diffusion."""
    own = {
        "layers_per_block": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH,
    }  # fmt: skip
    return small("UNet2DConditionModel", **own | options)


NETWORKS = {
    "attentive": attentive,
    "resnet-ways": lambda: attentive(downsample_type="resnet", upsample_type="resnet", layers_per_block=1),
    "text": texted,
    "text-deep": lambda: texted(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, transformer_layers_per_block=2,
    ),
}  # fmt: skip


class UnitByUnit:
    """`network` evaluated without its forward: every unit by itself, from the outside in and back.

    run(inputs) -> (prediction, F_b); with `feature` in place of F_b only the units that take part without the deep ones
    """

    def __init__(self, network: Any, branch: int) -> None:
        self.network, self.branch = network, branch
        self.down = [unit for block in network.down_blocks for unit in self._units(block)]
        self.up: list[Any] = []
        for block in network.up_blocks:
            units = self._units(block)
            units[-1] += list(block.upsamplers or ())
            self.up += units

    @staticmethod
    def _units(block: Any) -> list[Any]:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        units = [[resnet, *([attention] if attention is not None else [])]
                 for resnet, attention in zip(block.resnets, attentions, strict=True)]  # fmt: skip
        return units + [[sampler] for sampler in getattr(block, "downsamplers", None) or ()]

    def _do(self, unit: list[Any], h: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
        for module in unit:
            kind = type(module).__name__
            if "Resnet" in kind:
                h = module(h, emb)
            elif kind == "Transformer2DModel":
                h = module(h, encoder_hidden_states=text, return_dict=False)[0]
            else:
                h = module(h)
        return h

    def run(self, inputs: dict[str, Any], feature: Tensor | None = None) -> tuple[Tensor, Tensor]:
        net, x, text = self.network, inputs["sample"], inputs.get("encoder_hidden_states")
        emb = net.time_embedding(net.time_proj(inputs["timestep"].expand(len(x))).to(x.dtype))
        h = net.conv_in(x)
        skips = [h]
        for unit in self.down if feature is None else self.down[: self.branch]:
            h = self._do(unit, h, emb, text)
            skips.append(h)
        if feature is None:
            h = net.mid_block(h, emb) if text is None else net.mid_block(h, emb, encoder_hidden_states=text)
        entry = len(self.up) - 1 - self.branch
        for place, unit in enumerate(self.up):
            if place == entry:
                feature = h = h if feature is None else feature
            if place >= entry or feature is None:
                h = self._do(unit, torch.cat([h, skips[len(self.up) - 1 - place]], 1), emb, text)
        assert feature is not None
        return net.conv_out(net.conv_act(net.conv_norm_out(h))), feature


class Kit:
    """What the tests of this room share."""

    networks: Sequence[str] = tuple(NETWORKS)
    UnitByUnit = UnitByUnit
    attentive, texted = staticmethod(attentive), staticmethod(texted)
    WIDTH, TOKENS = WIDTH, TOKENS

    def network(self, name: str) -> Any:
        torch.manual_seed(0)
        return NETWORKS[name]()

    def inputs(self, network: Any, batch: int, place: int = 0) -> dict[str, Any]:
        """What the network is called with at the `place`-th step, other numbers at each."""
        generator = torch.Generator().manual_seed(place)
        size = network.config.sample_size
        made: dict[str, Any] = {
            "sample": torch.randn(batch, network.config.in_channels, size, size, generator=generator),
            "timestep": torch.linspace(900, 500, batch) - 100.0 * place,
        }
        if isinstance(network, UNet2DConditionModel):
            text = torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(99))
            made["encoder_hidden_states"] = text
        return made

    def rows(self, inputs: dict[str, Any], rows: slice) -> dict[str, Any]:
        return {name: value[rows] for name, value in inputs.items()}

    def twice(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The guided batch: the same states and times, and no text in the first half."""
        made = {name: torch.cat([value, value]) for name, value in inputs.items()}
        if "encoder_hidden_states" in made:
            made["encoder_hidden_states"][: len(inputs["sample"])] = 0.1
        return made

    def told(self, network: Any, cacher: Any, calls: list[dict[str, Any]], batch: int) -> list[Tensor]:
        """The predictions of a run of as many steps as there are `calls`."""
        cacher.begin(len(calls), batch)
        found = []
        for index, inputs in enumerate(calls):
            cacher.at(index)
            found.append(network(**inputs).sample)
        cacher.end()
        return found

    def run(self, network: Any, cacher: Any, calls: list[dict[str, Any]], batch: int) -> list[Tensor]:
        """As `told`, with the cacher attached for that run alone."""
        with attached(network, cacher):
            return self.told(network, cacher, calls, batch)

    def calls(self, network: Any, batch: int, steps: int) -> list[dict[str, Any]]:
        """The `inputs` of all steps of a run."""
        return [self.inputs(network, batch, place) for place in range(steps)]

    @contextmanager
    def counted(self, network: nn.Module) -> Iterator[list[tuple[str, int]]]:
        """(name, rows) of every convolution and linear layer that runs."""
        calls: list[tuple[str, int]] = []

        def note(name: str) -> Any:
            return lambda module, args, out: calls.append((name, len(out)))

        handles = [
            module.register_forward_hook(note(name))
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        yield calls
        for handle in handles:
            handle.remove()

    def marks(self, network: nn.Module) -> dict[str, dict[str, Any]]:
        """What each module has in its dictionary, by name and identity."""
        return {name: {key: id(value) for key, value in vars(m).items()} for name, m in network.named_modules()}


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
