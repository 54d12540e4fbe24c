"""The table of corrections: what may be learned beside the times of a grid, each in one row.

    shift         model_times   t'_i = t_i + w min(t_{i-1} - t_i, t_i - t_{i+1}) tanh(d_i),   t'_0 = t_0
    scale         output_scale  s_i = 1 + b tanh(o_i / b)
    coefficients  coefficients  c_ik, as they are
    history       history       b_i, a_i0, a_i1, .., as they are
    guidance      guidance      w_i = w (1 + b tanh(g_i / b))
    embedding     embedding     d_i, as they are

The model times are LD3's decoupled set (Tong et al. 2025) and INDIS's shift, the output scale is INDIS's (2026), the
coefficients are additive corrections to a multistep solver of order K, the history GS's (2025) to all that a solve has
met, whatever the order (`solvers.history`); of a guided denoiser with the scale w the guidance is a factor on it, with
a bound b of its own; the embedding is an offset of what the network makes of the time (`denoisers.time_embedding`), as
MTEO's (2026) in each layer. Zeros are no corrections.

A row says where its correction is kept in a grid (`interfaces.Field`) and how unconstrained numbers z become it;
searches, predictors, labels, files and names ask the table. Whoever uses a correction, a denoiser or a solver, takes it
from the node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.parametric import positions, times_at
from ts_adapt.interfaces import (
    COEFFICIENTS,
    EMBEDDING,
    GUIDANCE,
    HISTORY,
    MODEL_TIMES,
    OUTPUT_SCALE,
    RESIDUAL,
    START,
    Field,
    NoiseSchedule,
    TimeGrid,
)
from ts_adapt.numerics import finite_log_snr_range
from ts_adapt.options import OneOf

WIN_RATE = 0.5
"""w: the share of the smaller neighbouring gap that a model time may move (LD3)."""
SCALE_BOUND, GUIDANCE_BOUND = 0.2, 0.9
"""b: how far an output scale, or a factor on the guidance, may be from 1."""
INSIDE = 1 - 1e-6
"""How near to its bound a correction still has a finite z."""
SMALL_UNIT = 0.2
"""Of output scales, coefficients and weights: 1 in them moves the solve much further than 1 in a logit does."""
GUIDANCE_UNIT = 0.5


class Correction(ABC):
    """A row of the table; as it is here, the numbers themselves are the correction, and zeros none.

    field  where it is kept in a grid
    unit   the change of z that moves a solve about as far as a change of 1 in a logit
    many   whether it has so many numbers that they are learned by the gradient alone
    """

    field: ClassVar[Field]
    unit: ClassVar[float] = 1.0
    many: ClassVar[bool] = False

    def width(self, steps: int, order: int, embedding: int) -> int:
        """How many numbers a step it has, in solves of `steps` steps with a solver of `order`, of a network that embeds
        the time in `embedding` numbers."""
        return 1

    @abstractmethod
    def neutral(self, times: Tensor, width: int) -> Tensor:
        """What changes nothing in the steps at `times` `(...)`: `(...)`, with dims 1 `(..., width)`."""

    def value(self, z: Tensor, times: Tensor) -> Tensor:
        """The correction of a grid of `times` `(..., N+1)`, from z `(..., N, width)`; differentiable."""
        return z if self.field.dims else z.squeeze(-1)

    def numbers(self, value: Tensor, times: Tensor) -> Tensor:
        """The inverse of `value`; TsAdaptError for what is out of its bounds."""
        return value if self.field.dims else value.unsqueeze(-1)

    def at(self, z: Tensor, u: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        """The correction of one node alone, whose neighbours are not known yet, from z `(B, width)`.

        u  `(B,)`: the node's time, as its position in log-SNR (`parametric.positions`)

        As it is here it is `value`, for corrections whose value does not depend on the times.
        """
        return self.value(z, u)

    def numbers_at(self, value: Tensor, t: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        """The inverse of `at`: z `(width,)` of the `value` that a node at `t` `()` has."""
        return self.numbers(value, t)

    def departure(self, value: Tensor, times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        """What of the correction may differ between samples beyond their times, for its spread."""
        return value


class Shift(Correction):
    """Of the times told to the network."""

    field = MODEL_TIMES

    def neutral(self, times: Tensor, width: int) -> Tensor:
        return times

    def value(self, z: Tensor, times: Tensor) -> Tensor:
        return times[..., :-1] + _room(times) * torch.tanh(z.squeeze(-1))

    def numbers(self, value: Tensor, times: Tensor) -> Tensor:
        room = _room(times)
        share = torch.where(room > 0, (value - times[..., :-1]) / torch.where(room > 0, room, 1.0), 0.0)
        return _unbounded(share, "a model time").unsqueeze(-1)

    def at(self, z: Tensor, u: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        low, high = finite_log_snr_range(noise_schedule)
        return times_at((u + z.squeeze(-1) / (high - low)).clamp(0, 1), noise_schedule)

    def numbers_at(self, value: Tensor, t: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        low, high = finite_log_snr_range(noise_schedule)
        return ((high - low) * (positions(value, noise_schedule) - positions(t, noise_schedule))).unsqueeze(-1)

    def departure(self, value: Tensor, times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        low, high = finite_log_snr_range(noise_schedule)
        return (high - low) * (positions(value, noise_schedule) - positions(times, noise_schedule)[..., :-1])


class Scale(Correction):
    """Factors on the network's predictions, which stay within `bound` of 1."""

    field, unit = OUTPUT_SCALE, SMALL_UNIT
    bound: ClassVar[float] = SCALE_BOUND
    what: ClassVar[str] = "an output scale"

    def neutral(self, times: Tensor, width: int) -> Tensor:
        return torch.ones_like(times)

    def value(self, z: Tensor, times: Tensor) -> Tensor:
        return 1 + self.bound * torch.tanh(z.squeeze(-1) / self.bound)

    def numbers(self, value: Tensor, times: Tensor) -> Tensor:
        return (self.bound * _unbounded((value - 1) / self.bound, self.what)).unsqueeze(-1)


