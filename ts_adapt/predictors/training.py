"""Training of one-shot and recursive predictors.

Two losses, alone or one after the other:

    end to end   the distance itself, through the solver: sum_b distance(student_b, teacher_b). A row's gradient with
                 respect to what is predicted for it is shortened to a length of 1 (`shorten_gradient`)
    labels       regression on the oracle's grids: the squared error of the positions u in log-SNR (see `recursive`),
                 over the variance of the labels, so that 1 is what predicting their mean scores. The recursive
                 predictor sees the states that the solver meets along the label. Learns the times only (ALD3)

The weights kept are those of the moving average with the lowest *distance* on the validation samples; where its mean
gain over the static grid is less than the standard error of that gain, the predictor stays untrained, the static grid
itself. The spread of the predicted grids over samples is logged: without it a predictor is one more static grid.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.numerics import finite_log_snr_range
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive, positions
from ts_adapt.predictors.resume import Checkpoint
from ts_adapt.sampling import generator_for
from ts_adapt.search.objective import Batch, Objective, condition_rows

Predictor = OneShot | Recursive
Loss = Callable[[Any, Tensor], Tensor]
WARM_UP = 20
"""Steps over which the learning rate rises."""
LAST_RATE = 0.04
"""Share of the learning rate at the end of its cosine."""


@dataclass
class TrainOptions:
    """How a predictor is trained."""

    loss: str = "end_to_end"
    """end_to_end, labels (needs those of search --method per-sample), or both: labels first."""
    corrections: list[str] = field(default_factory=lambda: ["shift", "scale", "coefficients"])
    """What is predicted beside the times."""
    samples: int = 512
    """Training samples; the last fifth, at most 512, validates."""
    epochs: int = 4
    """Passes through the solver."""
    lr: float = 2e-3
    batch_size: int = 64
    label_epochs: int = 60
    """Passes over the labels."""
    label_lr: float = 1e-3
    weight_decay: float = 0.01
    ema: float = 0.98
    patience: int = 20
    """Epochs without a better validation distance before a phase ends."""
    validate_every: int = 5
    """Epochs over the labels between two validations; end to end validates at every epoch."""
    width: int = 24
    hidden: int = 128
    seed: int = 0


@dataclass
class TrainResult:
    """Mean validation distances of the static grid and of the trained predictor."""

    static_distance: float
    distance: float
    epochs: int

    @property
    def gain(self) -> float:
        """Share of the static grid's distance that is gone."""
        return 1 - self.distance / self.static_distance if self.static_distance > 0 else 0.0


@dataclass(frozen=True)
class Labelled:
    """Samples with their oracle grids `times` `(n, N+1)` and the oracle's `distance` `(n,)`."""

    batch: Batch
    times: Tensor
    distance: Tensor

    def rows(self, rows: slice | Tensor) -> Labelled:
        return Labelled(self.batch.rows(rows), self.times[rows], self.distance[rows])


