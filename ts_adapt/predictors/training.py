"""Training of one-shot and recursive predictors.

Two losses, alone or one after the other:

    labels       regression on the oracle's grids: the squared error of the positions u in log-SNR (see `recursive`),
                 over the variance of the labels, so that 1 is what predicting their mean scores. The recursive
                 predictor sees the states that the solver meets along the label.
    end to end   the distance itself, through the solver: mean_b distance(student_b, teacher_b)

The weights kept are those of the moving average with the lowest *distance* on the validation samples, the untrained
predictor (the static grid) included: a predictor is never worse there than what it started from. The variance of the
predicted grids over samples is logged beside the labels', since end-to-end training tends to collapse it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.plots import plot_images, plot_schedules
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive, positions
from ts_adapt.search.objective import Batch, Objective, condition_rows

Predictor = OneShot | Recursive


@dataclass
class TrainOptions:
    """How a predictor is trained."""

    loss: str = "both"
    """labels, end_to_end, or both: labels first, then end to end."""
    epochs: int = 60
    """Passes over the training labels by regression."""
    end_to_end_epochs: int = 4
    """Passes through the solver."""
    batch_size: int = 32
    lr: float = 1e-3
    end_to_end_lr: float = 2e-4
    weight_decay: float = 0.05
    ema: float = 0.98
    patience: int = 20
    """Epochs without a better validation distance before a phase ends."""
    validate_every: int = 5
    """Regression epochs between two validations; end to end validates at every epoch."""
    width: int = 16
    hidden: int = 128
    seed: int = 0


@dataclass
class TrainResult:
    """Mean validation distances: of the static grid, of the trained predictor, of the labels; and the share of the
    oracle's improvement that the predictor takes."""

    static_distance: float
    distance: float
    oracle_distance: float
    epochs: int

    @property
    def share_of_oracle(self) -> float:
        room = self.static_distance - self.oracle_distance
        return (self.static_distance - self.distance) / room if room > 0 else 0.0


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
    train: Labelled,
    validation: Labelled,
    options: TrainOptions,
    folder: Path,
    *,
    progress: bool = True,
) -> TrainResult:
    """Train `predictor` in place; scalars, schedules and samples go to `folder/tensorboard`.

    Raises TsAdaptError for an unknown loss, or where there is nothing to learn (one step only).
    """
    phases = _phases(options)
    if predictor.steps < 2:
        raise TsAdaptError("a grid of one step has no free time to predict; use nfe 2 or more")
    torch.manual_seed(options.seed)
    accelerator = Accelerator(cpu=train.batch.x_T.device.type == "cpu", log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("tensorboard")
    writer = accelerator.get_tracker("tensorboard", unwrap=True)
    static = TimeGrid(predictor.static_times)
    result = TrainResult(
        static_distance=float(objective.measure(static, validation.batch).mean()),
        distance=float("inf"),
        oracle_distance=float(validation.distance.mean()),
        epochs=0,
    )
    result.distance, kept = result.static_distance, copy.deepcopy(predictor.state_dict())
    accelerator.log({"validation/distance": result.distance}, step=0)
    for loss_name, epochs, lr in phases:
        loss_of = _regression(predictor, objective, train) if loss_name == "labels" else _end_to_end(objective, train)
        average = AveragedModel(predictor, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=False)
        optimizer = torch.optim.AdamW(predictor.parameters(), lr=lr, weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        model, optimizer, schedule = accelerator.prepare(predictor, optimizer, schedule)
        generator = torch.Generator().manual_seed(options.seed)
        since_best = 0
        bar = tqdm(
            range(epochs), desc=f"{predictor.kind}, {loss_name}", unit="epoch", disable=not progress, leave=False
        )
        for epoch in bar:
            total, count = 0.0, 0
            for rows in torch.randperm(len(train.batch), generator=generator).split(options.batch_size):
                loss = loss_of(model, rows)
                optimizer.zero_grad()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                average.update_parameters(model)
                total, count = total + float(loss.detach()) * len(rows), count + len(rows)
            schedule.step()
            result.epochs += 1
            accelerator.log({f"train/{loss_name}": total / count}, step=result.epochs)
            due = loss_name != "labels" or (epoch + 1) % options.validate_every == 0 or epoch + 1 == epochs
            if not due:
                continue
            value, spread = _validate(average.module, objective, validation)
            accelerator.log({"validation/distance": value, "validation/grid_spread": spread}, step=result.epochs)
            bar.set_postfix(validation=f"{value:.5f}", static=f"{result.static_distance:.5f}")
            since_best += 1 if loss_name != "labels" else options.validate_every
            if value < result.distance:
                result.distance, kept, since_best = value, copy.deepcopy(average.module.state_dict()), 0
            if since_best >= options.patience:
                break
        predictor.load_state_dict(kept)
    _picture(writer, predictor, objective, validation, result)
    accelerator.end_training()
    return result


def _phases(options: TrainOptions) -> list[tuple[str, int, float]]:
    labels = ("labels", options.epochs, options.lr)
    through = ("end-to-end", options.end_to_end_epochs, options.end_to_end_lr)
    known = {"labels": [labels], "end_to_end": [through], "both": [labels, through]}
    if options.loss not in known:
        raise TsAdaptError(f"loss {options.loss!r} is not known; expected one of {', '.join(known)}")
    return known[options.loss]


def _regression(predictor: Predictor, objective: Objective, data: Labelled) -> Callable[[Any, Tensor], Tensor]:
    noise = objective.denoiser.noise
    u = positions(data.times, noise)
    variance = u[:, 1:-1].var(0, correction=0).mean().clamp_min(1e-6)
    if isinstance(predictor, OneShot):

        def one_shot_loss(model: Any, rows: Tensor) -> Tensor:
            batch = data.batch.rows(rows)
            predicted = positions(model(batch.x_T, batch.condition).times[:, 1:-1], noise)
            return (predicted - u[rows, 1:-1]).square().mean() / variance

        return one_shot_loss

    states, x0 = _label_states(objective, data)

    def recursive_loss(model: Any, rows: Tensor) -> Tensor:
        free = predictor.steps - 1
        index = torch.arange(free).repeat(len(rows))
        sample = rows.repeat_interleave(free)
        condition = condition_rows(data.batch.condition, sample)
        logit = predictor.share_logit(
            states[sample, index], x0[sample, index], data.times[sample, index], index, condition
        )
        predicted = u[sample, index] + torch.sigmoid(logit) * (1 - u[sample, index])
        return (predicted - u[sample, index + 1]).square().mean() / variance

    return recursive_loss


@torch.no_grad()
def _label_states(objective: Objective, data: Labelled, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """The states and x0 `(n, N, ...)` that the solver meets along each label."""
    states, x0 = [], []
    for start in range(0, len(data.batch), batch_size):
        part = data.rows(slice(start, start + batch_size))
        solution = objective.student_solution(TimeGrid(part.times), part.batch, keep_trajectory=True)
        assert solution.states is not None and solution.x0 is not None
        states.append(solution.states[:, :-1])
        x0.append(solution.x0)
    return torch.cat(states), torch.cat(x0)


def _end_to_end(objective: Objective, data: Labelled) -> Callable[[Any, Tensor], Tensor]:
    mean = data.distance.mean().clamp_min(1e-12)

    def loss(model: Any, rows: Tensor) -> Tensor:
        distances = objective(model.policy(), data.batch.rows(rows))
        finite = torch.isfinite(distances)
        return torch.where(finite, distances, torch.zeros_like(distances)).sum() / finite.sum().clamp_min(1) / mean

    return loss


@torch.no_grad()
def predicted_times(predictor: Predictor, objective: Objective, batch: Batch, batch_size: int = 128) -> Tensor:
    """The grids `(n, N+1)` that the predictor chooses."""
    parts = []
    for part in batch.split(batch_size):
        parts.append(objective.student_solution(predictor.policy(), part).times.expand(len(part), -1))
    return torch.cat(parts)


def _validate(predictor: Any, objective: Objective, validation: Labelled) -> tuple[float, float]:
    """Mean distance, and the predicted grids' standard deviation over the labels'."""
    predictor.eval()
    distance = float(objective.measure(predictor.policy(), validation.batch).mean())
    noise = objective.denoiser.noise
    predicted = positions(predicted_times(predictor, objective, validation.batch.rows(slice(0, 128))), noise)
    labels = positions(validation.times, noise)
    ratio = predicted.std(0)[1:-1].mean() / labels.std(0)[1:-1].mean().clamp_min(1e-9)
    predictor.train()
    return distance, float(ratio)


@torch.no_grad()
def _picture(
    writer: Any, predictor: Predictor, objective: Objective, validation: Labelled, result: TrainResult
) -> None:
    few = validation.rows(slice(0, 64))
    grids = {
        "static": predictor.static_times,
        predictor.kind: predicted_times(predictor, objective, few.batch),
        "oracle": few.times,
    }
    title = f"{predictor.steps} steps, {type(objective.solver).__name__}"
    writer.add_figure("schedules", plot_schedules(grids, objective.denoiser.noise, title), result.epochs)
    shown = few.rows(slice(0, 8)).batch
    rows = {name: objective.student(TimeGrid(t[:8] if t.ndim == 2 else t), shown) for name, t in grids.items()}
    rows["teacher"] = shown.target
    images = {name: objective.denoiser.decode(x) for name, x in rows.items()}
    writer.add_figure("samples", plot_images(images, title), result.epochs)
