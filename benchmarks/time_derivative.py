"""What the way of taking the derivative in time is worth, on a network trained the way networks are: at integer times.

The static grid by every method and derivative, from the best fixed grid, with the same samples; then the oracle grids
of some test noises, and predictors, trained by the exact derivative and by the one that the package chooses. All are
measured on the same unseen noises: mean and median distance to the teacher, and the share of noises that end nearer to
it than on the best fixed grid. Evaluations are those of the network, a backward pass counted as two.

    python benchmarks/time_derivative.py
    python benchmarks/time_derivative.py --model fashion-ddpm          # smoothed in training: nothing is to be mended

The last line is one JSON object: {"fixed": mean, "static": {row: mean}, "oracle": {row: share of the best static
grid's mean}, "predictors": {row: mean}}.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from workload import last_line  # isort: skip  (first: it loads ts_adapt)
import torch
from torch import Tensor

import ts_adapt
from ts_adapt import Batch, Objective, TimeGrid, integrate
from ts_adapt.errors import TsAdaptError
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.training import train_predictor
from ts_adapt.search.objective import AUTO
from ts_adapt.search.per_sample import PerSampleOptions, search_per_sample
from ts_adapt.search.static import best_start, search_static
from ts_adapt.search.static_options import StaticOptions
from ts_adapt.teacher.store import TEST_START, TRAIN_START

GRIDS = ("linear", "quadratic", "karras", "log_snr", "ays-sd15", "ays-sdxl", "ays-svd")
LBFGS: dict[str, Any] = {"method": "lbfgs", "iterations": 20, "batch_size": 64}
STATIC: dict[str, dict[str, Any]] = {
    "lbfgs, exact": {**LBFGS, "derivative": "exact"},
    "lbfgs, slow, width .01": {**LBFGS, "derivative": "slow", "width": 0.01},
    "lbfgs, slow, width .04": {**LBFGS, "derivative": "slow"},
    "lbfgs, slow, width .1": {**LBFGS, "derivative": "slow", "width": 0.1},
    "lbfgs, secant": {**LBFGS, "derivative": "secant"},
    "adam, exact": {"method": "adam", "derivative": "exact"},
    "adam, slow": {"method": "adam", "derivative": "slow"},
    "adam, secant": {"method": "adam", "derivative": "secant"},
    "smoothed": {"method": "smoothed", "iterations": 40, "batch_size": 64},
    "forward": {"method": "forward"},
    "forward, a fifth": {"method": "forward", "evaluations": 32},
    "as it comes": {"method": "auto"},
}


class Counted:
    """A denoiser that counts the evaluations of samples, with two for a backward pass."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser, self.samples = denoiser, 0

    def __getattr__(self, name: str) -> Any:
        if name == "denoiser":
            raise AttributeError(name)
        return getattr(self.denoiser, name)

    def __call__(self, x_t: Tensor, t: Tensor, **given: Any) -> Tensor:
        x0: Tensor = self.denoiser(x_t, t, **given)
        self.samples += len(x_t) * (3 if x0.requires_grad else 1)
        return x0


