"""The oracle: for each starting noise the grid that is best for it alone (ALD3's RQ1), whole batches at once.

    minimise over logits_b (N,), for every b of the batch:   L_b(times(logits_b))

The samples share nothing but the network's batch: each row has its own logits, optimiser state, gradient clipping and
best-so-far, and an elementwise optimiser (Adam) on the sum of the losses is exactly B searches side by side. The
problem is not convex, so each sample is searched from several starts: the static grid, grids that are given, such as
the oracle grids of noises alike, and the best of a few random perturbations of the static one, chosen by forward passes
alone. Random draws depend on (seed, sample) only, so that a label does not depend on the batch it was searched in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.interfaces import TimeGrid
from ts_adapt.sampling import initial_noise
from ts_adapt.search.objective import Batch, Objective


@dataclass
class PerSampleOptions:
    """How the oracle grid of each sample is searched."""

    iterations: int = 40
    lr: float = 0.1
    random_starts: int = 1
    """Searches from random logits, beside the one from the static grid."""
    candidates: int = 4
    """Random draws screened by forward passes for each random start."""
    spread: float = 0.7
    """Standard deviation of the random logits around the static ones."""
    clip: float = 1.0
    """Each sample's gradient is clipped to this norm."""
    seed: int = 0


@dataclass(frozen=True)
class LabelBatch:
    """Searched `times` `(B, N+1)`, their `distance` `(B,)`, the static grid's, and which start won.

    0 is static, then come those that were given, then the random ones.
    """

    index: Tensor
    times: Tensor
    distance: Tensor
    static_distance: Tensor
    start: Tensor


def search_per_sample(
    objective: Objective, batch: Batch, static: TimeGrid, options: PerSampleOptions, starts: Sequence[TimeGrid] = ()
) -> LabelBatch:
    """The best grid found for each sample of `batch`, never worse than the shared grid `static`.

    `starts` are further grids to search from, with times `(N+1,)` or `(B, N+1)`. Each start, a random one too, costs
    `iterations` gradient evaluations; each random one about `candidates` forward solves besides.
    """
    noise = objective.denoiser.noise
    given = [grid.times.to(batch.x_T.device).expand(len(batch), -1) for grid in (static, *starts)]
    static_times, static_logits = given[0], times_to_logits(given[0], noise)
    static_distance = objective.measure(static, batch, len(batch))
    best_times, best = static_times.clone(), static_distance.clone()
    winner = torch.zeros(len(batch), dtype=torch.long, device=best.device)
    for start in range(len(given) + options.random_starts):
        if start < len(given):
            logits = times_to_logits(given[start], noise)
        else:
            logits = _random_start(objective, batch, static_logits, options, start - len(starts))
        times, distance = _descend(objective, batch, logits, options)
        better = distance < best
        best_times = torch.where(better[:, None], times, best_times)
        best = torch.where(better, distance, best)
        winner = torch.where(better, torch.full_like(winner, start), winner)
    return LabelBatch(batch.index, best_times, best, static_distance, winner)


def _random_start(
    objective: Objective, batch: Batch, static_logits: Tensor, options: PerSampleOptions, start: int
) -> Tensor:
    """For each sample the best of `candidates` random perturbations of the static logits, by forward passes."""
    steps = static_logits.shape[-1]
    draws = initial_noise(options.seed, batch.index, (options.candidates, steps), stream=1_000_000 + start)
    draws = draws.to(static_logits) * options.spread
    distances = torch.stack(
        [
            objective.measure(TimeGrid(logits_to_times(static_logits + draws[:, k], objective.denoiser.noise)), batch)
            for k in range(options.candidates)
        ]
    )
    chosen = distances.argmin(0)
    return static_logits + draws[torch.arange(len(batch), device=draws.device), chosen]


def _descend(objective: Objective, batch: Batch, start: Tensor, options: PerSampleOptions) -> tuple[Tensor, Tensor]:
    """Adam on every row of the logits `(B, N)` at once; the best times `(B, N+1)` and distances `(B,)` met."""
    noise, distance_of = objective.denoiser.noise, objective.towards(batch)
    logits = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=options.lr, betas=(0.8, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.iterations), eta_min=0.1 * options.lr)
    best = torch.full((len(batch),), torch.inf, device=start.device)
    best_times = logits_to_times(start, noise).detach()
    for iteration in range(options.iterations + 1):
        last = iteration == options.iterations
        with torch.set_grad_enabled(not last):
            times = logits_to_times(logits, noise)
            distance = distance_of(TimeGrid(times))
        value = torch.nan_to_num(distance.detach().float(), nan=torch.inf)
        better = value < best
        best = torch.where(better, value, best)
        best_times = torch.where(better[:, None], times.detach(), best_times)
        if last:
            break
        (gradient,) = torch.autograd.grad(distance.sum(), logits)
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        norm = gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
        logits.grad = gradient * (options.clip / norm).clamp(max=1.0)
        optimizer.step()
        decay.step()
    return best_times, best
