"""search: schedules for every solver and NFE of the config, on its student, by any of the methods.

    per-sample                     a grid for each sample (`labels`)
    static, blackbox               one for all, by the gradient or by trials; static without corrections first, then
                                   with them, where the config does not say which
    dmn, gits, oss, klub           one for all, optimised

What is finished is kept, with the options that it was made with. What was made with others is refused, or with `redo`
made anew beside the old one, which is replaced once the new one is complete.

The student is the teacher's own network, or a cheaper one that is made of it; the teacher stays what it was. By
gradient schedules are learned through what a quantizer passes on (straight-through). Several processes (`distributed`)
share the parts of labels, the trials of blackbox, and the solvers and NFEs of every other search.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

from ts_adapt import distributed
from ts_adapt.assembly import FULL, steps_of
from ts_adapt.evaluation.records import fingerprint
from ts_adapt.grids.corrections import corrected
from ts_adapt.grids.optimized import dmn
from ts_adapt.interfaces import Solver, TimeGrid
from ts_adapt.jobs.cheaper_network import cheaper_network, check_gradients
from ts_adapt.jobs.labels import search_labels, student_options
from ts_adapt.jobs.minimised import minimised_said
from ts_adapt.jobs.session import Session, paired_verdict, stays
from ts_adapt.jobs.tracking import board
from ts_adapt.plots import plot_schedules
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.search.blackbox import SAMPLERS, search_blackbox
from ts_adapt.search.journal import Journal
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.optimized import METHODS as OPTIMIZED
from ts_adapt.search.optimized import search_optimized
from ts_adapt.search.static import best_start, by_derivative, search_static
from ts_adapt.search.work import Work
from ts_adapt.search.workers import open_study
from ts_adapt.storage.files import make_folder
from ts_adapt.storage.folders import making
from ts_adapt.storage.layout import MANIFEST
from ts_adapt.teacher.store import TeacherStore

TOGETHER = ("per-sample", "blackbox")
"""The searches at each of which all processes work; of the others each process makes whole ones."""


def search(session: Session, method: str, split: str = "train", *, redo: bool = False) -> None:
    """Search schedules for every solver and NFE of the config, on its student.

    redo  replace what was made with other options or does not fit; what was made with these is kept all the same
    """
    config = session.config
    if method == "static" and config.static.corrections is None:
        for corrections in ([], session.static_corrections):
            search(session.changed(static=replace(config.static, corrections=corrections)), method, split, redo=redo)
        return
    session.check(caption=config.static.caption if method == "static" else 0.0)
    if method == "static":
        session.check_static(session.static_corrections)
    if method == "per-sample":
        session.check_told("a grid for each sample")
    with cheaper_network(session, config.student):
        if method == "per-sample" or (method == "static" and config.static.method in ("lbfgs", "adam")):
            check_gradients(session)
        cells = [(name, session.solver(name), nfe) for name in config.solvers for nfe in config.nfe]
        for _, solver, nfe in cells:
            steps_of(solver, nfe)
        if method in TOGETHER:
            for name, solver, nfe in cells:
                with distributed.held(_lock(session, method, split, name, nfe)):
                    _search_one(session, name, solver, nfe, method, split, redo)
            return
        with distributed.together():
            for name, solver, nfe in distributed.own_share(cells):
                with _lock(session, method, split, name, nfe):
                    _search_one(session, name, solver, nfe, method, split, redo)


def _search_one(session: Session, name: str, solver: Solver, nfe: int, method: str, split: str, redo: bool) -> None:
    if method == "per-sample":
        search_labels(session, name, solver, nfe, split, redo)
    elif method in OPTIMIZED:
        search_optimized_grid(session, name, solver, nfe, method, redo)
    else:
        search_shared(session, name, solver, nfe, method, redo)


def _lock(session: Session, method: str, split: str, name: str, nfe: int) -> AbstractContextManager[None]:
    """What holds the result of a search against other commands; nothing where many share a storage of trials."""
    config, workspace = session.config, session.workspace
    if method == "blackbox" and config.blackbox.storage is not None:
        return nullcontext()
    if method == "per-sample":
        return making(workspace.labels(corrected(split, config.per_sample.corrections), name, nfe))
    return making(workspace.shared(session.static_name if method == "static" else method, name, nfe))


def _shared_stays(session: Session, called: str, name: str, nfe: int, redo: bool) -> bool:
    """Whether the shared grid `called` is there already, and stays; says so."""
    path = session.workspace.shared(called, name, nfe)
    there = stays(path, lambda: session.shared(called, name, nfe, strict=True), redo)
    if there:
        print(f"{called}, {name}, NFE {nfe}: {path} is there already, made with these options")
    return there


def search_shared(session: Session, name: str, solver: Solver, nfe: int, method: str, redo: bool) -> None:
    """Search the grid of all samples by static or blackbox, unless it is there and stays."""
    config = session.config
    called = session.static_name if method == "static" else method
    there = partial(_shared_stays, session, called, name, nfe, redo)
    if distributed.first(there) if method == "blackbox" else there():
        return
    count = config.static_samples
    store, both = session.teacher("train", count + config.static_validating)
    train, validation = both.rows(slice(0, count)), both.rows(slice(count, None))
    objective = session.objective(solver)
    fixed = session.starts(steps_of(solver, nfe))
    session.announce(f"{called}, {name}, NFE {nfe}", shared_work(session, name, nfe, method))
    best, means = best_start(objective, fixed, validation)
    if method == "blackbox":
        grid = _search_blackbox(session, objective, train, store, name, nfe, fixed[best])
        if distributed.rank() == 0:
            keep_shared(session, called, name, nfe, grid, (best, means[best]), config.blackbox.seed)
        return
    onwards = called != method and method in session.shared_names(name, nfe)
    starts = {"static": session.static(name, nfe).grid} if onwards else fixed | _of_full(session, name, nfe)
    key = fingerprint(store.hash, session.distance, session.made_with(called))
    journal = Journal(session.workspace.journal(called, name, nfe), key)
    with board(config, f"search {called}", session.workspace.curves(called, name, nfe)) as writer:
        result = search_static(
            objective, train, validation, starts, config.static,
            means=means if starts.keys() == fixed.keys() else None, journal=journal,
            derivatives=session.derivatives(store.hash, name, steps_of(solver, nfe), count), progress=session.progress,
            on_step=lambda step, loss: writer.add_scalar("train/distance", loss, step),
            **session.learned_beside(config.static),
        )  # fmt: skip
        for line in [*minimised_said(session, config.static), *result.remarks()]:
            print(f"{called}, {name}, NFE {nfe}: {line}")
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
    study = _study_name(session, store, name, nfe, start)

    def begin() -> None:
        make_folder(trials.parent)
        open_study(study, url, SAMPLERS["random"](config.blackbox.seed))

    distributed.first(begin)
    with distributed.together():
        found = search_blackbox(
            lambda grid: float(objective.measure(grid, train).mean()),
            session.noise_schedule, start, config.blackbox, storage=url, study=study,
            alone=config.blackbox.storage is None and distributed.world() == 1, progress=session.progress,
        )  # fmt: skip
    return found.grid


def shared_work(session: Session, solver: str, nfe: int, method: str) -> Work:
    """About how many evaluations the search of one shared grid takes: that of its start among the fixed grids, that of
    a derivative, and the two that are compared at the end included."""
    config, steps = session.config, session.steps(solver, nfe)
    count, validating = config.static_samples, config.static_validating
    solves = Work((len(session.starts(steps)) + 2) * validating)
    if method == "blackbox":
        return (solves + Work(config.blackbox.trials * count)).times(nfe)
    if by_derivative(config.static.method, session.denoiser):
        solves += session.comparing(solver, steps, count)
    return (solves + config.static.solves(count, validating)).times(nfe)


def search_optimized_grid(session: Session, name: str, solver: Solver, nfe: int, method: str, redo: bool) -> None:
    """Find the grid of a method of `search.optimized`, unless it is there and stays."""
    if _shared_stays(session, method, name, nfe, redo):
        return
    config, steps, known = session.config, steps_of(solver, nfe), best_fixed_known(session, name, nfe)
    if method == "dmn":
        grid = TimeGrid(dmn(session.noise_schedule, steps, solver.order))
    else:
        _, looked_at = session.teacher("train", config.optimized.samples)
        fine, places = session.solver(config.teacher.solver), session.teacher_grid(config.optimized.places)
        spent = config.optimized.places
        spent += 1 + (steps - 1) * (spent - steps + 1) if method == "oss" else 0
        compared = nfe * config.static_validating * (1 if known is None else 2)
        session.announce(f"{method}, {name}, NFE {nfe}", Work(spent * len(looked_at) + compared))
        grid = search_optimized(method, session.objective(solver), looked_at, fine, places, steps)
    keep_shared(session, method, name, nfe, grid, known)


def _of_full(session: Session, solver: str, nfe: int) -> dict[str, TimeGrid]:
    """For a student the static grid that was learned for the teacher's own network, where there is one."""
    full = session.of_student(FULL)
    if not session.config.student.name or "static" not in full.shared_names(solver, nfe):
        return {}
    return {"static": full.static(solver, nfe).grid}


