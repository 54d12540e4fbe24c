"""One grid for all samples (LD3: Tong et al., "Learning to Discretize Denoising Diffusion ODEs", ICLR 2025).

    logits (N,) -> softmax -> cumsum -> affine to [lambda_min, lambda_max] -> times;    minimise  mean_b L_b(times)

by minibatch Adam from the best of several starts. The loss of one sample is rugged in the logits (a sample may end in
another mode of the data), and its exact gradient says little about a step of the search. So by default the mean loss is
smoothed over Gaussian perturbations xi of the logits, one for each sample of the batch, and its gradient estimated
from forward solves alone, antithetically:

    d/dlogits E_xi mean_b L_b(logits + s xi_b)  ~  mean_b (L_b(logits + s xi_b) - L_b(logits - s xi_b)) / (2 s) xi_b

(Nesterov & Spokoiny 2017); since every sample of a batch may have a grid of its own, that costs one solve of twice the
batch. `gradient="exact"` differentiates through the solver instead, as LD3 does. What is validated is the moving
average of the parameters, in which the noise of the minibatches cancels; the grid of the lowest validation distance
is kept, so that the result is never worse there than the best start. Two options of LD3:

    model times       t'_i = t_i + w min(t_{i-1} - t_i, t_i - t_{i+1}) tanh(d_i),  t'_0 = t_0: told to the network
    soft teacher      the student may start anywhere within r = 0.001 D / N^2 of x_T (D data dimensions);
                      each visit makes one gradient step on the start, projected, kept only where the distance falls
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.interfaces import NoiseSchedule, TimeGrid, TsAdaptError, unknown
from ts_adapt.search.objective import Batch, Objective

GRADIENTS = ("smoothed", "exact")


@dataclass
class StaticOptions:
    """How the static grid is searched."""

    iterations: int = 45
    batch_size: int = 64
    lr: float = 0.08
    gradient: str = "smoothed"
    """smoothed: from perturbed grids, by forward solves alone; exact: through the solver."""
    smoothing: float = 0.2
    """s: the standard deviation of the perturbed logits."""
    clip: float = 1.0
    """Each sample's exact gradient is clipped to this norm before the mean."""
    ema: float = 0.9
    """Decay of the moving average of the parameters."""
    validate_every: int = 5
    model_times: bool = False
    """Also learn the times told to the network (LD3's decoupled set)."""
    win_rate: float = 0.5
    """w of the model times: the share of the smaller neighbouring gap that they may move."""
    soft_teacher: bool = False
    seed: int = 0


@dataclass
class StaticResult:
    """grid; its mean distance on the validation samples; the start's; (iteration, validation distance) on the way."""

    grid: TimeGrid
    distance: float
    start: str
    start_distance: float
    curve: list[tuple[int, float]] = field(default_factory=list)


class GridParameters(torch.nn.Module):
    """The unconstrained parameters of one grid: logits `(N,)`, and shifts `(N,)` of the model times if wanted."""

    def __init__(self, times: Tensor, noise: NoiseSchedule, *, model_times: bool, win_rate: float) -> None:
        super().__init__()
        self.noise, self.win_rate = noise, win_rate
        self.logits = torch.nn.Parameter(times_to_logits(times, noise).detach().clone())
        self.shift = torch.nn.Parameter(torch.zeros_like(self.logits)) if model_times else None

    def forward(self, batch: int | None = None, clip: float = 1.0) -> TimeGrid:
        """The grid `(N+1,)`; for a `batch`, as `(B, N+1)`, so that each sample's gradient is clipped to norm `clip`
        before they are averaged: a few samples with steep losses would outvote all others."""
        return self.grid(*(_per_sample(parameter, batch, clip) for parameter in self.parameters()))

    def grid(self, logits: Tensor, shift: Tensor | None = None) -> TimeGrid:
        """The grid, or grids, of given parameters `(N,)` or `(B, N)`."""
        times = logits_to_times(logits, self.noise)
        if shift is None:
            return TimeGrid(times)
        gaps = times[..., :-1] - times[..., 1:]
        room = torch.cat([torch.zeros_like(gaps[..., :1]), torch.minimum(gaps[..., :-1], gaps[..., 1:])], -1)
        return TimeGrid(times, model_times=times[..., :-1] + self.win_rate * room * torch.tanh(shift))

    def snapshot(self) -> TimeGrid:
        grid = self()
        model_times = None if grid.model_times is None else grid.model_times.detach().clone()
        return TimeGrid(grid.times.detach().clone(), model_times)


def _per_sample(parameter: Tensor, batch: int | None, clip: float) -> Tensor:
    """`(N,)` as `(B, N)`, with the gradient of a mean over the batch clipped row by row."""
    if batch is None:
        return parameter
    rows = parameter.expand(batch, -1)

    def limit(gradient: Tensor) -> Tensor:
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        norm = gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
        clipped: Tensor = gradient * (clip / batch / norm).clamp(max=1.0)
        return clipped

    if rows.requires_grad:
        rows.register_hook(limit)
    return rows


def best_start(objective: Objective, starts: Mapping[str, TimeGrid], batch: Batch) -> tuple[str, dict[str, float]]:
    """The name of the start with the least mean distance on `batch`, and every start's mean distance."""
    if not starts:
        raise TsAdaptError("the static search needs at least one grid to start from")
    means = {name: float(objective.measure(grid, batch).mean()) for name, grid in starts.items()}
    return min(means, key=lambda name: means[name]), means


