"""Which derivative in time a search may follow: each is compared with differences of what is searched.

    D_j = (L(z + h e_j) - L(z - h e_j)) / 2h,   j = 1 .. N          L  the mean distance of a few samples
    error = |dL/dz - D| / |D|                                       z  the logits of a grid, h as long as a step

at two grids of equal steps, in log-SNR and in time, taken together as one vector: unlike a searched grid they are at no
minimum, where derivatives say little; should one of them be near one, the other decides. Between timesteps a network
may wiggle, in amounts that rule its derivative and mean nothing (`time_derivative`). No derivative is right for every
network; the differences tell which one is for this, for the price of 4N solves of a few samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ts_adapt import distributed
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import DERIVATIVES, TimeGrid
from ts_adapt.search.objective import AUTO, Batch, Objective
from ts_adapt.search.work import Work

PLACES = ("log_snr", "linear")
STEP = 0.2
"""h: a change of the logits that moves times by a twentieth of the range, as the first steps of a search do."""
SAMPLES = 32
"""How many of the samples are looked at."""
AGREES = 0.5
"""The least cosine with the differences at which a derivative still leads down."""
ALIKE = 0.05
"""Derivatives whose cosines differ by less point the same way; of them that of the least error is taken."""
NEAR = 0.1
"""Of errors that differ by less the first of `DERIVATIVES` is taken."""
SMALLEST = 1e-30
Recall = Callable[[Sequence[float], Callable[[], Sequence[float]]], list[float]]
"""(question, compute) -> the answer, computed or kept from before: `Journal.recall`."""


def nothing_kept(question: Sequence[float], compute: Callable[[], Sequence[float]]) -> list[float]:
    """The `Recall` of who keeps nothing."""
    return [*compute()]


@dataclass(frozen=True)
class Agreement:
    """How the derivatives agree with differences of the objective, by their way: cosine and error.

    Both are empty where the denoiser has no derivative at all.
    """

    cosine: dict[str, float]
    error: dict[str, float]

    @property
    def best(self) -> str:
        """The way to take; exact where there is none."""
        alike = [way for way, cosine in self.cosine.items() if cosine >= max(self.cosine.values()) - ALIKE]
        least = min((self.error[way] for way in alike), default=0.0)
        return next((way for way in alike if self.error[way] <= least + NEAR), "exact")

    @property
    def leads_down(self) -> bool:
        """Whether the best of them does, surely."""
        return self.cosine.get(self.best, -1.0) >= AGREES

    def __str__(self) -> str:
        found = ", ".join(f"{way} {cosine:.2f}" for way, cosine in self.cosine.items()) or "there is none"
        verdict = f"{self.best} is taken" if self.leads_down else "none leads down surely"
        return f"derivatives in time against differences of the distance (cosine): {found}; {verdict}"


def compare(
    objective: Objective, steps: int, batch: Batch, part: int = SAMPLES, recall: Recall = nothing_kept
) -> Agreement:
    """How the derivatives that this denoiser has agree in grids of `steps` steps, on the first samples of `batch`.

    part    samples differentiated at once
    recall  keeps the answers; they are those of one objective and batch
    """
    few, noise_schedule = batch.rows(slice(0, SAMPLES)), objective.denoiser.noise_schedule
    space = GridSpace(noise_schedule, steps)
    places = [space.numbers(TimeGrid(fixed.make(name, noise_schedule, steps))).to(batch.x_T.device) for name in PLACES]

    def difference(z: Tensor, j: int) -> float:
        step = torch.zeros_like(z)
        step[j] = STEP
        up, down = (float(objective.measure(space.grid(z + sign * step), few).double().mean()) for sign in (1, -1))
        return (up - down) / (2 * STEP) if math.isfinite(up - down) else 0.0

    def along(z: Tensor) -> list[float]:
        return [difference(z, j) for j in range(steps)]

    def asked(what: int, z: Tensor, compute: Callable[[], list[float]]) -> Tensor:
        return torch.tensor(recall([float(what), STEP, *z.tolist()], compute), dtype=torch.float64)

    differences = [asked(-1, z, partial(along, z)) for z in places]
    cosine, error = {}, {}
    for number, way in enumerate(DERIVATIVES):
        try:
            by = objective.differentiated(way)
            slopes = [asked(number, z, partial(_gradient, by, space, z, few, part)) for z in places]
        except torch.OutOfMemoryError:
            raise
        except (TsAdaptError, RuntimeError):  # this denoiser has no such derivative
            continue
        taken, found = torch.cat(slopes), torch.cat(differences)
        cosine[way] = float(torch.cosine_similarity(taken, found, dim=0))
        error[way] = float((taken - found).norm() / found.norm().clamp_min(SMALLEST))
    return Agreement(cosine, error)


def comparing(objective: Objective, steps: int, samples: int) -> Work:
    """How many solves `trusted` takes to find the derivative, of a denoiser that has all of them; none where it is
    known. A secant's gradient is one solve and two without."""
    if objective.is_differentiated or objective.derivative != AUTO or steps == 1:
        return Work()
    few = len(PLACES) * min(SAMPLES, samples)
    return Work(few * (2 * steps + 2), few * len(DERIVATIVES))


def _gradient(objective: Objective, space: GridSpace, z: Tensor, batch: Batch, part: int) -> list[float]:
    """dL/dz `(N,)` of the mean over `batch`."""
    z = z.clone().requires_grad_()
    total = torch.zeros_like(z)
    for rows in batch.split(part):
        total += torch.autograd.grad(objective(space.grid(z), rows).double().sum() / len(batch), z)[0]
    return torch.nan_to_num(total).tolist()


def trusted(
    objective: Objective,
    steps: int,
    batch: Batch,
    part: int = SAMPLES,
    recall: Recall = nothing_kept,
    *,
    together: bool = False,
) -> tuple[Objective, Agreement | None]:
    """`objective` with the derivative in time that is asked for; where that is left open, with the best of all.

    The agreement is None where nothing was compared: a derivative was asked for, the denoiser is a `TimeDerivative`, or
    there is one step. `together`: all processes ask, and take what the first one finds; the rest as in `compare`.
    """
    if objective.is_differentiated:
        return objective, None
    if objective.derivative != AUTO:
        return objective.differentiated(objective.derivative), None
    if steps == 1:
        return objective.differentiated("exact"), None
    ask = partial(compare, objective, steps, batch, part, recall)
    agreement = distributed.first(ask) if together else ask()
    return objective.differentiated(agreement.best), agreement
