"""A few schedules side by side, from Python: how far each ends from the teacher, on the same noises.

    found = ts_adapt.compare(denoiser, ["karras", "log_snr", learned], steps=5)
    print(found)           a table; a notebook shows it by itself
    found.figure()         their log-SNR at every step

A look, not a measurement: `evaluate` has intervals, other measures, and noises that nothing was learned on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ts_adapt.assembly import build_distance, build_solver, steps_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.tables import Column, Table, as_markdown, as_text, make_table
from ts_adapt.interfaces import Condition, Denoiser
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.schedules.resolve import build_grid
from ts_adapt.search.objective import Batch, Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Side:
    """One of them: its name, the grid with its solver and NFE, and its distances, mean and median over the samples."""

    name: str
    schedule: LearnedGrid
    distance: float
    median: float


@dataclass(frozen=True, repr=False)
class SideBySide:
    """What `compare` found, in the order that was asked for."""

    denoiser: Denoiser
    sides: Sequence[Side]
    title: str

    @property
    def table(self) -> Table:
        columns = [
            Column("schedule", lambda side: side.name, text=True),
            Column("solver", lambda side: side.schedule.solver, text=True),
            Column("NFE", lambda side: side.schedule.nfe, form="{:.0f}"),
            Column("distance", lambda side: side.distance, min),
            Column("median", lambda side: side.median, min),
        ]
        return make_table(self.title, columns, self.sides)

    def __repr__(self) -> str:
        return as_text(self.table)

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return as_markdown(self.table)

    def figure(self) -> Figure:
        """The log-SNR of each at every step."""
        from ts_adapt.plots import plot_schedules

        times = {side.name: side.schedule.grid.times for side in self.sides}
        return plot_schedules(times, self.denoiser.noise_schedule, self.title)


def teacher_batch(
    denoiser: Denoiser, index: Sequence[int], *, steps: int = 40, seed: int = 0, condition: Condition | None = None
) -> Batch:
    """The noises of the samples numbered `index` and where `steps` fine steps lead from them: what is learned from.

    condition  of the samples, as the denoiser takes it: a row for each
    """
    noise_schedule, network = denoiser.noise_schedule, denoiser.network
    device = "cpu" if network is None else next((str(p.device) for p in network.parameters()), "cpu")
    x_T = initial_noise(seed, index, denoiser.shape).to(device) * noise_schedule.noise_scale
    numbers, given = torch.tensor(list(index)), dict(condition or {})
    if denoiser.numbered is not None:
        given = {"number": numbers, "seed": torch.full_like(numbers, seed), **given}
    fine, solver = build_grid("log_snr", noise_schedule, steps), build_solver("unipc-3", noise_schedule)
    with torch.no_grad():
        return Batch(numbers, x_T, integrate(denoiser, solver, fine, x_T, condition=given).x, given)


def compare(
    denoiser: Denoiser,
    schedules: Sequence[str | LearnedGrid],
    solver: str = "unipc-3",
    *,
    steps: int = 5,
    samples: int = 64,
    seed: int = 0,
    teacher_steps: int = 40,
    distance: str = "l2",
    condition: Condition | None = None,
) -> SideBySide:
    """Solve from the same noises along each of `schedules`, and finely, and say how far apart the ends are.

    schedules  names of fixed grids, of `steps` evaluations with `solver`, and learned ones, each with its own
    condition  of the samples, as the denoiser takes it: a row for each
    distance   as `build_distance` has it

    Raises TsAdaptError for what is unknown, and for no schedules.
    """
    if not schedules:
        raise TsAdaptError("there are no schedules to compare; give names of fixed grids, or learned ones")
    noise_schedule = denoiser.noise_schedule
    batch = teacher_batch(denoiser, range(samples), steps=teacher_steps, seed=seed, condition=condition)
    with torch.no_grad():
        shape = tuple(denoiser.decode(batch.target[:1], batch.rows(slice(1)).condition).shape[1:])
    measure = build_distance(distance, str(batch.x_T.device), shape)
    sides = []
    for each in schedules:
        if isinstance(each, LearnedGrid):
            name, learned = str(each.about.get("method") or "learned"), each
        else:
            taken = steps_of(build_solver(solver, noise_schedule), steps)
            name, learned = each, LearnedGrid(build_grid(each, noise_schedule, taken), solver, steps)
        objective = Objective(denoiser, build_solver(learned.solver, noise_schedule), measure, seed=seed)
        distances = objective.measure(learned.grid, batch)
        sides.append(Side(name, learned, float(distances.mean()), float(distances.median())))
    return SideBySide(denoiser, sides, f"{samples} noises, {distance} to {teacher_steps} steps of unipc-3")
