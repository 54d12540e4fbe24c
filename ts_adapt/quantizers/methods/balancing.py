"""Channel balancing: an input channel's range is traded against its weights' (PTQ4DiT, Wu et al. 2024, section 4).

    y = (x b) (W / b)^T + bias     b_c = sqrt(s_c(X) s_c(W)) / s_c(X) = sqrt(s_c(W) / s_c(X))
    s_c(X) = sum_t w_t max |x_c| at t,     w = softmax_t(-rho_t)
    rho_t  Spearman's correlation over the channels of max |x_c| at t and s_c(W) = max |W_c|

so that the times count most at which large inputs do not meet large weights. b is rounded to a power of two: balancing
then only shifts exponents, and the network in full precision is the same bit for bit.

b goes into the operation before where that commutes with it: a GroupNorm or LayerNorm, the value projection of an
attention, the linear half of a GEGLU. Elsewhere (behind a SiLU) it stays with the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from ts_adapt.quantizers.calibration.layer_inputs import InputRecord
from ts_adapt.quantizers.layers.affine import along, power_of_two
from ts_adapt.quantizers.layers.quantized_layer import Layer
from ts_adapt.quantizers.layers.weights import over_columns
from ts_adapt.quantizers.quantization import Quantization

LARGEST_EXPONENT = 20


@dataclass(frozen=True)
class Fold:
    """producer   a norm, or a layer whose first `rows` output channels feed the consumers (None: all)
    consumers  the layers, all of them, that its output goes to
    """

    producer: str
    consumers: tuple[str, ...]
    rows: int | None = None


@dataclass
class Balance:
    """Exponents of two: the layer's weight in place of W is 2^rows W 2^-columns.

    columns  `(I,)` k_c of the input channels; rows  `(O,)` what the layers behind have folded into this one
    folded   whether the input arrives multiplied by 2^columns
    """

    columns: Tensor
    rows: Tensor
    folded: bool = False

    @classmethod
    def of(cls, layer: Layer, columns: Tensor | None = None) -> Balance:
        """That of `layer` by itself; without `columns` none."""
        rows, inputs = (torch.zeros(count, dtype=torch.int8) for count in layer.weight.shape[:2])
        return cls(inputs if columns is None else columns, rows)

    def arriving(self) -> Balance:
        """What the layer in full precision has to undo: nothing of an input that arrives as it was."""
        return Balance(self.columns if self.folded else torch.zeros_like(self.columns), self.rows, self.folded)


def folds(network: nn.Module) -> Iterator[Fold]:
    """The places in diffusers' blocks where an operation and the layers behind it commute with factors."""
    for name, module in network.named_modules():
        if isinstance(module, Attention) and _is_plain(module):
            if module.group_norm is not None and not module.is_cross_attention:
                yield Fold(f"{name}.group_norm", tuple(f"{name}.{part}" for part in ("to_q", "to_k", "to_v")))
            yield Fold(f"{name}.to_v", (f"{name}.to_out.0",))
        if isinstance(module, BasicTransformerBlock) and _is_plain_block(module):
            for norm, attention in (("norm1", "attn1"), ("norm2", "attn2")):
                if getattr(module, attention, None) is not None and _is_plain(getattr(module, attention)):
                    crossed = getattr(module, attention).is_cross_attention
                    parts = ("to_q",) if crossed else ("to_q", "to_k", "to_v")
                    yield Fold(f"{name}.{norm}", tuple(f"{name}.{attention}.{part}" for part in parts))
            if isinstance(module.ff, FeedForward) and isinstance(module.ff.net[0], GEGLU):
                yield Fold(f"{name}.norm3", (f"{name}.ff.net.0.proj",))
        if isinstance(module, FeedForward) and isinstance(module.net[0], GEGLU):
            half = module.net[0].proj.out_features // 2
            yield Fold(f"{name}.net.0.proj", (f"{name}.net.2",), half)


def balance(to: Quantization, layers: Mapping[str, Layer], records: Mapping[str, InputRecord]) -> dict[str, Balance]:
    """Fold what can be folded into `to.network`, in full precision, through `to.replace`; the balance of each layer.

    Afterwards the network's layers in `layers` that take part in a fold are balanced ones, and its output is the same.
    """
    found = {name: Balance.of(layer, exponents([layer], records[name])) for name, layer in layers.items()}
    for fold in folds(to.network):
        consumers = [name for name in fold.consumers if name in layers]
        producer = to.network.get_submodule(fold.producer)
        norm = isinstance(producer, nn.GroupNorm | nn.LayerNorm) and producer.weight is not None
        if len(consumers) != len(fold.consumers) or not (norm or fold.producer in layers):
            continue
        columns = exponents([layers[name] for name in consumers], records[consumers[0]])
        for name in consumers:
            found[name].columns, found[name].folded = columns, True
        if norm:
            to.replace(fold.producer, scaled(producer, columns))
        else:
            found[fold.producer].rows[: fold.rows] = columns
    for name, own in found.items():
        if own.folded or bool(own.rows.any()):
            to.replace(name, balanced_layer(layers[name], own.arriving()))
    return found


def exponents(layers: Sequence[Layer], record: InputRecord) -> Tensor:
    """k_c `(I,)` for `layers` of one input; 0 for channels that are always 0, and for grouped convolutions."""
    weights = torch.stack([layer.weight.detach().float().abs().transpose(0, 1).flatten(1).amax(1) for layer in layers])
    by_weight = weights.amax(0).cpu()
    if record.channel_bound.shape[1] != len(by_weight):
        return torch.zeros(record.channel_bound.shape[1], dtype=torch.int8)
    importance = (-spearman(record.channel_bound, by_weight)).softmax(0)
    by_input = (importance[:, None] * record.channel_bound).sum(0)
    usable = (by_input > 0) & (by_weight > 0)
    ratio = torch.where(usable, by_weight / by_input.clamp(min=1e-30), torch.ones_like(by_input))
    return (0.5 * ratio.log2()).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int8)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation of each row of `x` `(T, n)` with `y` `(n,)`: that of their ranks, `(T,)`; 0 for n = 1."""
    ranks = [v.argsort(-1).argsort(-1).double() for v in (x, y.expand_as(x))]
    a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
    norm = (a.square().sum(-1) * b.square().sum(-1)).sqrt().clamp(min=1e-30)
    return ((a * b).sum(-1) / norm).float()


def balanced_layer(layer: Layer, by: Balance) -> Any:
    """A copy of `layer` with weight 2^rows W 2^-columns and bias 2^rows."""
    new = scaled(layer, by.rows)
    with torch.no_grad():
        new.weight.div_(over_columns(by.columns, new.weight))
    return new


def scaled(module: Any, rows: Tensor) -> Any:
    """A copy of `module`, a layer or a norm, whose output channels are 2^rows times as large."""
    new, factor = copy.deepcopy(module), power_of_two(rows.to(module.weight.device))
    with torch.no_grad():
        new.weight.mul_(along(factor, new.weight, 0))
        if new.bias is not None:
            new.bias.mul_(factor)
    return new


def _is_plain_block(block: Any) -> bool:
    """With norms whose outputs go to the layers behind them as they are."""
    return bool(block.norm_type == "layer_norm" and block.pos_embed is None)


def _is_plain(attention: Any) -> bool:
    """Softmax attention on q, k and v alone, without projections or processors of other kinds."""
    return bool(
        isinstance(attention.processor, AttnProcessor | AttnProcessor2_0)
        and attention.added_kv_proj_dim is None
        and attention.spatial_norm is None
        and not attention.only_cross_attention
    )
