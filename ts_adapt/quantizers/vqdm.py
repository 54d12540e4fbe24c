"""VQDM (Egiazarian et al. 2024, for diffusion models): weights as sums of vectors from additive codebooks, calibrated.

Blocks of the network are quantized one after the other, each for the inputs that it gets from those before it as they
are by then. A layer's format depends on its size (`codebooks.choose_format`), as codebooks are paid for once a layer.
At the end codebooks and scales may be fine-tuned to what the network in full precision said to the calibration set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from ts_adapt.interfaces import TsAdaptError
from ts_adapt.quantizers.calibration import Recorder, observe
from ts_adapt.quantizers.calls import Call
from ts_adapt.quantizers.codebooks import FORMATS, CodebookWeight, LearnedCodebooks, choose_format, find_codes
from ts_adapt.quantizers.gram import grams
from ts_adapt.quantizers.layer import QuantizedLayer
from ts_adapt.quantizers.network import Quantization, Quantizer, quantized_layers
from ts_adapt.quantizers.training import Batches, FineTuneOptions, fine_tune, reproduction_batches, reproduction_loss
from ts_adapt.quantizers.traversal import Layer


@dataclass
class VQDMOptions:
    """Bits, and how long is searched."""

    bits: int = 4
    """Of the codes of a weight: 2, 3 or 4."""
    overhead: float = 0.25
    """Bits a weight that the codebooks of a layer may add; a layer too small for any takes the cheapest."""
    rounds: int = 4
    """Of Adam and beam search for a layer, at most."""
    steps: int = 100
    """Of Adam in a round."""
    lr: float = 1e-4
    beam: int = 8
    fine_tune: int = 0
    """Steps of fine-tuning to the network in full precision."""
    fine_tune_lr: float = 1e-6
    fine_tune_batch: int = 16
    seed: int = 0


class VQDM(Quantizer):
    """See the module's head. Raises TsAdaptError for options that make no sense, naming them."""

    name = "vqdm"
    needs_calls = True

    def __init__(self, options: VQDMOptions | None = None) -> None:
        self.options: VQDMOptions = options or VQDMOptions()
        o = self.options
        if o.bits not in FORMATS:
            raise TsAdaptError(f"bits is {o.bits!r}; vqdm has codebooks for {', '.join(map(str, FORMATS))}")
        for name, least in (("rounds", 0), ("steps", 1), ("beam", 1), ("fine_tune", 0), ("fine_tune_batch", 1)):
            if getattr(o, name) < least:
                raise TsAdaptError(f"{name} of vqdm is {getattr(o, name)}; expected {least} or more")

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        o = self.options
        layers = _in_order_of_calls(to.network, to.layers(), calls)
        for name in [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.groups > 1]:
            to.leave(name, "grouped convolution, which vqdm does not take")
            del layers[name]
        batches = reproduction_batches(to.network, calls, o.fine_tune_batch, o.seed) if o.fine_tune else None
        for _, names in groupby(layers, key=block_of):
            block = {name: layers[name] for name in names}
            inputs = grams(to.network, block, calls)
            for name, layer in block.items():
                layout = choose_format(layer.weight.shape, o.bits, o.overhead)
                found = find_codes(
                    layer.weight, inputs[name][0], layout,
                    rounds=o.rounds, steps=o.steps, lr=o.lr, beam=o.beam, seed=o.seed,
                )  # fmt: skip
                to.replace(name, QuantizedLayer(layer, CodebookWeight.of(found, layer.weight.shape, layout, o.bits)))
        if batches is not None:
            self._fine_tune(to.network, batches)

    def _fine_tune(self, network: nn.Module, batches: Batches) -> None:
        o = self.options
        for _, layer in quantized_layers(network):
            if isinstance(layer.stored, CodebookWeight):
                layer.stored = LearnedCodebooks(layer.stored)
        options = FineTuneOptions(steps=o.fine_tune, lr=o.fine_tune_lr, train="weights", seed=o.seed)
        fine_tune(network, batches, reproduction_loss, options, progress=False)
        for _, layer in quantized_layers(network):
            if isinstance(layer.stored, LearnedCodebooks):
                layer.stored = layer.stored.learned()


def _in_order_of_calls(network: nn.Module, layers: dict[str, Layer], calls: Sequence[Call]) -> dict[str, Layer]:
    recorder = Recorder(keep=1)
    observe(network, layers, [calls[0].rows(torch.arange(1))], recorder.visit)
    recorder.records(layers)
    return {name: layers[name] for name in recorder.seen}


def block_of(name: str) -> str:
    """The block that a layer is in: `down_blocks.0` of `down_blocks.0.resnets.1.conv1`, `mid_block`."""
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    return f"{first}.{second}" if second.isdigit() else first
