"""evaluate and sample: schedules at work on noises that no search has seen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from ts_adapt.assembly import steps_of
from ts_adapt.evaluation.benchmark import Entry, Row, Run, fingerprint, run_entry, score
from ts_adapt.evaluation.metrics import (
    Extractor,
    FeatureStatistics,
    folder_features,
    frechet,
    make_extractor,
    real_features,
)
from ts_adapt.evaluation.report import Panel, table, write_report
from ts_adapt.files import make_folder, write_bytes
from ts_adapt.interfaces import Solver, StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.jobs.session import Session
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.sampling import initial_noise, integrate, noise_for, noise_scale
from ts_adapt.schedule_file import Schedule
from ts_adapt.teacher.generate import class_labels_for

MAX_COUNT = 1_000_000


def _entries(session: Session, solver: str, nfe: int) -> list[Entry]:
    """Every schedule there is for `solver` and `nfe`: fixed grids, and what has been learned so far."""
    config, workspace = session.config, session.workspace
    samples, steps = config.evaluate.samples, steps_of(session.solver(solver), nfe)
    teacher, _ = session.teacher("test")
    base = (teacher.hash, solver, config.distance, config.evaluate.features)

    def entry(name: str, kind: str, policy: StepPolicy | TimeGrid, key: object, count: int = samples) -> Entry:
        return Entry(solver, nfe, name, kind, policy, fingerprint(*base, key), count)

    entries = [entry(name, "fixed", grid, grid) for name, grid in session.fixed_grids(steps).items()]
    for method, kind in (("blackbox", "optimized"), ("static", "static")):
        if workspace.shared(method, solver, nfe).exists():
            grid = session.shared(method, solver, nfe).grid
            entries.append(entry(method, kind, grid, grid))
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


def evaluate(session: Session) -> tuple[list[Row], Path]:
    """Measure every schedule of the experiment on the test noises; returns the rows and the report's path."""
    config, options = session.config, session.config.evaluate
    _, batch = session.teacher("test", options.samples)
    extractor = make_extractor(options.features, device=config.model.device, inception=options.inception)
    data, floor_features = _reference(session, extractor)
    folder = session.workspace.evaluation / "runs"
    teacher_features = _teacher_features(session, batch.target, extractor)
    plan = [(s, n, e) for s in config.solvers for n in config.nfe for e in _entries(session, s, n)]
    bar = tqdm(total=sum(e.samples for _, _, e in plan), desc="evaluate", unit="image", disable=not session.progress)
    runs: list[tuple[Entry, Run]] = []
    for solver, nfe, entry in plan:
        bar.set_postfix_str(f"{solver} NFE {nfe} {entry.schedule}")
        objective = session.objective(session.solver(solver))
        runs.append((entry, run_entry(entry, objective, batch, extractor, folder, batch_size=options.batch_size)))
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
    facts = _facts(session, counts, data, teacher_features, floor_features)
    panels = _panels(session, runs, batch.target)
    notes = [
        (
            f"Model {config.model.name}; teacher {config.teacher.solver}, {config.teacher.nfe} evaluations; distance "
            f"{config.distance}; Frechet distances in {options.features} features, comparable at equal counts only."
        ),
        *(
            f"{count} samples: the teacher's own images score {facts['teacher'][count]:.4f}"
            + (f", real test images {facts['floor'][count]:.4f}." if count in facts["floor"] else ".")
            for count in counts
        ),
    ]
    path = write_report(
        session.workspace.evaluation, rows, panels, session.noise,
        title=f"{config.name}: schedules compared", notes=notes, facts=facts,
    )  # fmt: skip
    print(table(rows))
    print("\n".join(notes[1:]))
    print(f"report: {path}")
    return rows, path


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
    session: Session, counts: list[int], data: FeatureStatistics, teacher: Tensor, real: Tensor | None
) -> dict[str, Any]:
    """The Frechet distance to the data of the teacher's images and of real ones, at each sample count."""
    floor = {} if real is None else {n: frechet(FeatureStatistics.of(real[:n]), data) for n in counts if n <= len(real)}
    return {
        "teacher": {n: frechet(FeatureStatistics.of(teacher[:n]), data) for n in counts},
        "floor": floor,
        "device": session.config.model.device,
        "torch": torch.__version__,
    }


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