def _study_name(session: Session, store: TeacherStore, solver: str, nfe: int, start: TimeGrid) -> str:
    """One study for each thing that is searched, so that trials of another never mix in."""
    config, options = session.config, session.config.blackbox
    key = fingerprint(
        store.hash, session.distance, config.static_samples, start, options.radius, options.sampler, options.seed,
        *student_options(config),
    )  # fmt: skip
    return f"{solver}-nfe{nfe}-{key}"


def validation_samples(session: Session, *, of_predictor: bool = False) -> Batch | None:
    """The training samples that shared grids, or predictors, are validated on; None where the teacher has fewer."""
    config = session.config
    validating = config.train.validating if of_predictor else config.static_validating
    count = config.train.samples if of_predictor else config.static_samples + validating
    begun = (session.workspace.teacher("train") / MANIFEST).exists()
    if not begun or len(session.teacher("train")[1]) < count:
        return None
    return session.teacher("train", count)[1].rows(slice(count - validating, None))


def best_fixed_known(session: Session, solver: str, nfe: int) -> tuple[str, float] | None:
    """The best fixed grid and its mean distance on the validation samples, if the static search has measured it."""
    if "static" not in session.shared_names(solver, nfe):
        return None
    kept = (session.static(solver, nfe).about.get("measured") or {}).get("best_fixed_distance")
    now = {"samples": session.config.static_validating, "evaluator": session.distance}
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
    paired = {"evaluator": session.distance, "samples": config.static_validating, "split": "validation"}
    drawn, said = {called: grid.times}, f"{called}, {name}, NFE {nfe}: "
    about = {**session.about(name), "method": called, "seed": seed, "shape": session.shape_that_counts}
    about |= {} if called == "dmn" else session.guided_by  # which asks no model
    if batch is not None:
        distances = session.objective(solver).measure(grid, batch)
        distance, median = float(distances.mean()), float(distances.median())
        measured["distance"] = {"value": distance, **paired}
        about |= {
            "distance": session.distance, "teacher": session.teacher("train")[0].hash,
            "teacher_solver": config.teacher.solver, "teacher_nfe": config.teacher.nfe,
            "teacher_grid": config.teacher.grid, "teacher_seed": config.teacher.seed,
        }  # fmt: skip
        said += f"distance {distance:.5f} (median {median:.5f})"
        if best_fixed is not None:
            best, reference = best_fixed
            measured["best_fixed_distance"] = {"value": reference, **paired, "grid": best}
            fixed = session.starts(steps_of(solver, nfe))[best]
            drawn[best] = fixed.times
            others = session.objective(solver).measure(fixed, batch)
            said += f"; beside the best fixed grid ({best}) {paired_verdict(distances, others)}"
        said += "; "
    with board(config, f"search {called}", session.workspace.curves(called, name, nfe)) as writer:
        writer.add_figure("schedule", plot_schedules(drawn, session.noise_schedule, f"{name}, NFE {nfe}"))
    LearnedGrid(grid, name, nfe, {**about, "made_with": session.made_with(called), "measured": measured}).save(
        path, session.noise_schedule
    )
    print(f"{said}{path}")