def search_static(
    objective: Objective,
    train: Batch,
    validation: Batch,
    starts: Mapping[str, TimeGrid],
    options: StaticOptions,
    *,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> StaticResult:
    """Search the grid that minimises the mean distance over `train`; the best one on `validation` is returned.

    `starts` are grids of N steps by name; the search begins at the best of them on `validation`.
    """
    if options.gradient not in GRADIENTS:
        raise unknown("gradient", options.gradient, GRADIENTS)
    if options.soft_teacher and options.gradient != "exact":
        raise TsAdaptError("soft_teacher moves the starts by their exact gradient; set static.gradient to exact")
    noise = objective.denoiser.noise
    start, means = best_start(objective, starts, validation)
    if not math.isfinite(means[start]):
        raise TsAdaptError("no grid to start from gives a finite distance; try a higher precision, or more steps")
    parameters = GridParameters(
        starts[start].times.to(train.x_T.device), noise, model_times=options.model_times, win_rate=options.win_rate
    )
    average = AveragedModel(parameters, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    averaged = cast(GridParameters, average.module)
    optimizer = torch.optim.Adam(parameters.parameters(), lr=options.lr, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations, eta_min=0.05 * options.lr)
    offsets = torch.zeros_like(train.x_T) if options.soft_teacher else None
    generator = torch.Generator().manual_seed(options.seed)
    best, best_grid = means[start], TimeGrid(starts[start].times.clone())
    curve = [(0, best)]
    order: list[int] = []
    bar = tqdm(range(1, options.iterations + 1), desc="static", unit="step", disable=not progress, leave=False)
    for iteration in bar:
        size = min(options.batch_size, len(train))
        if len(order) < size:
            order = torch.randperm(len(train), generator=generator).tolist()
        rows = torch.tensor([order.pop(0) for _ in range(size)])
        batch = train.rows(rows)
        optimizer.zero_grad()
        if options.gradient == "smoothed":
            loss = _smoothed_gradient(objective, parameters, batch, options.smoothing, generator)
        else:
            loss = _exact_gradient(objective, parameters, batch, rows, offsets, options.clip)
        optimizer.step()
        average.update_parameters(parameters)
        decay.step()
        if on_step is not None:
            on_step(iteration, loss)
        if iteration % options.validate_every == 0 or iteration == options.iterations:
            grid = averaged.snapshot()
            value = float(objective.measure(grid, validation).mean())
            curve.append((iteration, value))
            bar.set_postfix(validation=f"{value:.5f}", best=f"{min(value, best):.5f}")
            if value < best:
                best, best_grid = value, grid
    return StaticResult(best_grid, best, start, means[start], curve)


def _smoothed_gradient(
    objective: Objective, parameters: GridParameters, batch: Batch, spread: float, generator: torch.Generator
) -> float:
    """Sets `.grad` from antithetic pairs of perturbed grids, one pair a sample; returns the mean distance met."""
    owned = list(parameters.parameters())
    draws = [torch.randn((len(batch), len(p)), generator=generator, dtype=p.dtype).to(p.device) for p in owned]

    def distances(sign: float) -> Tensor:
        moved = [p.detach() + sign * spread * draw for p, draw in zip(owned, draws, strict=True)]
        return objective.measure(parameters.grid(*moved), batch, len(batch)).to(owned[0].dtype)

    up, down = distances(1.0), distances(-1.0)
    slope = torch.nan_to_num((up - down) / (2 * spread), nan=0.0, posinf=0.0, neginf=0.0)
    for parameter, draw in zip(owned, draws, strict=True):
        parameter.grad = (slope[:, None] * draw).mean(0)
    return float((0.5 * (up + down)).mean())


def _exact_gradient(
    objective: Objective, parameters: GridParameters, batch: Batch, rows: Tensor, offsets: Tensor | None, clip: float
) -> float:
    """Sets `.grad` by differentiating through the solver; moves the starts `offsets` where they are soft."""
    x_T = batch.x_T if offsets is None else (batch.x_T + offsets[rows]).requires_grad_()
    distances = objective(parameters(len(batch), clip), batch, x_T)
    finite = torch.isfinite(distances)
    loss = torch.where(finite, distances, torch.zeros_like(distances)).sum() / finite.sum().clamp_min(1)
    loss.backward()
    if offsets is not None and x_T.grad is not None:
        offsets[rows] = _soft_start(objective, parameters.snapshot(), batch, offsets[rows], x_T.grad, distances)
    return float(loss.detach())


def _soft_start(
    objective: Objective, grid: TimeGrid, batch: Batch, offset: Tensor, gradient: Tensor, distances: Tensor
) -> Tensor:
    """One projected gradient step on each start, kept where the distance falls (LD3's soft teacher forcing)."""
    steps, dimensions = grid.steps, batch.x_T[0].numel()
    radius = 0.001 * dimensions / steps**2
    moved = offset - (12 / steps) * torch.nan_to_num(gradient) * len(batch)
    norm = moved.flatten(1).norm(dim=1).clamp_min(1e-12)
    moved = moved * (radius / norm).clamp(max=1.0).reshape(-1, *[1] * (moved.ndim - 1)).to(moved)
    with torch.no_grad():
        after = objective(grid, batch, batch.x_T + moved)
    better = (after < distances.detach()).reshape(-1, *[1] * (moved.ndim - 1))
    return torch.where(better, moved, offset)
