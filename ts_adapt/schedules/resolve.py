"""The one ladder from a name to a schedule, for every command that takes one.

    1  a word of the language (`name`)           a fixed grid, or what a workspace has learned
    2  the name of a schedule of the zoo
    3  a folder with a schedule for diffusers
    4  a folder with a predictor
    5  a file, or what ends in .json             a schedule file
    6  owner/name                                a schedule for diffusers on the hub

The first that fits is taken: ./static is a folder that is called like a word. Workspaces and schedules for diffusers
are above this room; they are asked of a `Shelf`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ts_adapt import zoo
from ts_adapt.assembly import AXES, build_solver, steps_of
from ts_adapt.denoisers.load import HUB_ID
from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.grids import fixed, published
from ts_adapt.interfaces import NoiseSchedule, TimeGrid
from ts_adapt.noise import RectifiedFlow
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.store import PREDICTOR_NAMES, load_predictor, made_for
from ts_adapt.remedies import command
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.schedules.name import FIXED, ORACLE, PREDICTOR, SHARED, SHARED_NAMES, fixed_name, grid_names, parse
from ts_adapt.storage.layout import CONFIG, SCHEDULER_CONFIG

FILE, FOLDER, SCHEDULER = "a schedule file", "the folder of a predictor", "a schedule for diffusers"
ANY = RectifiedFlow()
"""A noise schedule for solvers that are asked for no more than their order and evaluations a step."""


@dataclass(frozen=True)
class Predicted:
    """A predictor in a solve of `steps` steps, and what is known `about` it, as of a `LearnedGrid`."""

    predictor: OneShot | Recursive
    steps: int
    about: Mapping[str, Any]


class Shelf(Protocol):
    """Where names are looked up: a model and a `Config`, here without a workspace."""

    config: Any

    @property
    def noise_schedule(self) -> NoiseSchedule: ...

    def about(self, solver: str) -> dict[str, Any]:
        """What a schedule file says of the model and of the solver."""
        return {}

    def shared(self, name: str, solver: str, nfe: int, /) -> LearnedGrid:
        """The workspace's grid of that name; TsAdaptError where there is none."""
        raise _of_workspace(name)

    def predictor(self, name: str, solver: str, nfe: int, /) -> Predicted:
        """The workspace's predictor likewise."""
        raise _of_workspace(name)

    def scheduler(self, name: str, *, alone: bool) -> Found:
        """The schedule for diffusers that is in the zoo, in a folder or on the hub; `alone` as in `resolve`."""
        ...


@dataclass(frozen=True)
class Found:
    """What a name stands for.

    name, kind   as given, and what it is the name of
    at           (solver, NFE) -> the grid or the predictor; raises TsAdaptError where there is none for them
    solver       the only one that it is for; None: any
    learned      the NFEs that it was learned for; None: any
    own          every sample has times, or corrections, of its own
    noise_schedule   the one that it brings along
    scheduler    the schedule for diffusers, where it is one
    """

    name: str
    kind: str
    at: Callable[[str, int], LearnedGrid | Predicted]
    solver: str | None = None
    learned: Sequence[int] | None = None
    own: bool = False
    noise_schedule: NoiseSchedule | None = None
    scheduler: Any = None

    @property
    def called(self) -> str:
        """Its name in a table, or of a folder: of a place the last part, of a file without its ending."""
        path = Path(self.name).absolute()
        return {SCHEDULER: path.name, FOLDER: path.name, FILE: path.stem}.get(self.kind, self.name)

    def choose(
        self, solver: str | None, nfe: int | None, config: Any, *, unlearned: bool = False
    ) -> tuple[str, int, str]:
        """The solver and the NFE that are taken, and what is to be said of other NFEs.

        Those that are asked for by `solver` and `nfe`; else its own, or those of the `Config`: of several NFEs the one
        that the config names alone, else the largest. Raises TsAdaptError where something is asked for that it is not
        for; `unlearned`: an NFE that it was not learned for may be.
        """
        if self.solver is not None and solver not in (None, self.solver):
            raise TsAdaptError(f"{self.name} is for {self.solver}, not for {solver}; leave --solver out")
        there = list(config.nfe if self.learned is None else self.learned)
        listed = ", ".join(map(str, there))
        if self.kind == FILE and nfe not in (None, *there) and not unlearned:
            making = command("export", self.name, "--steps", nfe)
            raise TsAdaptError(
                f"{self.name} is for NFE {listed}, not for {nfe}; leave --steps out, or make one for it with {making}"
            )
        alone = len(config.nfe) == 1 and config.nfe[0] in there
        taken = nfe if nfe is not None else config.nfe[0] if alone else max(there)
        name = self.solver or solver or config.solvers[0]
        steps_of(build_solver(name, ANY), taken)
        return name, taken, f" (of {listed}; --steps takes another)" if nfe is None and {*there} != {taken} else ""

    def shared(self, solver: str, nfe: int) -> tuple[LearnedGrid, list[str]]:
        """One grid for all samples, and what it drops: of grids of their own the one that stands for them."""
        part = self.at(solver, nfe)
        if isinstance(part, LearnedGrid) and not self.own:
            return part, []
        if isinstance(part, Predicted):
            times, which = part.predictor.static(part.steps).cpu(), "the static grid that it corrects"
            about = {key: value for key, value in part.about.items() if key != "seed"} | {"method": "static"}
        else:
            times = part.grid.times.mean(0) if part.grid.per_sample else part.grid.times
            about, which = part.about, "the one that stands for them"
        remark = f"{self.name} has a grid for each sample, which only --format diffusers carries: this is {which}"
        return LearnedGrid(TimeGrid(times), solver, nfe, about), [remark]


