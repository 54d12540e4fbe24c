"""One grid for all samples (LD3: Tong et al., "Learning to Discretize Denoising Diffusion ODEs", ICLR 2025).

    logits (N,) -> softmax -> cumsum -> affine to [lambda_min, lambda_max] -> times;    minimise  mean_b L_b(times)

N - 1 free numbers and a mean over hundreds of samples: the mean is smooth where one sample's loss is rugged (a sample
may end in another mode of the data), and two halves of the samples agree on its shape. Three ways down, by `method`:

    lbfgs     the exact gradient of the whole mean, by L-BFGS (scipy), in some ten to twenty evaluations (the default)
    adam      the exact gradient of minibatches, by Adam, as LD3 does
    smoothed  Adam on the mean smoothed over Gaussian perturbations xi_b of the logits, antithetically, from forward
              solves alone (Nesterov & Spokoiny 2017), for what has no useful derivative in the times:
              mean_b (L_b(logits + s xi_b) - L_b(logits - s xi_b)) / (2 s) xi_b

The search begins at the best of the given grids, L-BFGS at several of them. Under Adam the moving average of the
parameters is validated, in which the noise of the minibatches cancels. The grid of the lowest distance on the
validation samples is kept, so that the result is never worse there than the best start. Two options of LD3:

    model times       t'_i = t_i + w min(t_{i-1} - t_i, t_i - t_{i+1}) tanh(d_i),  t'_0 = t_0: told to the network
    soft teacher      the student may start anywhere within r = 0.001 D / N^2 of x_T (D data dimensions); each visit
                      makes one gradient step on the start, projected, kept only where the distance falls (adam only)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.interfaces import NoiseSchedule, TimeGrid, TsAdaptError, unknown
from ts_adapt.search.objective import Batch, Objective

METHODS = ("lbfgs", "adam", "smoothed")
Bar: TypeAlias = "tqdm[Any]"
FIRST_STEP = 0.1
"""The length of L-BFGS's first trial step in the logits, before it knows any curvature."""


