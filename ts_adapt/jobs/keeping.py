"""Results that are kept: whether one that is there stays; a shared grid that has been found, measured where the teacher
has samples for it, written, and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from ts_adapt.assembly import steps_of
from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.jobs.session import Session
from ts_adapt.plots import plot_schedules
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.search.objective import Batch
from ts_adapt.storage.files import make_folder
from ts_adapt.storage.layout import MANIFEST


def stays(path: Path, check: Callable[[], object], redo: bool) -> bool:
    """Whether there is a result in `path` that stays; where `check` raises, it does not with `redo`."""
    if not path.exists():
        return False
    try:
        check()
    except TsAdaptError:
        if not redo:
            raise
        return False
    return True


def compared(value: float, reference: float) -> str:
    """How far `value` is from `reference`, in words."""
    change = value / reference - 1 if reference > 0 else 0.0
    return f"{100 * abs(change):.1f} % {'above' if change > 0 else 'below'}"


def validation_samples(session: Session) -> Batch | None:
    """The training samples that shared grids are validated on; None before the teacher has made that many."""
    count = session.config.static_samples
    begun = (session.workspace.teacher("train") / MANIFEST).exists()
    if not begun or len(session.teacher("train")[1]) < 2 * count:
        return None
    return session.teacher("train", 2 * count)[1].rows(slice(count, None))


def best_fixed_known(session: Session, solver: str, nfe: int) -> tuple[str, float] | None:
    """The best fixed grid and its mean distance on the validation samples, if the static search has measured it."""
    if "static" not in session.shared_names(solver, nfe):
        return None
    kept = (session.static(solver, nfe).about.get("measured") or {}).get("best_fixed_distance")
    now = {"samples": session.config.static_samples, "evaluator": session.config.distance}
    if not isinstance(kept, dict) or any(kept.get(key) != value for key, value in now.items()):
        return None
    return str(kept.get("grid")), float(kept["value"])


def keep_shared(
    session: Session, called: str, name: str, nfe: int, grid: TimeGrid, best_fixed: tuple[str, float] | None,
    seed: int | None = None,
) -> None:  # fmt: skip
    """Write the grid that was found for the solver `name` as the workspace's `called`, and say how good it is.

    best_fixed  a fixed grid and its mean distance on the validation samples, to compare with
    seed        of the search, where it has one
    """
    config, solver, path = session.config, session.solver(name), session.workspace.shared(called, name, nfe)
    batch, measured = validation_samples(session), {}
    paired = {"evaluator": config.distance, "samples": config.static_samples, "split": "validation"}
    drawn, said = {called: grid.times}, f"{name}, NFE {nfe}: "
    about = {**session.about(name), "method": called, "seed": seed}
    if batch is not None:
        distances = session.objective(solver).measure(grid, batch)
        distance, median = float(distances.mean()), float(distances.median())
        measured["distance"] = {"value": distance, **paired}
        about |= {
            "distance": config.distance, "teacher": session.teacher("train")[0].hash,
            "teacher_solver": config.teacher.solver, "teacher_nfe": config.teacher.nfe,
            "teacher_grid": config.teacher.grid, "teacher_seed": config.teacher.seed,
        }  # fmt: skip
        said += f"distance {distance:.5f} (median {median:.5f})"
        if best_fixed is not None:
            best, reference = best_fixed
            measured["best_fixed_distance"] = {"value": reference, **paired, "grid": best}
            drawn[best] = session.starts(steps_of(solver, nfe))[best].times
            said += f", {compared(distance, reference)} the best fixed grid ({best})"
        said += "; "
    with SummaryWriter(str(make_folder(session.workspace.curves(called, name, nfe)))) as writer:
        writer.add_figure("schedule", plot_schedules(drawn, session.noise, f"{name}, NFE {nfe}"))
    LearnedGrid(grid, name, nfe, {**about, "made_with": config.made_with(called), "measured": measured}).save(
        path, session.noise
    )
    print(f"{said}{path}")
