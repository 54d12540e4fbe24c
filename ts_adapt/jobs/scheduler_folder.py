"""export --format diffusers: a folder that `LearnedScheduler.from_pretrained` loads.

    static, blackbox, one-shot, recursive    the workspace's, of every NFE of the config that is there
    one-shot-all, recursive-all              the workspace's, of every NFE that it serves
    a schedule file, a predictor's folder    its one NFE
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

from ts_adapt.assembly import PUBLISHED, build_grid, grid_names, steps_of
from ts_adapt.config import Config
from ts_adapt.denoisers.pipeline import noise_of
from ts_adapt.files import make_folder, read_bytes, read_json, write_bytes
from ts_adapt.interfaces import TsAdaptError, unknown
from ts_adapt.jobs.named import is_scheduler
from ts_adapt.jobs.session import SHARED, Session, check_asked, is_shared
from ts_adapt.predictors.store import ALL, PREDICTOR_NAMES, load_predictor, made_for
from ts_adapt.schedule_file import Schedule
from ts_adapt.schedulers.noise_config import differences
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedulers.storage import CONFIG

LEARNED_FOR = ("model", "method", "teacher", "distance", "seed")
"""What travels along of that which is known of a schedule."""
_FILES = re.compile(rf"{re.escape(CONFIG)}|(nfe\d+/)?(config\.json|model\.safetensors)")


def export_scheduler(
    config: Config, source: str, solver: str | None = None, nfe: int | None = None, out: str | None = None
) -> Path:
    """Write the schedule `source` as a `LearnedScheduler` to the folder `out`, and return it.

    source  a name, file or folder, as the module's head has them
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


def _scheduler_config(session: Session) -> Mapping[str, Any]:
    """The config of the scheduler in the model's pipeline, which has to mean what the session's denoiser does."""
    name, config = session.config.model.name, getattr(session.denoiser, "scheduler_config", None)
    if config is None:
        raise TsAdaptError(
            f"the model {name!r} is in no pipeline of diffusers, and a schedule for diffusers takes the betas and the "
            "prediction type of one; choose another model, or another --format"
        )
    found = differences((session.noise, session.denoiser.prediction), noise_of(config, config["_class_name"]))  # type: ignore[attr-defined]
    if found:
        raise TsAdaptError(f"no scheduler of diffusers has this noise and prediction; {name!r} differs in {found[0]}")
    return dict(config)


def _schedule(
    session: Session, source: str, solver: str | None, nfe: int | None, given: Mapping[str, Any]
) -> tuple[LearnedScheduler, list[int]]:
    """The schedule `source` for pipelines with the scheduler config `given`, and the NFEs of the config it lacks."""
    config, path, name = session.config, Path(source), solver or session.config.solvers[0]
    if is_shared(source) or source in PREDICTOR_NAMES:
        return _of_workspace(session, source, name, config.nfe if nfe is None else [nfe], given)
    if source.split("+")[0] in grid_names():
        return _fixed(session, source, name, nfe, given), []
    if is_scheduler(source):
        raise TsAdaptError(f"{source} is a schedule for diffusers already; LearnedScheduler.from_pretrained loads it")
    if path.is_dir():
        predictor, about = load_predictor(path, session.noise)
        name, there = made_for(about, path / "config.json")
        own = nfe if nfe in there else there[0]
        check_asked(path, name, own, solver, nfe)
        session.check_predictor(path, predictor, about, wanted=(name, own))
        return LearnedScheduler.from_predictors(
            predictor, about["solver"], given, learned_for=_alike([_of_predictor(about)])
        ), []
    if path.suffix == ".json" or path.is_file():
        file = Schedule.load(path, session.noise)
        check_asked(path, file.solver, file.nfe, solver, nfe)
        session.check_fit(path, file.solver, file.nfe, file.grid.steps, wanted=(file.solver, file.nfe))
        return LearnedScheduler.from_schedules(file, given, learned_for=_alike([file.about])), []
    error = unknown("schedule", source, [*grid_names(), *SHARED, *PREDICTOR_NAMES])
    raise TsAdaptError(f"{error}, or a schedule file, or a predictor's folder")


def _of_workspace(
    session: Session, kind: str, solver: str, wanted: Sequence[int], given: Mapping[str, Any]
) -> tuple[LearnedScheduler, list[int]]:
    """What was learned for the NFEs that are `wanted`, and those of them for which nothing was."""
    shared, workspace = kind not in PREDICTOR_NAMES, session.workspace
    names = session.shared_names if shared else session.predictor_names
    there = [nfe for nfe in wanted if kind in names(solver, nfe)]
    learned = there or wanted[:1]  # where there is none, the session says how to make it
    if shared:
        found = [session.shared(kind, solver, nfe) for nfe in learned]
        about = _alike([schedule.about for schedule in found])
        schedule = LearnedScheduler.from_schedules(found, given, learned_for=about)
    else:
        predictors = [session.predictor(kind, solver, nfe) for nfe in learned]
        predictors = predictors[:1] if kind.endswith(ALL) else predictors
        abouts = [read_json(workspace.predictor(kind, solver, nfe) / "config.json") for nfe in learned]
        about = _alike([_of_predictor(each) for each in abouts])
        schedule = LearnedScheduler.from_predictors(predictors, solver, given, learned_for=about)
    return schedule, [nfe for nfe in wanted if nfe not in there]


def _fixed(session: Session, name: str, solver: str, nfe: int | None, given: Mapping[str, Any]) -> LearnedScheduler:
    """The family by its name; its times where an NFE is asked for, or where a table is fitted to the model."""
    config, method = session.config, session.solver(solver)
    fitted = config.rescale_published and name.split("+")[0] in PUBLISHED
    counts = config.nfe if nfe is None else [nfe]
    grids = {n: build_grid(name, session.noise, steps_of(method, n), rescale=fitted) for n in counts}
    if nfe is None and not fitted:
        return LearnedScheduler.from_grid(name, solver, given)  # type: ignore[no-any-return]
    return LearnedScheduler.from_schedules([Schedule(grid, solver, n) for n, grid in grids.items()], given)  # type: ignore[no-any-return]


def _of_predictor(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a predictor, by the names that schedule files use."""
    former = config.get("options") or {}  # of an earlier program
    return {"method": config["kind"], "seed": former.get("seed"), **config}


def _alike(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What of `LEARNED_FOR` is known, and the same for all."""
    first, *rest = abouts
    known = {key: first[key] for key in LEARNED_FOR if first.get(key) is not None}
    return {key: value for key, value in known.items() if all(other.get(key) == value for other in rest)}


def _schedule_files(folder: Path) -> list[Path]:
    """The files of the schedule in `folder`, relative to it; TsAdaptError if it holds anything else than one."""
    if folder.exists() and not folder.is_dir():
        raise TsAdaptError(f"{folder} is a file; a schedule for diffusers is a folder of files, name another")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    foreign = [file for file in files if not _FILES.fullmatch(file.as_posix())]
    if files and not foreign:
        found = read_json(folder / CONFIG) if Path(CONFIG) in files else None
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
        for name in sorted(files, key=lambda name: name == Path(CONFIG)):
            write_bytes(folder / name, read_bytes(files[name]))
    for name in set(former) - files.keys():
        (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # where something is left in it
            (folder / name).parent.rmdir()
