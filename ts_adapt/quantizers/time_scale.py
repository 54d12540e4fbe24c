"""Activation scales as functions of the timestep: predicted by a small network, or read from a table.

    TimedActivation    s(t) = softplus(MLP(e(t))),  MLP = Linear(d, 64) ReLU Linear(64, 64) ReLU Linear(64, 64) ReLU
                       Linear(64, 1),  e the sinusoidal embedding of the network itself, before its own layers
    TableActivation    s at some timesteps; between them linear, outside as at the nearest

    x^ = s q                q = clamp(round(x / s)) of both signs
    x^ = s q + offset       q >= 0, offset the smallest value of the activation function that the input comes from:
                            -0.2785 of SiLU, 0 of ReLU

The levels of a sample depend on its own timestep alone. Source: TDQ (So et al. 2023), sections 4.1 and 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from ts_adapt.quantizers.affine import SMALLEST_SCALE, fake_quantize
from ts_adapt.quantizers.calibration import InputRecord
from ts_adapt.quantizers.clock import Clock
from ts_adapt.quantizers.parts import ActivationPart
from ts_adapt.quantizers.ranges import mse, power_of

HIDDEN = 64
SILU_MINIMUM = -0.2785
FIT_STEPS, FIT_LR = 300, 3e-3
FIT_VALUES = 8192
DEFAULT_WIDTH = 128


class TimedScale(ActivationPart):
    """An input quantized at a scale of its time; subclasses say which.

    offset  the value of code 0; None: codes of both signs
    """

    timed = True

    def __init__(self, bits: int, offset: float | None, clock: Clock | None) -> None:
        super().__init__()
        self.bits, self.offset, self.clock = bits, offset, clock

    def scale_at(self, times: Tensor) -> Tensor:
        """The scale `(n,)` at timesteps `(n,)`, in the network's unit."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        assert self.clock is not None
        times = self.clock.now(x.shape[0]).to(x.device)
        return self.quantized(x, self.scale_at(times))

    def quantized(self, x: Tensor, scale: Tensor) -> Tensor:
        """x^ of `x` `(n, ...)` at `scale` `(n,)`."""
        scale = scale.view(-1, *[1] * (x.ndim - 1))
        zero = scale.new_zeros(())
        if self.offset is None:
            return fake_quantize(x, scale, zero, self.bits, True)
        return (fake_quantize(x.float() - self.offset, scale, zero, self.bits, False) + self.offset).to(x.dtype)


class TimedActivation(TimedScale):
    """See the module's head. `embedding` has the arguments of diffusers' `Timesteps`, by name."""

    kind = "timed"

    def __init__(self, bits: int, offset: float | None, embedding: Mapping[str, Any], clock: Clock | None) -> None:
        super().__init__(bits, offset, clock)
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
        return self.scale_of(self.embedding(times))

    def scale_of(self, embedded: Tensor) -> Tensor:
        """The scale `(n,)` of embedded timesteps `(n, d)`."""
        return _predicted(dict(self.predictor.named_parameters()), embedded, self.predictor)

    def table(self, times: Tensor) -> TableActivation:
        """The same scales at `times`, without a network."""
        times = times.to(self.predictor[0].weight.device).float().unique()  # type: ignore[arg-type]
        with torch.no_grad():
            return TableActivation(self.bits, self.offset, times, self.scale_at(times), self.clock)

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits, "offset": self.offset, "embedding": self.arguments}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        return cls(**spec, clock=clock)


