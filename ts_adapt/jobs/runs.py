"""The runs of a comparison, evaluate's first half: every schedule sampled on noises that no search has seen.

The product is students (pruned x quantizers x cachers) x solvers x NFE x schedules; to each student come the schedules
that were learned for it (`static@hqq4`). A student that the network cannot become is skipped, and so is a run that
fails while it is sampled; that is said, and `skipped` remembers why. Several processes (`distributed`) share the parts
of runs among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from ts_adapt import distributed
from ts_adapt.assembly import AXES, FULL, StudentOptions, by_axis
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import Extractor
from ts_adapt.evaluation.records import ORACLE, Entry, as_bytes, fingerprint, kept_run, parts_in, skip_said
from ts_adapt.evaluation.sample import Clip, RunError, join_parts, missing_parts, remove_parts, sample_part
from ts_adapt.grids.corrections import corrected
from ts_adapt.interfaces import StepPolicy, TimeGrid
from ts_adapt.jobs.cheaper_network import Impossible, cheaper_network, key_of
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.teach import teach
from ts_adapt.prompts import prompts_of, read_prompts
from ts_adapt.remedies import command
from ts_adapt.schedules.name import OF_STUDENT, PLACE, parse
from ts_adapt.schedules.resolve import resolve
from ts_adapt.search.objective import Batch
from ts_adapt.search.work import Work
from ts_adapt.storage.files import read_json, read_tensors, write_json, write_tensors
from ts_adapt.storage.folders import hold, remove_leftovers
from ts_adapt.storage.layout import LOCK, MANIFEST, PARTS, PLOTS, SKIPPED, TEACHER_FEATURES
from ts_adapt.teacher.store import TeacherStore

Bar: TypeAlias = "tqdm[Any]"
Skipped = dict[tuple[tuple[str, ...], str], str]
"""(the parts of a student, the file of a run, or nothing for all of its) -> why it was skipped."""
Listed = dict[tuple[str, int], dict[str, TimeGrid]]
"""The grids of `evaluate.schedules` by solver and NFE, then by their names in the table."""


def generate(session: Session) -> None:
    """Sample every schedule of the experiment on the test noises, with every student.

    The teacher's test samples are generated first, as far as they are missing. What an earlier evaluation left of the
    very same stays as it is. Raises TsAdaptError if another process is at this comparison.
    """
    session.check(scores=True)
    with distributed.held(comparing(session)):
        _generate(session)


@contextmanager
def comparing(session: Session) -> Iterator[None]:
    """Hold the comparison against other commands; the temporary files of those that were killed are swept away."""
    folder, runs = session.workspace.evaluation, session.workspace.runs
    with hold(folder / LOCK, f"the comparison in {folder}"):
        for place in (folder, folder / PLOTS, runs, runs / PARTS):
            remove_leftovers(place)
        yield


def _generate(session: Session) -> None:
    config, options, folder = session.config, session.config.evaluate, session.workspace.runs
    listed(session)
    if distributed.first(lambda: _lacking(session)):
        if config.teacher.test_samples < options.samples:
            teaching = command("teach", "--split", "test", "--teacher.test_samples", options.samples)
            raise TsAdaptError(
                f"evaluate.samples is {options.samples}, teacher.test_samples only {config.teacher.test_samples}; make "
                f"as many with {teaching}"
            )
        teach(session, ("test",))
    _, batch = session.teacher("test", options.samples)
    extractor = session.extractor()
    distributed.first(lambda: _keep_teacher_features(session, extractor))
    plan, clip = planned(session), _clip(session, batch)
    refused = skipped(session)
    total = sum(entry.samples for entries in plan.values() for entry in entries)
    left = {
        student: [entries[place] for place in distributed.first(partial(_unfinished, entries, folder))]
        for student, entries in plan.items()
    }
    session.announce("evaluate", Work(sum(entry.samples * entry.nfe for entries in left.values() for entry in entries)))
    with tqdm(total=total, desc="evaluate", unit="image", disable=not session.progress) as bar:
        for student, entries in plan.items():
            todo = left[student]
            for entry in (entry for entry in entries if entry not in todo):
                remove_parts(entry, folder, batch_size=options.batch_size)  # of one that was killed behind its run
                bar.update(entry.samples)
            for run in ("", *(entry.file for entry in entries)):
                refused.pop((student.parts, run), None)
            if not todo:
                continue
            try:
                with cheaper_network(session, student):
                    failed = _sample(session, todo, batch, extractor, clip, bar)
            except Impossible as error:
                failed = {"": str(error)}
                bar.update(sum(entry.samples for entry in todo))
            for run, reason in failed.items():
                refused[student.parts, run] = reason
                tqdm.write(skip_said(student.parts, reason))
    kept = [{**by_axis(parts), "run": run, "reason": reason} for (parts, run), reason in refused.items()]
    if distributed.rank() == 0 and (kept or (folder / SKIPPED).exists()):
        write_json(folder / SKIPPED, kept)


def _lacking(session: Session) -> bool:
    """Whether test samples of the teacher are missing."""
    folder = session.workspace.teacher("test")
    kept = len(TeacherStore.open(folder).indices) if (folder / MANIFEST).exists() else 0
    return kept < session.config.evaluate.samples


def _sample(
    session: Session, entries: list[Entry], batch: Batch, extractor: Extractor, clip: Clip | None, bar: Bar
) -> dict[str, str]:
    """Sample `entries` with the network as it is now; P processes take P entries at a time, whose parts they share.

    Returns why runs failed, by their files.
    """
    folder, size = session.workspace.runs, session.config.evaluate.batch_size
    shared = replace(session.objective(session.solver(entries[0].solver)), checkpoint=False)
    objectives = [replace(shared, solver=session.solver(entry.solver)) for entry in entries]

    def part(place: int, rows: range) -> None:
        entry = entries[place]
        bar.set_postfix_str(f"{entry.sampler} NFE {entry.nfe} {entry.schedule}")
        sample_part(entry, objectives[place], batch, extractor, folder, rows, batch_size=size, clip=clip)
        bar.update(len(rows))

    def join(place: int) -> None:
        join_parts(entries[place], objectives[place], batch, folder, batch_size=size)

    failed: dict[int, str] = {}
    for start in range(0, len(entries), distributed.world()):
        places = range(start, min(start + distributed.world(), len(entries)))
        end = bar.n + sum(entries[place].samples for place in places)
        failed |= _made(distributed.first(partial(_missing, entries, places, folder, size)), part)
        failed |= _made([(place,) for place in places if place not in failed], join)
        distributed.await_files([folder / entries[place].file for place in places if place not in failed])
        bar.update(end - bar.n)
    return {entries[place].file: reason for place, reason in failed.items()}


def _made(units: Sequence[tuple[Any, ...]], make: Callable[..., None]) -> dict[int, str]:
    """Share the `units` `(place, ...)` among the processes, which `make` them; returns, to all, why places failed."""
    failed: dict[int, str] = {}
    with distributed.together():
        for place, *rest in distributed.own_share(units):
            if place not in failed:
                try:
                    make(place, *rest)
                except RunError as error:
                    failed[place] = str(error)
    return {place: reason for found in reversed(distributed.gathered(failed)) for place, reason in found.items()}


def _missing(entries: list[Entry], places: range, folder: Path, batch_size: int) -> list[tuple[int, range]]:
    """Of the entries at `places` the places, and the rows, that are to be sampled yet."""
    return [(place, rows) for place in places for rows in missing_parts(entries[place], folder, batch_size)]


def skipped(session: Session) -> Skipped:
    """Why what was skipped so far was; what cannot be read is as none."""
    try:
        kept = read_json(session.workspace.runs / SKIPPED)
        return {(parts_in(one), one["run"]): one["reason"] for one in kept}
    except (TsAdaptError, KeyError, TypeError):
        return {}


def planned(session: Session) -> dict[StudentOptions, list[Entry]]:
    """Everything that is to be measured, by student.

    Raises TsAdaptError where the student of the config is none of them.
    """
    config = session.config
    check_student(config)

    def entries(of: Session, further: Listed) -> list[Entry]:
        cells = [(solver, nfe) for solver in config.solvers for nfe in config.nfe]
        return [entry for cell in cells for entry in _entries(of, *cell, further.get(cell, {}))]

    full = entries(session.of_student(FULL), listed(session))
    plan = {}
    for student in config.students:
        key = key_of(session, student)
        own = [] if student == FULL else entries(session.of_student(student), {})
        plan[student] = [
            replace(
                entry, **by_axis(student.parts),
                fingerprint=fingerprint(entry.fingerprint, key) if key else entry.fingerprint,
            )
            for entry in (*full, *own)
        ]  # fmt: skip
    return plan


def check_student(config: Config) -> None:
    """TsAdaptError where the student of `config` is none of the networks that it compares."""
    student, lists = config.student, ("pruned", "cachers", "quantizers")
    there = zip(*(each.parts for each in config.students), strict=True)
    lacking = [
        f"{getattr(student, axis)} to {listed}"
        for axis, listed, part, parts in zip(AXES, lists, student.parts, there, strict=True)
        if part not in parts
    ]
    if student.name and lacking:
        raise TsAdaptError(
            f"schedules are learned for the student {student.name}, which is not evaluated; add {', '.join(lacking)}"
        )


def _unfinished(entries: list[Entry], folder: Path) -> list[int]:
    """The places of the entries whose run is missing."""
    return [place for place, entry in enumerate(entries) if kept_run(entry, folder) is None]


def _keep_teacher_features(session: Session, extractor: Extractor) -> None:
    teacher_features(session, extractor)


def teacher_features(session: Session, extractor: Extractor) -> Tensor:
    """The features `(n, D)` of the teacher's images for all test samples, kept beside the run files."""
    options, path = session.config.evaluate, session.workspace.runs / TEACHER_FEATURES
    store, batch = session.teacher("test", options.samples)
    key = as_bytes(fingerprint(store.hash, session.features, options.samples))
    try:
        kept = read_tensors(path, {"features": (options.samples, None), "fingerprint": (len(key),)})
        if torch.equal(kept["fingerprint"], key):
            return kept["features"]
    except TsAdaptError:
        pass
    bar = tqdm(batch.split(options.batch_size), desc="features, teacher", disable=not session.progress, leave=False)
    with torch.inference_mode():
        parts = [extractor(session.denoiser.decode(part.target, part.condition).float()).cpu() for part in bar]
    features = torch.cat(parts).float()
    write_tensors(path, {"features": features, "fingerprint": key})
    return features


