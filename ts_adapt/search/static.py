"""One grid for all samples (LD3: Tong et al., "Learning to Discretize Denoising Diffusion ODEs", ICLR 2025).

    logits (N,) -> softmax -> cumsum -> affine to [lambda_min, lambda_max] -> times;    minimise  mean_b L_b(times)

A few free numbers and a mean over hundreds of samples: the mean is smooth where one sample's loss is rugged (a sample
may end in another mode of the data), and two halves of the samples agree on its shape. The ways down, by `method`:

    adam      the gradient of minibatches, of some 24 samples out of hundreds, by Adam, as LD3 and GS do
    lbfgs     the gradient of the whole mean, by L-BFGS (scipy): of few samples, and of few numbers
    smoothed  Adam on the mean smoothed over Gaussian perturbations xi_b of the logits, antithetically, from forward
              solves alone (Nesterov & Spokoiny 2017):
              mean_b (L_b(logits + s xi_b) - L_b(logits - s xi_b)) / (2 s) xi_b
    forward   CMA-ES (Hansen 2016) on the mean of all samples, from forward solves alone: for what has no useful
              derivative, and for networks too large for a backward pass
    auto      adam; forward where no derivative in time agrees with differences of the objective (`search.derivative`),
              where a pipeline tells all samples the same times, or where adam has found nothing better than its start
              (the default)

Of another `target` L_b is log L_b, or L_b capped: a few samples that end in another mode of the data decide the plain
mean, the others go by what happens to most.

The search begins at the best of the given grids, L-BFGS at several of them. Under Adam the moving average of the
parameters is validated, in which the noise of the minibatches cancels, and under CMA-ES the mean of what it draws from.
The grid of the lowest distance on the validation samples is kept, so that the result is never worse there than the
best start. Everything computed is noted in a journal, if one is given: a search that was killed goes on from there, to
the same result.

Corrections (`grids.corrections`) are learned along with the times, in their units. What may be minimised beside the
distance is in `distribution`, `adversarial` and `captions`. LD3's soft teacher, with adam only: the student may start
anywhere within r = 0.001 D / N^2 of x_T (D data dimensions); each visit makes one gradient step on the start,
projected, kept only where the distance falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ts_adapt.distances import capped, logarithm
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import Denoiser, TimeGrid
from ts_adapt.numerics import shorten_gradient, shortened
from ts_adapt.options import check_options
from ts_adapt.sampling import embedding_of, is_guided
from ts_adapt.search.adversarial import Adversary, learn, opposed
from ts_adapt.search.captions import Captions, asking
from ts_adapt.search.derivative import Agreement, Recall, trusted
from ts_adapt.search.distribution import Real, forget, matching
from ts_adapt.search.journal import Journal
from ts_adapt.search.objective import Batch, Objective, space_of
from ts_adapt.search.static_options import Method, StaticOptions

BY_GRADIENT = ("auto", "lbfgs", "adam")
Bar: TypeAlias = "tqdm[Any]"
GridAt: TypeAlias = Callable[[Tensor], TimeGrid]
"""v `(P,)` or `(B, P)`, steps from the start in `GridSpace.unit`, -> the grid there."""
CAP = 2.0
"""Medians of the best start that a distance counts for at most, where it is capped."""
FEW = 96
"""Samples that auto goes on with by forward, each of whose grids is measured on all of them; at most."""
FIRST_STEP = 0.1
"""The length of L-BFGS's first trial step in the logits, before it knows any curvature."""


@dataclass
class StaticResult:
    """grid; its mean distance on the validation samples, by `target`; the start's; (iteration, that) on the way.

    agreement  of the derivatives in time with the objective, where they were compared
    tried      what was done, in order: (method, name of the grid that it began at)
    """

    grid: TimeGrid
    distance: float
    start: str
    start_distance: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    agreement: Agreement | None = None
    tried: list[tuple[str, str]] = field(default_factory=list)

    @property
    def moved(self) -> bool:
        """Whether anything better than the start was found."""
        return self.distance < self.start_distance

    def exponential(self) -> StaticResult:
        """The distances of one whose distances are logarithms."""
        curve = [(step, math.exp(value)) for step, value in self.curve]
        distance, start_distance = math.exp(self.distance), math.exp(self.start_distance)
        return replace(self, distance=distance, start_distance=start_distance, curve=curve)

    def remarks(self) -> list[str]:
        """What there is to say of how it went, a line each."""
        lines = [] if self.agreement is None else [str(self.agreement)]
        if not self.moved:
            tried = ", ".join(f"{method} from {start}" for method, start in self.tried)
            lines.append(
                f"the search ended where it began, at {self.start}, after {tried}; it may be the best there is, "
                "or need more samples"
            )
        return lines


