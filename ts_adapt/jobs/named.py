"""What `--schedule` and `evaluate.schedules` may name beside schedule files, the workspace's schedules, and grids:
schedules for diffusers.

    a schedule of the zoo       by its name (`zoo.schedules`)
    a folder, or a hub id       that `LearnedScheduler.save_pretrained` wrote, `export --format diffusers` too

They hold what was learned for several NFEs. `evaluate` compares all that the config names. Else, where none is asked
for, the config's is taken if it names one that is there, else the largest; `of_others` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ts_adapt import zoo
from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.load import HUB_ID
from ts_adapt.interfaces import NoiseSchedule, StepPolicy, TimeGrid, TsAdaptError, unknown
from ts_adapt.schedule_file import ABOUT, Schedule

if TYPE_CHECKING:
    from ts_adapt.schedulers.scheduler import LearnedScheduler


def is_scheduler(name: str) -> bool:
    """Whether `name` is that of a schedule for diffusers, as far as one can tell without fetching it."""
    from ts_adapt.schedulers.storage import CONFIG

    path = Path(name).expanduser()
    on_hub = HUB_ID.fullmatch(name) is not None and path.suffix != ".json" and not path.exists()
    return name in zoo.schedules() or (path / CONFIG).is_file() or on_hub


def short_name(name: str) -> str:
    """What a schedule file, or a schedule for diffusers, is called in a table: that of the file or the folder."""
    path = Path(name).expanduser().absolute()
    return path.name if is_scheduler(name) else path.stem


def load_scheduler(name: str, solver: str | None = None, noise: NoiseSchedule | None = None) -> LearnedScheduler:
    """The schedule for diffusers called `name`.

    solver  another one than the schedule's is refused
    noise   of the model; a schedule for another noise schedule is refused. One that has none yet takes any

    Raises TsAdaptError likewise for what cannot be loaded.
    """
    from ts_adapt.schedulers.noise_config import differences
    from ts_adapt.schedulers.scheduler import LearnedScheduler

    schedule: LearnedScheduler = LearnedScheduler.from_pretrained(zoo.schedules().get(name, name))
    own = schedule.config["solver"]
    if solver not in (None, own):
        raise TsAdaptError(f"{name} is for {own}, not for {solver}; leave --solver out")
    if noise is not None and schedule.known_noise is not None:
        found = differences((schedule.noise, schedule.prediction), (noise, schedule.prediction))
        if found:
            raise TsAdaptError(f"{name} was learned for another model, which differs in {found[0]}; choose its model")
    return schedule


def choose_nfe(learned: Sequence[int] | None, asked: int | None, configured: Sequence[int]) -> int:
    """The NFE `asked` for; else the one of the config, if that was `learned` (None: any), else the largest learned."""
    if asked is not None:
        return asked
    if learned is None or (len(configured) == 1 and configured[0] in learned):
        return configured[0]
    return max(learned)


def of_others(there: Sequence[int] | None, taken: int, asked: int | None) -> str:
    """What a printed line says behind the NFE that was `taken`, where others are `there` and none was `asked` for."""
    if asked is not None or there is None or set(there) == {taken}:
        return ""
    return f" (of {', '.join(map(str, there))}; --steps takes another)"


def policy_of(schedule: LearnedScheduler, nfe: int, noise: NoiseSchedule, device: str) -> StepPolicy:
    """Where the schedule's times come from in a run of `nfe` steps; TsAdaptError where it was not learned for them."""
    plan = schedule.source.plan(nfe, noise)
    if plan.predictor is not None:
        plan.predictor.to(device)
    policy: StepPolicy = plan.policy(0)
    return policy


def shared_schedule(name: str, schedule: LearnedScheduler, nfe: int) -> tuple[Schedule, list[str]]:
    """The one grid of `schedule` for `nfe` evaluations, and what it drops: of grids per sample the nominal one is left.

    Raises TsAdaptError for a schedule whose noise schedule is not known, and where it was not learned for `nfe`.
    """
    if schedule.known_noise is None:
        raise TsAdaptError(f"{name} is a fixed grid for any model; give the grid's name, {schedule.config['grid']}")
    noise, solver = schedule.noise, schedule.config["solver"]
    plan = schedule.source.plan(nfe, noise)
    grid: TimeGrid = getattr(schedule.source, "grids", {}).get(nfe, TimeGrid(plan.times))
    remarks = []
    if plan.own_times:
        grid = TimeGrid(plan.times)
        remarks = [f"{name} has a grid for each sample, which no format carries: this is the one that stands for them"]
    known = {key: value for key, value in (schedule.config["learned_for"] or {}).items() if key in ABOUT}
    about = {
        **known, "order": build_solver(solver, noise).order, "prediction": schedule.prediction, "source": name,
    }  # fmt: skip
    return Schedule(grid, solver, nfe, about, noise.log_snr(grid.times)), remarks


def shared_schedules(name: str, noise: NoiseSchedule) -> list[Schedule]:
    """The schedules in a schedule file, or in a schedule for diffusers, one for each NFE, for a model with `noise`.

    Raises TsAdaptError for what is unknown, cannot be read, is for another model, or has a grid for each sample.
    """
    if not is_scheduler(name):
        path = Path(name)
        if path.suffix != ".json" and not path.exists():
            raise unknown("schedule", name, zoo.schedules())
        return [Schedule.load(path, noise)]
    schedule = load_scheduler(name, noise=noise)
    if schedule.source.own_times or schedule.source.learned is None:
        what = "gives each sample a grid of its own" if schedule.source.own_times else "is a fixed grid"
        raise TsAdaptError(f"{name} {what}, and holds no shared learned grids, one for each NFE; give one that does")
    return [shared_schedule(name, schedule, nfe)[0] for nfe in schedule.source.learned]
