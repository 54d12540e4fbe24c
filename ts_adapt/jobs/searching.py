"""The search for grids that all samples share: by gradient (static), by trials (blackbox), optimised (dmn, gits, oss,
klub)."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from torch.utils.tensorboard import SummaryWriter

from ts_adapt import distributed
from ts_adapt.assembly import steps_of
from ts_adapt.config import Config
from ts_adapt.evaluation.records import fingerprint
from ts_adapt.grids.optimized import dmn
from ts_adapt.interfaces import Solver, TimeGrid
from ts_adapt.jobs.accelerated import FULL
from ts_adapt.jobs.keeping import best_fixed_known, keep_shared, stays
from ts_adapt.jobs.labelling import student_options
from ts_adapt.jobs.session import Session
from ts_adapt.search.blackbox import SAMPLERS, search_blackbox
from ts_adapt.search.journal import Journal
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.optimized import search_optimized
from ts_adapt.search.static import best_start, search_static
from ts_adapt.search.workers import open_study
from ts_adapt.storage.files import make_folder
from ts_adapt.teacher.store import TeacherStore


def _shared_stays(session: Session, called: str, name: str, nfe: int, redo: bool) -> bool:
    """Whether the shared grid `called` is there already, and stays; says so."""
    path = session.workspace.shared(called, name, nfe)
    there = stays(path, lambda: session.shared(called, name, nfe, strict=True), redo)
    if there:
        print(f"{name}, NFE {nfe}: {path} is there already, made with these options")
    return there


def search_shared(session: Session, name: str, solver: Solver, nfe: int, method: str, redo: bool) -> None:
    """Search the grid of all samples by static or blackbox, unless it is there and stays."""
    config = session.config
    called = config.static_name if method == "static" else method
    there = partial(_shared_stays, session, called, name, nfe, redo)
    if distributed.first(there) if method == "blackbox" else there():
        return
    count = config.static_samples
    store, both = session.teacher("train", 2 * count)
    train, validation = both.rows(slice(0, count)), both.rows(slice(count, 2 * count))
    objective = session.objective(solver)
    fixed = session.starts(steps_of(solver, nfe))
    best, means = best_start(objective, fixed, validation)
    if method == "blackbox":
        grid = _search_blackbox(session, objective, train, store, name, nfe, fixed[best])
        if distributed.rank() == 0:
            keep_shared(session, called, name, nfe, grid, (best, means[best]), config.blackbox.seed)
        return
    onwards = called != method and method in session.shared_names(name, nfe)
    starts = {"static": session.static(name, nfe).grid} if onwards else fixed | _of_full(session, name, nfe)
    searched = asdict(config.static), config.derivative, config.derivative_width
    key = fingerprint(store.hash, config.distance, count, *searched, *student_options(config))
    journal = Journal(session.workspace.journal(called, name, nfe), key)
    with SummaryWriter(str(make_folder(session.workspace.curves(called, name, nfe)))) as writer:
        result = search_static(
            objective, train, validation, starts, config.static,
            means=means if starts.keys() == fixed.keys() else None,
            journal=journal, progress=session.progress,
            on_step=lambda step, loss: writer.add_scalar("train/distance", loss, step),
        )  # fmt: skip
        for line in result.remarks():
            print(f"{name}, NFE {nfe}: {line}")
        for step, value in result.curve:
            writer.add_scalar("validation/distance", value, step)
    keep_shared(session, called, name, nfe, result.grid, (best, means[best]), config.static.seed)
    journal.remove()


def _search_blackbox(
    session: Session, objective: Objective, train: Batch, store: TeacherStore, name: str, nfe: int, start: TimeGrid
) -> TimeGrid:
    """The best grid of one study, of which all processes make trials, as many together as are asked for."""
    config, trials = session.config, session.workspace.trials
    url = config.blackbox.storage or f"sqlite:///{trials}"
    study = _study_name(store, config, name, nfe, start)

    def begin() -> None:
        make_folder(trials.parent)
        open_study(study, url, SAMPLERS["random"](config.blackbox.seed))

    distributed.first(begin)
    with distributed.together():
        found = search_blackbox(
            lambda grid: float(objective.measure(grid, train).mean()),
            session.noise, start, config.blackbox, storage=url, study=study,
            alone=config.blackbox.storage is None and distributed.world() == 1, progress=session.progress,
        )  # fmt: skip
    return found.grid


def search_optimized_grid(session: Session, name: str, solver: Solver, nfe: int, method: str, redo: bool) -> None:
    """Find the grid of a method of `search.optimized`, unless it is there and stays."""
    if _shared_stays(session, method, name, nfe, redo):
        return
    config, steps = session.config, steps_of(solver, nfe)
    if method == "dmn":
        grid = TimeGrid(dmn(session.noise, steps, order=solver.order))
    else:
        _, looked_at = session.teacher("train", config.optimized.samples)
        fine, places = session.solver(config.teacher.solver), session.teacher_grid(config.optimized.places)
        grid = search_optimized(method, session.objective(solver), looked_at, fine, places, steps)
    keep_shared(session, method, name, nfe, grid, best_fixed_known(session, name, nfe))


def _of_full(session: Session, solver: str, nfe: int) -> dict[str, TimeGrid]:
    """For a student the static grid that was learned for the teacher's own network, where there is one."""
    full = session.of_student(*FULL)
    if not session.config.student.name or "static" not in full.shared_names(solver, nfe):
        return {}
    return {"static": full.static(solver, nfe).grid}


def _study_name(store: TeacherStore, config: Config, solver: str, nfe: int, start: TimeGrid) -> str:
    """One study for each thing that is searched, so that trials of another never mix in."""
    options = config.blackbox
    key = fingerprint(
        store.hash, config.distance, config.static_samples, start, options.radius, options.sampler, options.seed,
        *student_options(config),
    )  # fmt: skip
    return f"{solver}-nfe{nfe}-{key}"
