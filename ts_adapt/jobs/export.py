"""export: schedules for other programs.

What a format changes or drops is said on stderr, so that stdout holds the text alone and can be piped.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from ts_adapt.assembly import AXES
from ts_adapt.config import Config
from ts_adapt.evaluation.records import parts_in, sampler_name, with_parts
from ts_adapt.jobs.other_steps import at_other_steps
from ts_adapt.jobs.session import Session
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.schedules.formats import WRITERS
from ts_adapt.schedules.name import OF_STUDENT
from ts_adapt.schedules.resolve import resolve
from ts_adapt.storage.files import Schema, check_schema, read_json, read_tensors, write_bytes
from ts_adapt.storage.layout import RESULTS, run_file

ROW: Schema = {
    "solver": str, "nfe": int, "schedule": str, "model": str, "samples": int,
    **dict.fromkeys(AXES, str), "fid_data": (int, float, type(None)), "fid_teacher": (int, float),
    "distance": (int, float),
}  # fmt: skip
"""What is read of a row of results.json."""


def export_schedule(
    config: Config, source: str, kind: str, solver: str | None = None, nfe: int | None = None, out: str | None = None,
    *, progress: bool = True,
) -> str:  # fmt: skip
    """Write the schedule `source` in the format `kind` to the file `out`, or to stdout; returns the text.

    source       a name, as `schedules.resolve` has them; of a predictor the grid that it corrects is written
    solver, nfe  of a schedule that is given by name; None: the first of the config. For an NFE that was not learned the
                 grid is made of those that were (`other_steps`)

    What brings its noise schedule along needs no model, but for `timesteps` of a schedule file. Raises TsAdaptError for
    what is unknown, or has no such form.
    """
    session = Session(config, progress=progress)
    found = resolve(source, session, alone=True)
    name, taken, others = found.choose(solver, nfe, config, unlearned=True)
    made = at_other_steps(session, found, name, taken, corrected=kind == "json")
    schedule, remarks = made or found.shared(name, taken)
    remarks += [f"this is NFE {taken}{others}"] if others else []
    noise_schedule = found.noise_schedule
    if noise_schedule is None and (kind == "timesteps" or schedule.log_snr is None):
        noise_schedule = session.noise_schedule
        schedule.check_noise(noise_schedule, source)
    if kind == "json":
        schedule = _with_measurements(config, schedule)
    about = schedule.about
    named = [about.get("source") or about.get("method") or found.called, about.get("model"), schedule.solver]
    title = ", ".join([*(str(part) for part in named if part), f"NFE {schedule.nfe}"])
    text, changes = WRITERS[kind](schedule, title, noise_schedule)
    emit(text, out, [*remarks, *changes])
    return text


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
        check_schema(with_parts(row), ROW, f"a row of {path}")
        parts = parts_in(row)
        run = workspace.runs / run_file(sampler_name(row["solver"], parts), row["nfe"], row["schedule"])
        same = [row["solver"], row["nfe"], row["model"]] == [schedule.solver, schedule.nfe, about.get("model")]
        same &= parts == student.parts
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


def emit(text: str, out: str | None, remarks: list[str]) -> None:
    """Write a schedule to the file `out`, or to stdout, and say what is to be remarked."""
    for remark in remarks:
        print(f"ts-adapt: warning: {remark}", file=sys.stderr)
    if out is None:
        sys.stdout.write(text)
    else:
        write_bytes(Path(out), text.encode())
        print(out)
