"""The space in which grids are learned: unconstrained numbers z `(P,)` or `(B, P)` <-> a TimeGrid with its corrections.

    logits        N    t_0 .. t_N = logits_to_times(logits)                                          see `parametric`
    shift         N    model_times   t'_i = t_i + w min(t_{i-1} - t_i, t_i - t_{i+1}) tanh(d_i),   t'_0 = t_0
    scale         N    output_scale  s_i = 1 + b tanh(o_i / b)
    coefficients  N K  c_ik, as they are

One after the other in z; what is not learned takes no place. Zeros behind the logits are no corrections. The model
times are LD3's decoupled set (Tong et al. 2025) and INDIS's shift, the output scale is INDIS's (2026), the coefficients
are the additive corrections of GS (2025) to a multistep solver of order K.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.interfaces import NoiseSchedule, TimeGrid, TsAdaptError, unknown

WIN_RATE = 0.5
"""w: the share of the smaller neighbouring gap that a model time may move (LD3)."""
SCALE_BOUND = 0.2
"""b: how far an output scale may be from 1."""
INSIDE = 1 - 1e-6
"""How near to its bound a correction still has a finite z."""
SMALL_UNIT = 0.2
"""Of output scales and coefficients: a change of 1 in them moves the solve much further than one in a logit does."""
CORRECTIONS = ("shift", "scale", "coefficients")
"""What may be learned beside the times, by name."""


def corrected(name: str, corrections: Collection[str]) -> str:
    """What the result `name` is called that learns `corrections` too: static+shift+scale, in the order of above."""
    return "+".join([name, *(each for each in CORRECTIONS if each in corrections)])


class GridSpace:
    """Grids over `steps` intervals, with the corrections that are to be learned.

    shift, scale  whether model times and output scales are learned
    coefficients  K, the solver's order; 0: not learned
    """

    def __init__(
        self, noise: NoiseSchedule, steps: int, *, shift: bool = False, scale: bool = False, coefficients: int = 0
    ) -> None:
        if steps < 1:
            raise TsAdaptError(f"steps is {steps}; a time grid has at least 1")
        self.noise, self.steps, self.shift, self.scale, self.order = noise, steps, shift, scale, coefficients

    @classmethod
    def learning(cls, corrections: Sequence[str], noise: NoiseSchedule, steps: int, order: int) -> GridSpace:
        """The space with `corrections`, of `CORRECTIONS`, for a solver of `order`; TsAdaptError for another name."""
        for name in corrections:
            if name not in CORRECTIONS:
                raise unknown("correction", str(name), CORRECTIONS)
        coefficients = order if "coefficients" in corrections else 0
        return cls(noise, steps, shift="shift" in corrections, scale="scale" in corrections, coefficients=coefficients)

    @property
    def size(self) -> int:
        """P."""
        return self.steps * (1 + self.shift + self.scale + self.order)

    @property
    def unit(self) -> Tensor:
        """`(P,)`, float64: changes of z, place by place, that move a solve about as far; what a descent measures in."""
        unit = torch.ones(self.size, dtype=torch.float64)
        unit[self.steps * (1 + self.shift) :] = SMALL_UNIT
        return unit

    def completed(self, grid: TimeGrid) -> TimeGrid:
        """`grid` with a correction that changes nothing in the place of each that is learned here and that it lacks."""
        steps = grid.times[..., :-1]
        if self.shift and grid.model_times is None:
            grid = replace(grid, model_times=steps)
        if self.scale and grid.output_scale is None:
            grid = replace(grid, output_scale=torch.ones_like(steps))
        if self.order and grid.coefficients is None:
            grid = replace(grid, coefficients=steps.new_zeros(*steps.shape, self.order))
        return grid

    def grid(self, z: Tensor) -> TimeGrid:
        """The grid of `z` `(P,)`, or the grids of `(B, P)`; differentiable."""
        if z.shape[-1:] != (self.size,):
            raise TsAdaptError(f"the numbers of a grid have shape {tuple(z.shape)}; expected (..., {self.size})")
        logits, d, o, c = z.split([self.steps * each for each in (1, self.shift, self.scale, self.order)], -1)
        times = logits_to_times(logits, self.noise)
        return TimeGrid(
            times,
            model_times=times[..., :-1] + _room(times) * torch.tanh(d) if self.shift else None,
            output_scale=1 + SCALE_BOUND * torch.tanh(o / SCALE_BOUND) if self.scale else None,
            coefficients=c.unflatten(-1, (self.steps, self.order)) if self.order else None,
        )

    def numbers(self, grid: TimeGrid) -> Tensor:
        """z of `grid`, up to a constant of the logits: the inverse of `grid`. Corrections that it lacks are zero.

        Raises TsAdaptError for a grid of another number of steps, and for corrections that are not learned here, are of
        another solver's order, or out of their bounds.
        """
        if grid.steps != self.steps:
            raise TsAdaptError(f"the grid has {grid.steps} steps; expected {self.steps}")
        logits = times_to_logits(grid.times, self.noise)
        parts = [logits]
        for name, given, learned in (
            ("model_times", grid.model_times, self.shift),
            ("output_scale", grid.output_scale, self.scale),
            ("coefficients", grid.coefficients, self.order),
        ):
            if given is not None and not learned:
                raise TsAdaptError(f"the grid has {name}, which are not learned here; learn them too")
            if learned and given is None:
                parts.append(torch.zeros_like(logits).repeat_interleave(int(learned), -1))
            elif given is not None:
                parts.append(self._correction(name, given, grid.times))
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, -1) for part in parts], -1)

    def _correction(self, name: str, given: Tensor, times: Tensor) -> Tensor:
        if name == "coefficients":
            if given.shape[-1] != self.order:
                raise TsAdaptError(f"the grid has {given.shape[-1]} coefficients a step; expected {self.order}")
            return given.flatten(-2)
        if name == "output_scale":
            return SCALE_BOUND * _unbounded((given - 1) / SCALE_BOUND, "an output scale")
        room = _room(times)
        share = torch.where(room > 0, (given - times[..., :-1]) / torch.where(room > 0, room, 1.0), 0.0)
        return _unbounded(share, "a model time")


def _room(times: Tensor) -> Tensor:
    """How far each of the model times may be from its time: w of the smaller neighbouring gap, and 0 at t_0."""
    gaps = times[..., :-1] - times[..., 1:]
    return WIN_RATE * torch.cat([torch.zeros_like(gaps[..., :1]), torch.minimum(gaps[..., :-1], gaps[..., 1:])], -1)


def _unbounded(value: Tensor, what: str) -> Tensor:
    if bool((value.abs() * INSIDE > 1).any()):
        raise TsAdaptError(f"{what} of the grid is further off than can be learned; leave the corrections out")
    return torch.atanh(value.clamp(-INSIDE, INSIDE))
