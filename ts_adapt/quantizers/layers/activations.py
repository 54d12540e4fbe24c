"""What is done to the input of a quantized layer: x^, the nearest of the levels s (q - z), for scales s that depend on

    StaticActivation   nothing: one scale and zero, calibrated
    DynamicActivation  the sample: its own range at each call
    TimedActivation    its timestep: s(t) = softplus(MLP(e(t))), MLP = Linear(d, 64) ReLU Linear(64, 64) ReLU
                       Linear(64, 64) ReLU Linear(64, 1), e the sinusoidal embedding of the network itself, before its
                       own layers
    TableActivation    its timestep: s at some of them; between them linear, outside as at the nearest
    GroupedActivation  its timestep: that of the nearest calibrated timestep, many of which share one

Timed and tabled scales are TDQ's (So et al. 2023, sections 4.1 and 4.2):

    x^ = s q                q = clamp(round(x / s)) of both signs
    x^ = s q + offset       q >= 0, offset the smallest value of the activation function that the input comes from

Groups are APQ-DM's (Wang et al. 2024). The levels of a sample depend on its own timestep alone, whatever its batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Self

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ts_adapt.quantizers.layers.affine import (
    SMALLEST_SCALE,
    along,
    channel_dim,
    fake_quantize,
    power_of_two,
    scale_and_zero,
)
from ts_adapt.quantizers.layers.quantized_layer import ActivationPart
from ts_adapt.quantizers.layers.timestep import TimestepListener, between

HIDDEN = 64


class StaticActivation(ActivationPart):
    """One scale and zero `()` for all inputs of the layer, at all times."""

    kind = "static"
    described = ("bits", "symmetric")
    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().clone().float().reshape(()))
        self.register_buffer("zero", zero.detach().clone().float().reshape(()))
        self.bits, self.symmetric = bits, symmetric

    @classmethod
    def of_range(cls, low: Tensor, high: Tensor, bits: int, symmetric: bool = False) -> Self:
        """Its levels span [low, high], both `()`."""
        return cls(*scale_and_zero(low, high, bits, symmetric, exact_zero=True), bits, symmetric)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.zero, self.bits, self.symmetric)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        return cls(torch.ones(()), torch.zeros(()), **spec)


class DynamicActivation(ActivationPart):
    """A scale and zero for each sample from its own smallest and largest value; no calibration."""

    kind = "dynamic"
    described = ("bits", "symmetric")

    def __init__(self, bits: int, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(1, x.ndim))
        low, high = x.detach().amin(dims, keepdim=True), x.detach().amax(dims, keepdim=True)
        scale, zero = scale_and_zero(low.float(), high.float(), self.bits, self.symmetric, exact_zero=True)
        return fake_quantize(x, scale, zero, self.bits, self.symmetric)


class _Timed(ActivationPart):
    """Levels by the timestep that the `listener` has heard for each sample."""

    timed = True

    def __init__(self, bits: int, listener: TimestepListener | None) -> None:
        super().__init__()
        self.bits, self.listener = bits, listener

    def now(self, x: Tensor) -> Tensor:
        """The timestep of each sample of `x`."""
        assert self.listener is not None
        return self.listener.now(x.shape[0]).to(x.device)


class TimedScale(_Timed):
    """An input quantized at a scale of its time; subclasses say which.

    offset  the value of code 0; None: codes of both signs
    """

    def __init__(self, bits: int, offset: float | None, listener: TimestepListener | None) -> None:
        super().__init__(bits, listener)
        self.offset = offset

    def scale_at(self, times: Tensor) -> Tensor:
        """The scale `(n,)` at timesteps `(n,)`, in the network's unit."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized(x, self.scale_at(self.now(x)))

    def quantized(self, x: Tensor, scale: Tensor) -> Tensor:
        """x^ of `x` `(n, ...)` at `scale` `(n,)`."""
        scale = along(scale, x, 0)
        zero = scale.new_zeros(())
        if self.offset is None:
            return fake_quantize(x, scale, zero, self.bits, True)
        return (fake_quantize(x.float() - self.offset, scale, zero, self.bits, False) + self.offset).to(x.dtype)


