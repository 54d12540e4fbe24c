"""Training of one-shot and recursive predictors, by one loss or one after the other (`losses`, `phases`).

A predictor for several numbers of steps N is trained on all of them: in every epoch each N sees every sample once, the
batches of the different N in turn, in an order drawn anew for every round.

The weights kept are those of the moving average with the lowest mean over N of

    distance along the predicted grids / distance along the static grid               on the validation samples

where an N whose mean gain over the static grid is less than the standard error of that gain counts as 1, and is left
untrained: there the predictor stays the static grid itself. Of averages that please a discriminator the last below 1
are kept, not the lowest (`search.adversarial` has the reason). At the end the same samples choose, by the same rule, k
of each N that is served and was not trained for (`predictor`), among KEPT; of a predictor without, `choose_kept` does
that alone. The spread of what is predicted is logged (`diagnosis`). After every validation it is said what one more
pass promises (`phases.going_on`). Under accelerate or torchrun the training is data-parallel (`distributed`).
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ts_adapt.distributed import add_gradients, agree, by_rows, first, rank, share, total_of
from ts_adapt.errors import TsAdaptError, TsAdaptWarning
from ts_adapt.interfaces import StepPolicy, TimeGrid
from ts_adapt.predictors.diagnosis import chosen, draw, spread
from ts_adapt.predictors.losses import Labelled, states_along
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import (
    DRAWN,
    LOOKED_AT,
    MEASURED,
    Phase,
    TrainOptions,
    averaged,
    batches_of,
    going_on,
    kept_of,
    optimizer_of,
    phases_of,
    rate,
)
from ts_adapt.predictors.predictor import served
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.sampling import generator_for
from ts_adapt.search.adversarial import Adversary, learn, opposed
from ts_adapt.search.captions import Captions, asking
from ts_adapt.search.derivative import Agreement, Recall, nothing_kept, trusted
from ts_adapt.search.distribution import Real, forget, matching
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.work import Work
from ts_adapt.storage.checkpoint import Checkpoint

KEPT = (0.25, 0.5, 0.75, 1.0)
"""What k is chosen among, beside 0, at numbers of steps that were not learned."""
DISCRIMINATOR = "discriminator"
"""Its weights in a checkpoint."""


@dataclass
class TrainResult:
    """Mean validation distances by the number of steps: `static` along the static grid, `learned` the predictor's."""

    static: dict[int, float]
    learned: dict[int, float]
    epochs: int = 0
    agreement: Agreement | None = None
    """Of the derivatives in time with the distance, where they were compared."""
    apart: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)
    """The validation distances `(n,)` themselves, the predictor's and the static grid's, by the number of steps."""

    @property
    def relative(self) -> float:
        """The mean over N of the predictor's distance, as a share of the static grid's."""
        pairs = [(self.learned[steps], self.static[steps]) for steps in self.static]
        return sum(a / b if a < b else 1.0 for a, b in pairs) / len(pairs)

    @property
    def gain(self) -> float:
        """Share of the static grids' distance that is gone."""
        return 1 - self.relative


def as_numbers(grid: TimeGrid) -> dict[str, Any]:
    """`grid` as numbers, for what a checkpoint is of."""
    return {"times": grid.times.tolist(), **{name: value.tolist() for name, value in grid.corrections.items()}}


def surely(gain: Tensor) -> bool:
    """Whether the mean of `gain` `(n,)` is more than its standard error."""
    return float(gain.mean()) > float(gain.std()) / math.sqrt(len(gain))


