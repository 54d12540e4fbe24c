"""How near the teacher is to what it approximates: its own solve, with twice as many evaluations, of a few samples.

    moved_b    distance(teacher_b, the same solver on the same grid with twice the evaluations)
    missed_b   distance(teacher_b, the first of the config's solvers on that grid, with the most of its `nfe`)

What is learned is learned from the teacher's errors too: where `moved` is no small share of `missed`, it says so, and
for which of the compared schedules it is no small share of what they miss.
Solves that draw noise have no limit of their own and are left out, and so are grids without such numbers of steps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.records import Row
from ts_adapt.evaluation.tables import once
from ts_adapt.interfaces import Solver, TimeGrid
from ts_adapt.jobs.session import Session
from ts_adapt.remedies import command
from ts_adapt.schedules.resolve import build_grid
from ts_adapt.search.work import Work
from ts_adapt.solvers.coefficients import check_end
from ts_adapt.storage.files import read_json, write_json
from ts_adapt.storage.layout import CONVERGENCE
from ts_adapt.teacher.store import TeacherStore

FEW = 16
"""Samples that are solved once more."""
ENOUGH = 0.05
"""The share of what a fixed grid misses above which the teacher is said to be too coarse."""
NEAR = 0.2
"""The share of what a schedule misses above which the teacher's own error decides which of two is nearer."""
MANY = 3
"""Schedules that are named."""
KEPT = {"teacher": str, "distance": str, "student": str, "moved": list, "missed": list}


def work(session: Session) -> Work:
    """What measuring it takes."""
    return Work(
        min(FEW, session.config.teacher.train_samples) * (2 * session.config.teacher.nfe + max(session.config.nfe))
    )


def check_teacher(session: Session) -> None:
    """Measure it on the first training samples, keep it beside them, and say it; what is kept already stays."""
    options = session.config.teacher
    if session.solver(options.solver).needs_noise:
        return
    try:
        solves = _solves(session)
    except TsAdaptError as error:  # whole timesteps, say, are not twice as many
        print(f"ts-adapt: how near the teacher is to converged is not measured: {error}", file=sys.stderr)
        return
    found = of_teacher(session) or _measured(session, solves)
    print(said(session))
    share = sum(found["moved"]) / max(sum(found["missed"]), 1e-30)
    if not share <= ENOUGH:
        print(
            f"ts-adapt: warning: that is {100 * share:.0f} % of what {found['student']} miss, and schedules would "
            f"learn the teacher's errors; give --teacher.nfe {2 * options.nfe}, or another --teacher.solver (unipc-2, "
            "dpmpp-2m) or --teacher.grid (log_snr, linear), and another `name`",
            file=sys.stderr,
        )


def _solves(session: Session) -> dict[str, tuple[Solver, TimeGrid]]:
    """What the teacher is compared with; TsAdaptError where its grid has no such numbers of steps."""
    options, student = session.config.teacher, session.config.solvers[0]
    few = build_grid(options.grid, session.noise_schedule, session.steps(student, max(session.config.nfe)))
    solves = {
        "moved": (session.solver(options.solver), session.teacher_grid(2 * options.nfe)),
        "missed": (session.solver(student), few),
    }
    for solver, grid in solves.values():
        check_end(solver, grid.times[-1], f"the grid {options.grid}")
    return solves


def _measured(session: Session, solves: Mapping[str, tuple[Solver, TimeGrid]]) -> dict[str, Any]:
    config, options = session.config, session.config.teacher
    store, batch = session.teacher("train", min(FEW, options.train_samples))
    session.announce("how near the teacher is to converged", work(session))
    found: dict[str, Any] = {
        "teacher": store.hash,
        "distance": session.distance,
        "student": f"{max(config.nfe)} evaluations of {config.solvers[0]} on the grid {options.grid}",
    }
    for key, (solver, grid) in solves.items():
        found[key] = session.objective(solver).measure(grid, batch, options.batch_size).tolist()
    write_json(session.workspace.teacher("train") / CONVERGENCE, found)
    return found


def of_teacher(session: Session) -> dict[str, Any] | None:
    """What was measured of the teacher that there is, in the config's distance; None where nothing was. TsAdaptError
    for a file of something else."""
    folder = session.workspace.teacher("train")
    path = folder / CONVERGENCE
    if not path.exists():
        return None
    found: dict[str, Any] = read_json(path, KEPT)
    for key in ("moved", "missed"):
        values = [math.inf if value is None else value for value in found[key]]
        if not values or not all(type(value) in (int, float) for value in values):
            raise TsAdaptError(f"{key!r} of {path} holds no distances; remove it and run {command('teach')} again")
        found[key] = values
    now = {"teacher": TeacherStore.open(folder).hash, "distance": session.distance}
    return found if now.items() <= found.items() else None


def too_near(session: Session, rows: Sequence[Row]) -> str:
    """A sentence on the schedules that are so near to the teacher that its own error decides; empty for none, and for a
    finer teacher of test samples, of which nothing was measured."""
    found, options = of_teacher(session), session.config.teacher
    if found is None or options.nfe_of("test") > options.nfe:
        return ""
    moved = sum(found["moved"]) / len(found["moved"])
    near = [row for row in once(rows) if moved > NEAR * row.distance]
    if not near:
        return ""
    named = "; ".join(f"{row.schedule} of {row.sampler}, NFE {row.nfe}" for row in near[:MANY])
    named += "; ..." if len(near) > MANY else ""
    return (
        f"The teacher itself is {moved:.2g} away from its solve with twice the evaluations, which is no small share of "
        f"what the nearest schedules miss ({named}): which of them is better, their distances do not say. Without "
        f"{session.workspace.teacher('test')} and with --teacher.test_nfe {2 * options.nfe} they do."
    )


def said(session: Session) -> str:
    """One sentence on it; empty where nothing was measured."""
    found = of_teacher(session)
    if found is None:
        return ""
    moved, nfe = torch.tensor(found["moved"]), session.config.teacher.nfe
    return (
        f"With {2 * nfe} evaluations in place of {nfe} the teacher's samples move by {float(moved.mean()):.2g} "
        f"(median {float(moved.median()):.2g}, {len(moved)} training samples)."
    )
