"""Which start finds a sample's best grid, and what the oracle's distance is for the work spent on it.

    python benchmarks/label_search.py [--samples 32] [--nfe 5] [--budgets 8 16 32]

The search of a sample's grid is not convex. Its starts:

    static   the learned grid of all
    near     the oracle grid of the sample whose noise x_T is nearest
    alike    the oracle grid of the sample whose first x0, after one evaluation, is nearest
    other    the oracle grid of the sample that follows: what any oracle grid is worth
    random   the best of a few random perturbations of the static logits, by forward solves

"Corrected" is the search from static with the corrections that predictors learn by default beside the times (model
times, output scale, coefficients): what predictors that choose them too could reach.

Oracle grids of other samples are those of the search from static within the same budget, which whoever labels many has
at hand; of 32 samples the nearest is not near, more make it so. Strategies share a budget among their starts: what
counts is solves of N network evaluations for each sample, screening included. Beside them stands population search,
CMA-ES of optuna in the box of `search.blackbox`: one study a sample, all asked together, so that the network sees whole
batches. Its solves have no backward pass; the seconds tell what that is worth. On one thread (OMP_NUM_THREADS=1) they
are those of the processor, which other work on the machine does not touch. The last line is JSON:

    wins        share of samples in which each start ends lowest, all with half of the largest budget
    distance    strategy -> budget -> mean oracle distance over the samples / mean distance of the static grid
    seconds     strategy -> budget -> seconds a sample
    population  CMA-ES's distance / that of the search from static, at the largest budget
    corrected   the distance with corrections / that of the search from static, likewise
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from workload import grid_of, last_line, objective_on, samples_of, timed  # isort: skip  (first: it loads ts_adapt)
import optuna
import torch
from torch import Tensor

from ts_adapt import Batch, Objective, TimeGrid, search_per_sample
from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.predictors.phases import PREDICTED
from ts_adapt.search.blackbox import BlackboxOptions
from ts_adapt.search.per_sample import LabelBatch, PerSampleOptions

STRATEGIES = {
    "static": ("static",),
    "static, near": ("static", "near"),
    "static, alike": ("static", "alike"),
    "static, random": ("static", "random"),
    "static, near, alike, random": ("static", "near", "alike", "random"),
}
"""The starts of each; `random` stands last, as in the search's own count."""
STARTS = ("static", "near", "alike", "other", "random")
POPULATION, CORRECTED = "population", "corrected"
LEAST_BUDGET = max(len(starts) + PerSampleOptions.candidates * starts.count("random") for starts in STRATEGIES.values())
"""Solves that are spent before the first gradient."""


def nearest(points: Tensor) -> Tensor:
    """For each of `points` `(B, ...)` the place of the nearest other one."""
    apart = torch.cdist(points.flatten(1), points.flatten(1))
    return apart.fill_diagonal_(torch.inf).argmin(1)


class Searches:
    """Gradient searches of the same samples from several starts."""

    def __init__(self, objective: Objective, batch: Batch, static: TimeGrid) -> None:
        self.objective, self.batch, self.static = objective, batch, static
        with torch.no_grad():
            first = objective.denoiser(batch.x_T, static.times[0])
        self.neighbours = {
            "near": nearest(batch.x_T),
            "alike": nearest(first),
            "other": torch.arange(len(batch)).roll(-1),
        }

    def run(
        self, starts: tuple[str, ...], budget: int, oracle: Tensor | None, corrections: Sequence[str] = ()
    ) -> LabelBatch:
        """Search from `starts` with `budget` solves in all; `oracle` are all samples' grids `(B, N+1)`."""
        options = PerSampleOptions(random_starts=starts.count("random"), corrections=list(corrections))
        left = budget - options.candidates * options.random_starts
        options.iterations = max(0, left // len(starts) - 1)  # the last solve of each start has no gradient
        given = [] if oracle is None else [TimeGrid(oracle[self.neighbours[s]]) for s in starts if s in self.neighbours]
        return search_per_sample(self.objective, self.batch, self.static, options, given)


def population(objective: Objective, batch: Batch, static: TimeGrid, budget: int) -> Tensor:
    """The least distances `(B,)` that CMA-ES, a study for each sample, meets in `budget` solves."""
    box, noise_schedule = BlackboxOptions(), objective.denoiser.noise_schedule
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    centre = times_to_logits(static.times, noise_schedule)
    span = optuna.distributions.FloatDistribution(-box.radius, box.radius)
    space: dict[str, optuna.distributions.BaseDistribution] = {f"logit_{i}": span for i in range(static.steps)}
    studies = [optuna.create_study(sampler=optuna.samplers.CmaEsSampler(seed=box.seed + i)) for i in range(len(batch))]
    for study in studies:
        study.enqueue_trial(dict.fromkeys(space, 0.0))
    for _ in range(budget):
        trials = [study.ask(space) for study in studies]
        moved = torch.tensor([[trial.params[name] for name in space] for trial in trials], dtype=torch.float64)
        measured = objective.measure(TimeGrid(logits_to_times(centre + moved, noise_schedule)), batch)
        for study, trial, value in zip(studies, trials, measured.tolist(), strict=True):
            study.tell(trial, value)
    return torch.tensor([study.best_value for study in studies])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 16, 32])
    asked = parser.parse_args()
    if min(asked.budgets) < LEAST_BUDGET:
        parser.error(f"a budget of {min(asked.budgets)} solves is too small; give at least {LEAST_BUDGET}")
    objective, most = objective_on(), max(asked.budgets)
    batch, static = samples_of(objective, asked.samples), grid_of(objective, asked.nfe)
    searches, of_static = Searches(objective, batch, static), objective.measure(static, batch)
    oracle: dict[int, Tensor] = {}
    distance: dict[str, dict[int, float]] = {}
    spent: dict[str, dict[int, float]] = {}

    def note(name: str, budget: int, found: Tensor, took: float) -> None:
        distance.setdefault(name, {})[budget] = float(found.mean() / of_static.mean())
        spent.setdefault(name, {})[budget] = took / len(batch)
        print(
            f"{name:28s} {budget:3d} solves: {distance[name][budget]:.3f} of the static grid's distance, "
            f"{spent[name][budget]:6.2f} s a sample",
            flush=True,
        )

    for name, starts in STRATEGIES.items():
        for budget in asked.budgets:
            labels, took = timed(lambda: searches.run(starts, budget, oracle.get(budget)))  # noqa: B023
            if name == "static":
                oracle[budget] = labels.grid.times
            note(name, budget, labels.distance, took)
    for budget in asked.budgets:
        labels, took = timed(lambda: searches.run(("static",), budget, None, PREDICTED))  # noqa: B023
        note(CORRECTED, budget, labels.distance, took)
    for budget in asked.budgets:
        found, took = timed(lambda: population(objective, batch, static, budget))  # noqa: B023
        note(POPULATION, budget, found, took)
    winner = searches.run(STARTS, len(STARTS) * most // 2, oracle[most]).start
    wins = {start: float((winner == place).double().mean()) for place, start in enumerate(STARTS)}
    print("wins: " + ", ".join(f"{start} {share:.0%}" for start, share in wins.items()))
    last_line(
        wins=wins, distance=distance, seconds=spent,
        population=distance[POPULATION][most] / distance["static"][most],
        corrected=distance[CORRECTED][most] / distance["static"][most],
    )  # fmt: skip


if __name__ == "__main__":
    main()