def _clip(session: Session, batch: Batch) -> Clip | None:
    """The CLIP scores of images of the samples of `batch`; None where no model for them is asked for."""
    weights, path = session.config.evaluate.clip, session.config.teacher.prompts_of("test")
    if weights is None or path is None:
        return None
    from ts_adapt.evaluation.clip import clip_scorer

    scorer, of_samples = clip_scorer(weights, session.config.model.device), prompts_of(read_prompts(path), batch.index)
    return lambda images, rows: scorer(images, of_samples[rows])


def _entries(session: Session, solver: str, nfe: int, further: dict[str, TimeGrid]) -> list[Entry]:
    """Every schedule there is for `solver` and `nfe`: fixed grids, what has been learned so far, and `further` ones; of
    a student only what was learned for it."""
    config = session.config
    samples, steps = config.evaluate.samples, session.steps(solver, nfe)
    teacher, _ = session.teacher("test")
    base: tuple[object, ...] = (teacher.hash, solver, session.distance, session.features)
    if config.evaluate.clip is not None:
        base += ("clip", config.evaluate.clip)
    if config.model.execution:
        base += ("execution", config.model.execution)

    student = config.student.name
    behind = OF_STUDENT + student if student else ""

    def entry(name: str, kind: str, policy: StepPolicy | TimeGrid, key: object, count: int = samples) -> Entry:
        return Entry(solver, nfe, name + behind, kind, policy, fingerprint(*base, key), count)

    fixed = {} if student else session.fixed_grids(steps)
    entries = [entry(name, "fixed", grid, grid) for name, grid in fixed.items()]
    for name in session.shared_names(solver, nfe):
        shared = session.shared(name, solver, nfe)
        session.check_judge(name, shared.about)
        grid = shared.grid
        entries.append(entry(name, "static" if name.startswith("static") else "optimized", grid, grid))
    entries += [entry(name, "optimized", grid, grid) for name, grid in further.items()]
    for name in session.predictor_names(solver, nfe):
        predicted = session.predictor(name, solver, nfe)
        session.check_judge(name, predicted.about)
        predictor = predicted.predictor
        key: object = predictor.state_dict()
        key = key if steps in predictor.learned else (key, predictor.near(steps))
        entries.append(entry(name, predictor.kind, predictor.policy(steps), key))
    for corrections in session.oracles(solver, nfe):
        labels = session.labelled("test", solver, nfe, corrections)
        count = min(config.oracle_samples, len(labels.batch))
        if samples < count:
            raise TsAdaptError(
                f"evaluate.samples is {samples}, below the {count} samples of the oracle; raise it to {count}, "
                f"or lower oracle_samples to {samples}"
            )
        _, batch = session.teacher("test", count)
        if not torch.equal(labels.batch.index[:count], batch.index):
            searching = command("search", "--method", "per-sample", "--split", "test")
            raise TsAdaptError(
                f"the oracle of {solver}, NFE {nfe} does not cover the first {count} test samples; run {searching}"
            )
        grid = labels.grid.rows(slice(0, count))
        entries.append(entry(corrected(ORACLE, corrections), ORACLE, grid, grid, count))
    return entries


