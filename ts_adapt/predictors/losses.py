"""What predictors are trained by, for every number of steps N that they serve:

    end to end   the distance itself, through the solver: sum_b distance(student_b, teacher_b). A row's gradient with
                 respect to what is predicted for it is shortened to a length of 1 (`shorten_gradient`). Where it is
                 asked for, the distance has that to real images beside it (`search.distribution`), each N with a
                 memory of its own, or a discriminator (`search.adversarial`), one for all N. What dropout keeps of a
                 sample's features goes with the sample
    labels       regression on the oracle's grids: the squared error of the positions u in log-SNR (see `recursive`),
                 over the variance of the labels, so that 1 is what predicting their mean scores. The recursive
                 predictor sees the states that the solver meets along the label. Learns the times only (ALD3)

Sums over rows, not means: those of the parts of a batch add up to that of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ts_adapt.grids.parametric import positions
from ts_adapt.interfaces import Condition, Node, TimeGrid
from ts_adapt.policies import Around
from ts_adapt.predictors.encoder import Encoder
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.search.objective import Batch, Objective

Loss = Callable[[int, Tensor], Tensor]
"""(N, rows) -> the loss summed over the rows, in solves of N steps."""
TOGETHER = 128
"""Samples that are solved at once where no gradient is asked for."""


@dataclass(frozen=True)
class Labelled:
    """Samples with their oracle grids, of times `(n, N+1)`, and the oracle's `distance` `(n,)`."""

    batch: Batch
    grid: TimeGrid
    distance: Tensor

    def rows(self, rows: slice | Tensor) -> Labelled:
        return Labelled(self.batch.rows(rows), self.grid.rows(rows), self.distance[rows])


@dataclass(frozen=True)
class Dropping(Around):
    """`policy`, in whose solve k of its `encoder` is `kept` `(B, hidden)`, of each sample its own."""

    encoder: Encoder
    kept: Tensor

    def rows(self, rows: slice) -> Dropping:
        return replace(self, kept=self.kept[rows])

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        with self.encoder.dropping(self.kept):
            return self.policy.init(x_T, condition)

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        with self.encoder.dropping(self.kept):
            return self.policy.next(x_t, x0, node, state)


def end_to_end(predictor: OneShot | Recursive, objectives: Mapping[int, Objective], data: Batch) -> Loss:
    """The distance through the solver, of the objective of each N; rows that end in no number count nothing."""

    def loss(steps: int, rows: Tensor) -> Tensor:
        policy, encoder = predictor.policy(steps), predictor.encoder
        if encoder.kept is not None:
            policy = Dropping(policy, encoder, encoder.kept)
        distances = objectives[steps](policy, data.rows(rows))
        return torch.where(torch.isfinite(distances), distances, torch.zeros_like(distances)).sum()

    return loss


def regression(predictor: OneShot | Recursive, objective: Objective, labels: Mapping[int, Labelled]) -> Loss:
    """The squared error of the times."""
    losses = {steps: _regression(predictor, objective, steps, data) for steps, data in labels.items()}
    return lambda steps, rows: losses[steps](rows)


def _regression(
    predictor: OneShot | Recursive, objective: Objective, steps: int, data: Labelled
) -> Callable[[Tensor], Tensor]:
    noise_schedule, times = objective.denoiser.noise_schedule, data.grid.times
    u = positions(times, noise_schedule)
    variance = u[:, 1:-1].var(0, correction=0).mean().clamp_min(1e-6)

    def squared_error(predicted: Tensor, wanted: Tensor) -> Tensor:
        return (predicted - wanted).square().mean(-1).sum() / variance

    if isinstance(predictor, OneShot):

        def one_shot_loss(rows: Tensor) -> Tensor:
            batch = data.batch.rows(rows)
            predicted = predictor(*objective.denoiser.shown(batch.x_T, batch.condition), steps=steps)
            return squared_error(positions(predicted.times[:, 1:-1], noise_schedule), u[rows, 1:-1])

        return one_shot_loss

    states, x0 = states_along(objective, data.grid, data.batch)
    place = predictor.places(steps).start

    def recursive_loss(rows: Tensor) -> Tensor:
        parts, batch = [], data.batch.rows(rows)
        _, condition = objective.denoiser.shown(batch.x_T, batch.condition)
        for i in range(steps - 1):
            before = x0[rows, i - 1] if i else None
            picture = predictor.picture(states[rows, i], x0[rows, i], before, times[rows, i])
            r = predictor.share_of_rest(predictor.encoder(picture, place + i, condition).double(), steps, i)
            parts.append(u[rows, i] + r * (1 - u[rows, i]))
        return squared_error(torch.stack(parts, 1), u[rows, 1:-1])

    return recursive_loss


@torch.no_grad()
def states_along(objective: Objective, grid: TimeGrid, batch: Batch) -> tuple[Tensor, Tensor]:
    """The states `(n, N+1, ...)` and x0 `(n, N, ...)` met along `grid`, as policies are shown them."""
    states, x0 = [], []
    for start in range(0, len(batch), TOGETHER):
        rows = slice(start, start + TOGETHER)
        part = batch.rows(rows)

        def shown(along: Tensor, condition: Condition = part.condition) -> Tensor:
            return torch.stack([objective.denoiser.shown(x, condition)[0] for x in along.unbind(1)], 1)

        solution = objective.student_solution(grid.rows(rows), part, keep_trajectory=True)
        if solution.states is not None and solution.x0 is not None:
            states.append(shown(solution.states))
            x0.append(shown(solution.x0))
    return torch.cat(states), torch.cat(x0)
