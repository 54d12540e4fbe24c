"""teach, search, train: from a model to its learned schedules.

What is finished is kept, with the options that it was made with. What was made with others is refused, or with `redo`
made anew beside the old one, which is replaced once the new one is complete.

Schedules are learned for the student of the config: the teacher's own network, or that with a cacher and a quantizer.
The teacher stays what it was. By gradient they are learned through what a quantizer passes on (straight-through).

Several processes (`distributed`) share the shards of the teacher, the parts of labels, the trials of blackbox, and the
solvers and NFEs of every other search; they train one predictor together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from ts_adapt import distributed
from ts_adapt.assembly import steps_of
from ts_adapt.config import Config
from ts_adapt.evaluation.benchmark import fingerprint
from ts_adapt.files import make_folder, read_json, sha256_of_json
from ts_adapt.folders import making, replace_folder
from ts_adapt.grids.optimized import dmn
from ts_adapt.interfaces import Solver, TimeGrid, TsAdaptError, unknown
from ts_adapt.jobs.accelerated import FULL, accelerated, check_gradients
from ts_adapt.jobs.keeping import best_fixed_known, compared, keep_shared
from ts_adapt.jobs.labelling import beside, of_student, search_labels
from ts_adapt.jobs.session import SPLITS, Session, command_for
from ts_adapt.predictors.losses import Labelled
from ts_adapt.predictors.store import ALL, PREDICTOR_NAMES, PREDICTORS, save_predictor
from ts_adapt.predictors.training import train_predictor
from ts_adapt.search.blackbox import SAMPLERS, search_blackbox
from ts_adapt.search.journal import Journal
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.optimized import METHODS as OPTIMIZED
from ts_adapt.search.optimized import search_optimized
from ts_adapt.search.static import best_start, search_static
from ts_adapt.search.workers import open_study
from ts_adapt.teacher.generate import generate
from ts_adapt.teacher.store import TeacherStore

METHODS = ("static", "per-sample", "blackbox", *OPTIMIZED)
TOGETHER = ("per-sample", "blackbox")
"""The searches at each of which all processes work; of the others each process makes whole ones."""
MOST_VALIDATION = 512
"""Samples that validate a predictor, at most; else the last fifth of its training samples."""


def teach(session: Session, splits: Sequence[str] = ("train", "test"), *, save_png: bool = False) -> None:
    """Generate the teacher's end points for each split; finished shards are kept."""
    options = session.config.teacher
    solver, grid, condition = session.solver(options.solver), session.teacher_grid(), session.condition_source()
    for split in splits:
        if split not in SPLITS:
            raise unknown("split", split, (*SPLITS, "both"))
        samples = options.train_samples if split == "train" else options.test_samples
        folder, config = session.workspace.teacher(split), session.teacher_config(split)
        store = distributed.first(partial(TeacherStore.create, folder, config))
        generate(
            session.denoiser, solver, grid, store,
            samples=samples, batch_size=options.batch_size, condition=condition, save_png=save_png,
            progress=session.progress,
        )  # fmt: skip
        print(f"teacher, {split}: {samples} samples in {store.folder}")


def search(session: Session, method: str, split: str = "train", *, redo: bool = False) -> None:
    """Search schedules for every solver and NFE of the config, on its student.

    redo  replace what was made with other options or does not fit; what was made with these is kept all the same
    """
    config = session.config
    if method not in METHODS:
        raise unknown("search method", method, METHODS)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    with accelerated(session, config.student.cacher, config.student.quantizer):
        if method == "per-sample" or (method == "static" and config.static.method != "smoothed"):
            check_gradients(session)
        cells = [(name, session.solver(name), nfe) for name in config.solvers for nfe in config.nfe]
        for _, solver, nfe in cells:
            steps_of(solver, nfe)
        if method in TOGETHER:
            for name, solver, nfe in cells:
                with distributed.held(_lock(session, method, split, name, nfe)):
                    if method == "per-sample":
                        search_labels(session, name, solver, nfe, split, redo)
                    else:
                        _search_shared(session, name, solver, nfe, method, redo)
            return
        with distributed.together():
            for name, solver, nfe in distributed.mine(cells):
                with _lock(session, method, split, name, nfe):
                    if method in OPTIMIZED:
                        _search_optimized(session, name, solver, nfe, method, redo)
                    else:
                        _search_shared(session, name, solver, nfe, method, redo)