def listed(session: Session) -> Listed:
    """What `evaluate.schedules` names, for the solvers and NFEs of the config.

    Raises TsAdaptError for a schedule that none of them meets, or that was learned to please who judges here, or a name
    met twice.
    """
    config = session.config
    found: Listed = {(solver, nfe): {} for solver in config.solvers for nfe in config.nfe}
    for source in config.evaluate.schedules:
        given = resolve(source, session)
        solver, name, learned = given.solver, given.called, given.learned
        if solver is None or learned is None or given.own:
            raise TsAdaptError(
                f"{source} is {given.kind} and holds no shared learned grids, one for each NFE; evaluate.schedules "
                "takes those, evaluate.grids fixed grids, and what the workspace has is compared in any case"
            )
        met = [nfe for nfe in learned if (solver, nfe) in found]
        if not met:
            nfes = ",".join(map(str, learned))
            raise TsAdaptError(
                f"{source} is for {solver}, NFE {nfes}, which is not evaluated; add --solvers [{solver}] --nfe [{nfes}]"
            )
        for nfe in met:
            twice = name in found[solver, nfe]
            if twice or parse(name).kind != PLACE:
                other = "another one of evaluate.schedules" if twice else "a schedule of the comparison"
                raise TsAdaptError(f"{source} would be called {name!r}, as is {other}; rename the file or folder")
            shared = given.shared(solver, nfe)[0]
            session.compare(source, shared.about)
            session.check_judge(source, shared.about)
            found[solver, nfe][name] = shared.grid
    return found