def build_grid(name: str, noise_schedule: NoiseSchedule, steps: int, *, rescale: bool = False) -> TimeGrid:
    """The fixed grid called `name` over `steps` intervals; published tables are fitted to the noise schedule with
    `rescale`.

    `NAME+native` is the grid as published, with ends of its own; `NAME+rounded` has its times moved to the integer
    timesteps nearest in log-SNR, and is refused where two fall together. Raises TsAdaptError for an unknown name.
    """
    found = fixed_name(name)
    if found.base in published.PUBLISHED:
        table, native = published.PUBLISHED[found.base], found.native
        times = published.ays(table, noise_schedule, steps, native=native, rescale=rescale and not native)
    else:
        times = fixed.make(found.base, noise_schedule, steps, native=found.native)
    if found.rounded:
        times = published.round_to_timesteps(times, noise_schedule)
    return TimeGrid(times)


def resolve(text: str, shelf: Shelf, *, alone: bool = False) -> Found:
    """What `text` names, on `shelf`.

    alone  what brings its noise schedule along is not held against the shelf's, and needs no model

    Raises TsAdaptError for what is unknown, cannot be read, or is for another model.
    """
    name, path = parse(text), Path(os.path.expanduser(text))
    if name.student:
        raise TsAdaptError(
            f"{text} was learned for the network {name.student}; give its name alone, {replace(name, student='')}, "
            f"with that network as {' and '.join(f'--student.{axis}' for axis in AXES)}"
        )
    if name.kind == ORACLE:
        raise TsAdaptError(f"{text} is for the test samples that were searched, which evaluate compares by itself")
    words: dict[str, Any] = {FIXED: partial(_fixed, shelf), SHARED: shelf.shared, PREDICTOR: shelf.predictor}
    if name.kind in words:
        return Found(text, name.kind, partial(words[name.kind], str(name)), own=name.kind == PREDICTOR)
    if text in zoo.schedules() or (path / SCHEDULER_CONFIG).is_file():
        return shelf.scheduler(text, alone=alone)
    if path.is_dir():
        return _folder(text, path, shelf)
    if path.suffix == ".json" or path.is_file():
        file = LearnedGrid.load(path, None if alone else shelf.noise_schedule)
        check_steps(path, file.solver, file.nfe, file.grid.steps)
        return Found(text, FILE, lambda solver, nfe: file, file.solver, [file.nfe])
    if HUB_ID.fullmatch(text):
        return shelf.scheduler(text, alone=alone)
    error = unknown("schedule", text, [*grid_names(), *SHARED_NAMES, *PREDICTOR_NAMES, *zoo.schedules()])
    raise TsAdaptError(f"{error}, or a schedule file, or the folder of a predictor or of a schedule for diffusers")


def _of_workspace(name: str) -> TsAdaptError:
    return TsAdaptError(
        f"{name!r} is of a workspace; {command('export', name, '--format', 'diffusers', '--out', 'FOLDER')} writes it "
        "for pipelines, and FOLDER is the schedule to give here"
    )


def check_steps(what: Path | str, solver: str, nfe: int, steps: int) -> None:
    """TsAdaptError, naming `what`, unless `solver` spends `nfe` evaluations in `steps` steps."""
    expected = steps_of(build_solver(solver, ANY), nfe)
    if steps != expected:
        raise TsAdaptError(f"{what} has {steps} steps; {solver} with NFE {nfe} takes {expected}; make it again")


def predicted(
    predictor: OneShot | Recursive, config: Mapping[str, Any], solver: str, nfe: int, shelf: Shelf
) -> Predicted:
    """A predictor that was read with its `config`, which is what is known of it."""
    told = ("model", "guidance_scale", "other_scales", "teacher", "distance", "seed", "made_with")
    known = {key: config.get(key) for key in told if config.get(key) is not None}
    steps = steps_of(build_solver(solver, ANY), nfe)
    return Predicted(predictor, steps, {**shelf.about(solver), "method": predictor.kind, **known})


def _fixed(shelf: Shelf, name: str, solver: str, nfe: int) -> LearnedGrid:
    steps, rescale = steps_of(build_solver(solver, ANY), nfe), shelf.config.rescale_published
    grid = build_grid(name, shelf.noise_schedule, steps, rescale=rescale)
    return LearnedGrid(grid, solver, nfe, {**shelf.about(solver), "method": "fixed", "source": name})


def _folder(text: str, path: Path, shelf: Shelf) -> Found:
    """The predictor in a folder."""
    if not (path / CONFIG).is_file():
        raise TsAdaptError(f"{path} holds neither a predictor nor a schedule for diffusers; give the folder of one")
    predictor, config = load_predictor(path, shelf.noise_schedule)
    solver, nfes = made_for(config, path / CONFIG)
    for nfe, steps in zip(nfes, predictor.learned, strict=False):
        check_steps(path, solver, nfe, steps)
    return Found(text, FOLDER, lambda solver, nfe: predicted(predictor, config, solver, nfe, shelf), solver, nfes, True)
