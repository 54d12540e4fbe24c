"""The blocks of a UNet that can be left out: those that add something to what they are given.

    block      y = (S x + f(x, ...)) / c      S the identity, or the convolution that fits the channels of a resnet
    left out   y = S x / c

They are the resnets that do not resample, the attention layers of UNet2DModel, the transformers of
UNet2DConditionModel, and, where one of these has several layers, each layer by itself. What comes out has the shape
that it had, so that any of them may go, alone or with others. Skip connections stay, and so do the names of all weights
that are left, and how the network is run (`denoisers.execution`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ts_adapt.denoisers.network import QUANTIZATION, step_aware_parts
from ts_adapt.errors import TsAdaptError, unknown

ATTRIBUTE = "_ts_adapt_pruned"
RESNET, ATTENTION, TRANSFORMER, LAYER = "ResnetBlock2D", "Attention", "Transformer2DModel", "BasicTransformerBlock"


class Bypass(nn.Module):
    """What is left of a block that is left out.

    conv_shortcut  S, a module of the block itself; None: the identity
    factor         c
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        factor = "output_scale_factor" if type(block).__name__ == RESNET else "rescale_output_factor"
        self.conv_shortcut: nn.Module | None = getattr(block, "conv_shortcut", None)
        self.factor = float(getattr(block, factor, 1.0))
        self.out_channels: int | None = getattr(block, "out_channels", None)
        self.training = block.training

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        hidden = hidden if self.factor == 1.0 else hidden / self.factor
        return (hidden,) if kwargs.get("return_dict") is False else hidden


def candidates(network: nn.Module) -> list[str]:
    """The names of the blocks of `network` that can be left out and are not; TsAdaptError where it has none at all."""
    names = [name for name, module in network.named_modules() if name and _can_go(network, name, module)]
    if not names and not removed(network):
        raise TsAdaptError(
            f"this {type(network).__name__} has no block that can be left out; give a UNet2DModel or a "
            "UNet2DConditionModel of diffusers"
        )
    return names


def removed(network: nn.Module) -> list[str]:
    """The names of the blocks that are left out, in the order in which they went."""
    return list(network.__dict__.get(ATTRIBUTE, {}))


def remove(network: nn.Module, name: str) -> nn.Module:
    """Leave out the block `name` of `network`, in place.

    Raises TsAdaptError for a block that cannot be left out, and for a network that is quantized or has cachers: blocks
    go first.
    """
    if QUANTIZATION in vars(network) or step_aware_parts(network):
        raise TsAdaptError(
            f"this {type(network).__name__} is quantized or has cachers; leave blocks out of the plain network, then "
            "do the rest"
        )
    known = candidates(network)
    if name not in known:
        raise unknown("block", name, known)
    block = network.get_submodule(name)
    network.__dict__.setdefault(ATTRIBUTE, {})[name] = block
    _put(network, name, Bypass(block))
    return network


def put_back(network: nn.Module, count: int | None = None) -> nn.Module:
    """The last `count` blocks that were left out, None: all of them, where they were; the very same modules."""
    kept: dict[str, nn.Module] = network.__dict__.get(ATTRIBUTE, {})
    for name in list(reversed(kept))[:count]:
        _put(network, name, kept.pop(name))
    if not kept:
        network.__dict__.pop(ATTRIBUTE, None)
    return network


@contextmanager
def pruned(network: nn.Module, *names: str) -> Iterator[nn.Module]:
    """`network` without these blocks for as long as the block of code runs."""
    before = len(removed(network))
    try:
        for name in names:
            remove(network, name)
        yield network
    finally:
        put_back(network, len(removed(network)) - before)


def _can_go(network: nn.Module, name: str, module: Any) -> bool:
    kind = type(module).__name__
    if kind == RESNET:
        return module.upsample is None and module.downsample is None
    if kind == ATTENTION:
        return bool(module.residual_connection)
    if kind == LAYER:
        return len(list(network.get_submodule(name.rpartition(".")[0]).children())) > 1
    return kind == TRANSFORMER


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)
