"""The search for labels: the oracle grids of a split's samples, part by part.

A part is the unit of work that several processes (`distributed`) share; what is in it depends on the config alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ts_adapt import distributed
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.corrections import corrected
from ts_adapt.interfaces import Solver
from ts_adapt.jobs.session import Session, paired_verdict
from ts_adapt.search.derivative import trusted
from ts_adapt.search.labels import LabelStore, start_entries
from ts_adapt.search.objective import Batch
from ts_adapt.search.per_sample import LabelBatch, search_per_sample
from ts_adapt.search.work import Work
from ts_adapt.storage.folders import beside, replace_folder


def student_options(config: Config) -> list[Any]:
    """What a search depends on beside its options where it is on a student; nothing on the teacher's own network."""
    made = config.made_with("static")
    return [made[name] for name in ("student", "calibration", "qat") if name in made]


def label_options(config: Config) -> dict[str, Any]:
    """What the spec of labels says of the options that they are searched with."""
    spec = {
        "batch": config.label_batch, "options": config.made_with("per-sample")["per_sample"],
        "derivative": [getattr(config, name) for name in config.derivative_options],
    }  # fmt: skip
    return spec | ({"student": student_options(config)} if config.student.name else {})


def search_labels(session: Session, name: str, solver: Solver, nfe: int, split: str, redo: bool) -> None:
    """Search the oracle grids of the samples of `split`; a part that is there stays."""
    config = session.config
    count = config.label_samples if split == "train" else config.oracle_samples
    teacher, batch = session.teacher(split, count)
    corrections = config.per_sample.corrections
    static = corrected("static", corrections)
    static = static if static in session.shared_names(name, nfe) else "static"
    start = session.shared(static, name, nfe).grid
    spec = {
        "teacher": teacher.hash, "solver": name, "nfe": nfe, "distance": session.distance,
        **label_options(config), **start_entries(static, start),
    }  # fmt: skip
    folder = session.workspace.labels(corrected(split, corrections), name, nfe)
    store = distributed.first(partial(_label_store, folder, spec, redo))
    parts = batch.split(config.label_batch)
    missing = distributed.first(partial(_missing, store, parts))
    own, objective, agreement = distributed.own_share(missing), session.objective(solver), None
    if missing:
        teacher, samples = session.teacher("train")
        kept = session.derivatives(teacher.hash, name, start.steps, len(samples))
        objective, agreement = trusted(objective, start.steps, samples, recall=kept, together=True)
    to_do = sum(len(parts[part]) for part in missing)
    what = f"{corrected('oracle', corrections)}, {name}, NFE {nfe}"
    session.announce(what, labelling_work(session, name, nfe, to_do))
    done = len(batch) - sum(len(parts[part]) for part in own) if distributed.world() == 1 else 0
    bar = tqdm(
        total=done + sum(len(parts[part]) for part in own), initial=done, unit="sample", leave=False,
        desc=distributed.label(f"oracle {name} NFE {nfe}"), disable=not session.progress,
    )  # fmt: skip
    with distributed.together(), bar:
        for part in own:
            store.write(part, search_per_sample(objective, parts[part], start, config.per_sample))
            bar.update(len(parts[part]))
    labels = distributed.first(partial(_finished, store, folder, len(parts)))
    if agreement is not None:
        print(f"{what}: {agreement}")
    oracle, shared = labels.distance[:count], labels.static_distance[:count]
    print(
        f"{what}, {split}: distance {float(oracle.mean()):.5f} over {count} samples, the {static} grid's "
        f"{float(shared.mean()):.5f}: {paired_verdict(oracle, shared)}"
    )


def labelling_work(session: Session, solver: str, nfe: int, samples: int) -> Work:
    """About how many evaluations the search of the grids of so many samples takes, that of a derivative included."""
    first = session.comparing(solver, session.steps(solver, nfe), session.config.teacher.train_samples)
    return (session.config.per_sample.solves.times(samples) + (first if samples else Work())).times(nfe)


def _missing(store: LabelStore, parts: Sequence[Batch]) -> list[int]:
    return [part for part, samples in enumerate(parts) if not store.has(part, samples.index)]


def _finished(store: LabelStore, folder: Path, parts: int) -> LabelBatch:
    """All labels, from now on in `folder`; TsAdaptError where one of `parts` parts is missing."""
    paths = [store.path(part) for part in range(parts)]
    distributed.await_files(paths)
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise TsAdaptError(f"{missing} of another process is not to be seen here yet; run the same command again")
    labels = store.load()
    if store.folder != folder:
        replace_folder(folder, store.folder)
    return labels


def _label_store(folder: Path, spec: dict[str, Any], redo: bool) -> LabelStore:
    """The labels in `folder`, if they are those of `spec`; with `redo` else new ones beside them."""
    try:
        return LabelStore.create(folder, spec)
    except TsAdaptError:
        if not redo:
            raise
    try:
        return LabelStore.create(beside(folder), spec)
    except TsAdaptError:  # what an interrupted command left there, with yet other options
        shutil.rmtree(beside(folder))
        return LabelStore.create(beside(folder), spec)
