"""Grids with their corrections over other numbers of steps N than those that were learned.

The times are those of `parametric.between`. The unconstrained numbers z of each correction (`corrections`) are linear
between the nearest two n < N < m that were learned, and within each of these between the two steps j that step i stands
among:

    z_N,i = (1 - w) z_n,j(n) + w z_m,j(m),     w = (N - n) / (m - n),     j(n) = i (n - 1) / (N - 1)

so that the first step, which alone sees pure noise, stands for the first and the last, which ends at t_N, for the last.
A weight of a history is mixed with that of equally many steps back; where one does not reach as far, its weight is
zero. Beyond all that were learned the nearest speaks alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from ts_adapt.grids.corrections import CORRECTIONS
from ts_adapt.grids.parametric import between, neighbours
from ts_adapt.interfaces import Field, NoiseSchedule, TimeGrid

FURTHEST = 2
"""How many times as many steps as the most that were learned a grid is still sampled over."""


def shares(learned: Collection[int], steps: int) -> list[tuple[int, float]]:
    """The one or two of the numbers `learned` that `steps` stands among, with their shares, of sum 1."""
    low, *rest = neighbours(learned, steps)
    w = (steps - low) / (rest[0] - low) if rest else 0.0
    return [(low, 1 - w), *((other, w) for other in rest)]


def among(step: int, steps: int, others: int) -> list[tuple[int, float]]:
    """The one or two steps of a solve of `others` steps that step i of one of N stands among, with shares of sum 1.

    i = N, the place before the first step, stands for that of the other; the step of N = 1 stands for the first.
    """
    if step == steps:
        return [(others, 1.0)]
    below, rest = divmod(step * (others - 1), max(steps - 1, 1))
    share = rest / max(steps - 1, 1)
    return [(below, 1 - share), (below + 1, share)] if rest else [(below, 1.0)]


def mixed(parts: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The sum of share * tensor, all of one shape."""
    return torch.stack([share * part for share, part in parts]).sum(0)


def fitted(numbers: Tensor, width: int) -> Tensor:
    """`numbers` `(..., P)` as `(..., width)`: the first of them, and zeros for those that are not there."""
    return nn.functional.pad(numbers, (0, width - numbers.shape[-1]))


def grid_between(learned: Mapping[int, TimeGrid], noise_schedule: NoiseSchedule, steps: int) -> TimeGrid:
    """The grid over `steps` that those `learned`, by their numbers of steps, make; all samples share each of them.

    Raises TsAdaptError as `parametric.between` does, and for corrections out of their bounds.
    """
    if steps in learned:
        return learned[steps]
    times = between({n: grid.times for n, grid in learned.items()}, noise_schedule, steps)
    held: dict[Field, Tensor] = {}
    for correction in CORRECTIONS.values():
        near = {n: learned[n] for n, _ in shares(learned, steps) if correction.field in learned[n].held}
        if not near:
            continue
        z = {n: correction.numbers(grid.held[correction.field], grid.times) for n, grid in near.items()}
        widest = max(each.shape[-1] for each in z.values())
        width = correction.width(steps, widest, widest)
        rows = [
            mixed(
                (share * part, fitted(z[n][j], width))
                for n, share in shares(learned, steps)
                if n in z
                for j, part in among(i, steps, n)
            )
            for i in range(steps)
        ]
        held[correction.field] = correction.value(torch.stack(rows), times)
    return TimeGrid.of(times, held)
