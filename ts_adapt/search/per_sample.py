"""The oracle: for each starting noise the grid that is best for it alone (ALD3's RQ1), whole batches at once.

    minimise over v_b (P,), for every b of the batch:   L_b(GridSpace.grid(z_b + unit * v_b)),       from v_b = 0

z_b is the start: the logits of the times and, where they are asked for, the corrections that travel with a grid
(`grids.space`); with them this is the bound of what predictors of times and corrections can reach. Adam makes steps of
like length in every place; `unit` makes them such that all places move the solve about as far.

The samples share nothing but the network's batch: each row has its own v, optimiser state, gradient clipping and
best-so-far, and an elementwise optimiser (Adam) on the sum of the losses is exactly B searches side by side. The
problem is not convex, so each sample is searched from several starts: the static grid, grids that are given, such as
the oracle grids of noises alike, and the best of a few random perturbations of the static logits, chosen by forward
passes alone. Random draws depend on (seed, sample) only, so that a label does not depend on the batch it was searched
in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import pad

from ts_adapt.grids.corrections import CorrectionName
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import TimeGrid
from ts_adapt.numerics import shortened
from ts_adapt.options import MANY, SMALL, Between, Count, Positive, Seed
from ts_adapt.sampling import initial_noise
from ts_adapt.search.derivative import trusted
from ts_adapt.search.objective import Batch, Objective, space_of
from ts_adapt.search.work import Work


@dataclass
class PerSampleOptions:
    """How the oracle grid of each sample is searched."""

    iterations: Count = 40
    lr: Positive = 0.1
    random_starts: Annotated[int, Between(0, 1000)] = 1
    """Searches from random logits, beside the one from the static grid."""
    candidates: Annotated[int, Between(1, 10_000)] = 4
    """Random draws screened by forward passes for each random start."""
    spread: Annotated[float, Between(0, 1000)] = 0.7
    """Standard deviation of the random logits around the static ones."""
    clip: Annotated[float, Between(SMALL, MANY)] = 1.0
    """Each sample's gradient is clipped to this norm."""
    corrections: list[CorrectionName] = field(default_factory=list)
    """What is searched beside the times: shift (of the model times), scale (of the output), coefficients,
    history (weights on all past predictions), guidance (factors on its scale), embedding (added to the network's
    embedding of the time); start and residual take a predictor."""
    seed: Seed = 0

    @property
    def solves(self) -> Work:
        """Of each sample, from the static grid and the random starts."""
        return Work(2 + self.random_starts * self.candidates, (1 + self.random_starts) * self.iterations)


@dataclass(frozen=True)
class LabelBatch:
    """The searched grids of B samples, corrections included, their `distance` `(B,)`, and the static grid's.

    index  `(B,)`, of the samples
    grid   of times `(B, N+1)`; each of its corrections has rows for all samples
    start  `(B,)`, from where a grid was found: 0 is static, then come those that were given, then the random ones
    """

    index: Tensor
    grid: TimeGrid
    distance: Tensor
    static_distance: Tensor
    start: Tensor


def search_per_sample(
    objective: Objective, batch: Batch, static: TimeGrid, options: PerSampleOptions, starts: Sequence[TimeGrid] = ()
) -> LabelBatch:
    """The best grid found for each sample of `batch`, never worse than the shared grid `static`.

    `starts` are further grids to search from, with times `(N+1,)` or `(B, N+1)`; they and `static` may have corrections
    that are searched. Each start, a random one too, costs `iterations` gradient evaluations; each random one about
    `candidates` forward solves besides.

    The derivative in time is the objective's; where that is open, the one that agrees best with the mean distance of
    this batch. Raises TsAdaptError for an unknown correction, and for a start with one that is not searched.
    """
    objective, _ = trusted(objective, static.steps, batch)
    space = space_of(objective, static.steps, options.corrections, batch)

    def own(value: Tensor, dims: int) -> Tensor:
        """A row for every sample, beside the samples."""
        return value.to(batch.x_T.device).expand(len(batch), *value.shape[-dims:])

    given = [space.completed(grid).mapped(own) for grid in (static, *starts)]
    origins = [space.numbers(grid) for grid in given]
    static_distance = objective.measure(static, batch, len(batch))
    best, best_distance = given[0], static_distance.clone()
    winner = torch.zeros(len(batch), dtype=torch.long, device=best_distance.device)
    for start in range(len(given) + options.random_starts):
        if start < len(given):
            origin = origins[start]
        else:
            origin = _random_start(objective, space, batch, origins[0], options, start - len(starts))
        grid, distance = _descend(objective, space, batch, origin, options)
        better = distance < best_distance
        best = _chosen(better, grid, best)
        best_distance = torch.where(better, distance, best_distance)
        winner = torch.where(better, torch.full_like(winner, start), winner)
    best_distance = objective.measure(best, batch, len(batch))  # in the search it is told the times by another road
    kept = best_distance <= static_distance
    return LabelBatch(
        batch.index,
        _chosen(kept, best, given[0]),
        torch.where(kept, best_distance, static_distance),
        static_distance,
        torch.where(kept, winner, torch.zeros_like(winner)),
    )


def _chosen(rows: Tensor, one: TimeGrid, other: TimeGrid) -> TimeGrid:
    """The grids of `one` in the `rows` `(B,)` that are true, those of `other`, of the same kind, elsewhere."""

    def pick(mine: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(rows.reshape(-1, *[1] * (mine.ndim - 1)), mine, theirs)

    held = {field: pick(value, other.held[field]) for field, value in one.held.items()}
    return TimeGrid.of(pick(one.times, other.times), held)


def _random_start(
    objective: Objective, space: GridSpace, batch: Batch, origin: Tensor, options: PerSampleOptions, start: int
) -> Tensor:
    """For each sample the best of `candidates` random perturbations of the logits in `origin`, by forward passes."""
    draws = initial_noise(options.seed, batch.index, (options.candidates, space.steps), stream=1_000_000 + start)
    moved = origin[:, None] + pad(draws.to(origin) * options.spread, (0, space.size - space.steps))
    distances = [objective.measure(space.grid(moved[:, k]), batch) for k in range(options.candidates)]
    chosen = torch.stack(distances).argmin(0)
    return moved[torch.arange(len(batch), device=moved.device), chosen]


def _descend(
    objective: Objective, space: GridSpace, batch: Batch, origin: Tensor, options: PerSampleOptions
) -> tuple[TimeGrid, Tensor]:
    """Adam on every row of v `(B, P)` at once; the best grids and distances `(B,)` met."""
    distance_of, unit = objective.towards(batch), space.unit.to(origin.device)
    v = torch.zeros_like(origin, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=options.lr, betas=(0.8, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.iterations), eta_min=0.1 * options.lr)
    best, best_z = torch.full((len(batch),), torch.inf, device=origin.device), origin
    for iteration in range(options.iterations + 1):
        last = iteration == options.iterations
        with torch.set_grad_enabled(not last):
            z = origin + unit * v
            distance = distance_of(space.grid(z))
        value = torch.nan_to_num(distance.detach().float(), nan=torch.inf)
        better = value < best
        best = torch.where(better, value, best)
        best_z = torch.where(better[:, None], z.detach(), best_z)
        if last:
            break
        (gradient,) = torch.autograd.grad(distance.sum(), v)
        v.grad = shortened(gradient, options.clip)
        optimizer.step()
        decay.step()
    return space.grid(best_z), best
