"""teach, search, train: from a model to its learned schedules.

What is finished is kept, with the options that it was made with. What was made with others is refused, or with `redo`
made anew beside the old one, which is replaced once the new one is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ts_adapt.assembly import steps_of
from ts_adapt.config import Config
from ts_adapt.evaluation.benchmark import fingerprint
from ts_adapt.files import make_folder, read_json, replace_folder, sha256_of_json
from ts_adapt.interfaces import Solver, TimeGrid, TsAdaptError, unknown
from ts_adapt.jobs.session import SPLITS, Session, command_for
from ts_adapt.plots import plot_schedules
from ts_adapt.predictors.store import PREDICTORS, save_predictor
from ts_adapt.predictors.training import Labelled, train_predictor
from ts_adapt.schedule_file import Schedule
from ts_adapt.search.blackbox import search_blackbox
from ts_adapt.search.journal import Journal
from ts_adapt.search.labels import LabelStore
from ts_adapt.search.optimized import METHODS as OPTIMIZED
from ts_adapt.search.optimized import search_optimized
from ts_adapt.search.per_sample import search_per_sample
from ts_adapt.search.static import best_start, search_static
from ts_adapt.teacher.generate import generate
from ts_adapt.teacher.store import TeacherStore

METHODS = ("static", "per-sample", "blackbox", *OPTIMIZED)
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
        store = TeacherStore.create(session.workspace.teacher(split), session.teacher_config(split))
        generate(
            session.denoiser, solver, grid, store,
            samples=samples, batch_size=options.batch_size, condition=condition, save_png=save_png,
            progress=session.progress,
        )  # fmt: skip
        print(f"teacher, {split}: {samples} samples in {store.folder}")


def search(session: Session, method: str, split: str = "train", *, redo: bool = False) -> None:
    """Search schedules for every solver and NFE of the config.

    redo  replace what was made with other options or does not fit; what was made with these is kept all the same
    """
    if method not in METHODS:
        raise unknown("search method", method, METHODS)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    for name in session.config.solvers:
        solver = session.solver(name)
        for nfe in session.config.nfe:
            steps_of(solver, nfe)
            if method == "per-sample":
                _search_labels(session, name, solver, nfe, split, redo)
            else:
                _search_shared(session, name, solver, nfe, method, redo)


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


def _beside(folder: Path) -> Path:
    """Where a new result is made while the old one stays in `folder`."""
    return folder.with_name(f"{folder.name}.new")


def _search_shared(session: Session, name: str, solver: Solver, nfe: int, method: str, redo: bool) -> None:
    config = session.config
    called = config.static_name if method == "static" else method
    path = session.workspace.shared(called, name, nfe)
    if _stays(path, lambda: session.shared(called, name, nfe, strict=True), redo):
        print(f"{name}, NFE {nfe}: {path} is there already, made with these options")
        return
    count = config.static_samples
    store, both = session.teacher("train", 2 * count)
    train, validation = both.rows(slice(0, count)), both.rows(slice(count, 2 * count))
    objective = session.objective(solver)
    fixed = session.starts(steps_of(solver, nfe))
    best, means = best_start(objective, fixed, validation)
    corrected = method == "static" and called != method and method in session.shared_names(name, nfe)
    starts = {"static": session.static(name, nfe).grid} if corrected else fixed
    key = fingerprint(store.hash, config.distance, count, asdict(config.static))
    journal = Journal(path.with_suffix(".journal"), key)
    with SummaryWriter(str(make_folder(session.workspace.tensorboard(called, name, nfe)))) as writer:
        if method == "static":
            result = search_static(
                objective, train, validation, starts, config.static, means=None if corrected else means,
                journal=journal, progress=session.progress,
                on_step=lambda step, loss: writer.add_scalar("train/distance", loss, step),
            )  # fmt: skip
            for step, value in result.curve:
                writer.add_scalar("validation/distance", value, step)
            grid = result.grid
        elif method in OPTIMIZED:
            looked_at = session.teacher("train", config.optimized.samples)[1]
            fine, places = session.solver(config.teacher.solver), session.teacher_grid(config.optimized.places)
            grid = search_optimized(method, objective, looked_at, fine, places, steps_of(solver, nfe))
        else:
            folder = make_folder(session.workspace.data / "blackbox")
            grid = search_blackbox(
                lambda grid: float(objective.measure(grid, train).mean()),
                session.noise, fixed[best], config.blackbox,
                storage=config.blackbox.storage or f"sqlite:///{folder}/optuna.db",
                study=_study_name(store, config, name, nfe, fixed[best]), progress=session.progress,
            ).grid  # fmt: skip
        distance = float(objective.measure(grid, validation).mean())
        drawn = {called: grid.times, best: fixed[best].times}
        writer.add_figure("schedule", plot_schedules(drawn, session.noise, f"{name}, NFE {nfe}"))
    paired = {"evaluator": config.distance, "samples": count, "split": "validation"}
    about = {
        "order": solver.order, "model": config.model.name, "prediction": getattr(session.denoiser, "prediction", None),
        "method": called, "seed": {"static": config.static.seed, "blackbox": config.blackbox.seed}.get(method),
        "distance": config.distance, "teacher": store.hash, "teacher_solver": config.teacher.solver,
        "teacher_nfe": config.teacher.nfe, "teacher_grid": config.teacher.grid, "teacher_seed": config.teacher.seed,
        "made_with": config.made_with(called),
        "measured": {
            "distance": {"value": distance, **paired},
            "best_fixed_distance": {"value": means[best], **paired, "grid": best},
        },
    }  # fmt: skip
    Schedule(grid, name, nfe, about).save(path, session.noise)
    journal.remove()
    print(
        f"{name}, NFE {nfe}: distance {distance:.5f}, {_compared(distance, means[best])} the best fixed grid ({best}); "
        f"{path}"
    )


def _study_name(store: TeacherStore, config: Config, solver: str, nfe: int, start: TimeGrid) -> str:
    """One study for each thing that is searched, so that trials of another never mix in."""
    options = config.blackbox
    key = fingerprint(
        store.hash, config.distance, config.static_samples, start, options.radius, options.sampler, options.seed
    )
    return f"{solver}-nfe{nfe}-{key}"


def _compared(value: float, reference: float) -> str:
    """How far `value` is from `reference`, in words."""
    change = value / reference - 1 if reference > 0 else 0.0
    return f"{100 * abs(change):.1f} % {'above' if change > 0 else 'below'}"


def _search_labels(session: Session, name: str, solver: Solver, nfe: int, split: str, redo: bool) -> None:
    config = session.config
    count = config.label_samples if split == "train" else config.oracle_samples
    teacher, batch = session.teacher(split, count)
    static = session.static(name, nfe)
    spec = {
        "teacher": teacher.hash, "solver": name, "nfe": nfe, "distance": config.distance, "batch": config.label_batch,
        "options": asdict(config.per_sample), "static": static.grid.times.tolist(),
    }  # fmt: skip
    folder = session.workspace.labels(split, name, nfe)
    store = _label_store(folder, spec, redo)
    objective = session.objective(solver)
    parts = batch.split(config.label_batch)
    bar = tqdm(
        total=len(batch), desc=f"oracle {name} NFE {nfe}", unit="sample", disable=not session.progress, leave=False
    )
    for part, samples in enumerate(parts):
        if not store.has(part, samples.index):
            store.write(part, search_per_sample(objective, samples, static.grid, config.per_sample))
        bar.update(len(samples))
    bar.close()
    labels = store.load()
    if store.folder != folder:
        replace_folder(folder, store.folder)
    oracle, shared = float(labels.distance[:count].mean()), float(labels.static_distance[:count].mean())
    print(
        f"{name}, NFE {nfe}, {split}: oracle distance {oracle:.5f} over {count} samples, "
        f"{_compared(oracle, shared)} the static grid's {shared:.5f}"
    )


def _label_store(folder: Path, spec: dict[str, Any], redo: bool) -> LabelStore:
    """The labels in `folder`, if they are those of `spec`; with `redo` else new ones beside them."""
    try:
        return LabelStore.create(folder, spec)
    except TsAdaptError:
        if not redo:
            raise
    try:
        return LabelStore.create(_beside(folder), spec)
    except TsAdaptError:  # what an interrupted command left there, with yet other options
        shutil.rmtree(_beside(folder))
        return LabelStore.create(_beside(folder), spec)


def train(session: Session, kind: str, *, redo: bool = False) -> None:
    """Train a predictor for every solver and NFE of the config; `redo` as in `search`."""
    if kind not in PREDICTORS:
        raise unknown("predictor", kind, PREDICTORS)
    config = session.config
    for name in config.solvers:
        solver = session.solver(name)
        for nfe in config.nfe:
            _train_one(session, kind, name, solver, nfe, redo)


def _train_one(session: Session, kind: str, name: str, solver: Solver, nfe: int, redo: bool) -> None:
    config = session.config
    folder = session.workspace.predictor(kind, name, nfe)
    if _stays(folder / "config.json", lambda: _check_predictor(session, kind, name, nfe), redo):
        print(f"{kind}, {name}, NFE {nfe}: {folder} is there already, made with these options")
        return
    labels = _labels_for(session, name, nfe) if config.train.loss != "end_to_end" else None
    store, batch = session.teacher("train", config.train.samples)
    cut = len(batch) - min(max(1, len(batch) // 5), MOST_VALIDATION)
    static = session.static(name, nfe)
    classes = int((store.config["condition"] or {}).get("classes", 0))
    text = batch.condition.get("encoder_hidden_states")
    key = fingerprint(store.hash, config.distance, static.grid, asdict(config.train), len(batch))
    torch.manual_seed(config.train.seed)
    predictor = PREDICTORS[kind](
        session.noise, static.grid.times, session.shape, corrections=config.train.corrections, order=solver.order,
        width=config.train.width, hidden=config.train.hidden, classes=classes,
        text=0 if text is None else text.shape[-1],
    ).to(config.model.device)  # fmt: skip
    result = train_predictor(
        predictor, session.objective(solver), batch.rows(slice(0, cut)), batch.rows(slice(cut, None)),
        config.train, make_folder(session.workspace.tensorboard(kind, name, nfe)), labels=labels,
        checkpoint=folder.with_name(f"{folder.name}.{key}.training"), progress=session.progress,
    )  # fmt: skip
    about = {
        "model": config.model.name, "teacher": store.hash, "solver": name, "nfe": nfe,
        "distance": config.distance, "seed": config.train.seed,
        "labels": None if labels is None else _labels_hash(session, name, nfe), "made_with": config.made_with(kind),
        "measured": {**asdict(result), "gain": result.gain},
    }  # fmt: skip
    new = _beside(folder)
    save_predictor(new, predictor, about)
    replace_folder(folder, new)
    print(
        f"{kind}, {name}, NFE {nfe}: validation distance {result.distance:.5f}, "
        f"{_compared(result.distance, result.static_distance)} the static grid's {result.static_distance:.5f}; {folder}"
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


def _check_predictor(session: Session, kind: str, name: str, nfe: int) -> None:
    """TsAdaptError unless the workspace's predictor was trained with the config's options, on the labels of today."""
    session.predictor(kind, name, nfe, strict=True)
    folder = session.workspace.predictor(kind, name, nfe)
    then, now = read_json(folder / "config.json").get("labels"), _labels_hash(session, name, nfe)
    if None not in (then, now) and then != now:
        raise TsAdaptError(f"{folder} was trained on other labels than today's; give --redo to replace it")


def _labels_hash(session: Session, name: str, nfe: int) -> str | None:
    """What identifies the training labels; None where there are none any more."""
    path = session.workspace.labels("train", name, nfe) / "labels.json"
    return sha256_of_json(read_json(path)) if path.exists() else None
