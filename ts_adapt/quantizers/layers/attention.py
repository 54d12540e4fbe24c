"""Quantized attention: what flows between the projections, which no layer's quantizer sees.

    L = Q_l(Q_q(q) Q_k(k)^T scale) + mask,     y = Q_p(softmax(L)) Q_v(v)

Scales are calibrated. A fixed grid over [0, 1] would round the probabilities of a flat attention, 1 / L each, to 0.

It stands in the place of the attention's processor, runs that processor, and takes over the one call of
`scaled_dot_product_attention` in it: projections, norms, rotary embeddings stay whoever's they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ts_adapt.quantizers.layers.activations import GroupedActivation
from ts_adapt.quantizers.layers.quantized_layer import Part
from ts_adapt.quantizers.layers.timestep import TimestepListener

TENSORS = ("query", "key", "value", "logits", "probabilities")
Through = Mapping[str, Callable[[Tensor], Tensor]]
"""What each of TENSORS goes through."""


def attention(
    through: Through,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, each of TENSORS gone through its own function."""
    q, k, v = through["query"](query), through["key"](key), through["value"](value)
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    logits = through["logits"](q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1])))
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    probabilities = F.dropout(through["probabilities"](logits.softmax(-1)), dropout_p)
    return probabilities @ v


class TakenOver(TorchFunctionMode):
    """While the block runs, `attention` is run wherever scaled_dot_product_attention is called."""

    def __init__(self, through: Through) -> None:
        super().__init__()
        self.through = through

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return attention(self.through, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class QuantizedAttention(Part):
    """Stands for `processor`. parts: an activation part for each of TENSORS."""

    kind = "attention"
    timed = True

    def __init__(self, processor: Any, parts: Mapping[str, GroupedActivation]) -> None:
        super().__init__()
        self.processor = (processor,)
        self.__dict__["__call__"] = processor.__call__  # diffusers reads off it which arguments are taken
        self.parts = nn.ModuleDict(parts)

    def forward(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with TakenOver(self.parts):  # type: ignore[arg-type]
            return self.processor[0](attn, *args, **kwargs)

    def spec(self) -> dict[str, Any]:
        return {"parts": {name: part.spec() for name, part in self.parts.items()}}  # type: ignore[operator]

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        parts = {name: GroupedActivation.from_spec(own, None, listener) for name, own in spec["parts"].items()}
        return cls(original, parts)