def compared_in(learned: Collection[int]) -> int:
    """In which of the `learned` numbers of steps derivatives are compared."""
    return sorted(learned)[len(learned) // 2]


def train_predictor(
    predictor: OneShot | Recursive,
    objective: Objective,
    train: Batch,
    validation: Batch,
    options: TrainOptions,
    folder: Path | str,
    *,
    labels: Mapping[int, Labelled] | None = None,
    checkpoint: Path | None = None,
    derivatives: Recall = nothing_kept,
    real: Real | None = None,
    images: Tensor | None = None,
    captions: Captions | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `predictor` in place; scalars, a point a validation, schedules and samples go to TensorBoard in `folder`.

    objective   its derivative in time is used; where that is open, the one that agrees best (`search.derivative`)
    labels      what regression learns from, by the number of steps; may be fewer samples than `train`
    checkpoint  the file of a training under way: begun anew without it, continued with it, on any number of processes.
                Its name stands for what is learned from: objective, samples and labels. It stays, for the caller to
                remove once the predictor is kept
    derivatives keeps how derivatives agree, for other searches of `objective`; of no use where captions are asked for
    real        the images that `options.distribution` asks for, and `captions` what `options.caption` does; the
                distances of the result have these losses beside the paired one
    images      those that `options.adversarial` asks for, as `adversarial.seen`; no part of these distances. The
                discriminator is part of the checkpoint, and goes with it

    Raises TsAdaptError for an unknown loss, labels that are missing or have corrections, where there is nothing to
    learn (one step, and no corrections or labels), for a distribution, a discriminator or captions with regression
    alone or without images or prompts, and for the checkpoint of another predictor or of other options.
    """
    if 1 in predictor.learned and (options.loss != "end_to_end" or not predictor.options["corrections"]):
        raise TsAdaptError(
            "a grid of one step has no free time to predict; use nfe 2 or more, or learn corrections end to end"
        )
    options.check_beside()
    if options.caption:
        objective = asking(objective, captions, options.caption)
    adversary = Adversary(images, options.seed) if options.adversarial else None
    phases_of(options, predictor, dict.fromkeys(predictor.learned, objective), train, labels)  # refuses at once
    if options.distribution:
        matching(objective, real, options.distribution)  # likewise
    about = {"predictor": predictor.kind, "network": predictor.options, "options": options.of_training}
    begun = [predictor.begun[steps] for steps in predictor.learned]
    kept = Checkpoint(checkpoint, {**about, "static": [as_numbers(grid) for grid in begun]})
    derivatives = nothing_kept if options.caption else derivatives
    training = _Training(
        predictor, objective, train, validation, options, Path(folder), kept, derivatives, real, adversary
    )
    phases = phases_of(options, predictor, training.objectives, train, labels)
    for phase in phases[training.phase :]:
        training.run(phase, progress)
    training.end()
    return replace(training.result, agreement=training.agreement)


def choose_kept(
    predictor: OneShot | Recursive, objective: Objective, validation: Batch, options: TrainOptions | None = None, *,
    real: Real | None = None, captions: Captions | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:  # fmt: skip
    """Choose k of the numbers of steps of which it has not been chosen, as a training does at its end.

    validation  noises that the predictor was not trained on
    options     of the training, with `real` and `captions` as there; None: by the paired distance alone

    Returns the distances `(n,)` by the number of steps, the predictor's and the interpolated grid's.
    """
    weights = options or TrainOptions()
    asked = asking(objective, captions, weights.caption) if weights.caption else objective
    whole = matching(asked, real, weights.distribution) if weights.distribution else asked
    measured = _Measured(whole, validation, predictor.learned)
    return {steps: measured.choose(predictor, steps) for steps in predictor.without_k}


def choosing(learned: Sequence[int], validation: int) -> Work:
    """How many steps of single samples it takes to choose k between and beside the numbers of steps `learned`."""
    between = sum(steps for steps in served(learned) if steps not in learned)
    return Work(between * validation * (1 + len(KEPT)))


class _Measured:
    """Validation samples, and the objective that measures them: of each N one, with a memory of its own."""

    def __init__(self, objective: Objective, samples: Batch, learned: Sequence[int]) -> None:
        self.samples = samples
        self.objectives = {
            steps: replace(objective, distance=copy.copy(objective.distance)) for steps in served(learned)
        }

    def along(self, steps: int, schedule: StepPolicy | TimeGrid) -> Tensor:
        """The distances `(n,)` of all samples along `schedule`, of `steps` steps."""
        objective = self.objectives[steps]

        def part(rows: Tensor) -> Tensor:
            return objective.apart(schedule, self.samples.rows(rows))

        return objective.whole(by_rows(part, len(self.samples), self.samples.x_T.device))

    def choose(self, predictor: OneShot | Recursive, steps: int) -> tuple[Tensor, Tensor]:
        """Let k of `steps`, not learned, be the best there, and 0 where none gains for sure; the distances there."""
        static = self.along(steps, TimeGrid(predictor.static(steps)))
        found = {0.0: static}
        for k in KEPT:
            predictor.keep(steps, k)
            with warnings.catch_warnings(action="ignore", category=TsAdaptWarning):
                distance = self.along(steps, predictor.policy(steps))
            if surely(static - distance):
                found[k] = distance
        best = min(found, key=lambda k: float(found[k].mean()))
        predictor.keep(steps, best)
        return found[best], static


class _Training:
    """A training under way: what it works on, where it is, and the best weights so far."""

    def __init__(
        self, predictor: OneShot | Recursive, objective: Objective, train: Batch, validation: Batch,
        options: TrainOptions, folder: Path, kept: Checkpoint, derivatives: Recall, real: Real | None,
        adversary: Adversary | None,
    ) -> None:  # fmt: skip
        from accelerate import Accelerator

        self.predictor, self.objective, self.validation, self.options = predictor, objective, validation, options
        self.agreement: Agreement | None = None
        cpu = train.x_T.device.type == "cpu"
        self.accelerator = Accelerator(cpu=cpu, log_with="tensorboard", project_dir=str(folder.parent))
        self.accelerator.init_trackers(folder.name)
        self.kept, self.adversary = kept, adversary
        if options.loss != "labels":
            objective, self.agreement = trusted(
                objective, compared_in(predictor.learned), train, options.batch_size, derivatives, together=True
            )
            self.objective = objective
        whole = matching(objective, real, options.distribution) if options.distribution else objective
        if adversary is not None:
            whole = opposed(whole, adversary, options.adversarial)
        self.measured = _Measured(whole, validation, predictor.learned)
        self.objectives = self.measured.objectives
        self.static = {steps: self.measured.along(steps, predictor.begun[steps]) for steps in predictor.learned}
        means = {steps: float(values.mean()) for steps, values in self.static.items()}
        self.result = TrainResult(means, dict(means))
        for steps in predictor.learned:
            grid = predictor.begun[steps]
            predictor.standardise(steps, *states_along(objective, grid, train.rows(slice(0, MEASURED))))
        agree(predictor.state_dict().values())
        self.best = copy.deepcopy(predictor.state_dict())
        self.phase = self.epoch = self.since_best = 0
        self.curve: list[tuple[int, float]] = []
        """(epochs of this phase, share of the static grid's distance) of its validations since it was begun here."""
        states = dict.fromkeys(("weights", "average", "best"), self.best)
        parameters, lengths = [*predictor.parameters()], {"place": 4, "learned": len(means)}
        if adversary is not None:
            states[DISCRIMINATOR] = adversary.network.state_dict()
            parameters += adversary.network.parameters()
        self.found = first(lambda: kept.load(states, parameters, lengths))
        if self.found:
            self.best, progress = self.found.states["best"], self.found.progress
            self.phase, self.epoch, self.since_best, self.result.epochs = map(int, progress["place"])
            self.result.learned = dict(zip(means, progress["learned"], strict=True))
        else:
            self.log({f"distance/{steps}-steps": value for steps, value in means.items()})

    def log(self, values: Mapping[str, float]) -> None:
        self.accelerator.log({f"validation/{name}": value for name, value in values.items()}, step=self.result.epochs)

    def run(self, phase: Phase, progress: bool) -> None:
        """Train by the loss of `phase` until it ends, or nothing gets better any more; then take the best weights."""
        predictor, options = self.predictor, self.options
        loss_of = phase.loss()
        average, optimizer = averaged(predictor, options), optimizer_of(predictor, options)
        adversary = self.adversary
        optimizers = [optimizer] if adversary is None else [optimizer, adversary.optimizer]
        per_epoch = sum(-(-count // options.batch_size) for count in phase.samples.values())
        steps, done = phase.epochs * per_epoch, self.epoch * per_epoch
        if self.found:
            predictor.load_state_dict(self.found.states["weights"])
            average.module.load_state_dict(self.found.states["average"])
            average.n_averaged.fill_(done)
            self.found.give(*optimizers)
            if adversary is not None:
                adversary.network.load_state_dict(self.found.states[DISCRIMINATOR])
        bar = tqdm(
            total=steps, initial=done, desc=f"{predictor.kind}, {phase.name}", unit="step",
            disable=not (progress and rank() == 0), leave=False,
        )  # fmt: skip
        self.curve = [] if self.found else [(self.epoch, self.result.relative)]
        began, first_epoch = time.monotonic(), self.epoch
        while self.epoch < phase.epochs and self.since_best < options.patience:
            for objective in self.objectives.values():
                forget(objective)
            totals = dict.fromkeys(phase.samples, 0.0)
            generator = generator_for(options.seed, self.epoch, stream=self.phase)
            for number, rows in batches_of(phase.samples, options.batch_size, generator):
                for group in optimizer.param_groups:
                    group["lr"] = phase.lr * rate(done, steps)
                optimizer.zero_grad()
                own, kept = share(rows), kept_of(options.dropout, len(rows), predictor.options["hidden"], generator)
                if len(own):
                    with predictor.encoder.dropping(
                        None if kept is None else share(kept).to(self.validation.x_T.device)
                    ):
                        loss = loss_of(number, own)
                        loss.backward()
                    totals[number] += float(loss.detach())
                add_gradients(predictor.parameters())
                optimizer.step()
                learn(self.objectives[number], together=True)
                average.update_parameters(predictor)
                done += 1
                bar.update()
            self.epoch, self.result.epochs = self.epoch + 1, self.result.epochs + 1
            if self.epoch % phase.validate_every and self.epoch < phase.epochs:
                continue
            here = torch.tensor([*totals.values()], dtype=torch.float64, device=self.validation.x_T.device)
            sums = dict(zip(totals, total_of(here).tolist(), strict=True))
            mean = sum(sums.values()) / sum(phase.samples.values())
            means = {f"train/{phase.name}": mean} | (
                {} if adversary is None else {"train/discriminator": adversary.level}
            )
            self.accelerator.log(means, step=self.result.epochs)
            better = self.validate(average.module, phase.keeps_last)
            self.since_best = 0 if better else self.since_best + phase.validate_every
            if progress and rank() == 0:
                seconds = (time.monotonic() - began) / (self.epoch - first_epoch)
                trained = None
                if phase.validated:
                    reached = {steps: value / phase.samples[steps] for steps, value in sums.items()}
                    trained = replace(self.result, learned=reached).relative
                bar.write(f"{predictor.kind}, {phase.name}, {going_on(self.curve, seconds, trained)}")
            bar.set_postfix(best=f"{self.result.relative:.4f} of static")
            if rank() == 0:
                states = {"weights": predictor.state_dict(), "average": average.module.state_dict(), "best": self.best}
                if adversary is not None:
                    states[DISCRIMINATOR] = adversary.network.state_dict()
                place = (self.phase, self.epoch, self.since_best, self.result.epochs)
                learned = list(self.result.learned.values())
                self.kept.save(states, {"place": place, "learned": learned}, *optimizers)
        bar.close()
        predictor.load_state_dict(self.best)
        self.found, self.phase, self.epoch, self.since_best = None, self.phase + 1, 0, 0

    def validate(self, now: Any, keeps_last: bool) -> bool:
        """Whether the predictor `now` is better than all before, or if the last is kept than the static grid; if so it
        is kept, but for the N that it is bad at."""
        candidate, learned = copy.deepcopy(now), dict(self.result.static)
        for steps, static in self.static.items():
            distance = self.measured.along(steps, now.policy(steps))
            value = float(distance.mean())
            if surely(static - distance):
                learned[steps] = value
            else:
                candidate.forget(steps)
            self.log({f"distance/{steps}-steps": value})
            if rank() == 0:
                found = chosen(now, self.objective, self.validation.rows(slice(0, LOOKED_AT)), steps)
                self.log({f"spread/{what}/{steps}-steps": s for what, s in spread(*found, self.objective).items()})
        better = replace(self.result, learned=learned)
        self.log({"relative": better.relative})
        self.curve.append((self.epoch, better.relative))
        if better.relative >= (1.0 if keeps_last else self.result.relative):
            return False
        self.result, self.best = better, candidate.state_dict()
        return True

    def end(self) -> None:
        """Choose k of the numbers of steps that were not learned; measure and draw what was."""
        for steps in sorted({*self.objectives} - {*self.static}):
            self.result.apart[steps] = self.measured.choose(self.predictor, steps)
        for steps, static in self.static.items():
            self.result.apart[steps] = self.measured.along(steps, self.predictor.policy(steps)), static
        if rank() == 0:
            writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
            for steps in self.predictor.learned:
                few = self.validation.rows(slice(0, DRAWN))
                draw(writer, self.predictor, self.objective, steps, few, self.result.epochs)
        for tracker in self.accelerator.trackers:
            tracker.finish()
