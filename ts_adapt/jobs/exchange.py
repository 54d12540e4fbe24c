"""export and import: schedules to and from other programs.

What a format changes or drops is said on stderr, so that stdout holds the text alone and can be piped.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from ts_adapt.config import Config
from ts_adapt.evaluation.records import sampler_name
from ts_adapt.interfaces import TimeGrid, TsAdaptError, unknown
from ts_adapt.jobs.session import Session
from ts_adapt.schedules.file import MAX_BYTES, LearnedGrid
from ts_adapt.schedules.formats import READERS, WRITERS
from ts_adapt.schedules.name import OF_STUDENT
from ts_adapt.schedules.resolve import check_steps, resolve
from ts_adapt.storage.files import Schema, check_schema, read_bytes, read_json, read_tensors, write_bytes
from ts_adapt.storage.layout import RESULTS, run_file

STDIN = "-"
ROW: Schema = {
    "solver": str, "nfe": int, "schedule": str, "model": str, "samples": int,
    "cacher": str, "quantizer": str, "fid_data": (int, float, type(None)), "fid_teacher": (int, float),
    "distance": (int, float),
}  # fmt: skip
"""What is read of a row of results.json."""


def export_schedule(
    config: Config, source: str, kind: str, solver: str | None = None, nfe: int | None = None, out: str | None = None
) -> str:
    """Write the schedule `source` in the format `kind` to the file `out`, or to stdout; returns the text.

    source       a name, as `schedules.resolve` has them; of a predictor the grid that it corrects is written
    solver, nfe  of a schedule that is given by name; None: the first of the config

    What brings its noise schedule along needs no model, but for `timesteps` of a schedule file. Raises TsAdaptError for
    what is unknown, or has no such form.
    """
    if kind not in WRITERS:
        raise unknown("format", kind, [*WRITERS, "diffusers"])
    session = Session(config)
    found = resolve(source, session, alone=True)
    name, taken, others = found.choose(solver, nfe, config)
    schedule, remarks = found.shared(name, taken)
    remarks += [f"this is NFE {taken}{others}"] if others else []
    noise = found.noise
    if noise is None and (kind == "timesteps" or schedule.log_snr is None):
        noise = session.noise
        schedule.check_noise(noise, source)
    if kind == "json":
        schedule = _with_measurements(config, schedule)
    about = schedule.about
    named = [about.get("source") or about.get("method") or found.called, about.get("model"), schedule.solver]
    title = ", ".join([*(str(part) for part in named if part), f"NFE {schedule.nfe}"])
    text, changes = WRITERS[kind](schedule, title, noise)
    _emit(text, out, [*remarks, *changes])
    return text


def import_schedule(
    config: Config, source: str, kind: str | None = None, solver: str | None = None, out: str | None = None
) -> LearnedGrid:
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
        schedule, remarks = LearnedGrid.parse(data, what, session.noise), list[str]()
        if solver not in (None, schedule.solver):
            raise TsAdaptError(
                f"{what} is for {schedule.solver}, not for {solver}; leave --solver out, or export it as sigmas and "
                "import these"
            )
        check_steps(what, schedule.solver, schedule.nfe, schedule.grid.steps)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TsAdaptError(f"{what} is no text; give numbers with commas between them") from error
        times, remarks = READERS[kind](text, what, session.noise)
        name, grid = solver or config.solvers[0], TimeGrid(times)
        about = {**session.about(name), "method": "imported", "source": Path(what).name}
        schedule = LearnedGrid(grid, name, grid.steps * session.solver(name).evaluations_per_step, about)
    _emit(schedule.text(session.noise), out, remarks)
    return schedule


def _with_measurements(config: Config, schedule: LearnedGrid) -> LearnedGrid:
    """`schedule` with what the experiment's evaluation has measured of this very grid, if it has."""
    workspace, student = config.workspace, config.student
    behind = OF_STUDENT + student.name if student.name else ""
    path = workspace.evaluation / RESULTS
    if not path.exists():
        return schedule
    results = read_json(path, {"rows": list, "facts": dict})
    about, grid = schedule.about, schedule.grid
    corrected = bool(grid.corrections)
    facts = {
        "features": config.evaluate.features,
        "distance": config.distance,
        **results["facts"].get("comparison", {}),
    }
    for row in results["rows"]:
        check_schema(row, ROW, f"a row of {path}")
        pair = row["cacher"], row["quantizer"]
        run = workspace.runs / run_file(sampler_name(row["solver"], *pair), row["nfe"], row["schedule"])
        same = [row["solver"], row["nfe"], row["model"]] == [schedule.solver, schedule.nfe, about.get("model")]
        same &= pair == (student.cacher, student.quantizer)
        if not same or not run.exists() or (corrected and row["schedule"] != f"{about.get('method')}{behind}"):
            continue
        times = read_tensors(run, {"times": (None, grid.steps + 1)})["times"]
        known = (about.get("measured") or {}).get("fid_teacher")
        fewer = isinstance(known, dict) and known.get("samples", 0) > row["samples"]
        if torch.equal(times, grid.times.expand_as(times)) and not fewer:
            common = {"samples": row["samples"], "split": "test"}
            evaluator = f"{facts['features']} features"
            measured = {
                "fid_teacher": {"value": row["fid_teacher"], "evaluator": evaluator, "reference": "teacher", **common},
                "test_distance": {"value": row["distance"], "evaluator": facts["distance"], **common},
            }
            if row["fid_data"] is not None:
                measured["fid"] = {"value": row["fid_data"], "evaluator": evaluator, "reference": "data", **common}
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
