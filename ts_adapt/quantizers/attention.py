"""Quantized attention: what flows between the projections, which no layer's quantizer sees.

    L = Q_l(Q_q(q) Q_k(k)^T scale) + mask,     y = Q_p(softmax(L)) Q_v(v)

Scales are calibrated. A fixed grid over [0, 1] would round the probabilities of a flat attention, 1 / L each, to 0.

It stands in the place of the attention's processor, runs that processor, and takes over the one call of
`scaled_dot_product_attention` in it: projections, norms, rotary embeddings stay whoever's they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ts_adapt.quantizers.calibration import Visit
from ts_adapt.quantizers.clock import Clock
from ts_adapt.quantizers.grouped import GroupedActivation
from ts_adapt.quantizers.parts import Part

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


class _TakenOver(TorchFunctionMode):
    """Runs `attention` wherever scaled_dot_product_attention is called."""

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
        with _TakenOver(self.parts):  # type: ignore[arg-type]
            return self.processor[0](attn, *args, **kwargs)

    def spec(self) -> dict[str, Any]:
        return {"parts": {name: part.spec() for name, part in self.parts.items()}}  # type: ignore[operator]

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        parts = {name: GroupedActivation.from_spec(own, None, clock) for name, own in spec["parts"].items()}
        return cls(original, parts)


def processors(network: nn.Module) -> list[str]:
    """The attentions of `network` that have a processor, by name."""
    return [name for name, module in network.named_modules() if hasattr(module, "processor") and name]


@contextmanager
def observed(network: nn.Module, names: list[str], clock: Clock, visit: Visit) -> Iterator[None]:
    """While the block runs, `visit` is shown `NAME.query`, ... of the attentions `names`."""

    def shown(name: str) -> Callable[[Tensor], Tensor]:
        def through(x: Tensor) -> Tensor:
            visit(name, x.detach(), clock.now(x.shape[0]))
            return x

        return through

    def listening(name: str) -> Callable[..., Any]:
        through = {tensor: shown(f"{name}.{tensor}") for tensor in TENSORS}
        former = network.get_submodule(name).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _TakenOver(through):
                return former(*args, **kwargs)

        return forward

    with ExitStack() as stack:
        for name in names:
            module = network.get_submodule(name)
            module.__dict__["forward"] = listening(name)
            stack.callback(module.__dict__.pop, "forward")
        yield
