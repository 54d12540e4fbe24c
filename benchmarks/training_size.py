"""What more training samples are worth to a predictor: through the solver, and by regression on oracle labels.

    ts-adapt teach  --config configs/fashion.yml --split train
    ts-adapt search --config configs/fashion.yml --solvers unipc-3 --nfe 5
    ts-adapt search --config configs/fashion.yml --solvers unipc-3 --nfe 5 --method per-sample --label_samples 4096
    python benchmarks/training_size.py [--sizes 256 1024 4096] [--kind recursive]

Every size gets the same number of gradient steps, those of `--epochs` (`--label-epochs`) passes over the largest, so
that what differs is how many different samples are seen. Trained in three ways:

    through the solver     times and corrections, no labels
    times alone            through the solver, the same without corrections
    labels                 times alone, regression on the labels (ALD3)

Measured is the mean paired distance to the teacher of the same validation samples, as the share of the static grid's
that is gone, after the last pass (a predictor that ends above the static grid scores 0: training then keeps the static
grid); and, for labels, the share that their own oracle grids gain on the training samples. The last line is JSON:
{"static": distance, "oracle": share, "gain": {way: {size: share}}}.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from workload import Experiment, last_line  # isort: skip  (first: it loads ts_adapt)
import ts_adapt
from ts_adapt.predictors.phases import PREDICTED
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.predictors.training import train_predictor

WAYS: dict[str, tuple[Literal["end_to_end", "labels"], Sequence[str]]] = {
    "through the solver": ("end_to_end", PREDICTED),
    "times alone": ("end_to_end", ()),
    "labels": ("labels", ()),
}
"""Loss and corrections of each way."""


def main() -> None:
    parser = Experiment.parser(__doc__)
    parser.add_argument("--kind", default="recursive", choices=list(PREDICTORS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--validation", type=int, default=512, help="validation samples, the teacher's last")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--label-epochs", type=int, default=20)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    options = parser.parse_args()
    given = Experiment.of(options)
    static = given.static
    _, batch = given.session.teacher("train", given.config.teacher.train_samples)
    train, validation = batch.rows(slice(0, max(options.sizes))), batch.rows(slice(-options.validation, None))
    before = given.mean_distance(validation)
    print(f"{options.kind}, {options.solver}, NFE {options.nfe}; static grid {before:.5f}", flush=True)
    labels, oracle = None, None
    if "labels" in options.ways:
        labels = given.session.labelled("train", options.solver, options.nfe).rows(slice(0, max(options.sizes)))
        oracle = 1 - float(labels.distance.mean()) / given.mean_distance(labels.batch)
        print(f"the labels' own grids, {len(labels.batch)} samples: {-100 * oracle:.1f} %", flush=True)
    gain: dict[str, dict[int, float]] = {}
    for way in options.ways:
        loss, corrections = WAYS[way]
        for size in options.sizes:
            again = max(options.sizes) / size
            settings = replace(
                given.config.train, loss=loss, corrections=list(corrections), patience=10**6,
                epochs=round(options.epochs * again), label_epochs=round(options.label_epochs * again),
                validate_every=max(1, round(options.label_epochs * again) // 4),
            )  # fmt: skip
            predictor = PREDICTORS[options.kind](
                given.session.noise_schedule, static.times, given.session.shape,
                corrections=corrections, order=given.solver.order,
            )  # fmt: skip
            began, few = time.process_time(), slice(0, size)
            with tempfile.TemporaryDirectory() as folder:
                result = train_predictor(
                    predictor, given.objective, train.rows(few), validation, settings, Path(folder),
                    labels={static.steps: labels.rows(few)} if labels and loss != "end_to_end" else None,
                    progress=False,
                )  # fmt: skip
            gain.setdefault(way, {})[size] = result.gain
            print(
                f"{way:20} {size:6} samples: {(1 - result.gain) * before:.5f}  {0.0 - 100 * result.gain:6.1f} %   "
                f"{time.process_time() - began:5.0f} s",
                flush=True,
            )
    last_line(version=ts_adapt.__version__, static=before, oracle=oracle, gain=gain)


if __name__ == "__main__":
    main()
