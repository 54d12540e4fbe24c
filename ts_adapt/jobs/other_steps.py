"""Lists for a number of steps N that was not learned, and what is lost with them.

    of shared grids    that which `grids.between` makes of those that were learned
    of a predictor     that which it makes of the static grids that the predictor corrects, as times alone

What the list cannot carry of it is left out; sampled here, it carries corrections. The loss is the mean distance to the
teacher on training noises that validate, beside that of the best fixed grid of N steps and of the one learned there, if
the workspace has one; test noises have no part in it. A list of as many steps as the teacher's, or more, is not
measured: the distance to a coarser solve says nothing of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from ts_adapt.errors import TsAdaptError, TsAdaptWarning
from ts_adapt.grids.between import FURTHEST, grid_between
from ts_adapt.grids.parametric import neighbours
from ts_adapt.interfaces import StepPolicy, TimeGrid
from ts_adapt.jobs.cheaper_network import cheaper_network
from ts_adapt.jobs.search import validation_samples
from ts_adapt.jobs.session import Session, compared
from ts_adapt.predictors.store import nfes_of
from ts_adapt.remedies import command
from ts_adapt.schedules.file import LearnedGrid, in_common
from ts_adapt.schedules.name import PREDICTOR, SHARED, parse
from ts_adapt.schedules.resolve import Found, Predicted
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.storage.files import read_json
from ts_adapt.storage.layout import ALL, CONFIG

OF_ITSELF = ("seed", "measured", "made_with")
"""What is known of a grid that was learned, and not of one that is made of it."""


def between_learned(
    session: Session, found: Found, solver: str, nfe: int, *, corrected: bool
) -> tuple[LearnedGrid, list[str]] | None:
    """The list that `found` gives for `nfe`, and what is to be said of it; None where that was learned, or is any's.

    corrected  whether the list carries corrections
    """
    parts = _learned(session, found, solver, nfe)
    if not parts:
        return None
    steps, learned, lost = session.steps(solver, nfe), dict[int, TimeGrid](), dict[int, list[str]]()
    for part in parts:
        if isinstance(part, Predicted):
            learned |= {each: TimeGrid(part.predictor.static(each).cpu()) for each in part.predictor.learned}
        elif corrected and part.grid.own_rows is None:
            learned[part.grid.steps] = part.grid
        else:
            times = part.grid.times
            learned[part.grid.steps] = TimeGrid(times.mean(0) if part.grid.per_sample else times)
            lost[part.grid.steps] = [name.replace("_", " ") for name in part.grid.corrections]
    noise_schedule = found.noise_schedule or session.noise_schedule
    for part in parts:
        if isinstance(part, LearnedGrid):
            part.check_noise(noise_schedule, found.name)
    near = neighbours(learned, steps)
    known = ", ".join(map(str, near))
    without = dict.fromkeys(name for n in near for name in lost.get(n, []))
    remarks = [f"{found.name} was not learned for NFE {nfe}: this is interpolated in log-SNR from {known} steps"]
    remarks += [f"without {' and '.join(without)}, which it cannot carry"] if without else []
    alike = in_common(part.about for part in parts)
    about = {key: value for key, value in alike.items() if key not in OF_ITSELF} | {"source": found.called}
    return LearnedGrid(grid_between(learned, noise_schedule, steps), solver, nfe, about), remarks


def at_other_steps(
    session: Session, found: Found, solver: str, nfe: int, *, corrected: bool
) -> tuple[LearnedGrid, list[str]] | None:
    """`between_learned`, with what is lost by it measured, where the teacher's samples allow it."""
    made = between_learned(session, found, solver, nfe, corrected=corrected)
    if made is None:
        return None
    schedule, remarks = made
    teacher = session.config.teacher.nfe
    try:
        if nfe >= teacher:
            raise TsAdaptError(f"the teacher takes {teacher} evaluations itself")
        batch = validation_samples(session, of_predictor=found.own)
        why = f"{session.workspace.teacher('train')} has not the teacher's samples"
    except TsAdaptError as error:  # a file's, or the zoo's, needs no workspace
        batch, why = None, str(error)
    model, here = schedule.about.get("model"), session.config.model.name
    if batch is None or model != here:
        if batch is not None or model not in (None, here):
            why = f"it is for the model {model}, and the config's is {here}; give the config that it was learned with"
        return schedule, [*remarks, f"what is lost by that is unmeasured: {why}"]
    objective = session.objective(session.solver(solver))
    with cheaper_network(session, session.config.student):
        measured, said = _beside(session, objective, solver, nfe, batch, schedule.grid)
    return replace(schedule, about={**schedule.about, "measured": measured}), [*remarks, said]


