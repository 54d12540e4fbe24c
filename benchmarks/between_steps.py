"""What one predictor of several numbers of steps is worth at those that it serves and was never trained for.

For each of these the paired distance to the teacher, mean and median, along

    the best fixed grid    chosen on the noises that validated the predictor
    interpolated static    the grid that the static grids of the learned numbers make there (`grids.between`), of times
                           alone, and with corrections where the predictor begins at some
    recursive-all          with the share k of its corrections that its validation noises chose (`predictors.predictor`)

and how far each is from the others on the same noises: training noises behind all that were learned from or validated
on. What was made with other options than those given here is refused: options of the config are flags here too.

    O="--config configs/plain.yml --train.samples 1152 --train.validation 128"
    ts-adapt teach  $O --split train
    ts-adapt search $O --solvers unipc-3 --nfe 3,5,8
    ts-adapt train  $O --solvers unipc-3 --nfe 3,5,8 --predictor recursive-all
    python benchmarks/between_steps.py $O

The last line is one JSON object: {"samples": n, "found": {N: {schedule: {"mean", "median"}, "one / other": {"mean",
"interval", "median", "nearer"}}}}.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from workload import Experiment, compared, last_line  # isort: skip  (first: it loads ts_adapt)
import ts_adapt
from ts_adapt import TimeGrid
from ts_adapt.grids.between import grid_between
from ts_adapt.interfaces import StepPolicy
from ts_adapt.predictors.predictor import served
from ts_adapt.search.static import best_start

PREDICTOR = "recursive-all"


def main() -> None:
    parser = Experiment.parser(__doc__)
    parser.add_argument("--samples", type=int, default=256, help="noises that all are measured on")
    options, more = parser.parse_known_args()
    given = Experiment.of(options, more)
    session, objective, each = given.session, given.objective, given.solver.evaluations_per_step
    predictor = session.predictor(PREDICTOR, *given.place, strict=True).predictor
    learned = {
        base: {n: session.shared(base, options.solver, n * each, strict=True).grid for n in predictor.learned}
        for base in dict.fromkeys(("static", session.base))
    }
    validation, judging = given.unseen(options.samples)
    known = ", ".join(map(str, predictor.learned))
    print(f"{options.solver}, learned for {known} steps; {len(judging)} other training noises")
    found: dict[int, Any] = {}
    for steps in served(predictor.learned):
        if steps in predictor.learned:
            continue
        starts = session.starts(steps)
        best, _ = best_start(objective, starts, validation)
        kept = sum(share for _, share in predictor.near(steps))
        interpolated = {
            f"interpolated {base}": grid_between(grids, session.noise_schedule, steps)
            for base, grids in learned.items()
        }
        fixed, recursive = f"best fixed grid, {best}", f"{PREDICTOR}, k = {kept:g}"
        schedules: dict[str, TimeGrid | StepPolicy] = {
            fixed: starts[best],
            **interpolated,
            recursive: predictor.policy(steps),
        }
        distances = {name: objective.measure(schedule, judging) for name, schedule in schedules.items()}
        rising = [recursive, *reversed(interpolated), fixed]
        found[steps] = compared(f"{steps} steps", distances, [*pairwise(rising), (recursive, fixed)])
    last_line(version=ts_adapt.__version__, samples=options.samples, found=found)


if __name__ == "__main__":
    main()
