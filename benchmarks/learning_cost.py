"""What learning costs, and what each cost buys: gain against evaluations of the network, by method and size.

Every method learns from the teacher's first training noises, in several sizes, and is measured on the same validation
noises behind them, that none of them saw: mean and median of the paired distance to the teacher, as shares of those of
the best fixed grid. Counted are all evaluations that learning makes, forward, of one sample, guided or not; of those
that a gradient goes back through the share is said. Predictors go on from the static grid of `--begins` noises, whose
evaluations are counted with theirs; which derivative in time is taken (`search.derivative`) is found once for all, and
counted for none. By the package's own options, not their authors' programs, are learned

    LD3   a static grid by its published budget: 50 noises and as many that validate, seven passes in batches of two,
          times and model times, a soft teacher; by Adam, where LD3 has RMSprop
    GS    times, model times and weights on all that was met, by Adam in batches of 24; two passes over the most noises
          of all methods, where GS has 1,400 and goes on for longer

    ts-adapt teach --config configs/plain.yml --split train
    python benchmarks/learning_cost.py --config configs/plain.yml

The last line is JSON, {"best_fixed": [mean, median], "found": {method: [{"noises", "passes", "evaluations", "gradient",
"mean", "median", "seconds"}, ...]}}, and `--figure` draws it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from workload import Experiment, last_line, timed  # isort: skip  (first: it loads ts_adapt)
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter
from torch import Tensor

import ts_adapt
from ts_adapt import TimeGrid
from ts_adapt.denoisers.wrapped import Wrapped
from ts_adapt.grids.corrections import corrected
from ts_adapt.interfaces import StepPolicy
from ts_adapt.jobs.train import new_predictor
from ts_adapt.plots import COLORS, LINES
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.predictors.training import train_predictor
from ts_adapt.search.derivative import trusted
from ts_adapt.search.static import search_static
from ts_adapt.search.static_options import StaticOptions
from ts_adapt.search.work import Work

Schedule = TimeGrid | StepPolicy
NOTHING = Work()
LD3, GS = "LD3, its budget", "GS, two passes"
BY_LBFGS: dict[str, Any] = {"method": "lbfgs", "iterations": 20, "batch_size": 64}
"""What static grids of few noises are learned by."""
OF_LD3 = StaticOptions(method="adam", corrections=["shift"], soft_teacher=True, iterations=7 * 25, batch_size=2)
OF_GS = StaticOptions(method="adam", corrections=["shift", "history"], batch_size=24, validate_every=20)
PASSES_OF_GS = 2
STYLES = {
    "static": (COLORS["static"], LINES[0], "o"),
    "one-shot": (COLORS["one-shot"], LINES[0], "o"),
    "recursive": (COLORS["recursive"], LINES[0], "o"),
    LD3: (COLORS["optimized"], "", "^"),
    GS: (COLORS["optimized"], "", "s"),
}
"""Colour, line and marker of a method; a static grid with corrections is dotted."""


class Counting(Wrapped):
    """`denoiser`, whose evaluations are counted sample by sample: all, and those with a gradient."""

    work = NOTHING

    def __call__(self, x_t: Tensor, t: Tensor, **given: Any) -> Tensor:
        x0: Tensor = self.denoiser(x_t, t, **given)
        self.work += Work(0, len(x0)) if x0.requires_grad else Work(len(x0))
        return x0


def drawn(found: Mapping[str, list[dict[str, float]]], title: str) -> Figure:
    """Shares of the best fixed grid's distance, mean and median, against the evaluations spent."""
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    panels, lines = figure.subplots(1, 2, sharex=True, sharey=True).tolist(), dict[str, Any]()
    for axes, measure in zip(panels, ("mean", "median"), strict=True):
        for method, points in found.items():
            color, line, marker = STYLES.get(method, (COLORS["static"], LINES[1], "D"))
            places = sorted((each["evaluations"], each[measure]) for each in points)
            (lines[method],) = axes.plot(*zip(*places, strict=True), color=color, linestyle=line, marker=marker)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("evaluations of the network in learning")
        axes.set_ylabel(f"{measure} distance, of the best fixed grid's")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.legend(lines.values(), lines, loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure


def main() -> None:
    parser = Experiment.parser(__doc__)
    parser.add_argument("--static-sizes", type=int, nargs="+", default=[8, 24, 64], help="noises, and as many validate")
    parser.add_argument("--begins", type=int, default=24, help="of them, of the grid that predictors begin with")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512], help="noises of predictors")
    parser.add_argument("--passes", type=int, nargs="+", default=[4, 8], help="of predictors over their noises")
    parser.add_argument("--kinds", nargs="*", default=list(PREDICTORS), choices=list(PREDICTORS))
    parser.add_argument("--validation", type=int, default=256, help="noises that all methods are measured on")
    parser.add_argument("--figure", default="logs/benchmarks/learning_cost.png", help="where it is drawn")
    options = parser.parse_args()
    given = Experiment.of(options)
    config, steps, most = given.config, given.session.steps(options.solver, options.nfe), max(options.sizes)
    _, batch = given.session.teacher("train", most + options.validation)
    validation = batch.rows(slice(most, None))
    counting = Counting(given.objective.denoiser)
    objective, _ = trusted(replace(given.objective, denoiser=counting), steps, batch, config.static.batch_size)
    starts = given.session.starts(steps)
    fixed = min((objective.measure(grid, validation) for grid in starts.values()), key=lambda each: float(each.mean()))
    found: dict[str, list[dict[str, float]]] = {}

    def report(method: str, noises: int, passes: int, learn: Callable[[], Schedule], onto: Work = NOTHING) -> Any:
        """Learn, measure what comes of it, and say so; returns it and the evaluations spent, those of `onto` too."""
        counting.work = onto
        schedule, seconds = timed(learn, config.model.device)
        work, reached = counting.work, objective.measure(schedule, validation)
        mean, median = float(reached.mean() / fixed.mean()), float(reached.median() / fixed.median())
        found.setdefault(method, []).append({
            "noises": noises, "passes": passes, "evaluations": work.count, "gradient": work.gradient / work.count,
            "mean": mean, "median": median, "seconds": seconds,
        })  # fmt: skip
        print(
            f"{method:32} {noises:5} noises, passes {passes} {work.count:9,} evaluations {seconds:5.0f} s   mean "
            f"{100 * (mean - 1):6.1f} %   median {100 * (median - 1):6.1f} %",
            flush=True,
        )
        return schedule, work

    def static(settings: StaticOptions, train: slice, validate: slice) -> TimeGrid:
        parts = batch.rows(train), batch.rows(validate)
        return search_static(objective, *parts, starts, settings, progress=False).grid

    def predictor(kind: str, noises: int, passes: int, start: TimeGrid) -> StepPolicy:
        corrections = given.session.corrections_of(kind)
        learned: Any = new_predictor(given.session, kind, [start], given.solver.order, corrections)
        settings = replace(config.train, samples=noises, epochs=passes, loss="end_to_end")
        cut = noises - settings.validating
        parts = batch.rows(slice(0, cut)), batch.rows(slice(cut, noises))
        with tempfile.TemporaryDirectory() as folder:
            train_predictor(learned, objective, *parts, settings, Path(folder), progress=False)
        policy: StepPolicy = learned.eval().policy(steps)
        return policy

    corrections = given.session.predicted_corrections
    print(f"{options.solver}, NFE {options.nfe}, {options.validation} validation noises; best fixed {fixed.mean():.5f}")

    def shared(learned: Sequence[str]) -> dict[int, tuple[TimeGrid, Work]]:
        settings, name = replace(config.static, corrections=list(learned), **BY_LBFGS), corrected("static", learned)
        parts = {n: (slice(0, n), slice(n, 2 * n)) for n in sorted({*options.static_sizes, options.begins})}
        return {n: report(name, n, 1, partial(static, settings, *parts[n])) for n in parts}

    begins, onto = shared(())[options.begins]
    for kind, noises, passes in product(options.kinds, options.sizes, options.passes):
        report(kind, noises, passes, partial(predictor, kind, noises, passes, begins), onto)
    few, cut = min(50, most // 2), most - max(options.static_sizes)
    report(LD3, few, 7, partial(static, OF_LD3, slice(0, few), slice(few, 2 * few)))
    settings = replace(OF_GS, iterations=PASSES_OF_GS * -(-cut // OF_GS.batch_size))
    report(GS, cut, PASSES_OF_GS, partial(static, settings, slice(0, cut), slice(cut, most)))
    shared(corrections)
    where = Path(options.figure)
    where.parent.mkdir(parents=True, exist_ok=True)
    title = f"{config.model.name}, {options.solver}, NFE {options.nfe}: {options.validation} unseen noises"
    drawn(found, title).savefig(where, dpi=100)
    last_line(version=ts_adapt.__version__, best_fixed=[float(fixed.mean()), float(fixed.median())], found=found)


if __name__ == "__main__":
    main()
