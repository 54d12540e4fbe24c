"""evaluate, the second half: what was sampled is scored, against the data and the teacher, and reported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from tqdm import tqdm

from ts_adapt import distributed, pruning
from ts_adapt.assembly import NONE, by_axis, plan_name
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.comparison import Results, differences, score
from ts_adapt.evaluation.conclusions import conclusions
from ts_adapt.evaluation.features import Extractor
from ts_adapt.evaluation.metrics import FeatureStatistics, frechet
from ts_adapt.evaluation.quality import Reference, quality_of, reference_of
from ts_adapt.evaluation.records import ORACLE, STATIC, Entry, Row, Run, kept_run, parts_in, skip_said
from ts_adapt.evaluation.report import Panel, write_report
from ts_adapt.evaluation.tables import LEGEND, as_text, cost_tables, frechet_name, group_tables, once, plain, written
from ts_adapt.evaluation.worth import worth_tables
from ts_adapt.jobs import converged
from ts_adapt.jobs.minimised import minimised_said
from ts_adapt.jobs.runs import comparing, generate, planned, skipped, teacher_features
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.tracking import board
from ts_adapt.plots import plot_images
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.remedies import command
from ts_adapt.search.objective import Batch
from ts_adapt.storage.files import sha256_of_json
from ts_adapt.storage.layout import stem

MANY = 5
"""Missing runs that are named."""
MEASURES = [name for name, kind in get_type_hints(Row).items() if float in (kind, *get_args(kind))]
"""What goes to TensorBoard: the columns of results.csv that are numbers, as far as they have values."""


def evaluate(session: Session) -> tuple[list[Row], Path]:
    """Measure every schedule of the experiment on the test noises; returns the rows and the report's path.

    What an earlier evaluation of the same comparison measured for other samplers and NFEs stays in the table.
    """
    generate(session)
    return distributed.first(lambda: score_runs(session))


def score_runs(session: Session) -> tuple[list[Row], Path]:
    """The table and the report of the runs that there are, without sampling; what is missing is said.

    Raises TsAdaptError where there are none at all, and if another process is at this comparison.
    """
    with comparing(session):
        return _score_runs(session)


def _score_runs(session: Session) -> tuple[list[Row], Path]:
    config, options, folder = session.config, session.config.evaluate, session.workspace.evaluation
    store, batch = session.teacher("test", options.samples)
    extractor = session.extractor()
    runs, left = _runs(session)
    reference = reference_images(session, extractor)
    of_teacher = teacher_features(session, extractor)
    subset = min((e.samples for e, _ in runs if e.kind == ORACLE), default=options.samples)
    counts = sorted({options.samples, subset}, reverse=True)
    static = {(e.sampler, e.nfe): run for e, run in runs if e.schedule == STATIC}
    data = None if reference is None else reference.statistics
    asked = [(entry, run, count) for count in counts for entry, run in runs if entry.samples >= count]
    rows = [
        score(
            entry, run, count, data, of_teacher, config.model.name, config.teacher.seed,
            None if entry.schedule == STATIC else static.get((entry.sampler, entry.nfe)),
            quality_of({"features": run.features, **run.further}, count, reference),
        )
        for entry, run, count in tqdm(asked, desc="scoring", unit="row", disable=not session.progress, leave=False)
    ]  # fmt: skip
    groups = list(dict.fromkeys((e.sampler, e.nfe) for e, _ in runs))
    apart = [
        difference
        for count in counts
        for group in groups
        for difference in differences([(e, run) for e, run in runs if (e.sampler, e.nfe) == group], count)
    ]
    facts = {**_facts(session, store.hash, counts, reference, of_teacher), "skipped": left}
    fresh = Results(rows, apart, facts)
    results = fresh.joined(Results.read(folder))
    panels = _panels(session, rows, runs, batch.rows(slice(16)))
    path = write_report(
        folder, results, panels, session.noise_schedule,
        title=f"{config.name}: schedules compared", notes=_notes(session, results), columns=options.columns,
    )  # fmt: skip
    _to_tensorboard(session, rows, panels)
    shown = session.features, options.columns
    tables = [*group_tables(once(plain(rows)), *shown).values(), *cost_tables(once(rows), *shown)]
    print("\n\n".join([*map(as_text, tables), LEGEND]))
    for one in facts["skipped"]:
        print(f"\n{skip_said(parts_in(one), one['reason'])}")
    print("\n".join(_notes(session, fresh)[1:]))
    for table in worth_tables(plain(results.rows), session.features):
        print(f"\n{as_text(table)}")
    for conclusion in conclusions(fresh):
        print("\n  - ".join([f"\n{conclusion.heading}, paired distance to the teacher:", *conclusion.lines]))
    print(f"report: {path}")
    return rows, path


def _to_tensorboard(session: Session, rows: list[Row], panels: list[Panel]) -> None:
    """The measures over the NFE, of all test samples, and the first samples of every schedule."""
    with board(session.config, "evaluate", session.workspace.tensorboard("evaluate")) as writer:
        for panel in panels:
            pictures = {name: x.float() / 127.5 - 1 for name, x in panel.pictures.items()}
            writer.add_figure(f"samples/{stem(panel.sampler)}", plot_images(pictures), panel.nfe)
        for row in rows:
            for measure in MEASURES:
                value = getattr(row, measure)
                if value is not None and row.samples == session.config.evaluate.samples:
                    writer.add_scalar(f"{measure}/{stem(row.sampler)}/{row.schedule}", value, row.nfe)


def _runs(session: Session) -> tuple[list[tuple[Entry, Run]], list[dict[str, str]]]:
    """What there is of everything planned, and what of it was skipped; the rest is named on stderr."""
    folder, refused, plan = session.workspace.runs, skipped(session), planned(session)
    found, missing = [], []
    wanted = {(student.parts, "") for student in plan}
    for student, entries in plan.items():
        for entry in entries:
            run = kept_run(entry, folder)
            if run is not None:
                found.append((entry, run))
                continue
            wanted.add((student.parts, entry.file))
            if not refused.keys() & {(student.parts, ""), (student.parts, entry.file)}:
                missing.append(f"{entry.sampler}, NFE {entry.nfe}, {entry.schedule}")
    left = [
        {**by_axis(parts), "run": run, "reason": reason}
        for (parts, run), reason in refused.items()
        if (parts, run) in wanted
    ]
    remedy = f"make them with {command('evaluate', '--generate-only')}"
    if not found:
        raise TsAdaptError(
            f"nothing of this comparison could be measured: {left[0]['reason']}"
            if left
            else f"nothing of this comparison is in {folder} yet; {remedy}"
        )
    if missing:
        named = "; ".join(missing[:MANY]) + ("; ..." if len(missing) > MANY else "")
        count = len(missing) + len(found)
        print(f"ts-adapt: {len(missing)} of {count} runs are missing ({named}); {remedy}", file=sys.stderr)
    return found, left


def _notes(session: Session, results: Results) -> list[str]:
    """What is compared, then what the teacher's own images and real ones score, and who is too near to the teacher."""
    config, counts, floor = session.config, results.facts["teacher"], results.facts["floor"]
    compared = (
        f"Fixed, optimised and learned schedules from the same unseen noises. Model {config.model.name}; teacher "
        f"{config.teacher.solver} with {config.teacher.nfe_of('test')} evaluations; distance to it: {session.distance}."
    )
    compared += f" {said}" if (said := converged.said(session)) else ""
    compared += "".join(f" Static grids: {line}." for line in minimised_said(session, config.static))
    compared += "".join(f" Predictors: {line}." for line in minimised_said(session, config.train))
    scores = "No real images to compare with; evaluate.reference names a folder of them."
    if counts:
        parts = {"the teacher's own images": counts, "real test images": floor}
        found = [f"{what} {' / '.join(written([*of.values()]))}" for what, of in parts.items() if of]
        scores = f"{frechet_name(session.features)} to the data at {' / '.join(counts)} samples: {', '.join(found)}."
    near = converged.too_near(session, plain(results.rows))
    return [compared, scores, *([near] if near else [])]