def _lock(session: Session, method: str, split: str, name: str, nfe: int) -> AbstractContextManager[None]:
    """What holds the result of a search against other commands; nothing where many share a storage of trials."""
    config, workspace = session.config, session.workspace
    if method == "blackbox" and config.blackbox.storage is not None:
        return nullcontext()
    if method == "per-sample":
        return making(workspace.labels(split, name, nfe, config.per_sample.corrections))
    return making(workspace.shared(config.static_name if method == "static" else method, name, nfe))


def _stays(path: Path, check: Callable[[], object], redo: bool) -> bool:
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


def _shared_stays(session: Session, called: str, name: str, nfe: int, redo: bool) -> bool:
    """Whether the shared grid `called` is there already, and stays; says so."""
    path = session.workspace.shared(called, name, nfe)
    stays = _stays(path, lambda: session.shared(called, name, nfe, strict=True), redo)
    if stays:
        print(f"{name}, NFE {nfe}: {path} is there already, made with these options")
    return stays


def _search_shared(session: Session, name: str, solver: Solver, nfe: int, method: str, redo: bool) -> None:
    config = session.config
    called = config.static_name if method == "static" else method
    path = session.workspace.shared(called, name, nfe)
    stays = partial(_shared_stays, session, called, name, nfe, redo)
    if distributed.first(stays) if method in TOGETHER else stays():
        return
    count = config.static_samples
    store, both = session.teacher("train", 2 * count)
    train, validation = both.rows(slice(0, count)), both.rows(slice(count, 2 * count))
    objective = session.objective(solver)
    fixed = session.starts(steps_of(solver, nfe))
    best, means = best_start(objective, fixed, validation)
    onwards = method == "static" and called != method and method in session.shared_names(name, nfe)
    starts = {"static": session.static(name, nfe).grid} if onwards else fixed | _of_full(session, name, nfe)
    key = fingerprint(store.hash, config.distance, count, asdict(config.static), *of_student(config))
    journal = Journal(path.with_suffix(".journal"), key)
    if method == "blackbox":
        grid = _search_blackbox(session, objective, train, store, name, nfe, fixed[best])
        if distributed.rank() > 0:
            return
    else:
        with SummaryWriter(str(make_folder(session.workspace.tensorboard(called, name, nfe)))) as writer:
            result = search_static(
                objective, train, validation, starts, config.static,
                means=means if starts.keys() == fixed.keys() else None,
                journal=journal, progress=session.progress,
                on_step=lambda step, loss: writer.add_scalar("train/distance", loss, step),
            )  # fmt: skip
            for step, value in result.curve:
                writer.add_scalar("validation/distance", value, step)
        grid = result.grid
    seed = config.static.seed if method == "static" else config.blackbox.seed
    keep_shared(session, called, name, nfe, grid, (best, means[best]), seed)
    journal.remove()


def _search_blackbox(
    session: Session, objective: Objective, train: Batch, store: TeacherStore, name: str, nfe: int, start: TimeGrid
) -> TimeGrid:
    """The best grid of one study, of which all processes make trials, as many together as are asked for."""
    config, folder = session.config, session.workspace.learned / "blackbox"
    url = config.blackbox.storage or f"sqlite:///{folder}/optuna.db"
    study = _study_name(store, config, name, nfe, start)

    def begin() -> None:
        make_folder(folder)
        open_study(study, url, SAMPLERS["random"](config.blackbox.seed))

    distributed.first(begin)
    with distributed.together():
        found = search_blackbox(
            lambda grid: float(objective.measure(grid, train).mean()),
            session.noise, start, config.blackbox, storage=url, study=study,
            alone=config.blackbox.storage is None and distributed.world() == 1, progress=session.progress,
        )  # fmt: skip
    return found.grid


def _search_optimized(session: Session, name: str, solver: Solver, nfe: int, method: str, redo: bool) -> None:
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
        *of_student(config),
    )  # fmt: skip
    return f"{solver}-nfe{nfe}-{key}"


def train(session: Session, kind: str, *, redo: bool = False) -> None:
    """Train a predictor for every solver and NFE of the config, on its student; `redo` as in `search`.

    kind  of `PREDICTORS`; with `ALL` behind it, one predictor for every solver, which serves all NFEs
    """
    if kind not in PREDICTOR_NAMES:
        raise unknown("predictor", kind, PREDICTOR_NAMES)
    config = session.config
    with accelerated(session, config.student.cacher, config.student.quantizer):
        if config.train.loss != "labels":
            check_gradients(session)
        for name in config.solvers:
            solver = session.solver(name)
            for served in [sorted(config.nfe)] if kind.endswith(ALL) else [[nfe] for nfe in config.nfe]:
                with distributed.held(making(session.workspace.predictor(kind, name, served[0]))):
                    _train_one(session, kind, name, solver, served, redo)


