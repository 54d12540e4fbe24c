"""How the cost of sampling and of per-sample search grows with the samples, and with the NFE.

    python benchmarks/scaling.py [--samples 64 512 4096] [--nfe 3 6 10 20] [--batch 64] [--least 4] [--device cuda]

    samples   `integrate`, and `search_per_sample` with one iteration, over 64 .. 4,096 samples in batches of `--batch`
              at the least NFE
    nfe       the same over NFE 3 .. 20, for one batch

The cost is the seconds of `integrate` or of the search alone, its targets being real images that cost nothing to make.
On one thread (OMP_NUM_THREADS=1) they are those of the processor, which other work on the machine does not touch; on
more, those of the wall. Each point is the median of several times, taken in turns, until they are `--least` seconds
long together; a run of the largest NFE goes before, for which the process grows to its full memory. An exponent is the
slope of the least-squares line through log cost against log work: 1 is proportional. For a look, `--samples 64 256
--nfe 3 6 --least 0` takes half a minute. The last line is JSON:

    samples_exponent, nfe_exponent   the larger one of sampling's and of the search's
    exponents                        all four
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

from workload import SOLVER, grid_of, last_line, objective_on, timed  # isort: skip  (first: it loads ts_adapt)
import torch

import ts_adapt
from ts_adapt import Batch, Objective, integrate, search_per_sample, zoo
from ts_adapt.search.per_sample import PerSampleOptions
from ts_adapt.zoo.data import to_model_range

OPTIONS = PerSampleOptions(iterations=1, random_starts=0)
MOST_TIMES = 8
"""So often a point is measured, at most."""


def work_of(job: str, objective: Objective, batch: Batch, nfe: int, size: int) -> Callable[[], Any]:
    """Sampling or searching `batch` in parts of `size`."""
    grid = grid_of(objective, nfe)

    @torch.no_grad()
    def sampling() -> None:
        for part in batch.split(size):
            integrate(objective.denoiser, objective.solver, grid, part.x_T)

    def search() -> None:
        for part in batch.split(size):
            search_per_sample(objective, part, grid, OPTIONS)

    return {"sampling": sampling, "search": search}[job]


def times_in_turns(works: dict[int, Callable[[], Any]], least: float, device: str) -> dict[int, float]:
    """Work -> the median of its times; the works take turns as long as they need more of them."""
    taken: dict[int, list[float]] = {amount: [] for amount in works}
    missing = list(works)
    while missing:
        for amount in missing:
            taken[amount].append(timed(works[amount], device)[1])
        missing = [amount for amount in missing if sum(taken[amount]) < least and len(taken[amount]) < MOST_TIMES]
    return {amount: statistics.median(times) for amount, times in taken.items()}


def exponent(points: dict[int, float]) -> float:
    """The slope of log cost against log work."""
    work, cost = [math.log(amount) for amount in points], [math.log(spent) for spent in points.values()]
    return statistics.linear_regression(work, cost).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 6, 10, 20])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--least", type=float, default=4.0)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    objective = objective_on(asked.device)
    most = max(*asked.samples, asked.batch)
    x_T = ts_adapt.initial_noise(0, range(most), objective.denoiser.shape)
    target = to_model_range(zoo.test_images()[0][:most])
    whole = Batch(torch.arange(most), x_T.to(asked.device), target.to(asked.device), {})
    one = whole.rows(slice(0, asked.batch))
    found: dict[str, dict[str, float]] = {"samples": {}, "nfe": {}}
    for job in ("sampling", "search"):
        work_of(job, objective, one, max(asked.nfe), asked.batch)()
        axes = {
            "samples": {
                count: work_of(job, objective, whole.rows(slice(0, count)), min(asked.nfe), asked.batch)
                for count in asked.samples
            },
            "nfe": {nfe: work_of(job, objective, one, nfe, asked.batch) for nfe in asked.nfe},
        }
        for axis, works in axes.items():
            points = times_in_turns(works, asked.least, asked.device)
            found[axis][job] = exponent(points)
            listed = ", ".join(f"{amount}: {spent:.3f} s" for amount, spent in points.items())
            print(f"{SOLVER} {job:8s} by {axis:7s} {listed}; exponent {found[axis][job]:.4f}", flush=True)
    last_line(samples_exponent=max(found["samples"].values()), nfe_exponent=max(found["nfe"].values()), exponents=found)


if __name__ == "__main__":
    main()
