"""import: a schedule file for a model, of a list of sigmas or timesteps from another program."""

from __future__ import annotations

import sys
from pathlib import Path

from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import TimeGrid
from ts_adapt.jobs.export import emit
from ts_adapt.jobs.session import Session
from ts_adapt.schedules.file import MAX_BYTES, LearnedGrid
from ts_adapt.schedules.formats import READERS
from ts_adapt.schedules.resolve import check_steps
from ts_adapt.storage.files import read_bytes

STDIN = "-"


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
    what = "the text on stdin" if source == STDIN else source
    data = _read(source)
    if kind is None and not data.lstrip().startswith(b"{"):
        raise TsAdaptError(
            f"{what} is no schedule file; give --format sigmas or --format timesteps if it is such a list; what was "
            "written for ComfyUI or A1111 cannot be read back"
        )
    session = Session(config)
    if kind is None or kind == "json":
        schedule, remarks = LearnedGrid.parse(data, what, session.noise_schedule), list[str]()
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
        times, remarks = READERS[kind](text, what, session.noise_schedule)
        name, grid = solver or config.solvers[0], TimeGrid(times)
        about = {**session.about(name), "method": "imported", "source": Path(what).name}
        schedule = LearnedGrid(grid, name, grid.steps * session.solver(name).evaluations_per_step, about)
    emit(schedule.text(session.noise_schedule), out, remarks)
    return schedule


def _read(source: str) -> bytes:
    if source != STDIN:
        return read_bytes(Path(source), limit=MAX_BYTES)
    if sys.stdin is None:
        raise TsAdaptError("stdin is closed; name a file in place of -, or give it the list")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise TsAdaptError(f"stdin gives more than {MAX_BYTES} bytes; that is no schedule")
    return data
