"""One experiment at work: what its workspace holds, checked against the config when it is read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt import distributed, dual_encoders
from ts_adapt.config import Config, other_options
from ts_adapt.distances import LOOKS
from ts_adapt.errors import TsAdaptError, TsAdaptWarning
from ts_adapt.evaluation.comparison import share_of_wins
from ts_adapt.evaluation.records import fingerprint
from ts_adapt.grids.corrections import CORRECTIONS, corrected
from ts_adapt.grids.parametric import neighbours
from ts_adapt.interfaces import MAX_STEPS, StepPolicy, TimeGrid
from ts_adapt.jobs.diffusers_schedules import find_scheduler
from ts_adapt.jobs.experiment import Experiment
from ts_adapt.jobs.matched_images import real_images, seen_images
from ts_adapt.jobs.minimised import captions
from ts_adapt.predictors.losses import Labelled
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.predictor import served
from ts_adapt.predictors.store import PREDICTOR_NAMES, load_predictor, nfes_of
from ts_adapt.remedies import command
from ts_adapt.schedules.file import LearnedGrid, check_about, guidance_remarks, size_remark
from ts_adapt.schedules.name import SHARED_NAMES, parse
from ts_adapt.schedules.resolve import Found, Predicted, check_steps, predicted
from ts_adapt.search.derivative import SAMPLES, Recall, comparing
from ts_adapt.search.journal import Journal
from ts_adapt.search.labels import LabelStore, start_entries
from ts_adapt.search.static_options import StaticOptions
from ts_adapt.search.work import Work
from ts_adapt.storage.files import read_json
from ts_adapt.storage.layout import ALL, CONFIG, LABELS


class Session(Experiment):
    """An experiment, and the schedules, labels and predictors in its workspace."""

    scheduler = find_scheduler
    real_images = cached_property(real_images)
    seen_images = cached_property(seen_images)
    captions = cached_property(captions)

    def __init__(self, config: Config, *, progress: bool = True) -> None:
        super().__init__(config, progress=progress)
        self._warned: set[Path] = set()

    def learned_beside(self, options: StaticOptions | TrainOptions) -> dict[str, Any]:
        """What the losses of `options` beside the paired distance need, as a search and a training take it."""
        return {
            "real": self.real_images if options.distribution else None,
            "images": self.seen_images if options.adversarial else None,
            "captions": self.captions if options.caption else None,
        }

    def derivatives(self, teacher: str, solver: str, steps: int, samples: int) -> Recall:
        """How derivatives agree in so many steps of `solver`, on the first `samples` of the `teacher` of that hash: of
        the config's network and distance, whichever search asked first."""
        student = self.config.made_with("dmn")  # of a grid that is searched without the network nothing else is left
        key = fingerprint(teacher, self.distance, student, self.config.derivative_width)
        return Journal(self.workspace.derivatives(solver, steps, min(samples, SAMPLES)), key).recall

    def comparing(self, solver: str, steps: int, samples: int) -> Work:
        """How many solves it takes to compare derivatives as `derivatives` says; none where they have been."""
        if self.workspace.derivatives(solver, steps, min(samples, SAMPLES)).exists():
            return Work()
        return comparing(self.objective(self.solver(solver)), steps, samples)

    def shared_names(self, solver: str, nfe: int) -> list[str]:
        """The shared grids that the workspace has: static, with corrections (`static+shift`), blackbox, dmn, ..."""
        static, *others = SHARED_NAMES
        kept = [path.name for path in sorted(self.workspace.learned.glob("*")) if parse(path.name).base == static]
        return [name for name in (*kept, *others) if self.workspace.shared(name, solver, nfe).exists()]

    def shared_nfes(self, method: str, solver: str) -> list[int]:
        """The NFEs for which the workspace has a shared grid found by `method`."""
        return [nfe for nfe in range(1, MAX_STEPS + 1) if self.workspace.shared(method, solver, nfe).exists()]

    def shared(self, method: str, solver: str, nfe: int, *, strict: bool = False) -> LearnedGrid:
        """The workspace's shared grid found by `method`; TsAdaptError if it is missing or of something else.

        strict  other options than the config's are an error, not a warning
        """
        path = self.workspace.shared(method, solver, nfe)
        if not path.exists():
            plain = method == "static" and bool(self.static_corrections)
            making = command_for(method, solver, nfe, plain=plain)
            raise TsAdaptError(f"there is no {method} grid at {path}; make it with {making}")
        schedule = LearnedGrid.load(path, self.noise_schedule)
        self.check_fit(path, schedule.solver, schedule.nfe, schedule.grid.steps, wanted=(solver, nfe))
        if method != "dmn":  # found without a teacher
            self.check_origin(path, schedule.about, command_for(method, solver, nfe, redo=True))
        self.check_options(path, schedule.about.get("made_with"), method, strict=strict)
        return schedule

    def static(self, solver: str, nfe: int) -> LearnedGrid:
        """The workspace's static grid."""
        return self.shared("static", solver, nfe)

    @property
    def base(self) -> str:
        """The static grid that predictors begin at: with the config's corrections, where they learn all of these."""
        fits = {*self.static_corrections} <= {*self.predicted_corrections}
        return self.static_name if fits and self.config.train.loss == "end_to_end" else "static"

    def check_origin(self, path: Path, about: Mapping[str, Any], remedy: str) -> None:
        """TsAdaptError if what is in `path` was learned from another teacher or under another distance."""
        now = {"teacher": self.teacher("train")[0].hash, "distance": self.distance}
        for key, value in now.items():
            if about.get(key) != value:
                raise TsAdaptError(
                    f"{path} was learned with another {key} ({str(about.get(key))[:12]}, now {value[:12]}); "
                    f"replace it by {remedy}, or choose another `name`"
                )

    def made_with(self, result: str) -> dict[str, Any]:
        """`Config.made_with`, with the corrections that a predictor learns, which the model decides where none are
        named."""
        made = self.config.made_with(result)
        if "train" in made:
            made["train"]["corrections"] = self.corrections_of(result.removesuffix(ALL))
        return made

    def check_options(self, path: Path, made_with: Any, result: str, *, strict: bool) -> None:
        """Say on stderr, once, that `result` in `path` was made with other options than the config's.

        made_with  what was recorded of them; TsAdaptError where that is nothing
        strict     raise it as a TsAdaptError
        """
        if not isinstance(made_with, Mapping):
            raise TsAdaptError(f"{path} has no 'made_with'; it is damaged, replace it with --redo")
        if path in self._warned and not strict:
            return
        left_open = replace(self.config.train, validation=None)
        usual = self.changed(static_validation=None, train=left_open).made_with(result)
        others = other_options(made_with, self.made_with(result), usual)
        if not others:
            return
        sentence = f"{path} was made with another {', '.join(others)}"
        if strict:
            raise TsAdaptError(
                f"{sentence}; set it back, or give --redo to replace it (the teacher's samples stay, what was learned "
                "from this is learned anew)"
            )
        self._warned.add(path)
        print(f"ts-adapt: warning: {sentence}; made again with --redo, it is replaced", file=sys.stderr)

    def check_judge(self, name: str, about: Mapping[str, Any]) -> None:
        """TsAdaptError where `name` was learned to please the very network that judges here."""
        made_with, judge, clip = about.get("made_with") or {}, self.features, self.config.evaluate.clip
        matched, asked = made_with.get("distribution"), made_with.get("caption")
        if asked and clip is not None and dual_encoders.same(asked["by"], clip):
            raise TsAdaptError(
                f"{name} was learned to please the dual encoder {clip}, which may not judge it too; give another "
                "evaluate.clip, or null"
            )
        if matched and LOOKS.get(about.get("distance", "")) == judge:
            raise TsAdaptError(
                f"{name} was learned to match a distribution in {judge} features, which may not judge it too; give "
                "another evaluate.features"
            )

    def predictor_names(self, solver: str, nfe: int) -> list[str]:
        """The predictors that the workspace has and that serve `nfe` with `solver`."""
        found = {name: self.workspace.predictor(name, solver, nfe) / CONFIG for name in PREDICTOR_NAMES}
        there = [name for name, path in found.items() if path.exists()]
        return [
            name for name in there
            if not name.endswith(ALL) or nfe in self._served(solver, nfes_of(read_json(found[name], {})))
        ]  # fmt: skip

    def _served(self, solver: str, learned: Collection[int]) -> range:
        """The NFEs that a predictor trained for `learned` serves: `served` counts steps, of `solver`."""
        each = self.solver(solver).evaluations_per_step
        steps = served([known // each for known in learned])
        return range(steps.start * each, steps.stop * each, each)

    def predictor(self, name: str, solver: str, nfe: int, *, strict: bool = False) -> Predicted:
        """The workspace's predictor `name`; TsAdaptError if it is missing or for others; `strict` as in `shared`."""
        folder, kind = self.workspace.predictor(name, solver, nfe), name.removesuffix(ALL)
        if not (folder / CONFIG).exists():
            training = command_for(name, solver, nfe)
            raise TsAdaptError(f"there is no {name} predictor in {folder}; train it with {training}")
        again = command_for(name, solver, nfe, redo=True)
        predictor, config = load_predictor(folder, self.noise_schedule)
        if predictor.kind != kind:
            raise TsAdaptError(f"{folder} holds a {predictor.kind} predictor, not a {kind} one; replace it by {again}")
        learned = dict(zip(nfes_of(config), predictor.learned, strict=False))
        every = self._served(solver, learned)
        fits = nfe in learned or (not strict and nfe in every)
        if not fits and not strict and len(learned) > 1:
            raise TsAdaptError(
                f"{folder} was learned for NFE {', '.join(map(str, learned))} and serves {every[0]} to {every[-1]}, "
                f"not {nfe}; choose one of these, or train it for more; "
                f"{command('export', name, '--solver', solver, '--steps', nfe)} makes one grid for all samples of it"
            )
        known, steps = nfe if fits else ", ".join(map(str, learned)), learned.get(nfe, self.steps(solver, nfe))
        self.check_fit(folder, config.get("solver"), known, steps, wanted=(solver, nfe))
        self.check_origin(folder, config, again)
        if not isinstance(base := config.get("base"), str):
            raise TsAdaptError(f"{folder} does not say at which grid it begins; replace it by {again}")
        for each in neighbours(learned, nfe):
            if not torch.equal(predictor.static(learned[each]), self.shared(base, solver, each).grid.times):
                raise TsAdaptError(f"{folder} corrects another static grid than today's; replace it by {again}")
        if tuple(predictor.options["shape"]) != self.seen_shape:
            shape = predictor.options["shape"]
            raise TsAdaptError(f"{folder} is for samples of {shape}, not {self.seen_shape}; replace it by {again}")
        self.check_options(folder, recorded(config), name, strict=strict)
        return predicted(predictor.to(self.config.model.device).eval(), config, solver, nfe, self)

    def check_fit(self, path: Path, solver: Any, nfe: Any, steps: int, *, wanted: tuple[str, int]) -> None:
        """TsAdaptError unless what is in `path` is for the solver and NFE that are `wanted`, and has their steps."""
        if (solver, nfe) != wanted:
            raise TsAdaptError(
                f"{path} is for {solver}, NFE {nfe}, not for {wanted[0]}, NFE {wanted[1]}; remove it, or make it again "
                "with --redo"
            )
        check_steps(path, *wanted, steps)

    def oracles(self, solver: str, nfe: int) -> list[tuple[str, ...]]:
        """The corrections with which grids of test samples were searched: none first, if without any they were too."""
        every = [chosen for count in range(len(CORRECTIONS) + 1) for chosen in combinations(CORRECTIONS, count)]
        places = [self.workspace.labels(corrected("test", each), solver, nfe) for each in every]
        return [each for each, folder in zip(every, places, strict=True) if (folder / LABELS).exists()]

    def labelled(self, split: str, solver: str, nfe: int, corrections: Collection[str] = ()) -> Labelled:
        """The samples of `split` whose grids were searched, and `corrections` with them.

        Raises TsAdaptError for labels that are missing, damaged or of others.
        """
        store, batch = self.teacher(split)
        folder = self.workspace.labels(corrected(split, corrections), solver, nfe)
        result = corrected("per-sample", corrections)
        searching = command_for(result, solver, nfe, split)
        if not (folder / LABELS).exists():
            raise TsAdaptError(f"there are no labels in {folder}; search them with {searching}")
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
                f"search them anew with {searching}, or remove the labels"
            )
        rows = torch.tensor([place[int(i)] for i in labels.index])
        device = self.config.model.device
        grid = labels.grid.mapped(lambda value, dims: value.to(device))
        return Labelled(batch.rows(rows), grid, labels.distance.to(device))

    def policy(self, found: Found, solver: str, nfe: int, scale: float | None = None) -> TimeGrid | StepPolicy:
        """Where the times of a solve, guided by `scale`, come from, along what a name stands for."""
        part = found.at(solver, nfe)
        self.compare(found.called, part.about, scale)
        if isinstance(part, LearnedGrid):
            return part.grid
        return part.predictor.to(self.config.model.device).eval().policy(part.steps)

    def announce(self, what: str, evaluations: Work) -> None:
        """Say, before the work begins, about how many evaluations of the network `what` takes; none, or --quiet: no."""
        if self.progress and evaluations.count and distributed.rank() == 0:
            print(f"{what}: about {evaluations.count:,} evaluations of the network to do", flush=True)

    def compare(self, name: str, about: Mapping[str, Any], scale: float | None = None) -> None:
        """Warn that the schedule `name` was found for another size, where that counts, or under another guidance than
        `scale`; None: than the config's.

        Raises TsAdaptError where what is known of it, `about`, is damaged.
        """
        check_about(about, name)
        if (then := about.get("shape")) and tuple(then) != tuple(self.shape):
            warnings.warn(f"of {name}: {size_remark(then, self.shape)}", TsAdaptWarning, stacklevel=2)
        by = self.guidance_scale if scale is None else scale
        for said in guidance_remarks(about, by, self.denoiser.other_scales):
            warnings.warn(f"of {name}: {said}", TsAdaptWarning, stacklevel=2)


def recorded(about: Mapping[str, Any]) -> Any:
    """What is known of the options that a result was made with; of a predictor's corrections, what its network has."""
    made, network = about.get("made_with"), about.get("network")
    if not isinstance(made, Mapping) or not isinstance(network, Mapping) or "corrections" not in network:
        return made
    train = made.get("train")
    return {**made, "train": {**train, "corrections": network["corrections"]}} if isinstance(train, Mapping) else made


def stays(path: Path, check: Callable[[], object], redo: bool) -> bool:
    """Whether there is a result in `path` that stays; where `check` raises, it does not with `redo`."""
    if not path.exists():
        return False
    try:
        check()
    except TsAdaptError:
        if not redo:
            raise
        return False
    return True


def compared(value: float, reference: float) -> str:
    """How far `value` is from `reference`, in words."""
    change = value / reference - 1 if reference > 0 else 0.0
    return f"{100 * abs(change):.1f} % {'above' if change > 0 else 'below'}"


def paired_verdict(distances: Tensor, others: Tensor) -> str:
    """How far `distances` `(n,)` are from those of the `others` on the same samples: by mean, median and wins."""
    mean, median = (compared(float(of(distances)), float(of(others))) for of in (torch.mean, torch.median))
    return f"mean {mean}, median {median}, nearer on {100 * share_of_wins(distances, others):.0f} % of {len(others)}"


def command_for(
    result: str, solver: str, nfe: int, split: str = "train", *, redo: bool = False, plain: bool = False
) -> str:
    """The command that makes `result`, a shared grid, labels (per-sample) or a predictor, for `solver` and `nfe`.

    plain  without the corrections of the config's static grid
    """
    name, *corrections = result.split("+")
    job, *flags = ["train", "--predictor", name] if result in PREDICTOR_NAMES else ["search", "--method", name]
    flags += [f"--{name.replace('-', '_')}.corrections", ",".join(corrections)] if corrections else []
    flags += ["--static.corrections", "[]"] if plain else []
    flags += ["--split", split] if split != "train" else []
    flags += ["--solvers", solver]
    flags += ["--nfe", str(nfe)] if not result.endswith(ALL) else []
    flags += ["--redo"] if redo else []
    return command(job, *flags)
