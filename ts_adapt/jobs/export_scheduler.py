"""export --format diffusers: a folder that `LearnedScheduler.from_pretrained` loads.

    of the workspace                         every NFE of the config that is there
    a schedule file, a predictor's folder    every NFE that it is for
    a fixed grid                             its name, which serves any NFE; its times, where an NFE is asked for

Betas and prediction type are those of the model's own pipeline, which the schedule is then attached to.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ts_adapt.config import Config
from ts_adapt.denoisers.scheduler_config import differences, noise_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.published import PUBLISHED
from ts_adapt.jobs.diffusers_schedules import make_scheduler
from ts_adapt.jobs.session import Session
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.name import FIXED, PREDICTOR, SHARED, parse
from ts_adapt.schedules.resolve import resolve
from ts_adapt.storage.files import make_folder, read_bytes, read_json, write_bytes
from ts_adapt.storage.layout import CONFIG, SCHEDULER_CONFIG, TENSORS

_FILES = re.compile(rf"{re.escape(SCHEDULER_CONFIG)}|(nfe\d+/)?({re.escape(CONFIG)}|{re.escape(TENSORS)})")


def export_scheduler(
    config: Config, source: str, solver: str | None = None, nfe: int | None = None, out: str | None = None
) -> Path:
    """Write the schedule `source` as a `LearnedScheduler` to the folder `out`, and return it.

    source  a name, as `schedules.resolve` has them
    solver  of a schedule given by name; None: the first of the config
    nfe     the only one that is written; None: all of the config's `nfe` that are there

    A schedule that is in `out` already is replaced. Raises TsAdaptError for a folder that holds anything else, for a
    model that is in no pipeline, and where nothing was learned.
    """
    if out is None:
        raise TsAdaptError("a schedule for diffusers is a folder of files; name it with --out FOLDER")
    folder = Path(out)
    former = _schedule_files(folder)
    session = Session(config)
    schedule, missing = _schedule(session, source, solver, nfe, _scheduler_config(session))
    _write(schedule, folder, former)
    if missing:
        lacks = f"{source} was not learned for NFE {', '.join(map(str, missing))}, and {folder} is without"
        print(f"ts-adapt: warning: {lacks}", file=sys.stderr)
    print(folder)
    return folder


def is_for_diffusers(session: Session) -> bool:
    """Whether there is a pipeline of diffusers that schedules of the session's model can be written for."""
    try:
        return bool(_scheduler_config(session))
    except TsAdaptError:
        return False


def _scheduler_config(session: Session) -> Mapping[str, Any]:
    """The config of the scheduler in the model's pipeline, which has to mean what the session's denoiser does."""
    name, denoiser = session.config.model.name, session.denoiser
    config, prediction = denoiser.scheduler_config, denoiser.prediction
    if config is None or prediction is None:
        raise TsAdaptError(
            f"the model {name!r} is in no pipeline of diffusers, and a schedule for diffusers takes the betas and the "
            "prediction type of one; choose another model, or another --format"
        )
    found = differences((session.noise_schedule, prediction), noise_of(config))
    if found:
        raise TsAdaptError(f"no scheduler of diffusers has this noise and prediction; {name!r} differs in {found[0]}")
    return dict(config)


def _schedule(
    session: Session, source: str, solver: str | None, nfe: int | None, given: Mapping[str, Any]
) -> tuple[LearnedScheduler, list[int]]:
    """The schedule `source` for pipelines with the scheduler config `given`, and the NFEs of the config it lacks."""
    config, found = session.config, resolve(source, session)
    if found.scheduler is not None:
        raise TsAdaptError(f"{source} is a schedule for diffusers already; LearnedScheduler.from_pretrained loads it")
    name, _, _ = found.choose(solver, nfe, config)
    fitted = config.rescale_published and parse(source).base in PUBLISHED
    if found.kind == FIXED and nfe is None and not fitted:
        for count in config.nfe:
            found.at(name, count)  # which says what the family cannot do
        made: LearnedScheduler = LearnedScheduler.from_grid(source, name, given)
        return made, []
    there = wanted = [nfe] if nfe is not None else list(found.learned or config.nfe)
    if found.kind in (SHARED, PREDICTOR):
        word = str(parse(source))
        there = [n for n in wanted if word in (*session.shared_names(name, n), *session.predictor_names(name, n))]
    # where there is none, the session says how to make it
    return make_scheduler(found, name, there or wanted[:1], given), [n for n in wanted if n not in there]


def _schedule_files(folder: Path) -> list[Path]:
    """The files of the schedule in `folder`, relative to it; TsAdaptError if it holds anything else than one."""
    if folder.exists() and not folder.is_dir():
        raise TsAdaptError(f"{folder} is a file; a schedule for diffusers is a folder of files, name another")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    foreign = [file for file in files if not _FILES.fullmatch(file.as_posix())]
    if files and not foreign:
        found = read_json(folder / SCHEDULER_CONFIG) if Path(SCHEDULER_CONFIG) in files else None
        if not isinstance(found, dict) or found.get("_class_name") != LearnedScheduler.__name__:
            foreign = files
    if foreign:
        raise TsAdaptError(
            f"{folder} holds {foreign[0]}, which is of no schedule that could be replaced; name an empty folder, or "
            "one with a schedule written before"
        )
    return files


def _write(schedule: LearnedScheduler, folder: Path, former: Sequence[Path]) -> None:
    """Replace the files `former` in `folder` by those of `schedule`, each of them whole, the config last."""
    with tempfile.TemporaryDirectory() as scratch:
        schedule.save_pretrained(scratch)
        files = {path.relative_to(scratch): path for path in Path(scratch).rglob("*") if path.is_file()}
        make_folder(folder)
        for name in sorted(files, key=lambda name: name == Path(SCHEDULER_CONFIG)):
            write_bytes(folder / name, read_bytes(files[name]))
    for name in set(former) - files.keys():
        (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # where something is left in it
            (folder / name).parent.rmdir()