class TableActivation(TimedScale):
    """times `(T,)` in rising order, scales `(T,)`."""

    kind = "table"
    times: Tensor
    scales: Tensor

    def __init__(self, bits: int, offset: float | None, times: Tensor, scales: Tensor, clock: Clock | None) -> None:
        super().__init__(bits, offset, clock)
        self.register_buffer("times", times.float())
        self.register_buffer("scales", scales.float())

    def scale_at(self, times: Tensor) -> Tensor:
        after = torch.searchsorted(self.times, times.float()).clamp(max=len(self.times) - 1)
        before = (after - 1).clamp(min=0)
        width = (self.times[after] - self.times[before]).clamp(min=1e-12)
        share = ((self.times[after] - times) / width).clamp(0, 1)
        return self.scales[after] + share * (self.scales[before] - self.scales[after])

    def spec(self) -> dict[str, Any]:
        return {"bits": self.bits, "offset": self.offset, "count": len(self.times)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        count = spec["count"]
        return cls(spec["bits"], spec["offset"], torch.zeros(count), torch.ones(count), clock)


def embedding_of(network: nn.Module, largest_time: float) -> dict[str, Any]:
    """The sinusoidal embedding that `network` makes of its timestep, as arguments of `Timesteps`.

    A network told times up to 1 multiplies them by 1000 itself, which the embedding here does in its place.
    """
    found = next((module for module in network.modules() if isinstance(module, Timesteps)), None)
    unit = 1000.0 if largest_time <= 1 else 1.0
    if found is None:
        return {"num_channels": DEFAULT_WIDTH, "flip_sin_to_cos": True, "downscale_freq_shift": 0.0, "scale": unit}
    return {
        "num_channels": found.num_channels,
        "flip_sin_to_cos": found.flip_sin_to_cos,
        "downscale_freq_shift": float(found.downscale_freq_shift),
        "scale": unit * float(found.scale),
    }


def offset_of(record: InputRecord) -> float | None:
    """The offset for inputs that an activation function bounds from below; None: they have both signs."""
    low, high = float(record.low.min()), float(record.high.max())
    if low >= 0:
        return 0.0
    return SILU_MINIMUM if low >= SILU_MINIMUM - 1e-3 and high > -SILU_MINIMUM else None


def best_scales(record: InputRecord, bits: int, offset: float | None) -> Tensor:
    """The scale `(T,)` of least error at each timestep by itself (`ranges`)."""
    x, weights = record.rows(FIT_VALUES)
    low, high = mse(
        x - (offset or 0.0), bits, offset is None,
        exact_zero=offset is not None, weights=weights, power=power_of(bits),
    )  # fmt: skip
    bound, levels = (high, 2**bits - 1) if offset is not None else (torch.maximum(-low, high), 2 ** (bits - 1) - 1)
    best: Tensor = bound.squeeze(1) / levels
    return best.clamp(min=SMALLEST_SCALE)


def fit(parts: Sequence[TimedActivation], records: Sequence[InputRecord]) -> None:
    """Train the predictors alone, all at once, on the logarithms of the best scale of each timestep.

    As scales differ by orders of magnitude over time, the logarithm is what has an error of one size.
    """
    groups: dict[tuple[float, ...], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(tuple(record.times.tolist()), []).append(index)
    for members in groups.values():
        _fit([parts[i] for i in members], [records[i] for i in members])


def _fit(parts: list[TimedActivation], records: list[InputRecord]) -> None:
    device = next(parts[0].parameters()).device
    goal = torch.stack([best_scales(r, p.bits, p.offset) for p, r in zip(parts, records, strict=True)]).log().to(device)
    embedded = parts[0].embedding(records[0].times.to(device))
    weights, _ = stack_module_state([part.predictor for part in parts])
    predicted = vmap(partial(_predicted, embedded=embedded, skeleton=parts[0].predictor))
    learned = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    optimizer = torch.optim.Adam(learned.values(), lr=FIT_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    with torch.enable_grad():
        for _ in range(FIT_STEPS):
            loss = (predicted(learned).log() - goal).square().mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for index, part in enumerate(parts):
        part.predictor.load_state_dict({name: value[index].detach() for name, value in learned.items()})


def _predicted(weights: dict[str, Tensor], embedded: Tensor, skeleton: nn.Module) -> Tensor:
    """softplus(MLP(e)), float32, computed in float64, so that a scale does not depend on the batch that it is in."""
    exact = {name: value.double() for name, value in weights.items()}
    raw: Tensor = functional_call(skeleton, exact, (embedded.double(),))
    return F.softplus(raw.squeeze(-1)).clamp(min=SMALLEST_SCALE).float()