def train_predictor(
    predictor: Predictor,
    objective: Objective,
    train: Batch,
    validation: Batch,
    options: TrainOptions,
    folder: Path,
    *,
    labels: Labelled | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `predictor` in place; scalars, schedules and samples go to `folder/tensorboard`.

    labels      what regression learns from; may be fewer samples than `train`
    checkpoint  the file of a training under way: begun anew without it, continued with it, removed at the end. Its
                name stands for all that the training depends on

    Raises TsAdaptError for an unknown loss, labels that are missing, or where there is nothing to learn (one step and
    no corrections).
    """
    from accelerate import Accelerator

    phases = _phases(options, labels)
    if predictor.steps < 2 and predictor.space.size == 1:
        raise TsAdaptError("a grid of one step has no free time to predict; use nfe 2 or more, or learn corrections")
    torch.manual_seed(options.seed)
    accelerator = Accelerator(cpu=train.x_T.device.type == "cpu", log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("tensorboard")
    writer = accelerator.get_tracker("tensorboard", unwrap=True)
    static = objective.measure(TimeGrid(predictor.static_times), validation)
    result = TrainResult(static_distance=float(static.mean()), distance=float(static.mean()), epochs=0)
    accelerator.log({"validation/distance": result.distance}, step=0)
    predictor.standardise(*_states(objective, TimeGrid(predictor.static_times), train.rows(slice(0, 512))))
    best, kept = copy.deepcopy(predictor.state_dict()), Checkpoint(checkpoint)
    found = kept.load(dict.fromkeys(("weights", "average", "best"), best))
    first_phase, first_epoch, since_best = (int(n) for n in found["progress"][:3]) if found else (0, 0, 0)
    if found:
        result.epochs, result.distance, best = int(found["progress"][3]), found["progress"][4], found["best"]
    for number, phase in list(enumerate(phases))[first_phase:]:
        loss_of, count = phase.loss(predictor, objective, train, labels)
        average = AveragedModel(predictor, avg_fn=_warming_average(options.ema), use_buffers=False)
        averaged: Any = average.module
        optimizer = torch.optim.AdamW(predictor.parameters(), betas=(0.9, 0.98), weight_decay=options.weight_decay)
        per_epoch = -(-count // options.batch_size)
        if found:
            predictor.load_state_dict(found["weights"])
            averaged.load_state_dict(found["average"])
            average.n_averaged.fill_(first_epoch * per_epoch)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": found["optimizer"]})
        model, optimizer = accelerator.prepare(predictor, optimizer)
        steps, done = phase.epochs * per_epoch, first_epoch * per_epoch
        bar = tqdm(
            total=steps, initial=done, desc=f"{predictor.kind}, {phase.name}", unit="step", disable=not progress,
            leave=False,
        )  # fmt: skip
        for epoch in range(first_epoch, phase.epochs):
            if since_best >= options.patience:
                break
            total, generator = 0.0, generator_for(options.seed, epoch, stream=number)
            for rows in torch.randperm(count, generator=generator).split(options.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = phase.lr * _rate(done, steps)
                loss = loss_of(model, rows)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                average.update_parameters(model)
                total, done = total + float(loss.detach()), done + 1
                bar.update()
            result.epochs += 1
            accelerator.log({f"train/{phase.name}": total / count}, step=result.epochs)
            if (epoch + 1) % phase.validate_every and epoch + 1 < phase.epochs:
                continue
            now = objective.measure(averaged.policy(), validation)
            value, gain = float(now.mean()), static - now
            spread = _spread(averaged, objective, validation.rows(slice(0, 128)))
            accelerator.log({"validation/distance": value, "validation/spread": spread}, step=result.epochs)
            bar.set_postfix(validation=f"{value:.5f}", static=f"{result.static_distance:.5f}")
            since_best += phase.validate_every
            sure = float(gain.mean()) > float(gain.std()) / len(gain) ** 0.5
            if value < result.distance and sure:
                result.distance, best, since_best = value, copy.deepcopy(averaged.state_dict()), 0
            states = {"weights": predictor.state_dict(), "average": averaged.state_dict(), "best": best}
            kept.save(states, optimizer, (number, epoch + 1, since_best, result.epochs, result.distance))
        bar.close()
        predictor.load_state_dict(best)
        found, first_epoch, since_best = None, 0, 0
    _picture(writer, predictor, objective, validation, result)
    accelerator.end_training()
    kept.remove()
    return result


def _rate(step: int, steps: int) -> float:
    """The learning rate at `step` of `steps`, over its peak: a short rise, then a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


@dataclass(frozen=True)
class _Phase:
    """One loss, for a number of epochs."""

    name: str
    epochs: int
    lr: float
    validate_every: int

    def loss(
        self, predictor: Predictor, objective: Objective, train: Batch, labels: Labelled | None
    ) -> tuple[Loss, int]:
        """(model, rows) -> the loss summed over the rows, and how many rows there are."""
        if self.name == "labels" and labels is not None:
            return _regression(predictor, objective, labels), len(labels.batch)
        return _end_to_end(objective, train), len(train)


def _phases(options: TrainOptions, labels: Labelled | None) -> list[_Phase]:
    regression = _Phase("labels", options.label_epochs, options.label_lr, options.validate_every)
    through = _Phase("end-to-end", options.epochs, options.lr, 1)
    known = {"end_to_end": [through], "labels": [regression], "both": [regression, through]}
    if options.loss not in known:
        raise TsAdaptError(f"loss {options.loss!r} is not known; expected one of {', '.join(known)}")
    if options.loss != "end_to_end" and labels is None:
        raise TsAdaptError(f"loss {options.loss!r} learns from labels, and none were given; take end_to_end")
    return known[options.loss]


def _warming_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """The exponential moving average whose memory grows with the number of steps n: min(decay, (1 + n) / (10 + n))."""

    def average(mean: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        n = int(count)
        return mean.lerp(new, 1 - min(decay, (1 + n) / (10 + n)))

    return average


def _regression(predictor: Predictor, objective: Objective, data: Labelled) -> Loss:
    noise = objective.denoiser.noise
    u = positions(data.times, noise)
    variance = u[:, 1:-1].var(0, correction=0).mean().clamp_min(1e-6)

    def squared_error(predicted: Tensor, wanted: Tensor) -> Tensor:
        return (predicted - wanted).square().mean(-1).sum() / variance

    if isinstance(predictor, OneShot):

        def one_shot_loss(model: Any, rows: Tensor) -> Tensor:
            batch = data.batch.rows(rows)
            return squared_error(positions(model(batch.x_T, batch.condition).times[:, 1:-1], noise), u[rows, 1:-1])

        return one_shot_loss

    states, x0 = _states(objective, TimeGrid(data.times), data.batch)
    free = predictor.steps - 1

    def recursive_loss(model: Any, rows: Tensor) -> Tensor:
        parts = []
        for i in range(free):
            before = x0[rows, i - 1] if i else None
            seen = predictor.picture(states[rows, i], x0[rows, i], before, data.times[rows, i])
            condition = condition_rows(data.batch.condition, rows)
            r = predictor.share(model.encoder(seen, i, condition).double(), i)
            parts.append(u[rows, i] + r * (1 - u[rows, i]))
        return squared_error(torch.stack(parts, 1), u[rows, 1:-1])

    return recursive_loss


@torch.no_grad()
def _states(objective: Objective, grid: TimeGrid, batch: Batch, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """The states `(n, N+1, ...)` and x0 `(n, N, ...)` that the solver meets along `grid`."""
    states, x0 = [], []
    for start in range(0, len(batch), batch_size):
        rows = slice(start, start + batch_size)
        solution = objective.student_solution(grid.rows(rows), batch.rows(rows), keep_trajectory=True)
        if solution.states is not None and solution.x0 is not None:
            states.append(solution.states)
            x0.append(solution.x0)
    return torch.cat(states), torch.cat(x0)


def _end_to_end(objective: Objective, data: Batch) -> Loss:
    def loss(model: Any, rows: Tensor) -> Tensor:
        distances = objective(model.policy(), data.rows(rows))
        return torch.where(torch.isfinite(distances), distances, torch.zeros_like(distances)).sum()

    return loss


@torch.no_grad()
def predicted_times(predictor: Predictor, objective: Objective, batch: Batch, batch_size: int = 128) -> Tensor:
    """The grids `(n, N+1)` that the predictor chooses."""
    parts = []
    for part in batch.split(batch_size):
        parts.append(objective.student_solution(predictor.policy(), part).times.expand(len(part), -1))
    return torch.cat(parts)


def _spread(predictor: Predictor, objective: Objective, batch: Batch) -> float:
    """Standard deviation over samples of the predicted inner times, in log-SNR; their mean."""
    if predictor.steps < 2:
        return 0.0
    low, high = finite_log_snr_range(objective.denoiser.noise)
    u = positions(predicted_times(predictor, objective, batch), objective.denoiser.noise)[:, 1:-1]
    return float(u.std(0, correction=0).mean()) * (high - low)


@torch.no_grad()
def _picture(writer: Any, predictor: Predictor, objective: Objective, validation: Batch, result: TrainResult) -> None:
    from ts_adapt.plots import plot_images, plot_schedules

    few = validation.rows(slice(0, 64))
    grids = {"static": predictor.static_times, predictor.kind: predicted_times(predictor, objective, few)}
    title = f"{predictor.steps} steps, {type(objective.solver).__name__}"
    writer.add_figure("schedules", plot_schedules(grids, objective.denoiser.noise, title), result.epochs)
    shown = few.rows(slice(0, 8))
    rows = {
        "static": objective.student(TimeGrid(predictor.static_times), shown),
        predictor.kind: objective.student(predictor.policy(), shown),
        "teacher": shown.target,
    }
    images = {name: objective.denoiser.decode(x) for name, x in rows.items()}
    writer.add_figure("samples", plot_images(images, title), result.epochs)