def teacher(objective: Objective, first: int, count: int) -> Batch:
    """`count` noises from the one numbered `first` on, and where 30 evaluations take them."""
    denoiser, index = objective.denoiser, range(first, first + count)
    x_T = ts_adapt.initial_noise(0, index, denoiser.shape)
    fine = ts_adapt.build_grid("log_snr", denoiser.noise_schedule, 30)
    solver = ts_adapt.build_solver("unipc-3", denoiser.noise_schedule)
    with torch.no_grad():
        target = torch.cat([integrate(denoiser, solver, fine, part).x for part in x_T.split(64)])
    return Batch(torch.tensor(index), x_T, target, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-ddpm-plain", help="of the zoo, a pipeline folder or a hub id")
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--distance", default="features")
    parser.add_argument("--samples", type=int, default=256, help="training noises of static grids")
    parser.add_argument("--validation", type=int, default=128, help="training noises that validate them")
    parser.add_argument("--test", type=int, default=512, help="test noises")
    parser.add_argument("--oracles", type=int, default=32, help="test noises with grids of their own; 0: none")
    parser.add_argument("--noises", type=int, default=768, help="training noises of predictors; 0: no predictors")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rows", nargs="*", default=list(STATIC), choices=list(STATIC), metavar="ROW")
    options = parser.parse_args()
    denoiser = ts_adapt.load(options.model)
    solver = ts_adapt.build_solver(options.solver, denoiser.noise_schedule)
    objective = Objective(denoiser, solver, ts_adapt.build_distance(options.distance))
    train = teacher(objective, TRAIN_START, max(options.samples + options.validation, options.noises))
    few, validation = (
        train.rows(slice(0, options.samples)),
        train.rows(slice(options.samples, options.samples + options.validation)),
    )
    test = teacher(objective, TEST_START, options.test)
    starts = {name: ts_adapt.build_grid(name, denoiser.noise_schedule, options.nfe, rescale=True) for name in GRIDS}
    name, means = best_start(objective, starts, validation)
    fixed = objective.measure(starts[name], test)

    def say(row: str, distance: Tensor, about: str = "") -> float:
        wins = 100 * float((distance < fixed).float().mean())
        print(
            f"{row:36} mean {distance.mean():.5f}  median {distance.median():.5f}  wins {wins:3.0f} %  {about}",
            flush=True,
        )
        return float(distance.mean())

    result: dict[str, Any] = {"fixed": say(f"best fixed grid, {name}", fixed), "static": {}}
    grids: dict[str, TimeGrid] = {}
    for row in options.rows:
        given = dict(STATIC[row])
        by = {"derivative": given.pop("derivative", AUTO), "width": given.pop("width", objective.width)}
        counted, began = Counted(denoiser), time.process_time()
        settings = StaticOptions(corrections=[], starts=1, **given)
        found = search_static(
            replace(objective, denoiser=counted, **by), few, validation, starts, settings, means=means, progress=False
        )
        grids[row] = found.grid
        about = f"{counted.samples:8,} evaluations, {time.process_time() - began:4.0f} s"
        result["static"][row] = say(f"static, {row}", objective.measure(found.grid, test), about)
        for remark in found.remarks():
            print(f"    {remark}")
    if not grids:
        return
    best = min(grids, key=lambda row: float(objective.measure(grids[row], validation).mean()))
    if options.oracles:
        result["oracle"] = dict(oracles(objective, grids[best], test.rows(slice(0, options.oracles))))
        for row, share in result["oracle"].items():
            print(f"{'oracle, ' + row:36} {share:.3f} of the static grid's", flush=True)
    result["predictors"] = {}
    for kind in (Recursive, OneShot) if options.noises else ():
        for way in ("exact", AUTO):
            policy = trained(kind, replace(objective, derivative=way), grids[best], train, options)
            row = f"{kind.kind}, {way}"
            result["predictors"][row] = say(row, objective.measure(policy, test))
    last_line(version=ts_adapt.__version__, **result)


def oracles(objective: Objective, static: TimeGrid, batch: Batch) -> Iterator[tuple[str, float]]:
    """Each derivative, and what 20 steps by it from the static grid leave of the mean distance."""
    for way in ("exact", "slow", "secant"):
        try:
            settings = PerSampleOptions(iterations=20, random_starts=0)
            found = search_per_sample(objective.differentiated(way), batch, static, settings)
        except TsAdaptError as error:
            print(f"oracle, {way}: {error}")
            continue
        yield way, float(found.distance.mean() / found.static_distance.mean())


def trained(kind: Any, objective: Objective, static: TimeGrid, data: Batch, options: argparse.Namespace) -> Any:
    """The policy of a predictor trained on five sixths of `data`, the rest validates."""
    cut = len(data) * 5 // 6
    torch.manual_seed(0)
    denoiser = objective.denoiser
    predictor = kind(
        denoiser.noise_schedule, static.times, denoiser.shape,
        corrections=["shift", "scale", "history"], order=objective.solver.order,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train_predictor(
            predictor, objective, data.rows(slice(0, cut)), data.rows(slice(cut, None)),
            TrainOptions(epochs=options.epochs, batch_size=32), Path(folder), progress=False,
        )  # fmt: skip
    return predictor.policy(options.nfe)


if __name__ == "__main__":
    main()