def best_start(objective: Objective, starts: Mapping[str, TimeGrid], batch: Batch) -> tuple[str, dict[str, float]]:
    """The name of the start with the least mean distance on `batch`, and every start's mean distance."""
    if not starts:
        raise TsAdaptError("the static search needs at least one grid to start from")
    means = {name: float(objective.measure(grid, batch).mean()) for name, grid in starts.items()}
    return min(means, key=lambda name: means[name]), means


def by_derivative(method: Method, denoiser: Denoiser) -> bool:
    """Whether a search by `method` asks for the derivative in time: not where the network is told its loop's alone,
    but by lbfgs."""
    return method in (("lbfgs",) if denoiser.loop_times_only else BY_GRADIENT)


def search_static(
    objective: Objective,
    train: Batch,
    validation: Batch,
    starts: Mapping[str, TimeGrid],
    options: StaticOptions,
    *,
    means: Mapping[str, float] | None = None,
    journal: Journal | None = None,
    derivatives: Recall | None = None,
    real: Real | None = None,
    images: Tensor | None = None,
    captions: Captions | None = None,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> StaticResult:
    """Search the grid that minimises the mean distance over `train`; the best one on `validation` is returned.

    starts   grids of N steps by name; the best on `validation` is the one that the result is measured against
    means    their mean distances on `validation`, where `best_start` has measured them before; of no use for the
             target geometric, and with `options.distribution` or `caption`
    journal  of the same search, with what it computed before it was killed; soft starts, the memory of a
             distribution and a discriminator are no part of it
    derivatives  keeps how derivatives agree, for other searches of this objective; the journal does where it is None,
             and where the target is not the mean or captions are asked for, which are other objectives
    real     the images that `options.distribution` asks for, and `captions` what `options.caption` does; what is
             validated then, and said of the result, is that loss
    images   those that `options.adversarial` asks for, as `adversarial.seen`; no part of what is validated

    Raises TsAdaptError as `options.check_beside` does, and if no start has a finite distance.
    """
    check_options(options, "static.")
    options.check_beside()
    by_data = options.distribution or options.adversarial
    if options.target == "geometric":
        objective, means = replace(objective, distance=logarithm(objective.distance)), None
    if options.target == "capped":
        known = best_start(objective, starts, validation)[1] if means is None else means
        most = CAP * float(objective.measure(starts[min(starts, key=known.__getitem__)], validation).median())
        objective, means = replace(objective, distance=capped(objective.distance, most)), None
    if options.caption:
        objective, means = asking(objective, captions, options.caption), None
    paired = objective
    if options.distribution:
        objective, means = matching(objective, real, options.distribution), None
    if options.adversarial:
        objective = opposed(objective, Adversary(images, options.seed), options.adversarial)
    if means is None:
        _, means = best_start(objective, starts, validation)
    start = min(starts, key=means.__getitem__)
    if not math.isfinite(means[start]):
        raise TsAdaptError("no grid to start from gives a finite distance; try a higher precision, or more steps")
    steps = starts[start].steps
    learned = options.corrections
    if learned is None:
        first = train.rows(slice(0, 1))
        guided = is_guided(objective.denoiser, first.x_T, first.condition)
        told = not objective.denoiser.loop_times_only
        embeds = told and embedding_of(objective.denoiser, first.x_T, first.condition) is not None
        learned = options.corrected(guided, embeds, told)
    space = space_of(objective, steps, learned, train)
    journal = Journal() if journal is None or options.soft_teacher or by_data else journal
    agreement = None
    if by_derivative(options.method, objective.denoiser):
        usual = options.target == "mean" and not options.caption
        recall = derivatives if derivatives is not None and usual else journal.recall
        taken, agreement = trusted(paired, steps, train, options.batch_size, recall)
        objective = replace(taken, distance=objective.distance, beside=objective.beside) if by_data else taken
    at_start = means[start]
    result = StaticResult(starts[start], at_start, start, at_start, [(0, at_start)], agreement)
    track = _Track(objective, validation, space, result, journal, on_step, options.adversarial > 0)

    def descend(method: Method, name: str, grid: TimeGrid, train: Batch = train) -> None:
        z = space.numbers(grid).detach().to(train.x_T.device)
        total = options.evaluations if method == "forward" else options.iterations
        result.tried.append((method, name))
        with tqdm(total=total, desc=f"static from {name}", disable=not progress, leave=False) as bar:
            DESCENTS[method](track, train, z, replace(options, method=method), bar)

    finite = [name for name in sorted(starts, key=means.__getitem__) if math.isfinite(means[name])]
    if options.method == "auto":
        if not objective.denoiser.loop_times_only and (agreement is None or agreement.leads_down):
            descend("adam", start, starts[start])
        if not result.moved:
            descend("forward", start, starts[start], train.rows(slice(0, FEW)))
    else:
        for name in finite[: options.starts if options.method == "lbfgs" else 1]:
            descend(options.method, name, starts[name])
    return result.exponential() if options.target == "geometric" else result


@dataclass
class _Track:
    """What is searched, and how far it is: in `result` the best grid on the validation samples so far, or the last that
    is better than the start where it `keeps_last`, and the curve of what was validated."""

    objective: Objective
    validation: Batch
    space: GridSpace
    result: StaticResult
    journal: Journal
    on_step: Callable[[int, float], None] | None
    keeps_last: bool
    steps: int = 0

    def step(self, loss: float) -> None:
        self.steps += 1
        if self.on_step is not None:
            self.on_step(self.steps, loss)

    def validate(self, z: Tensor, bar: Bar) -> None:
        """Measure the grid of `z`, without gradient, and keep it if it is the best so far, or good enough."""
        grid = self.space.grid(z)
        (value,) = self.journal.recall(
            z.tolist(), lambda: [float(self.objective.measure(grid, self.validation).mean())]
        )
        result = self.result
        result.curve.append((self.steps, value))
        if value < (result.start_distance if self.keeps_last else result.distance):
            result.distance, result.grid = value, grid
        bar.set_postfix(validation=f"{value:.5f}", best=f"{result.distance:.5f}")


def _descend_lbfgs(track: _Track, train: Batch, origin: Tensor, options: StaticOptions, bar: Bar) -> None:
    from scipy.optimize import minimize

    objective, space, journal = track.objective, track.space, track.journal

    def z_at(place: np.ndarray) -> Tensor:
        return origin + FIRST_STEP * torch.from_numpy(place).to(origin)

    def compute(z: Tensor) -> list[float]:
        z.requires_grad_()
        total, gradient = 0.0, torch.zeros_like(origin)
        for part in train.split(options.batch_size):
            loss = objective(space.grid(z), part).double().sum() / len(train)
            gradient += FIRST_STEP * torch.autograd.grad(loss, z)[0]
            total += float(loss.detach())
        return [total if math.isfinite(total) else math.inf, *torch.nan_to_num(gradient).tolist()]

    def loss_and_gradient(place: np.ndarray) -> tuple[float, np.ndarray]:
        z = z_at(place)
        loss, *gradient = journal.recall(z.tolist(), lambda: compute(z))
        return loss, np.array(gradient)

    def after_iteration(intermediate_result: Any) -> None:
        track.step(float(intermediate_result.fun))
        track.validate(z_at(intermediate_result.x), bar)
        bar.update()

    minimize(
        loss_and_gradient, np.zeros(len(origin)), jac=True, method="L-BFGS-B", callback=after_iteration,
        options={
            "maxiter": options.iterations, "maxfun": 3 * options.iterations, "maxls": 6, "ftol": options.tolerance
        },
    )  # fmt: skip


def _descend_adam(track: _Track, train: Batch, origin: Tensor, options: StaticOptions, bar: Bar) -> None:
    objective, unit = track.objective, track.space.unit.to(origin)
    v = torch.zeros_like(origin, requires_grad=True)
    average = torch.zeros_like(origin)
    optimizer = torch.optim.Adam([v], lr=options.lr, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations, eta_min=0.05 * options.lr)
    offsets = torch.zeros_like(train.x_T) if options.soft_teacher else None
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []

    def grid_at(v: Tensor) -> TimeGrid:
        return track.space.grid(origin + unit * v)

    def compute(rows: Tensor, draws: Tensor) -> list[float]:
        """The mean distance of a minibatch, and its gradient in `v` `(P,)`, one number after the other."""
        batch = train.rows(rows)
        if options.method == "smoothed":
            loss, gradient = _smoothed_gradient(objective, grid_at, v.detach(), batch, options.smoothing, draws)
        else:
            loss, gradient = _exact_gradient(objective, grid_at, v, batch, rows, offsets, options.clip)
        return [loss, *gradient.tolist()]

    for iteration in range(1, options.iterations + 1):
        size = min(options.batch_size, len(train))
        if len(order) < size:
            order = torch.randperm(len(train), generator=generator).tolist()
            if options.distribution:
                forget(objective)
        rows = torch.tensor([order.pop(0) for _ in range(size)])
        draws = torch.randn((size, len(v)), generator=generator, dtype=v.dtype).to(v.device)
        asked = [*rows.tolist(), *(origin + unit * v).tolist()]
        loss, *gradient = track.journal.recall(asked, partial(compute, rows, draws))
        if options.adversarial:
            learn(objective)
        v.grad = torch.tensor(gradient, dtype=v.dtype, device=v.device)
        optimizer.step()
        average.lerp_(v.detach(), 1 - options.ema if iteration > 1 else 1.0)
        decay.step()
        track.step(loss)
        bar.update()
        if iteration % options.validate_every == 0 or iteration == options.iterations:
            track.validate(origin + unit * average, bar)


def _descend_forward(track: _Track, train: Batch, origin: Tensor, options: StaticOptions, bar: Bar) -> None:
    """CMA-ES from `origin` in steps of `space.unit`; the mean of each generation's draws is validated.

    Of corrections with many numbers, those of `origin` stay: draws say nothing of so many.
    """
    from cmaes import CMA

    objective, space, journal = track.objective, track.space, track.journal

    few = space.few.to(origin.device)

    def z_at(place: np.ndarray) -> Tensor:
        z = origin.clone()
        z[few] += torch.from_numpy(place).to(origin) * space.unit.to(origin)[few]
        return z

    def measure(place: np.ndarray) -> float:
        z = z_at(place)
        (value,) = journal.recall(z.tolist(), lambda: [float(objective.measure(space.grid(z), train).mean())])
        bar.update()
        return value

    search = CMA(mean=np.zeros(int(few.sum())), sigma=options.spread, seed=options.seed)
    for _ in range(max(1, options.evaluations // search.population_size)):
        places = [search.ask() for _ in range(search.population_size)]
        values = [measure(place) for place in places]
        search.tell(list(zip(places, values, strict=True)))
        track.step(min(values))
        track.validate(z_at(search.mean), bar)
        track.validate(z_at(places[int(np.argmin(values))]), bar)


def _smoothed_gradient(
    objective: Objective, grid_at: GridAt, v: Tensor, batch: Batch, spread: float, draws: Tensor
) -> tuple[float, Tensor]:
    """The mean distance met and the gradient in `v`, from antithetic pairs of perturbed grids, one pair a sample.

    draws  xi, `(B, P)`, standard normal
    """
    up, down = (
        objective.measure(grid_at(v + sign * spread * draws), batch, len(batch)).to(v.dtype) for sign in (1, -1)
    )
    slope = torch.nan_to_num((up - down) / (2 * spread), nan=0.0, posinf=0.0, neginf=0.0)
    return float((0.5 * (up + down)).mean()), (slope[:, None] * draws).mean(0)


def _exact_gradient(
    objective: Objective, grid_at: GridAt, v: Tensor, batch: Batch, rows: Tensor, offsets: Tensor | None, clip: float
) -> tuple[float, Tensor]:
    """The mean distance and its gradient in `v`, through the solver; moves the starts `offsets` where they are soft."""
    x_T = batch.x_T if offsets is None else (batch.x_T + offsets[rows]).requires_grad_()
    rows_of_v = shorten_gradient(v.expand(len(batch), -1), clip / len(batch))  # of the mean over the batch
    distances = objective(grid_at(rows_of_v), batch, x_T)
    finite = torch.isfinite(distances)
    loss = torch.where(finite, distances, torch.zeros_like(distances)).sum() / finite.sum().clamp_min(1)
    gradient, *pull = torch.autograd.grad(loss, [v] if offsets is None else [v, x_T])
    if offsets is not None:
        offsets[rows] = _soft_start(objective, grid_at(v.detach()), batch, offsets[rows], pull[0], distances)
    return float(loss.detach()), gradient


def _soft_start(
    objective: Objective, grid: TimeGrid, batch: Batch, offset: Tensor, gradient: Tensor, distances: Tensor
) -> Tensor:
    """One projected gradient step on each start, kept where the distance falls (LD3's soft teacher forcing)."""
    steps, dimensions = grid.steps, batch.x_T[0].numel()
    moved = shortened(offset - (12 / steps) * torch.nan_to_num(gradient) * len(batch), 0.001 * dimensions / steps**2)
    with torch.no_grad():
        after = objective(grid, batch, batch.x_T + moved)
    better = (after < distances.detach()).reshape(-1, *[1] * (moved.ndim - 1))
    return torch.where(better, moved, offset)


DESCENTS = {"lbfgs": _descend_lbfgs, "adam": _descend_adam, "smoothed": _descend_adam, "forward": _descend_forward}
