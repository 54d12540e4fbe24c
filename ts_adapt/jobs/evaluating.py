"""evaluate: schedules compared on noises that no search has seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ts_adapt.assembly import grid_names, steps_of
from ts_adapt.evaluation.benchmark import Entry, Row, Run, differences, fingerprint, run_entry, score
from ts_adapt.evaluation.metrics import (
    Extractor,
    FeatureStatistics,
    folder_features,
    frechet,
    make_extractor,
    real_features,
)
from ts_adapt.evaluation.report import Panel, Results, table, write_report
from ts_adapt.interfaces import StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.jobs.session import Session, is_shared
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.schedule_file import Schedule


def _entries(session: Session, solver: str, nfe: int) -> list[Entry]:
    """Every schedule there is for `solver` and `nfe`: fixed grids, and what has been learned so far."""
    config, workspace = session.config, session.workspace
    samples, steps = config.evaluate.samples, steps_of(session.solver(solver), nfe)
    teacher, _ = session.teacher("test")
    base = (teacher.hash, solver, config.distance, config.evaluate.features)

    def entry(name: str, kind: str, policy: StepPolicy | TimeGrid, key: object, count: int = samples) -> Entry:
        return Entry(solver, nfe, name, kind, policy, fingerprint(*base, key), count)

    entries = [entry(name, "fixed", grid, grid) for name, grid in session.fixed_grids(steps).items()]
    for name in session.shared_names(solver, nfe):
        grid = session.shared(name, solver, nfe).grid
        entries.append(entry(name, "static" if name.startswith("static") else "optimized", grid, grid))
    entries += _file_entries(session, solver, nfe, base)
    for kind in PREDICTORS:
        folder = workspace.predictor(kind, solver, nfe)
        if (folder / "config.json").exists():
            predictor = session.predictor(kind, solver, nfe)
            entries.append(entry(kind, kind, predictor.policy(), predictor.state_dict()))
    if (workspace.labels("test", solver, nfe) / "labels.json").exists():
        labels = session.labelled("test", solver, nfe)
        count = min(config.oracle_samples, len(labels.batch))
        if samples < count:
            raise TsAdaptError(
                f"evaluate.samples is {samples}, below the {count} samples of the oracle; raise it to {count}, "
                f"or lower oracle_samples to {samples}"
            )
        _, batch = session.teacher("test", count)
        if not torch.equal(labels.batch.index[:count], batch.index):
            raise TsAdaptError(
                f"the oracle of {solver}, NFE {nfe} does not cover the first {count} test samples; "
                "run `ts-adapt search --method per-sample --split test` again"
            )
        grid = TimeGrid(labels.times[:count])
        entries.append(entry("oracle", "oracle", grid, grid, count))
    return entries


def _file_entries(session: Session, solver: str, nfe: int, base: tuple[object, ...]) -> list[Entry]:
    """The schedule files of the config that are for `solver` and `nfe`."""
    entries = []
    for path in map(Path, session.config.evaluate.schedules):
        schedule = Schedule.load(path, session.noise)
        if (schedule.solver, schedule.nfe) == (solver, nfe):
            session.check_fit(path, solver, nfe, schedule.grid.steps, wanted=(solver, nfe))
            key = fingerprint(*base, schedule.grid)
            entries.append(
                Entry(solver, nfe, path.stem, "optimized", schedule.grid, key, session.config.evaluate.samples)
            )
    return entries


def _check_files(session: Session) -> None:
    """TsAdaptError for a schedule file that no solver and NFE of the config will meet, or a name met twice."""
    config = session.config
    names: dict[tuple[str, str, int], Path] = {}
    for path in map(Path, config.evaluate.schedules):
        schedule = Schedule.load(path, session.noise)
        if schedule.solver not in config.solvers or schedule.nfe not in config.nfe:
            raise TsAdaptError(
                f"{path} is for {schedule.solver}, NFE {schedule.nfe}, which is not evaluated; "
                f"add --solvers [{schedule.solver}] --nfe [{schedule.nfe}]"
            )
        key = path.stem, schedule.solver, schedule.nfe
        if key in names or path.stem in (*grid_names(), *PREDICTORS, "oracle") or is_shared(path.stem):
            other = f"{names[key]} too" if key in names else "a schedule of the comparison"
            raise TsAdaptError(f"{path} would be called {path.stem!r}, as is {other}; rename the file")
        names[key] = path


def evaluate(session: Session) -> tuple[list[Row], Path]:
    """Measure every schedule of the experiment on the test noises; returns the rows and the report's path.

    What an earlier evaluation of the same comparison measured for other solvers and NFEs stays in the table.
    """
    config, options = session.config, session.config.evaluate
    _check_files(session)
    store, batch = session.teacher("test", options.samples)
    extractor = make_extractor(options.features, device=config.model.device, inception=options.inception)
    data, floor_features = _reference(session, extractor)
    folder = session.workspace.evaluation
    teacher_features = _teacher_features(session, batch.target, extractor)
    plan = [(s, n, e) for s in config.solvers for n in config.nfe for e in _entries(session, s, n)]
    bar = tqdm(total=sum(e.samples for _, _, e in plan), desc="evaluate", unit="image", disable=not session.progress)
    runs: list[tuple[Entry, Run]] = []
    for solver, nfe, entry in plan:
        bar.set_postfix_str(f"{solver} NFE {nfe} {entry.schedule}")
        objective = session.objective(session.solver(solver))
        run = run_entry(entry, objective, batch, extractor, folder / "runs", batch_size=options.batch_size)
        runs.append((entry, run))
        bar.update(entry.samples)
    bar.close()
    subset = min((e.samples for e, _ in runs if e.kind == "oracle"), default=options.samples)
    counts = sorted({options.samples, subset}, reverse=True)
    rows = [
        score(entry, run, count, data, teacher_features, config.model.name, config.teacher.seed)
        for count in counts
        for entry, run in runs
        if entry.samples >= count
    ]
    groups = list(dict.fromkeys((e.solver, e.nfe) for e, _ in runs))
    apart = [
        difference
        for count in counts
        for group in groups
        for difference in differences([(e, run) for e, run in runs if (e.solver, e.nfe) == group], count)
    ]
    facts = _facts(session, store.hash, counts, data, teacher_features, floor_features)
    results = Results(rows, apart, facts).joined(Results.read(folder))
    notes = _notes(session, results.facts)
    path = write_report(
        folder, results, _panels(session, runs, batch.target), session.noise,
        title=f"{config.name}: schedules compared", notes=notes,
    )  # fmt: skip
    print(table(rows))
    print("\n".join(notes[1:]))
    print(f"report: {path}")
    return rows, path


def _notes(session: Session, facts: Mapping[str, Any]) -> list[str]:
    config = session.config
    lines = [
        f"Model {config.model.name}; teacher {config.teacher.solver}, {config.teacher.nfe} evaluations; distance "
        f"{config.distance}; Frechet distances in {config.evaluate.features} features, comparable at equal counts only."
    ]
    for count, teacher in facts["teacher"].items():
        real = facts["floor"].get(count)
        lines.append(
            f"{count} samples: the teacher's own images score {teacher:.4f}"
            + (f", real test images {real:.4f}." if real is not None else ".")
        )
    return lines


def _reference(session: Session, extractor: Extractor) -> tuple[FeatureStatistics, Tensor | None]:
    """The statistics of the data, and the features of other real samples: drawn, where the data's law is known."""
    options, draw = session.config.evaluate, getattr(session.denoiser, "draw", None)
    if draw is None or options.reference is not None:
        return real_features(extractor, options.features, options.reference)
    return FeatureStatistics.of(extractor(draw(20_000, seed=1))), extractor(draw(10_000, seed=2))


