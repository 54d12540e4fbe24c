"""PTQD's correction of what a quantized network says (He et al. 2023, arXiv:2305.10657).

    F^ = (1 + k) F + b + d      F in full precision; k `()`, b a number a channel, d of mean 0 and standard deviation s,
                                all of them functions of the timestep
    said instead                (F^ - b) / (1 + k) = F + d / (1 + k)

which takes out what of the quantization noise is correlated with F, and its bias. What is left has the standard
deviation s / (1 + k); stochastic solvers add so much less (`solvers.absorbing`). Between the times at which k, b and s
were measured they are interpolated: a schedule may ask at any.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.network import prediction_of, with_prediction
from ts_adapt.quantizers.layers.affine import along
from ts_adapt.quantizers.layers.quantized_layer import Part
from ts_adapt.quantizers.layers.timestep import TimestepListener, between


class OutputCorrection(Part):
    """times `(T,)` in rising order; gain 1 + k `(T,)`, bias b `(T, C)` and spread s `(T,)`, measured at each.

    A network with more channels than C has learned a variance in the others, which stay.
    """

    kind = "output"
    timed = True
    times: Tensor
    gain: Tensor
    bias: Tensor
    spread: Tensor

    def __init__(
        self, times: Tensor, gain: Tensor, bias: Tensor, spread: Tensor, listener: TimestepListener | None
    ) -> None:
        super().__init__()
        self.listener = listener
        for name, value in {"times": times, "gain": gain, "bias": bias, "spread": spread}.items():
            self.register_buffer(name, value.float())

    def forward(self, raw: Tensor) -> Tensor:
        """The prediction that `raw` `(B, C, ...)` or `(B, N, C)` stands for."""
        assert self.listener is not None
        now, dim, channels = self.listener.now(len(raw)).to(self.times.device), output_dim(raw), self.bias.shape[1]
        own, others = raw.split([channels, raw.shape[dim] - channels], dim)
        bias = between(self.times, self.bias, now).view(-1, *[1] * (raw.ndim - 2), channels).movedim(-1, dim)
        right = ((own.float() - bias) / along(between(self.times, self.gain, now), own, 0)).to(raw.dtype)
        return torch.cat([right, others], dim) if others.shape[dim] else right

    def left(self, batch: int) -> Tensor:
        """The standard deviation `(batch,)` of what could not be taken out of the network's latest answer."""
        assert self.listener is not None and self.listener.timestep is not None
        now = self.listener.timestep.to(self.times)[-batch:].expand(batch)
        return between(self.times, self.spread, now) / between(self.times, self.gain, now)

    def hook(self, network: nn.Module, args: Any, answer: Any) -> Any:
        """A forward hook: the network's `answer`, corrected."""
        return with_prediction(answer, self(prediction_of(answer)))

    def spec(self) -> dict[str, Any]:
        return {"times": len(self.times), "channels": self.bias.shape[1]}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        none = torch.zeros(spec["times"])
        return cls(none, none + 1, torch.zeros(spec["times"], spec["channels"]), none, listener)


def output_dim(raw: Tensor) -> int:
    """Where the channels of a prediction are: 1 of pictures and films, the last of tokens."""
    return 1 if raw.ndim > 3 else -1
