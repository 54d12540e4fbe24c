"""What a predictor does, and how much of it depends on the sample.

    spread   standard deviation over samples, in the mean over steps: of the inner times and of the shift (both in
             log-SNR), of the output scale, of the coefficients, of the weights of the history, of the factors on the
             guidance; of the changes of pictures, of the start in sigma_T and of x0, in the mean over their numbers

Without a spread a predictor has collapsed: it is one more static grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ts_adapt.grids.corrections import CORRECTIONS
from ts_adapt.grids.parametric import positions
from ts_adapt.interfaces import RESIDUAL, START, Condition, Field, Node, TimeGrid
from ts_adapt.numerics import finite_log_snr_range, scale
from ts_adapt.policies import Around
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.search.objective import Batch, Objective


@dataclass(frozen=True)
class Overheard(Around):
    """`policy`, whose `nodes` are kept, those of all batches one after the other."""

    nodes: list[Node] = field(default_factory=list)

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        node, state = self.policy.init(x_T, condition)
        self.nodes.append(node)
        return node, state

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        found, state = self.policy.next(x_t, x0, node, state)
        self.nodes.append(found)
        return found, state


@torch.no_grad()
def chosen(
    predictor: OneShot | Recursive, objective: Objective, batch: Batch, steps: int | None = None, batch_size: int = 128
) -> tuple[TimeGrid, dict[str, Tensor]]:
    """The grids `(n, N+1)` that the predictor chooses, with the corrections that they hold, and the changes of pictures
    that it learns: start `(n, ...)` in sigma_T, residual `(n, N, ...)`; `steps` as in `policy`."""
    parts: list[TimeGrid] = []
    changes: dict[str, list[Tensor]] = {}
    for part in batch.split(1 if objective.denoiser.alone else batch_size):
        heard = Overheard(predictor.policy(steps))
        objective.student(heard, part)
        parts.append(_grid_of(heard.nodes, len(part)))
        first, *after = heard.nodes
        if START in after[0].held:
            change = scale(1 / objective.denoiser.noise_schedule.sigma(first.t), after[0].held[START])
            changes.setdefault(START.name, []).append(change)
        if RESIDUAL in after[0].held:
            changes.setdefault(RESIDUAL.name, []).append(torch.stack([node.held[RESIDUAL] for node in after], 1))
    held = {field: torch.cat([part.held[field] for part in parts]) for field in parts[0].held}
    grid = TimeGrid.of(torch.cat([part.times for part in parts]), held)
    return grid, {name: torch.cat(each) for name, each in changes.items()}


def predicted(
    predictor: OneShot | Recursive, objective: Objective, batch: Batch, steps: int | None = None, batch_size: int = 128
) -> TimeGrid:
    """The grids of `chosen`."""
    return chosen(predictor, objective, batch, steps, batch_size)[0]


def _grid_of(nodes: list[Node], batch: int) -> TimeGrid:
    """The grids `(B, N+1)` that a solve of `batch` samples went along."""

    def stacked(values: list[Tensor], dims: int = 0) -> Tensor:
        return torch.stack([value.expand(batch, *value.shape[value.ndim - dims :]) for value in values], 1)

    held: dict[Field, Tensor] = {}
    for correction in CORRECTIONS.values():
        field = correction.field
        steps = nodes[1:] if field.ends else nodes[:-1]
        width = next((node.held[field].shape[-1] if field.dims else 1 for node in steps if field in node.held), None)
        if width is not None:
            values = [node.held.get(field, correction.neutral(node.t, width)) for node in steps]
            held[field] = stacked(values, field.dims)
    return TimeGrid.of(stacked([node.t for node in nodes]), held)


def spread(grid: TimeGrid, changes: Mapping[str, Tensor], objective: Objective) -> dict[str, float]:
    """The spread of the times of grids `(n, N+1)`, of each of their corrections, and of the changes of pictures, by
    name: of what `chosen` finds."""
    noise_schedule = objective.denoiser.noise_schedule
    low, high = finite_log_snr_range(noise_schedule)
    u, found = positions(grid.times, noise_schedule), {}
    if grid.steps > 1:
        found["times"] = (high - low) * u[:, 1:-1]
    for name, correction in CORRECTIONS.items():
        if correction.field in grid.held:
            found[name] = correction.departure(grid.held[correction.field], grid.times, noise_schedule)
    return {name: float(value.std(0, correction=0).mean()) for name, value in {**found, **changes}.items()}


@torch.no_grad()
def draw(
    writer: Any, predictor: OneShot | Recursive, objective: Objective, steps: int, samples: Batch, at: int
) -> None:
    """Write figures of the predicted grids, and of what becomes of the first `samples`, to TensorBoard."""
    from ts_adapt.plots import plot_images, plot_schedules

    static, policy, few = predictor.static(steps), predictor.policy(steps), samples.rows(slice(0, 8))
    grids = {"static": static, predictor.kind: predicted(predictor, objective, samples, steps).times}
    title = f"{steps} steps, {type(objective.solver).__name__}"
    writer.add_figure(f"schedules/{steps}-steps", plot_schedules(grids, objective.denoiser.noise_schedule, title), at)
    ends = {
        "static": objective.student(TimeGrid(static), few), predictor.kind: objective.student(policy, few),
        "teacher": few.target,
    }  # fmt: skip
    images = {name: objective.denoiser.decode(x, few.condition) for name, x in ends.items()}
    writer.add_figure(f"samples/{steps}-steps", plot_images(images, title), at)