class Guidance(Scale):
    """Factors on the guidance scale, of denoisers and pipelines that are guided."""

    field, unit = GUIDANCE, GUIDANCE_UNIT
    bound, what = GUIDANCE_BOUND, "a factor on the guidance"


class Coefficients(Correction):
    """Added to the solver's."""

    field, unit = COEFFICIENTS, SMALL_UNIT

    def width(self, steps: int, order: int, embedding: int) -> int:
        return order

    def neutral(self, times: Tensor, width: int) -> Tensor:
        return times.new_zeros(*times.shape, width)


class History(Coefficients):
    """Weights on all that was met before."""

    field = HISTORY

    def width(self, steps: int, order: int, embedding: int) -> int:
        return steps + 1


class Embedding(Coefficients):
    """Added to the network's embedding of the time."""

    field, many = EMBEDDING, True

    def width(self, steps: int, order: int, embedding: int) -> int:
        return embedding


CORRECTIONS: dict[str, Correction] = {
    "shift": Shift(), "scale": Scale(), "coefficients": Coefficients(), "history": History(),
    "guidance": Guidance(), "embedding": Embedding(),
}  # fmt: skip
"""By the name that users give; the order is that of the numbers z, of names and of files."""
OF_MODEL_TIME = tuple(name for name, each in CORRECTIONS.items() if each.field in (MODEL_TIMES, EMBEDDING))
"""Those that change what the network is told of the time."""
PICTURES: dict[str, Field] = {field.name: field for field in (START, RESIDUAL)}
"""What predictors change beside the corrections of grids, by the name that users give: pictures of each sample."""

CorrectionName = Annotated[str, OneOf(CORRECTIONS)]
"""What options name a correction by."""


def corrected(name: str, corrections: Collection[str]) -> str:
    """What the result `name` is called that learns `corrections` too: static+shift+scale, in the table's order."""
    return "+".join([name, *(each for each in CORRECTIONS if each in corrections)])


def field_names() -> tuple[str, ...]:
    """What the corrections are called in grids and files."""
    return tuple(correction.field.name for correction in CORRECTIONS.values())


def grid_of(parts: Mapping[str, Tensor]) -> TimeGrid:
    """The grid of the `parts` "times" and `field_names()`, of which all but the times may be missing."""
    fields = (correction.field for correction in CORRECTIONS.values())
    return TimeGrid.of(parts["times"], {field: parts[field.name] for field in fields if field.name in parts})


def _room(times: Tensor) -> Tensor:
    """How far each of the model times may be from its time: w of the smaller neighbouring gap, and 0 at t_0."""
    gaps = times[..., :-1] - times[..., 1:]
    return WIN_RATE * torch.cat([torch.zeros_like(gaps[..., :1]), torch.minimum(gaps[..., :-1], gaps[..., 1:])], -1)


def _unbounded(value: Tensor, what: str) -> Tensor:
    if bool((value.abs() * INSIDE > 1).any()):
        raise TsAdaptError(f"{what} of the grid is further off than can be learned; leave the corrections out")
    return torch.atanh(value.clamp(-INSIDE, INSIDE))