def policy_at(
    session: Session, found: Found, solver: str, nfe: int, scale: float | None = None
) -> TimeGrid | StepPolicy:
    """`session.policy`; for an NFE that a grid was not learned for it is that of `between_learned`, with a warning.

    Predictors serve the NFEs that they say themselves. Raises TsAdaptError for more than FURTHEST times the most.
    """
    made = None if found.own else between_learned(session, found, solver, nfe, corrected=True)
    if made is None:
        return session.policy(found, solver, nfe, scale)
    schedule, remarks = made
    measuring = command("export", found.name, "--solver", solver, "--steps", nfe)
    most = max(part.nfe for part in _learned(session, found, solver, nfe) if isinstance(part, LearnedGrid))
    if nfe > FURTHEST * most:
        raise TsAdaptError(
            f"NFE {nfe} is more than {FURTHEST} times the most that {found.name} was learned for, {most}; {measuring} "
            "makes its grid, and measures what is lost by it"
        )
    warnings.warn(f"{'; '.join(remarks)}; {measuring} measures what is lost by it", TsAdaptWarning, stacklevel=2)
    session.compare(found.called, schedule.about, scale)
    return schedule.grid


def _learned(session: Session, found: Found, solver: str, nfe: int) -> Sequence[LearnedGrid | Predicted]:
    """What `found` has for other NFEs; nothing where it was learned for `nfe`, or for none."""
    if found.kind == PREDICTOR:
        config = session.workspace.predictor(found.name, solver, nfe) / CONFIG
        served = nfes_of(read_json(config, {})) if found.name.endswith(ALL) and config.exists() else []
        return [found.at(solver, served[0])] if served and nfe not in served else []
    nfes = session.shared_nfes(str(parse(found.name)), solver) if found.kind == SHARED else found.learned or []
    return [] if nfe in nfes else [found.at(solver, each) for each in nfes]


def _beside(
    session: Session, objective: Objective, solver: str, nfe: int, batch: Batch, grid: TimeGrid
) -> tuple[dict[str, Any], str]:
    """What a file keeps of the mean distance of `grid` over `batch`; the same said, beside the best fixed grid and a
    learned one."""
    means, starts = dict[str, float](), session.starts(session.steps(solver, nfe))
    what = f"measuring NFE {nfe} on {len(batch)} noises"
    for name, each in tqdm({"": grid, **starts}.items(), what, unit="grid", disable=not session.progress, leave=False):
        means[name] = float(objective.measure(each, batch).mean())
    distance, best = means.pop(""), min(starts, key=means.__getitem__)
    paired = {"evaluator": session.distance, "samples": len(batch), "split": "validation"}
    measured = {
        "distance": {"value": distance, **paired},
        "best_fixed_distance": {"value": means[best], **paired, "grid": best},
    }
    said = (
        f"on {len(batch)} validation noises its distance ({session.distance}) is {distance:.5f}, "
        f"{compared(distance, means[best])} the best fixed grid's {means[best]:.5f} ({best})"
    )
    if nfe in session.shared_nfes("static", solver):
        own = float(objective.measure(session.static(solver, nfe).grid, batch).mean())
        said += f", {compared(distance, own)} the {own:.5f} of the static grid learned for NFE {nfe}"
    return measured, said
