"""What every search minimises: the distance of the few-step solve to the teacher's, per sample.

L_b(grid) = distance(decode(student_b(grid)), decode(teacher_b))          student and teacher start from the same x_T

and what is asked of the student's images beside it, by `search.distribution`, `search.captions` and
`search.adversarial`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ts_adapt.distances import towards
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import DERIVATIVE_WIDTH, EMBEDDING, Denoiser, Distance, Solver, StepPolicy, TimeGrid
from ts_adapt.sampling import Solution, condition_rows, embedding_of, integrate, noise_for

AUTO = "auto"


@dataclass(frozen=True)
class Batch:
    """Samples of a teacher: `index` (B,), noise `x_T` and the teacher's end point `target` `(B, ...)`, condition."""

    index: Tensor
    x_T: Tensor
    target: Tensor
    condition: dict[str, Any]

    def __len__(self) -> int:
        return self.x_T.shape[0]

    def rows(self, rows: slice | Tensor) -> Batch:
        return Batch(self.index[rows], self.x_T[rows], self.target[rows], condition_rows(self.condition, rows))

    def split(self, size: int) -> list[Batch]:
        return [self.rows(slice(i, i + size)) for i in range(0, len(self), size)]


@dataclass(frozen=True)
class Objective:
    """The student's distance to the teacher; differentiable in the grid where denoiser and distance are.

    `checkpoint` trades time for memory (see `sampling.integrate`). Stochastic solvers draw noise from `seed`, the
    sample's index and the step. `derivative` is how searches and trainings take the derivative in time, one of
    `interfaces.DERIVATIVES` over the share `width` of all times; auto: as `search.derivative` finds. A call of
    the objective itself has that of `differentiated`. `beside`: indices of samples `(B,)` -> the student's images ->
    what is added to their distances, `(B,)`.
    """

    denoiser: Denoiser
    solver: Solver
    distance: Distance
    checkpoint: bool = False
    seed: int = 0
    derivative: str = AUTO
    width: float = DERIVATIVE_WIDTH
    beside: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None

    def differentiated(self, way: str) -> Objective:
        """The same objective, with the derivative in time taken in `way`; errors as those of `TimeDerivative`."""
        from ts_adapt.denoisers.time_derivative import TimeDerivative

        if isinstance(self.denoiser, TimeDerivative):
            if (self.denoiser.way, self.denoiser.width) == (way, self.width):
                return self
            return replace(self, denoiser=self.denoiser.denoiser).differentiated(way)
        return replace(self, denoiser=TimeDerivative(self.denoiser, way, self.width), derivative=way)

    @property
    def is_differentiated(self) -> bool:
        """Whether the derivative in time has been chosen, here or by whoever made the denoiser."""
        from ts_adapt.denoisers.time_derivative import TimeDerivative

        taken = self.denoiser.way if isinstance(self.denoiser, TimeDerivative) else None
        return taken is not None and self.derivative in (AUTO, taken)

    def __call__(self, schedule: StepPolicy | TimeGrid | Tensor, batch: Batch, x_T: Tensor | None = None) -> Tensor:
        """Distances `(B,)`; `x_T` replaces the batch's noise where the start itself is searched."""
        return self.towards(batch)(schedule, x_T)

    def towards(self, batch: Batch) -> Callable[..., Tensor]:
        """(schedule, x_T) -> what a call returns for `batch`, whose targets are decoded and looked at once."""
        with torch.no_grad():
            distance = towards(self.distance, self.denoiser.decode(batch.target, batch.condition))
        beside = None if self.beside is None else self.beside(batch.index)

        def loss(schedule: StepPolicy | TimeGrid | Tensor, x_T: Tensor | None = None) -> Tensor:
            images = self.denoiser.decode(self.student(schedule, batch, x_T), batch.condition)
            found = distance(images)
            return found if beside is None else _added(found, beside(images).to(found))

        return loss

    def student(self, schedule: StepPolicy | TimeGrid | Tensor, batch: Batch, x_T: Tensor | None = None) -> Tensor:
        """The end point of the few-step solve, `(B, ...)`."""
        return self.student_solution(schedule, batch, x_T).x

    def student_solution(
        self,
        schedule: StepPolicy | TimeGrid | Tensor,
        batch: Batch,
        x_T: Tensor | None = None,
        *,
        keep_trajectory: bool = False,
        check: bool = False,
    ) -> Solution:
        """The few-step solve itself; `keep_trajectory` and `check` as in `sampling.integrate`."""
        noise = noise_for(self.seed, batch.index, batch.x_T) if self.solver.needs_noise else None
        start = batch.x_T if x_T is None else x_T
        return integrate(
            self.denoiser,
            self.solver,
            schedule,
            start,
            condition=batch.condition,
            step_noise=noise,
            checkpoint=self.checkpoint,
            keep_trajectory=keep_trajectory,
            check=check,
        )

    @torch.no_grad()
    def measure(self, schedule: StepPolicy | TimeGrid | Tensor, batch: Batch, batch_size: int = 128) -> Tensor:
        """Distances `(B,)` without gradient, in parts of `batch_size`; non-finite ones become infinity."""
        return self.whole(self.apart(schedule, batch, batch_size))

    @torch.no_grad()
    def apart(self, schedule: StepPolicy | TimeGrid | Tensor, batch: Batch, batch_size: int = 128) -> Tensor:
        """What `whole` makes distances of, `(B,)` or `(B, K)`: of any rows of the samples, in parts of `batch_size`.

        A distance that compares samples with one another has a method `apart`, of a part of them, and `whole`, of all.
        """
        objective = replace(self, distance=getattr(self.distance, "apart", self.distance))
        parts = []
        for start in range(0, len(batch), batch_size):
            rows = slice(start, start + batch_size)
            part = schedule.rows(rows) if isinstance(schedule, TimeGrid) else schedule
            parts.append(objective(part, batch.rows(rows)))
        return torch.cat(parts)

    @torch.no_grad()
    def whole(self, parts: Tensor) -> Tensor:
        """The distances `(B,)` of all samples; non-finite ones become infinity."""
        found = getattr(self.distance, "whole", lambda found: found)(parts)
        return torch.nan_to_num(found.float(), nan=torch.inf, posinf=torch.inf)


def _added(found: Tensor, more: Tensor) -> Tensor:
    """`found` `(B,)`, or of `apart` `(B, K)` whose first column is the distance, with `more` `(B,)`."""
    return found + more if found.ndim == 1 else torch.cat([found[:, :1] + more[:, None], found[:, 1:]], 1)


def space_of(objective: Objective, steps: int, corrections: Collection[str], batch: Batch) -> GridSpace:
    """The grids over `steps` intervals with `corrections`, for the objective's solver and network, which a sample of
    `batch` shows; errors as those of `GridSpace`."""
    denoiser, embedding = objective.denoiser, None
    if EMBEDDING.name in corrections:
        embedding = embedding_of(denoiser, batch.x_T, batch.condition)
    width = 0 if embedding is None else embedding.width
    return GridSpace(denoiser.noise_schedule, steps, corrections, objective.solver.order, width)