@dataclass
class StaticOptions:
    """How the static grid is searched."""

    method: str = "lbfgs"
    """lbfgs: exact gradient of all samples; adam: of minibatches; smoothed: from perturbed grids, forward only."""
    iterations: int = 20
    starts: int = 2
    """lbfgs: how many of the grids to start from, the best ones, are searched."""
    tolerance: float = 1e-4
    """lbfgs: stops when the mean distance falls by less than this share."""
    batch_size: int = 64
    """adam, smoothed: of a minibatch; lbfgs: of the parts whose gradients are summed."""
    lr: float = 0.08
    smoothing: float = 0.2
    """smoothed: s, the standard deviation of the perturbed logits."""
    clip: float = 1.0
    """adam: each sample's gradient is clipped to this norm before the mean."""
    ema: float = 0.9
    """adam, smoothed: decay of the moving average of the parameters."""
    validate_every: int = 5
    """adam, smoothed: iterations; lbfgs validates after each."""
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

    `starts` are grids of N steps by name; the best on `validation` is the one that the result is measured against.
    Raises TsAdaptError for an unknown method, for soft teaching without minibatches of exact gradients, and if no
    start has a finite distance.
    """
    if options.method not in METHODS:
        raise unknown("static.method", options.method, METHODS)
    if options.soft_teacher and options.method != "adam":
        raise TsAdaptError("soft_teacher moves the starts by their gradient at each visit; set static.method to adam")
    noise = objective.denoiser.noise
    start, means = best_start(objective, starts, validation)
    if not math.isfinite(means[start]):
        raise TsAdaptError("no grid to start from gives a finite distance; try a higher precision, or more steps")
    track = _Track(objective, validation, starts[start].times, means[start], on_step)
    finite = [name for name in sorted(means, key=lambda name: means[name]) if math.isfinite(means[name])]
    for name in finite[: options.starts if options.method == "lbfgs" else 1]:
        times = starts[name].times.to(train.x_T.device)
        parameters = GridParameters(times, noise, model_times=options.model_times, win_rate=options.win_rate)
        descend = _descend_lbfgs if options.method == "lbfgs" else _descend_adam
        with tqdm(total=options.iterations, desc=f"static from {name}", disable=not progress, leave=False) as bar:
            descend(objective, train, parameters, options, track, bar)
    return StaticResult(track.grid, track.distance, start, means[start], track.curve)


class _Track:
    """The best grid on the validation samples so far, and the curve of what was validated."""

    def __init__(
        self, objective: Objective, validation: Batch, times: Tensor, distance: float,
        on_step: Callable[[int, float], None] | None,
    ) -> None:  # fmt: skip
        self.objective, self.validation, self.on_step = objective, validation, on_step
        self.grid, self.distance, self.curve, self.steps = TimeGrid(times.clone()), distance, [(0, distance)], 0

    def step(self, loss: float) -> None:
        self.steps += 1
        if self.on_step is not None:
            self.on_step(self.steps, loss)

    def validate(self, grid: TimeGrid, bar: Bar) -> None:
        value = float(self.objective.measure(grid, self.validation).mean())
        self.curve.append((self.steps, value))
        if value < self.distance:
            self.distance, self.grid = value, grid
        bar.set_postfix(validation=f"{value:.5f}", best=f"{self.distance:.5f}")


def _descend_lbfgs(
    objective: Objective, train: Batch, parameters: GridParameters, options: StaticOptions, track: _Track, bar: Bar
) -> None:
    owned = list(parameters.parameters())
    origin = torch.nn.utils.parameters_to_vector(owned).detach()

    def set_to(place: np.ndarray) -> None:
        moved = origin + FIRST_STEP * torch.from_numpy(place).to(origin)
        torch.nn.utils.vector_to_parameters(moved, owned)

    def loss_and_gradient(place: np.ndarray) -> tuple[float, np.ndarray]:
        set_to(place)
        total, gradient = 0.0, torch.zeros_like(origin)
        for part in train.split(options.batch_size):
            loss = objective(parameters(), part).double().sum() / len(train)
            gradient += FIRST_STEP * torch.cat(torch.autograd.grad(loss, owned))
            total += float(loss.detach())
        return (total if math.isfinite(total) else math.inf), torch.nan_to_num(gradient).cpu().numpy()

    def after_iteration(intermediate_result: OptimizeResult) -> None:
        set_to(intermediate_result.x)
        track.step(float(intermediate_result.fun))
        track.validate(parameters.snapshot(), bar)
        bar.update()

    minimize(
        loss_and_gradient,
        np.zeros(len(origin)),
        jac=True,
        method="L-BFGS-B",
        callback=after_iteration,
        options={
            "maxiter": options.iterations,
            "maxfun": 3 * options.iterations,
            "maxls": 6,
            "ftol": options.tolerance,
        },
    )


def _descend_adam(
    objective: Objective,
    train: Batch,
    parameters: GridParameters,
    options: StaticOptions,
    track: _Track,
    bar: Bar,
) -> None:
    average = AveragedModel(parameters, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    averaged = cast(GridParameters, average.module)
    optimizer = torch.optim.Adam(parameters.parameters(), lr=options.lr, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations, eta_min=0.05 * options.lr)
    offsets = torch.zeros_like(train.x_T) if options.soft_teacher else None
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    for iteration in range(1, options.iterations + 1):
        size = min(options.batch_size, len(train))
        if len(order) < size:
            order = torch.randperm(len(train), generator=generator).tolist()
        rows = torch.tensor([order.pop(0) for _ in range(size)])
        batch = train.rows(rows)
        optimizer.zero_grad()
        if options.method == "smoothed":
            loss = _smoothed_gradient(objective, parameters, batch, options.smoothing, generator)
        else:
            loss = _exact_gradient(objective, parameters, batch, rows, offsets, options.clip)
        optimizer.step()
        average.update_parameters(parameters)
        decay.step()
        track.step(loss)
        bar.update()
        if iteration % options.validate_every == 0 or iteration == options.iterations:
            track.validate(averaged.snapshot(), bar)


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
