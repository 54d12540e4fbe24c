"""teach, search, train: from a model to its learned schedules. Whatever is finished is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ts_adapt.assembly import steps_of
from ts_adapt.config import Config
from ts_adapt.evaluation.benchmark import fingerprint
from ts_adapt.files import make_folder
from ts_adapt.interfaces import Solver, TimeGrid, TsAdaptError, unknown
from ts_adapt.jobs.session import SPLITS, Session
from ts_adapt.plots import plot_schedules
from ts_adapt.predictors.store import PREDICTORS, save_predictor
from ts_adapt.predictors.training import train_predictor
from ts_adapt.schedule_file import Schedule
from ts_adapt.search.blackbox import search_blackbox
from ts_adapt.search.labels import LabelStore
from ts_adapt.search.optimized import METHODS as OPTIMIZED
from ts_adapt.search.optimized import search_optimized
from ts_adapt.search.per_sample import search_per_sample
from ts_adapt.search.static import best_start, search_static
from ts_adapt.teacher.generate import generate
from ts_adapt.teacher.store import TeacherStore

METHODS = ("static", "per-sample", "blackbox", *OPTIMIZED)


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


def search(session: Session, method: str, split: str = "train") -> None:
    """Search schedules for every solver and NFE of the config; what is finished is kept."""
    if method not in METHODS:
        raise unknown("search method", method, METHODS)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    for name in session.config.solvers:
        solver = session.solver(name)
        for nfe in session.config.nfe:
            steps_of(solver, nfe)
            if method == "per-sample":
                _search_labels(session, name, solver, nfe, split)
            else:
                _search_shared(session, name, solver, nfe, method)


def _search_shared(session: Session, name: str, solver: Solver, nfe: int, method: str) -> None:
    config = session.config
    called = config.static_name if method == "static" else method
    path = session.workspace.shared(called, name, nfe)
    if path.exists():
        session.shared(called, name, nfe)
        print(f"{name}, NFE {nfe}: {path} exists")
        return
    count = config.static_samples
    store, both = session.teacher("train", 2 * count)
    train, validation = both.rows(slice(0, count)), both.rows(slice(count, 2 * count))
    objective = session.objective(solver)
    fixed = session.starts(steps_of(solver, nfe))
    best, _ = best_start(objective, fixed, validation)
    corrected = method == "static" and called != method and method in session.shared_names(name, nfe)
    starts = {"static": session.static(name, nfe).grid} if corrected else fixed
    with SummaryWriter(str(make_folder(session.workspace.tensorboard(called, name, nfe)))) as writer:
        if method == "static":
            result = search_static(
                objective, train, validation, starts, config.static, progress=session.progress,
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
        distance, fixed_distance = (float(objective.measure(g, validation).mean()) for g in (grid, fixed[best]))
        drawn = {called: grid.times, best: fixed[best].times}
        writer.add_figure("schedule", plot_schedules(drawn, session.noise, f"{name}, NFE {nfe}"))
    paired = {"evaluator": config.distance, "samples": count, "split": "validation"}
    about = {
        "order": solver.order, "model": config.model.name, "prediction": getattr(session.denoiser, "prediction", None),
        "method": called, "seed": {"static": config.static.seed, "blackbox": config.blackbox.seed}.get(method),
        "distance": config.distance, "teacher": store.hash, "teacher_solver": config.teacher.solver,
        "teacher_nfe": config.teacher.nfe, "teacher_grid": config.teacher.grid, "teacher_seed": config.teacher.seed,
        "measured": {
            "distance": {"value": distance, **paired},
            "best_fixed_distance": {"value": fixed_distance, **paired, "grid": best},
        },
    }  # fmt: skip
    Schedule(grid, name, nfe, about).save(path, session.noise)
    print(
        f"{name}, NFE {nfe}: distance {distance:.5f}, {_percent_below(distance, fixed_distance):.1f} % below the best "
        f"fixed grid ({best}); {path}"
    )


def _study_name(store: TeacherStore, config: Config, solver: str, nfe: int, start: TimeGrid) -> str:
    """One study for each thing that is searched, so that trials of another never mix in."""
    key = fingerprint(store.hash, config.distance, config.static_samples, start, config.blackbox.radius)
    return f"{solver}-nfe{nfe}-{key}"


def _percent_below(value: float, reference: float) -> float:
    return 100 * (1 - value / reference) if reference > 0 else 0.0


def _search_labels(session: Session, name: str, solver: Solver, nfe: int, split: str) -> None:
    config = session.config
    count = config.label_samples if split == "train" else config.oracle_samples
    teacher, batch = session.teacher(split, count)
    static = session.static(name, nfe)
    spec = {
        "teacher": teacher.hash, "solver": name, "nfe": nfe, "distance": config.distance, "batch": config.label_batch,
        "options": asdict(config.per_sample), "static": static.grid.times.tolist(),
    }  # fmt: skip
    store = LabelStore.create(session.workspace.labels(split, name, nfe), spec)
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
    oracle, shared = float(labels.distance[:count].mean()), float(labels.static_distance[:count].mean())
    print(
        f"{name}, NFE {nfe}, {split}: oracle distance {oracle:.5f} over {count} samples, "
        f"{_percent_below(oracle, shared):.1f} % below the static grid's {shared:.5f}"
    )


def train(session: Session, kind: str) -> None:
    """Train a predictor for every solver and NFE of the config; finished ones are kept."""
    if kind not in PREDICTORS:
        raise unknown("predictor", kind, PREDICTORS)
    config = session.config
    for name in config.solvers:
        solver = session.solver(name)
        for nfe in config.nfe:
            folder = session.workspace.predictor(kind, name, nfe)
            if (folder / "config.json").exists():
                session.predictor(kind, name, nfe)
                print(f"{kind}, {name}, NFE {nfe}: {folder} exists")
                continue
            data = session.labelled("train", name, nfe)
            if len(data.batch) < config.label_samples:
                raise TsAdaptError(
                    f"{len(data.batch)} of {config.label_samples} training samples have labels for {name}, NFE {nfe}; "
                    "run `ts-adapt search --method per-sample` again, or lower label_samples"
                )
            data = data.rows(slice(0, config.label_samples))
            cut = len(data.batch) - max(1, len(data.batch) // 5)
            static = session.static(name, nfe)
            store, _ = session.teacher("train")
            classes = int((store.config["condition"] or {}).get("classes", 0))
            text = data.batch.condition.get("encoder_hidden_states")
            torch.manual_seed(config.train.seed)
            predictor = PREDICTORS[kind](
                session.noise, static.grid.times, session.shape,
                width=config.train.width, hidden=config.train.hidden,
                classes=classes, text=0 if text is None else text.shape[-1],
            ).to(config.model.device)  # fmt: skip
            result = train_predictor(
                predictor, session.objective(solver), data.rows(slice(0, cut)), data.rows(slice(cut, None)),
                config.train, make_folder(session.workspace.tensorboard(kind, name, nfe)), progress=session.progress,
            )  # fmt: skip
            about = {
                "model": config.model.name, "teacher": store.hash, "solver": name, "nfe": nfe,
                "distance": config.distance, "options": asdict(config.train),
                "measured": {**asdict(result), "share_of_oracle": result.share_of_oracle},
            }  # fmt: skip
            save_predictor(folder, predictor, about)
            print(
                f"{kind}, {name}, NFE {nfe}: validation distance {result.distance:.5f} (static "
                f"{result.static_distance:.5f}, oracle {result.oracle_distance:.5f}): "
                f"{100 * result.share_of_oracle:.0f} % of the oracle's gain; {folder}"
            )