def _train_one(session: Session, kind: str, name: str, solver: Solver, served: list[int], redo: bool) -> None:
    config, steps = session.config, {nfe: steps_of(solver, nfe) for nfe in served}
    folder, logs = (at(kind, name, served[0]) for at in (session.workspace.predictor, session.workspace.tensorboard))
    if _stays(folder / "config.json", lambda: _check_predictor(session, kind, name, served), redo):
        nfes = ", ".join(map(str, served))
        print(f"{kind}, {name}, NFE {nfes}: {folder} is there already, made with these options")
        return
    labels = None
    if config.train.loss != "end_to_end":
        labels = {steps[nfe]: _labels_for(session, name, nfe) for nfe in served}
    store, batch = session.teacher("train", config.train.samples)
    cut = len(batch) - min(max(1, len(batch) // 5), MOST_VALIDATION)
    static = [session.static(name, nfe).grid.times for nfe in served]
    classes = int((store.config["condition"] or {}).get("classes", 0))
    text = batch.condition.get("encoder_hidden_states")
    key = fingerprint(store.hash, config.distance, static, asdict(config.train), len(batch), *of_student(config))
    checkpoint = folder.with_name(f"{folder.name}.{key}.training")
    torch.manual_seed(config.train.seed)
    predictor = PREDICTORS[kind.removesuffix(ALL)](
        session.noise, static, session.shape, corrections=config.train.corrections, order=solver.order,
        width=config.train.width, hidden=config.train.hidden, classes=classes,
        text=0 if text is None else text.shape[-1],
    ).to(config.model.device)  # fmt: skip
    result = train_predictor(
        predictor, session.objective(solver), batch.rows(slice(0, cut)), batch.rows(slice(cut, None)),
        config.train, make_folder(logs), labels=labels,
        checkpoint=checkpoint, progress=session.progress,
    )  # fmt: skip
    about = {
        "model": config.model.name, "teacher": store.hash, "solver": name, "nfe": served,
        "distance": config.distance, "seed": config.train.seed,
        "labels": None if labels is None else _labels_hashes(session, name, served),
        "made_with": config.made_with(kind),
        "measured": {**asdict(result), "gain": result.gain},
    }  # fmt: skip

    def keep() -> None:
        save_predictor(beside(folder), predictor, about)
        replace_folder(folder, beside(folder))
        checkpoint.unlink(missing_ok=True)

    distributed.first(keep)
    for nfe in served:
        now, before = result.learned[steps[nfe]], result.static[steps[nfe]]
        print(
            f"{kind}, {name}, NFE {nfe}: validation distance {now:.5f}, "
            f"{compared(now, before)} the static grid's {before:.5f}; {folder}"
        )


def _labels_for(session: Session, name: str, nfe: int) -> Labelled:
    """The first `label_samples` labels of the training split; TsAdaptError where there are fewer."""
    labels, wanted = session.labelled("train", name, nfe), session.config.label_samples
    if len(labels.batch) < wanted:
        raise TsAdaptError(
            f"{len(labels.batch)} of {wanted} training samples have labels for {name}, NFE {nfe}; "
            f"search the others with {command_for('per-sample', name, nfe)}, or lower label_samples"
        )
    return labels.rows(slice(0, wanted))


def _check_predictor(session: Session, kind: str, name: str, served: list[int]) -> None:
    """TsAdaptError unless the workspace's predictor was trained with the config's options, on the labels of today."""
    for nfe in served:
        session.predictor(kind, name, nfe, strict=True)
    folder = session.workspace.predictor(kind, name, served[0])
    then, now = read_json(folder / "config.json").get("labels"), _labels_hashes(session, name, served)
    if then and now and not set(now) <= set([then] if isinstance(then, str) else then):
        raise TsAdaptError(f"{folder} was trained on other labels than today's; give --redo to replace it")


def _labels_hashes(session: Session, name: str, served: list[int]) -> list[str] | None:
    """What identifies the training labels of each NFE; None where there are none any more."""
    paths = [session.workspace.labels("train", name, nfe) / "labels.json" for nfe in served]
    return [sha256_of_json(read_json(path)) for path in paths] if all(path.exists() for path in paths) else None