def _teacher_features(session: Session, target: Tensor, extractor: Extractor) -> Tensor:
    size = session.config.evaluate.batch_size
    with torch.inference_mode():
        return torch.cat([extractor(session.denoiser.decode(x).float()).cpu() for x in target.split(size)]).float()


def _facts(
    session: Session, teacher: str, counts: list[int], data: FeatureStatistics, features: Tensor, real: Tensor | None
) -> dict[str, Any]:
    """What the comparison is, and the Frechet distance to the data of the teacher's images and of real ones."""
    config, options = session.config, session.config.evaluate
    floor = {} if real is None else {n: frechet(FeatureStatistics.of(real[:n]), data) for n in counts if n <= len(real)}
    return {
        "comparison": {
            "model": config.model.name, "teacher": teacher, "distance": config.distance, "samples": options.samples,
            "features": options.features, "reference": options.reference,
        },
        "teacher": {str(n): frechet(FeatureStatistics.of(features[:n]), data) for n in counts},
        "floor": {str(n): value for n, value in floor.items()},
        "device": config.model.device,
        "torch": torch.__version__,
    }  # fmt: skip


def _panels(session: Session, runs: list[tuple[Entry, Run]], target: Tensor) -> list[Panel]:
    panels = []
    images = session.denoiser.decode(target[:16]).float().clamp(-1, 1)
    teacher = ((images + 1) * 127.5).round().to(torch.uint8).cpu()
    for solver, nfe in dict.fromkeys((e.solver, e.nfe) for e, _ in runs):
        here = {e.schedule: (e, run) for e, run in runs if (e.solver, e.nfe) == (solver, nfe)}
        times = {
            name: run.times if e.kind in (*PREDICTORS, "oracle") else run.times[0] for name, (e, run) in here.items()
        }
        pictures = {name: run.pictures for name, (_, run) in here.items()} | {"teacher": teacher}
        panels.append(Panel(solver, nfe, times, pictures))
    return panels


def evaluate_images(session: Session, folder: Path) -> float:
    """The Frechet distance of a folder of images to the data."""
    options = session.config.evaluate
    extractor = make_extractor(options.features, device=session.config.model.device, inception=options.inception)
    data, _ = _reference(session, extractor)
    features = folder_features(extractor, folder, session.shape, batch_size=options.batch_size)
    if features.shape[1] != data.mean.shape[0]:
        raise TsAdaptError(
            f"the images in {folder} are of another size than the model's {tuple(session.shape)}; resize them to it"
        )
    value = frechet(FeatureStatistics.of(features), data)
    print(f"{folder}: {len(features)} images, Frechet distance to the data {value:.3f} ({options.features} features)")
    return value
