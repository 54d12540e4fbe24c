"""Schedules for diffusers among the names: what one holds for a solve, and one that is made of what a name stands for.

A `LearnedScheduler` holds what was learned for one model and solver, for several NFEs; or it is a fixed family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ts_adapt import zoo
from ts_adapt.assembly import build_solver
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import TimeGrid
from ts_adapt.schedules.file import ABOUT, LearnedGrid, in_common
from ts_adapt.schedules.name import FIXED
from ts_adapt.schedules.resolve import ANY, SCHEDULER, Found, Predicted, Shelf

LEARNED_FOR = ("model", "shape", "guidance_scale", "other_scales", "method", "teacher", "distance", "seed")
"""What travels along of that which is known of a schedule."""


def find_scheduler(shelf: Shelf, name: str, *, alone: bool) -> Found:
    """What a shelf gives for the name of a schedule for diffusers; unless `alone`, one for another noise is refused."""
    from ts_adapt.denoisers.scheduler_config import differences
    from ts_adapt.schedulers.scheduler import LearnedScheduler

    schedule = LearnedScheduler.from_pretrained(zoo.schedules().get(name, name))
    own = None if schedule.known_noise is None else schedule.noise_schedule
    if own is not None and not alone:
        found = differences((own, schedule.prediction), (shelf.noise_schedule, schedule.prediction))
        if found:
            raise TsAdaptError(
                f"{name} was learned for another model, which differs in {found[0]}; give --model.name that model"
            )

    def at(solver: str, nfe: int) -> LearnedGrid | Predicted:
        noise_schedule = shelf.noise_schedule if own is None else own
        plan = schedule.source.plan(nfe, noise_schedule)
        known = {key: value for key, value in (schedule.config["learned_for"] or {}).items() if key in ABOUT}
        prediction = None if own is None else schedule.prediction
        about = {**known, "order": build_solver(solver, ANY).order, "prediction": prediction, "source": name}
        if plan.predictor is not None:
            return Predicted(plan.predictor, plan.steps, about)
        return LearnedGrid(plan.grid or TimeGrid(plan.times), solver, nfe, about)

    source, solver = schedule.source, schedule.config["solver"]
    return Found(name, SCHEDULER, at, solver, source.learned, source.own_times, own, schedule)


def make_scheduler(found: Found, solver: str, nfes: Sequence[int], config: Mapping[str, Any]) -> Any:
    """What `found` has for `nfes`, as a `LearnedScheduler` for pipelines whose scheduler has this `config`."""
    from ts_adapt.schedulers.scheduler import LearnedScheduler

    if found.scheduler is not None:
        return found.scheduler
    parts = [found.at(solver, nfe) for nfe in nfes]
    known = {} if found.kind == FIXED else in_common(part.about for part in parts)
    alike = {key: known[key] for key in LEARNED_FOR if known.get(key) is not None}
    grids = [part for part in parts if isinstance(part, LearnedGrid)]
    if grids:
        return LearnedScheduler.from_schedules(grids, config, learned_for=alike)
    predictors = {part.predictor.learned: part.predictor for part in parts if isinstance(part, Predicted)}
    return LearnedScheduler.from_predictors([*predictors.values()], solver, config, learned_for=alike)
