"""export and import: schedules to and from other programs.

What a format changes or drops is said on stderr, so that stdout holds the text alone and can be piped.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ts_adapt import zoo
from ts_adapt.assembly import NONE, build_grid, grid_names, steps_of
from ts_adapt.config import Config, Workspace
from ts_adapt.evaluation.benchmark import OF_STUDENT, sampler_name, stem
from ts_adapt.files import Schema, check_schema, read_bytes, read_json, read_tensors, write_bytes
from ts_adapt.interfaces import NoiseSchedule, Solver, TimeGrid, TsAdaptError, unknown
from ts_adapt.jobs.named import choose_nfe, is_scheduler, load_scheduler, of_others, shared_schedule
from ts_adapt.jobs.session import SHARED, Session, check_asked, is_shared
from ts_adapt.predictors.store import PREDICTOR_NAMES, load_predictor, made_for
from ts_adapt.schedule_file import MAX_BYTES, Schedule
from ts_adapt.schedule_formats import READERS, WRITERS

STDIN = "-"
ROW: Schema = {
    "solver": str, "nfe": int, "schedule": str, "model": str, "samples": int,
    "fid_data": (int, float), "fid_teacher": (int, float), "distance": (int, float),
}  # fmt: skip
"""What is read of a row of results.json."""


def export_schedule(
    config: Config, source: str, kind: str, solver: str | None = None, nfe: int | None = None, out: str | None = None
) -> str:
    """Write the schedule `source` in the format `kind` to the file `out`, or to stdout; returns the text.

    source       a name as `sample` takes it, a schedule file, one for diffusers (see `named`), or a predictor's folder:
                 then the grid it corrects
    solver, nfe  of a schedule that is given by name; None: the first of the config

    A schedule file needs no model, but for `timesteps`. Raises TsAdaptError for what is unknown, or has no such form.
    """
    if kind not in WRITERS:
        raise unknown("format", kind, [*WRITERS, "diffusers"])
    path, names, session = Path(source), (*grid_names(), *SHARED, *PREDICTOR_NAMES), None
    noise: NoiseSchedule | None = None
    if is_scheduler(source):
        scheduler = load_scheduler(source, solver)
        learned = scheduler.source.learned
        taken = choose_nfe(learned, nfe, config.nfe)
        schedule, remarks = shared_schedule(source, scheduler, taken)
        noise, others = scheduler.noise, of_others(learned, taken, nfe)
        remarks += [f"this is NFE {taken}{others}"] if others else []
    elif source not in names and (path.suffix == ".json" or path.is_file()):
        session = Session(config) if kind == "timesteps" else session
        schedule, remarks = Schedule.load(path, session.noise if session else None), list[str]()
        if schedule.log_snr is None and session is None:  # a file of an earlier program
            session = Session(config)
        check_asked(path, schedule.solver, schedule.nfe, solver, nfe)
    else:
        session = Session(config)
        schedule, remarks = _by_name(session, source, solver or config.solvers[0], nfe)
    if kind == "json":
        schedule = _with_measurements(config, schedule)
    about = schedule.about
    named = [about.get("source") or about.get("method") or path.stem, about.get("model"), schedule.solver]
    title = ", ".join([*(str(part) for part in named if part), f"NFE {schedule.nfe}"])
    text, changes = WRITERS[kind](schedule, title, session.noise if session else noise)
    _emit(text, out, [*remarks, *changes])
    return text


def import_schedule(
    config: Config, source: str, kind: str | None = None, solver: str | None = None, out: str | None = None
) -> Schedule:
    """Make a schedule file for the config's model of `source`, a list of sigmas or timesteps or a schedule file.

    source  a file, or - for stdin
    kind    sigmas, timesteps or json; None: json, if it is a JSON object
    solver  that the schedule is for; None: the first of the config, or the file's own
    out     the file that is written; None: stdout

    Raises TsAdaptError, naming `source`, for a file that is damaged, of another kind, or does not fit the model.
    """
    kinds = [*READERS, "json"]
    if kind is not None and kind not in kinds:
        raise unknown("format", kind, kinds)
    what = "the text on stdin" if source == STDIN else source
    data = _read(source)
    if kind is None and not data.lstrip().startswith(b"{"):
        raise TsAdaptError(
            f"{what} is no schedule file; give --format sigmas or --format timesteps if it is such a list"
        )
    session = Session(config)
    if kind is None or kind == "json":
        schedule, remarks = Schedule.parse(data, what, session.noise), list[str]()
        if solver not in (None, schedule.solver):
            raise TsAdaptError(
                f"{what} is for {schedule.solver}, not for {solver}; leave --solver out, or export it as sigmas and "
                "import these"
            )
        method = session.solver(schedule.solver)
        if steps_of(method, schedule.nfe) != schedule.grid.steps:
            raise TsAdaptError(
                f"{what} has {schedule.grid.steps} steps; {schedule.solver} with NFE {schedule.nfe} takes "
                f"{steps_of(method, schedule.nfe)}, so it is damaged"
            )
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TsAdaptError(f"{what} is no text; give numbers with commas between them") from error
        times, remarks = READERS[kind](text, what, session.noise)
        name = solver or config.solvers[0]
        method = session.solver(name)
        about = {**_known(session, method), "method": "imported", "source": Path(what).name}
        grid = TimeGrid(times)
        schedule = Schedule(grid, name, grid.steps * method.evaluations_per_step, about)
    _emit(schedule.text(session.noise), out, remarks)
    return schedule


def _by_name(session: Session, source: str, solver: str, asked: int | None) -> tuple[Schedule, list[str]]:
    """The schedule called `source`; for a predictor, the static grid that it corrects."""
    nfe = session.config.nfe[0] if asked is None else asked
    if is_shared(source):
        return session.shared(source, solver, nfe), []
    if source in grid_names():
        grid = build_grid(source, session.noise, session.steps(solver, nfe), rescale=session.config.rescale_published)
        about = {**_known(session, session.solver(solver)), "method": "fixed", "source": source}
        return Schedule(grid, solver, nfe, about), []
    folder = session.workspace.predictor(source, solver, nfe) if source in PREDICTOR_NAMES else Path(source)
    if source in PREDICTOR_NAMES:
        session.predictor(source, solver, nfe)
    elif not folder.is_dir():
        error = unknown("schedule", source, [*grid_names(), *SHARED, *PREDICTOR_NAMES, *zoo.schedules()])
        raise TsAdaptError(f"{error}, or a schedule file, or the folder of a predictor or of a schedule for diffusers")
    predictor, config = load_predictor(folder, session.noise)
    solver, there = made_for(config, folder / "config.json")
    nfe = choose_nfe(there, asked, session.config.nfe)
    session.check_predictor(folder, predictor, config, wanted=(solver, nfe))
    about = {**_known(session, session.solver(solver)), "method": "static"}
    about |= {key: config[key] for key in ("model", "teacher", "distance") if key in config}
    others = of_others(there, nfe, asked)
    return Schedule(TimeGrid(predictor.static(session.steps(solver, nfe)).cpu()), solver, nfe, about), [
        f"{folder} predicts a grid for each sample, which no format carries: this is the static grid that it corrects",
        *([f"this is NFE {nfe}{others}"] if others else []),
    ]


def _known(session: Session, solver: Solver) -> dict[str, Any]:
    prediction = getattr(session.denoiser, "prediction", None)
    return {"order": solver.order, "model": session.config.model.name, "prediction": prediction}


def _with_measurements(config: Config, schedule: Schedule) -> Schedule:
    """`schedule` with what the experiment's evaluation has measured of this very grid, if it has."""
    folder, student = Workspace.of(config).evaluation, config.student
    behind = OF_STUDENT + student.name if student.name else ""
    if not (folder / "results.json").exists():
        return schedule
    results = read_json(folder / "results.json", {"rows": list, "facts": dict})
    about, grid = schedule.about, schedule.grid
    corrected = bool(grid.corrections)
    facts = {
        "features": config.evaluate.features,
        "distance": config.distance,
        **results["facts"].get("comparison", {}),
    }
    for row in results["rows"]:
        check_schema(row, ROW, f"a row of {folder / 'results.json'}")
        pair = row.get("cacher", NONE), row.get("quantizer", NONE)
        sampler = sampler_name(row["solver"], *pair)
        run = folder / "runs" / f"{stem(sampler)}-nfe{row['nfe']}-{row['schedule']}.safetensors"
        same = [row["solver"], row["nfe"], row["model"]] == [schedule.solver, schedule.nfe, about.get("model")]
        same &= pair == (student.cacher, student.quantizer)
        if not same or not run.exists() or (corrected and row["schedule"] != f"{about.get('method')}{behind}"):
            continue
        times = read_tensors(run, {"times": (None, grid.steps + 1)})["times"]
        known = (about.get("measured") or {}).get("fid")
        fewer = isinstance(known, dict) and known.get("samples", 0) > row["samples"]
        if torch.equal(times, grid.times.expand_as(times)) and not fewer:
            common = {"samples": row["samples"], "split": "test"}
            evaluator = f"{facts['features']} features"
            measured = {
                "fid": {"value": row["fid_data"], "evaluator": evaluator, "reference": "data", **common},
                "fid_teacher": {"value": row["fid_teacher"], "evaluator": evaluator, "reference": "teacher", **common},
                "test_distance": {"value": row["distance"], "evaluator": facts["distance"], **common},
            }
            about = {**about, "measured": {**(about.get("measured") or {}), **measured}}
    return replace(schedule, about=about)


def _read(source: str) -> bytes:
    if source != STDIN:
        return read_bytes(Path(source), limit=MAX_BYTES)
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise TsAdaptError(f"stdin gives more than {MAX_BYTES} bytes; that is no schedule")
    return data


def _emit(text: str, out: str | None, remarks: list[str]) -> None:
    for remark in remarks:
        print(f"ts-adapt: warning: {remark}", file=sys.stderr)
    if out is None:
        sys.stdout.write(text)
    else:
        write_bytes(Path(out), text.encode())
        print(out)
