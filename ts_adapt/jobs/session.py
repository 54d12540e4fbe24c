"""One experiment at work: its objects and what its workspace holds."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ts_adapt import zoo
from ts_adapt.assembly import PUBLISHED, build_denoiser, build_distance, build_grid, build_solver, grid_names, steps_of
from ts_adapt.config import Config, StudentOptions, Workspace
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.evaluation.benchmark import OF_STUDENT
from ts_adapt.files import differing, read_json
from ts_adapt.grids.space import CORRECTIONS, corrected
from ts_adapt.interfaces import Denoiser, Solver, StepPolicy, TimeGrid, TsAdaptError, unknown
from ts_adapt.predictors.losses import Labelled
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.store import ALL, PREDICTOR_NAMES, load_predictor, nfes_of
from ts_adapt.schedule_file import Schedule
from ts_adapt.search.labels import LabelStore, start_entries
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.optimized import METHODS as OPTIMIZED
from ts_adapt.teacher.generate import ConditionSource, Prompts, class_labels_for, teacher_config
from ts_adapt.teacher.store import TEST_START, TRAIN_START, TeacherStore, condition_of

SPLITS = {"train": TRAIN_START, "test": TEST_START}
SHARED = ("static", "blackbox", *OPTIMIZED)
_STATIC, _ORACLE = (re.compile(rf"{name}(\+({'|'.join(CORRECTIONS)}))*") for name in ("static", "oracle"))


def is_shared(name: str) -> bool:
    """Whether `name` is that of a learned or optimised grid that all samples share."""
    return name in SHARED or _STATIC.fullmatch(name) is not None


def is_oracle(name: str) -> bool:
    """Whether `name` is that of grids searched for each sample, with corrections or without."""
    return _ORACLE.fullmatch(name) is not None


def check_asked(path: Path, solver: str, nfe: int, asked: str | None, asked_nfe: int | None) -> None:
    """TsAdaptError if another solver or NFE was asked for than the schedule in `path` is for."""
    if asked not in (None, solver) or asked_nfe not in (None, nfe):
        wanted = f"{asked or solver}, NFE {nfe if asked_nfe is None else asked_nfe}"
        raise TsAdaptError(
            f"{path} is for {solver}, NFE {nfe}, not for {wanted}; leave --solver and --steps out, they are for "
            "schedules given by name"
        )


class Session:
    """The objects of one experiment, built when they are first needed."""

    def __init__(self, config: Config, *, progress: bool = True) -> None:
        self.config, self.progress = config, progress
        self.workspace = Workspace.of(config)
        self.denoiser: Denoiser = build_denoiser(config.model)
        if config.guidance != 1.0:
            if not getattr(self.denoiser, "null_condition", None):
                raise TsAdaptError(
                    f"option guidance is {config.guidance:g}, but the model {config.model.name!r} has no unconditional "
                    "part to guide by; leave guidance at 1, or choose a conditional model"
                )
            self.denoiser = Guided(self.denoiser, config.guidance)
        self.noise = self.denoiser.noise
        self._batches: dict[str, tuple[TeacherStore, Batch]] = {}
        self._warned: set[Path] = set()

    def of_student(self, cacher: str, quantizer: str) -> Session:
        """The same experiment, whose schedules are those learned for the network with this cacher and quantizer."""
        other = copy.copy(self)
        other.config = replace(self.config, student=StudentOptions(cacher, quantizer))
        other.workspace = Workspace.of(other.config)
        return other

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample, without the batch."""
        return tuple(self.denoiser.shape)  # type: ignore[attr-defined]

    def condition_source(self) -> ConditionSource | None:
        """Where the teacher's conditions come from: class labels of a class-conditional model, or the prompts' file."""
        options = self.config.teacher
        if options.prompts is None:
            return class_labels_for(self.denoiser, options.label)
        encode = getattr(self.denoiser, "encode", None)
        if encode is None:
            raise TsAdaptError(f"the model {self.config.model.name!r} takes no prompts; leave teacher.prompts out")
        return Prompts.read(options.prompts, encode)

    def teacher_grid(self, nfe: int | None = None) -> TimeGrid:
        """The fine grid of the config's teacher; `nfe`: another number of evaluations than its own."""
        options = self.config.teacher
        return build_grid(options.grid, self.noise, steps_of(self.solver(options.solver), nfe or options.nfe))

    def teacher_config(self, split: str) -> dict[str, Any]:
        """Everything that the teacher's samples of `split` depend on; another config's teacher is refused by it."""
        options, model = self.config.teacher, self.config.model
        return teacher_config(
            self.denoiser, options.solver, self.teacher_grid(),
            model=model.name, seed=options.seed, first=SPLITS[split], shape=self.shape,
            shard_size=options.shard_size, batch_size=options.batch_size, condition=self.condition_source(),
            trajectory=options.trajectory, dtype=model.dtype, guidance=self.config.guidance,
        )  # fmt: skip

    def solver(self, name: str) -> Solver:
        return build_solver(name, self.noise)

    def steps(self, solver: str, nfe: int) -> int:
        """Of a solve by `solver` with `nfe` evaluations."""
        return steps_of(self.solver(solver), nfe)

    def objective(self, solver: Solver) -> Objective:
        config = self.config
        distance = build_distance(config.distance, config.model.device)
        return Objective(self.denoiser, solver, distance, config.checkpointing, config.teacher.seed)

    def fixed_grids(self, steps: int) -> dict[str, TimeGrid]:
        """The fixed grids that the config compares; else every one that fits the model, equal ones under one name."""
        wanted = self.config.evaluate.grids
        if wanted is None:
            return self.starts(steps)
        return {name: build_grid(name, self.noise, steps, rescale=self.config.rescale_published) for name in wanted}

    def starts(self, steps: int) -> dict[str, TimeGrid]:
        """Every fixed grid that fits the model, equal ones under one name: where a search may start."""
        grids: dict[str, TimeGrid] = {}
        for name in grid_names():
            try:
                grid = build_grid(name, self.noise, steps, rescale=self.config.rescale_published)
            except TsAdaptError:
                if name not in PUBLISHED:
                    raise
                continue
            if not any(torch.equal(grid.times, other.times) for other in grids.values()):
                grids[name] = grid
        return grids

    def teacher(self, split: str, count: int | None = None) -> tuple[TeacherStore, Batch]:
        """The teacher's store and the first `count` samples of `split`, on the model's device."""
        if count is not None and count < 1:
            raise TsAdaptError(f"{count} {split} samples are wanted; give at least 1")
        if split not in self._batches:
            store = TeacherStore.open(self.workspace.teacher(split), self.teacher_config(split))
            whole = range(len(store.indices))  # from the first sample on: one that is damaged is named, not left out
            data = store.load([SPLITS[split] + i for i in whole], self.config.model.device)
            batch = Batch(data["index"].cpu(), data["x_T"], data["target"], condition_of(data))
            self._batches[split] = store, batch
        store, batch = self._batches[split]
        if count is None:
            return store, batch
        if len(batch) < count:
            planned = getattr(self.config.teacher, f"{split}_samples")
            more = f" --teacher.{split}_samples {count}" if planned < count else ""
            raise TsAdaptError(
                f"{count} {split} samples are wanted, {store.folder} has {len(batch)}; make them with "
                f"`ts-adapt teach --split {split}{more}`"
            )
        return store, batch.rows(slice(0, count))

    def shared_names(self, solver: str, nfe: int) -> list[str]:
        """The shared grids that the workspace has: static, with corrections (`static+shift`), blackbox, dmn, ..."""
        kept = [path.name for path in sorted(self.workspace.learned.glob("*")) if _STATIC.fullmatch(path.name)]
        return [name for name in (*kept, *SHARED[1:]) if self.workspace.shared(name, solver, nfe).exists()]

    def shared(self, method: str, solver: str, nfe: int, *, strict: bool = False) -> Schedule:
        """The workspace's shared grid found by `method`; TsAdaptError if it is missing or of something else.

        strict  other options than the config's are an error, not a warning
        """
        path = self.workspace.shared(method, solver, nfe)
        if not path.exists():
            raise TsAdaptError(f"there is no {method} grid at {path}; make it with {command_for(method, solver, nfe)}")
        schedule = Schedule.load(path, self.noise)
        self.check_fit(path, schedule.solver, schedule.nfe, schedule.grid.steps, wanted=(solver, nfe))
        if method != "dmn":  # found without a teacher
            self.check_origin(path, schedule.about, command_for(method, solver, nfe, redo=True))
        self.check_options(path, schedule.about.get("made_with"), method, strict=strict)
        return schedule

    def static(self, solver: str, nfe: int) -> Schedule:
        """The workspace's static grid."""
        return self.shared("static", solver, nfe)

    def check_origin(self, path: Path, about: Mapping[str, Any], remedy: str) -> None:
        """TsAdaptError if what is in `path` was learned from another teacher or under another distance."""
        now = {"teacher": self.teacher("train")[0].hash, "distance": self.config.distance}
        for key, value in now.items():
            if about.get(key) != value:
                raise TsAdaptError(
                    f"{path} was learned with another {key} ({str(about.get(key))[:12]}, now {value[:12]}); "
                    f"replace it by {remedy}, or choose another `name`"
                )

    def check_options(self, path: Path, made_with: Any, result: str, *, strict: bool) -> None:
        """Say on stderr, once, that `result` in `path` was made with other options than the config's.

        made_with  what was recorded of them; of an earlier program that recorded none, nothing is said. An option that
                   the record lacks had its default
        strict     raise it as a TsAdaptError
        """
        recorded = made_with if isinstance(made_with, Mapping) else None
        if recorded is None or (path in self._warned and not strict):
            return
        others = differing(_overlaid(Config().made_with(result), recorded), self.config.made_with(result))
        if not others:
            return
        sentence = f"{path} was made with another {', '.join(others)}"
        if strict:
            raise TsAdaptError(f"{sentence}; set it back, or give --redo to replace it")
        self._warned.add(path)
        print(f"ts-adapt: warning: {sentence}; made again with --redo, it is replaced", file=sys.stderr)

    def predictor_names(self, solver: str, nfe: int) -> list[str]:
        """The predictors for `solver` and `nfe` that the workspace has."""
        found = {name: self.workspace.predictor(name, solver, nfe) / "config.json" for name in PREDICTOR_NAMES}
        there = [name for name, path in found.items() if path.exists()]
        return [name for name in there if not name.endswith(ALL) or nfe in nfes_of(read_json(found[name], {}))]

    def predictor(self, name: str, solver: str, nfe: int, *, strict: bool = False) -> OneShot | Recursive:
        """The workspace's predictor `name`; TsAdaptError if it is missing or for others; `strict` as in `shared`."""
        folder, kind = self.workspace.predictor(name, solver, nfe), name.removesuffix(ALL)
        if not (folder / "config.json").exists():
            command = command_for(name, solver, nfe)
            raise TsAdaptError(f"there is no {name} predictor in {folder}; train it with {command}")
        again = command_for(name, solver, nfe, redo=True)
        predictor, config = load_predictor(folder, self.noise)
        if predictor.kind != kind:
            raise TsAdaptError(f"{folder} holds a {predictor.kind} predictor, not a {kind} one; replace it by {again}")
        self.check_predictor(folder, predictor, config, wanted=(solver, nfe))
        self.check_origin(folder, config, again)
        if not torch.equal(predictor.static(self.steps(solver, nfe)), self.static(solver, nfe).grid.times):
            raise TsAdaptError(f"{folder} corrects another static grid than today's; replace it by {again}")
        if tuple(predictor.options["shape"]) != self.shape:
            shape = predictor.options["shape"]
            raise TsAdaptError(f"{folder} is for samples of {shape}, not {self.shape}; replace it by {again}")
        self.check_options(folder, config.get("made_with"), name, strict=strict)
        return predictor.to(self.config.model.device).eval()

    def check_predictor(
        self, folder: Path, predictor: OneShot | Recursive, config: Mapping[str, Any], *, wanted: tuple[str, int]
    ) -> None:
        """`check_fit` of what `load_predictor` read in `folder`: the NFE is among its own, with the right steps."""
        steps = dict(zip(nfes_of(config), predictor.learned, strict=False))
        one = wanted[1] if wanted[1] in steps else ", ".join(map(str, steps))
        self.check_fit(folder, config.get("solver"), one, steps.get(wanted[1], 0), wanted=wanted)

    def check_fit(self, path: Path, solver: Any, nfe: Any, steps: int, *, wanted: tuple[str, int]) -> None:
        """TsAdaptError unless what is in `path` is for the solver and NFE that are `wanted`, and has their steps."""
        if (solver, nfe) != wanted:
            raise TsAdaptError(
                f"{path} is for {solver}, NFE {nfe}, not for {wanted[0]}, NFE {wanted[1]}; remove it, or make it again "
                "with --redo"
            )
        expected = self.steps(*wanted)
        if steps != expected:
            raise TsAdaptError(
                f"{path} has {steps} steps; {wanted[0]} with NFE {wanted[1]} takes {expected}; remove it, or make it "
                "again with --redo"
            )

    def oracles(self, solver: str, nfe: int) -> list[tuple[str, ...]]:
        """The corrections with which grids of test samples were searched: none first, if without any they were too."""
        every = [chosen for count in range(len(CORRECTIONS) + 1) for chosen in combinations(CORRECTIONS, count)]
        return [each for each in every if (self.workspace.labels("test", solver, nfe, each) / "labels.json").exists()]

    def labelled(self, split: str, solver: str, nfe: int, corrections: Collection[str] = ()) -> Labelled:
        """The samples of `split` whose grids were searched, and `corrections` with them.

        Raises TsAdaptError for labels that are missing, damaged or of others.
        """
        store, batch = self.teacher(split)
        folder, result = self.workspace.labels(split, solver, nfe, corrections), corrected("per-sample", corrections)
        command = command_for(result, solver, nfe, split)
        if not (folder / "labels.json").exists():
            raise TsAdaptError(f"there are no labels in {folder}; search them with {command}")
        kept = LabelStore.open(folder, store.hash)
        start = (kept.spec.get("start") or {}).get("name", "static")
        if self.workspace.shared(start, solver, nfe).exists():
            today = start_entries(start, self.shared(start, solver, nfe).grid)
            if any(kept.spec.get(key) != value for key, value in today.items()):
                again = command_for(result, solver, nfe, split, redo=True)
                raise TsAdaptError(
                    f"{folder} was searched from another static grid than today's; replace it by {again}"
                )
        labels = kept.load()
        steps = labels.grid.steps
        self.check_fit(kept.folder, kept.spec.get("solver"), kept.spec.get("nfe"), steps, wanted=(solver, nfe))
        place = {int(i): row for row, i in enumerate(batch.index)}
        foreign = [int(i) for i in labels.index if int(i) not in place]
        if foreign:
            raise TsAdaptError(
                f"{kept.folder} has labels of sample {foreign[0]}, which is not in {store.folder}; "
                f"search them anew with {command}, or remove the labels"
            )
        rows = torch.tensor([place[int(i)] for i in labels.index])
        device = self.config.model.device
        grid = TimeGrid(
            labels.grid.times.to(device), **{name: value.to(device) for name, value in labels.grid.corrections.items()}
        )
        return Labelled(batch.rows(rows), grid, labels.distance.to(device))

    def policy(self, schedule: str, solver: str, nfe: int) -> TimeGrid | StepPolicy:
        """The schedule of that name for `solver` and `nfe`: static or a predictor of the workspace, or a fixed grid."""
        if is_shared(schedule):
            return self.shared(schedule, solver, nfe).grid
        if schedule in PREDICTOR_NAMES:
            return self.predictor(schedule, solver, nfe).policy(self.steps(solver, nfe))
        name, of, student = schedule.partition(OF_STUDENT)
        if of:
            raise TsAdaptError(
                f"{schedule} was learned for the network {student}; give its name alone, {name}, with that network as "
                "--student.cacher and --student.quantizer"
            )
        known = [*grid_names(), *SHARED, *PREDICTOR_NAMES]
        if schedule.split("+")[0] not in known:
            raise unknown("schedule", schedule, [*known, *zoo.schedules()])
        steps = steps_of(self.solver(solver), nfe)
        return build_grid(schedule, self.noise, steps, rescale=self.config.rescale_published)


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the entries of `above` in their places, groups entry by entry."""
    both = {k: _overlaid(below[k], v) if isinstance(v, dict) and k in below else v for k, v in above.items()}
    return {**below, **both}


def command_for(result: str, solver: str, nfe: int, split: str = "train", *, redo: bool = False) -> str:
    """The command that makes `result`, a shared grid, labels (per-sample) or a predictor, for `solver` and `nfe`."""
    name, *corrections = result.split("+")
    flags = ["train", "--predictor", name] if result in PREDICTOR_NAMES else ["search", "--method", name]
    flags += [f"--{name.replace('-', '_')}.corrections", ",".join(corrections)] if corrections else []
    flags += ["--split", split] if split != "train" else []
    flags += ["--solvers", solver]
    flags += ["--nfe", str(nfe)] if not result.endswith(ALL) else []
    flags += ["--redo"] if redo else []
    return f"`ts-adapt {' '.join(flags)}`"