class TimedActivation(TimedScale):
    """See the module's head. `embedding` has the arguments of diffusers' `Timesteps`, by name."""

    kind = "timed"

    def __init__(
        self, bits: int, offset: float | None, embedding: Mapping[str, Any], listener: TimestepListener | None
    ) -> None:
        super().__init__(bits, offset, listener)
        self.arguments = dict(embedding)
        self.embedding = Timesteps(**embedding)
        widths = [embedding["num_channels"], HIDDEN, HIDDEN, HIDDEN]
        layers: list[nn.Module] = []
        for wide, next_wide in pairwise(widths):
            layers += [nn.Linear(wide, next_wide), nn.ReLU()]
        self.predictor = nn.Sequential(*layers, nn.Linear(HIDDEN, 1)).requires_grad_(False)

    def start(self, mean: Tensor, std: Tensor) -> None:
        """Begin near the same scale at all times: (mean + 3 std) / (n // 2 - 1) of |x|, n = 2^b - 1 (n - 1 with an
        offset)."""
        levels = 2**self.bits - 1
        first = float((mean + 3 * std) / max(1, levels // 2 - 1 if self.offset is None else levels - 1))
        last = self.predictor[-1]
        with torch.no_grad():
            last.bias.fill_(first + math.log(-math.expm1(-max(first, 1e-8))))  # type: ignore[operator]

    def scale_at(self, times: Tensor) -> Tensor:
        return predicted_scale(self.predictor, dict(self.predictor.named_parameters()), self.embedding(times))

    def table(self, times: Tensor) -> TableActivation:
        """The same scales at `times`, without a network."""
        times = times.to(self.predictor[0].weight.device).float().unique()  # type: ignore[arg-type]
        with torch.no_grad():
            return TableActivation(self.bits, self.offset, times, self.scale_at(times), self.listener)

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits, "offset": self.offset, "embedding": self.arguments}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        return cls(**spec, listener=listener)


def predicted_scale(predictor: nn.Module, weights: Mapping[str, Tensor], embedded: Tensor) -> Tensor:
    """softplus(MLP(e)) `(n,)` of embedded timesteps `(n, d)`, the MLP being `predictor` with these `weights`.

    float32, computed in float64, so that a scale does not depend on the batch that it is in.
    """
    exact = {name: value.double() for name, value in weights.items()}
    raw: Tensor = functional_call(predictor, exact, (embedded.double(),))
    return F.softplus(raw.squeeze(-1)).clamp(min=SMALLEST_SCALE).float()


class TableActivation(TimedScale):
    """times `(T,)` in rising order, scales `(T,)`."""

    kind = "table"
    times: Tensor
    scales: Tensor

    def __init__(
        self, bits: int, offset: float | None, times: Tensor, scales: Tensor, listener: TimestepListener | None
    ) -> None:
        super().__init__(bits, offset, listener)
        self.register_buffer("times", times.float())
        self.register_buffer("scales", scales.float())

    def scale_at(self, times: Tensor) -> Tensor:
        return between(self.times, self.scales, times)

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits, "offset": self.offset, "count": len(self.times)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        count = spec["count"]
        return cls(spec["bits"], spec["offset"], torch.zeros(count), torch.ones(count), listener)


class GroupedActivation(_Timed):
    """times `(T,)` in rising order, group `(T,)`: the quantizer of each; scale and zero `(G,)`.

    exponents  `(C,)`: x^ = Q(2^k x) 2^-k for an input channel of exponent k; None: all 0
    """

    kind = "grouped"
    times: Tensor
    group: Tensor
    scale: Tensor
    zero: Tensor
    exponents: Tensor | None

    def __init__(
        self, bits: int, times: Tensor, group: Tensor, scale: Tensor, zero: Tensor, listener: TimestepListener | None,
        exponents: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(bits, listener)
        self.register_buffer("times", times.float())
        self.register_buffer("group", group.to(torch.uint8))
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero", zero.float())
        self.register_buffer("exponents", None if exponents is None else exponents.to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        nearest = (self.now(x)[:, None] - self.times).abs().argmin(1)
        chosen = self.group[nearest].long()
        scale, zero = along(self.scale[chosen], x, 0), along(self.zero[chosen], x, 0)
        if self.exponents is None:
            return fake_quantize(x, scale, zero, self.bits, False)
        factor = along(power_of_two(self.exponents), x, channel_dim(x))
        return fake_quantize(x * factor, scale, zero, self.bits, False) / factor

    def spec(self) -> dict[str, Any]:
        channels = None if self.exponents is None else len(self.exponents)
        return {"bits": self.bits, "times": len(self.times), "groups": len(self.scale), "channels": channels}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        exponents = None if spec["channels"] is None else torch.zeros(spec["channels"])
        times, groups = torch.zeros(spec["times"]), torch.ones(spec["groups"])
        return cls(spec["bits"], times, torch.zeros_like(times), groups, torch.zeros_like(groups), listener, exponents)