def sample(
    session: Session, chosen: TimeGrid | StepPolicy, method: Solver, count: int, seed: int, label: int | None = None
) -> Tensor:
    """`count` images in [-1, 1] along the schedule `chosen`, by the solver `method`; no label: classes are drawn."""
    source = class_labels_for(session.denoiser, label)
    index = list(range(count))
    x_T = initial_noise(seed, index, session.shape) * noise_scale(session.noise)
    x_T = x_T.to(session.config.model.device)
    drawn = source.draw(seed, index) if source is not None else {}
    condition = {key: value.to(x_T.device) for key, value in drawn.items()}
    with torch.inference_mode():
        end = integrate(
            session.denoiser, method, chosen, x_T, condition=condition,
            step_noise=noise_for(seed, index, x_T) if method.needs_noise else None,
        ).x  # fmt: skip
        return session.denoiser.decode(end)


def _schedule(
    session: Session, schedule: str, solver: str | None, nfe: int | None
) -> tuple[str, int, TimeGrid | StepPolicy]:
    """The solver's name, the NFE and the schedule itself; a schedule file is only sampled by the solver it is for."""
    path = Path(schedule)
    if path.suffix == ".json":
        loaded = Schedule.load(path, session.noise)
        wanted = solver or loaded.solver, loaded.nfe if nfe is None else nfe
        if wanted != (loaded.solver, loaded.nfe):
            raise TsAdaptError(
                f"{path} is for {loaded.solver}, NFE {loaded.nfe}, not for {wanted[0]}, NFE {wanted[1]}; "
                "leave --solver and --steps out"
            )
        session.check_fit(path, loaded.solver, loaded.nfe, loaded.grid.steps, wanted=wanted)
        return loaded.solver, loaded.nfe, loaded.grid
    name = session.config.solvers[0] if solver is None else solver
    nfe = session.config.nfe[0] if nfe is None else nfe
    steps_of(session.solver(name), nfe)
    return name, nfe, session.policy(schedule, name, nfe)


def _save_png(picture: Tensor, path: Path) -> None:
    buffer = io.BytesIO()
    save_image(picture, buffer, format="png")
    write_bytes(path, buffer.getvalue(), durable=False)


def sample_to_folder(
    session: Session, schedule: str, solver: str | None, nfe: int | None, count: int, seed: int, label: int | None,
    out: str | None,
) -> Path:  # fmt: skip
    """`count` images as PNG files and one grid of them; returns the folder.

    schedule     a grid's name, static / one-shot / recursive, or a schedule file
    solver, nfe  None: the schedule file's, or the first of the config
    """
    if not 1 <= count <= MAX_COUNT:
        raise TsAdaptError(f"count is {count}; at least 1 image is made, at most {MAX_COUNT}")
    if not 0 <= seed < 2**32:
        raise TsAdaptError(f"seed is {seed}; give a number from 0 to {2**32 - 1}")
    name, nfe, chosen = _schedule(session, schedule, solver, nfe)
    folder = Path(out) if out else session.workspace.logs / "samples" / f"{Path(schedule).stem}-{name}-nfe{nfe}"
    make_folder(folder / "images")
    images = sample(session, chosen, session.solver(name), count, seed, label)
    pictures = (images.float().clamp(-1, 1) + 1) / 2
    for number, picture in enumerate(pictures):
        _save_png(picture, folder / "images" / f"{number:05d}.png")
    _save_png(make_grid(pictures, nrow=max(1, round(count**0.5)), padding=2, pad_value=1.0), folder / "grid.png")
    print(f"{count} images along {schedule}, {name}, NFE {nfe}: {folder}")
    return folder


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
