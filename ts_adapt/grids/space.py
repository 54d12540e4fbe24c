"""The space in which grids are learned: unconstrained numbers z `(P,)` or `(B, P)` <-> a TimeGrid with its corrections.

    logits            N         t_0 .. t_N = logits_to_times(logits)                                    see `parametric`
    each correction   N width   of step 0, of step 1, ..                                               see `corrections`

One after the other in z; what is not learned takes no place. Zeros behind the logits are no corrections.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.grids.corrections import CORRECTIONS, PICTURES, Correction
from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.interfaces import EMBEDDING, NoiseSchedule, TimeGrid
from ts_adapt.numerics import check_steps


class GridSpace:
    """Grids over `steps` intervals, with the `corrections` that are to be learned, by name.

    order      the solver's, which is how many coefficients a step has
    embedding  how wide the network's embedding of the time is: so many numbers a step are added to it; 0: none is known

    Raises TsAdaptError for an unknown correction, and for one of an embedding that is not known.
    """

    def __init__(
        self, noise_schedule: NoiseSchedule, steps: int, corrections: Collection[str] = (), order: int = 1,
        embedding: int = 0,
    ) -> None:  # fmt: skip
        check_steps(steps)
        for name in corrections:
            if name in PICTURES:
                raise TsAdaptError(
                    f"{name} is a picture of each sample, which no grid holds; train a predictor with it"
                )
            if name not in CORRECTIONS:
                raise unknown("correction", str(name), CORRECTIONS)
        if EMBEDDING.name in corrections and not embedding:
            raise no_embedding()
        self.noise_schedule, self.steps, self.order = noise_schedule, steps, order
        self.learned = [correction for name, correction in CORRECTIONS.items() if name in corrections]
        self.widths = [1, *(correction.width(steps, order, embedding) for correction in self.learned)]
        """How many numbers a step has of the logits and of each correction."""

    @property
    def size(self) -> int:
        """P."""
        return self.steps * sum(self.widths)

    @property
    def unit(self) -> Tensor:
        """`(P,)`, float64: changes of z, place by place, that move a solve about as far; what a descent measures in."""
        units = [1.0, *(correction.unit for correction in self.learned)]
        sizes = torch.tensor([self.steps * width for width in self.widths])
        return torch.tensor(units, dtype=torch.float64).repeat_interleave(sizes)

    @property
    def few(self) -> Tensor:
        """`(P,)`: whether a number is of the times, or of a correction that has few."""
        few = [True, *(not correction.many for correction in self.learned)]
        return torch.tensor(few).repeat_interleave(torch.tensor([self.steps * width for width in self.widths]))

    def completed(self, grid: TimeGrid) -> TimeGrid:
        """`grid` with a correction that changes nothing in the place of each that is learned here and that it lacks."""
        steps = grid.times[..., :-1]
        neutral = {each.field: each.neutral(steps, width) for each, width in self._learned_widths()}
        return TimeGrid.of(grid.times, neutral | grid.held)

    def grid(self, z: Tensor) -> TimeGrid:
        """The grid of `z` `(P,)`, or the grids of `(B, P)`; differentiable."""
        logits, *parts = z.split([self.steps * width for width in self.widths], -1)
        times = logits_to_times(logits, self.noise_schedule)
        return TimeGrid.of(
            times,
            {
                correction.field: correction.value(part.unflatten(-1, (self.steps, -1)), times)
                for correction, part in zip(self.learned, parts, strict=True)
            },
        )

    def numbers(self, grid: TimeGrid) -> Tensor:
        """z of `grid`, up to a constant of the logits: the inverse of `grid`. Corrections that it lacks are zero.

        Raises TsAdaptError for a grid of another number of steps, and for corrections that are not learned here, are of
        another solver's order, or out of their bounds.
        """
        if grid.steps != self.steps:
            raise TsAdaptError(f"the grid has {grid.steps} steps; expected {self.steps}")
        widths = {correction.field: width for correction, width in self._learned_widths()}
        for field, value in grid.held.items():
            if field not in widths:
                raise TsAdaptError(f"the grid has {field.name}, which are not learned here; learn them too")
            if field.dims and value.shape[-1] != widths[field]:
                raise TsAdaptError(f"the grid has {value.shape[-1]} {field.name} a step; expected {widths[field]}")
        parts = [times_to_logits(grid.times, self.noise_schedule)]
        for correction, width in self._learned_widths():
            if correction.field in grid.held:
                parts.append(correction.numbers(grid.held[correction.field], grid.times).flatten(-2))
            else:
                parts.append(torch.zeros_like(parts[0]).repeat_interleave(width, -1))
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, -1) for part in parts], -1)

    def _learned_widths(self) -> Iterator[tuple[Correction, int]]:
        return zip(self.learned, self.widths[1:], strict=True)


def no_embedding() -> TsAdaptError:
    return TsAdaptError(
        f"{EMBEDDING.name} is added to a network's embedding of the time, and no module of this one is given times "
        "alone and embeds them; leave it out of the corrections"
    )