def reference_images(session: Session, extractor: Extractor) -> Reference | None:
    """The data, and other real samples: drawn, where the data's law is known, the embedded ones for models of the zoo;
    None where there are none."""
    options, draw = session.config.evaluate, session.denoiser.draw
    drawn = draw(20_000, seed=1) if options.reference is None else None
    others = None if drawn is None else draw(10_000, seed=2)
    if drawn is None or others is None:
        if options.reference is None and not session.of_zoo:
            return None
        return reference_of(
            extractor, session.features, options.reference, shape=session.image_shape, batch_size=options.batch_size,
            progress=session.progress,
        )  # fmt: skip
    return Reference(FeatureStatistics.of(extractor(drawn)), extractor(others), True)


def _facts(
    session: Session, teacher: str, counts: list[int], reference: Reference | None, features: Tensor
) -> dict[str, Any]:
    """What the comparison is, and the Frechet distance to the data of the teacher's images and of real ones."""
    config, options = session.config, session.config.evaluate
    real = reference.features if reference is not None and reference.apart else features[:0]

    def to_data(features: Tensor) -> dict[str, float]:
        """The distance of the first n, for each n that there are."""
        data = None if reference is None else reference.statistics
        found = {n: FeatureStatistics.of(features[:n]) for n in counts if n <= len(features)}
        return {} if data is None else {str(n): frechet(own, data) for n, own in found.items()}

    return {
        "comparison": {
            "model": config.model.name, "teacher": teacher, "distance": session.distance, "samples": options.samples,
            "features": session.features, "reference": options.reference,
        },
        "teacher": to_data(features),
        "floor": to_data(real),
        "pruned": {
            plan_name(path): sha256_of_json(sorted(pruning.read(path))) for path in config.pruned if path != NONE
        },
        "device": config.model.device,
        "torch": torch.__version__,
    }  # fmt: skip


def _panels(session: Session, rows: list[Row], runs: list[tuple[Entry, Run]], shown: Batch) -> list[Panel]:
    """What is drawn: of `plain` rows, as there may be many others."""
    panels = []
    drawn = {row.sampler for row in plain(rows)}
    images = session.denoiser.decode(shown.target, shown.condition).float().clamp(-1, 1)
    teacher = ((images + 1) * 127.5).round().to(torch.uint8).cpu()
    for sampler, nfe in dict.fromkeys((e.sampler, e.nfe) for e, _ in runs if e.sampler in drawn):
        here = {e.schedule: (e, run) for e, run in runs if (e.sampler, e.nfe) == (sampler, nfe)}
        times = {
            name: run.times if e.kind in (*PREDICTORS, ORACLE) else run.times[0] for name, (e, run) in here.items()
        }
        pictures = {name: run.pictures for name, (_, run) in here.items()} | {"teacher": teacher}
        panels.append(Panel(sampler, nfe, times, pictures))
    return panels
