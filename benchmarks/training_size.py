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

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ts_adapt
from ts_adapt.cli import parse
from ts_adapt.grids.space import CORRECTIONS
from ts_adapt.jobs.session import Session
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.predictors.training import train_predictor

WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "through the solver": ("end_to_end", CORRECTIONS),
    "times alone": ("end_to_end", ()),
    "labels": ("labels", ()),
}
"""Loss and corrections of each way."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fashion.yml")
    parser.add_argument("--data_root", help="where teacher, static grid and labels are, if not where the config says")
    parser.add_argument("--solver", default="unipc-3")
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--kind", default="recursive", choices=list(PREDICTORS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--validation", type=int, default=512, help="validation samples, the teacher's last")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--label-epochs", type=int, default=20)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    options = parser.parse_args()
    place = ["--data_root", options.data_root] if options.data_root else []
    _, _, config = parse(["train", "--config", options.config, *place])
    session = Session(config, progress=False)
    _, batch = session.teacher("train", config.teacher.train_samples)
    train, validation = batch.rows(slice(0, max(options.sizes))), batch.rows(slice(-options.validation, None))
    solver, static = session.solver(options.solver), session.static(options.solver, options.nfe).grid
    objective = session.objective(solver)
    before = float(objective.measure(static, validation).mean())
    print(f"{options.kind}, {options.solver}, NFE {options.nfe}; static grid {before:.5f}", flush=True)
    labels, oracle = None, None
    if "labels" in options.ways:
        labels = session.labelled("train", options.solver, options.nfe).rows(slice(0, max(options.sizes)))
        oracle = 1 - float(labels.distance.mean()) / float(objective.measure(static, labels.batch).mean())
        print(f"the labels' own grids, {len(labels.batch)} samples: {-100 * oracle:.1f} %", flush=True)
    gain: dict[str, dict[int, float]] = {}
    for way in options.ways:
        loss, corrections = WAYS[way]
        for size in options.sizes:
            again = max(options.sizes) / size
            settings = replace(
                config.train, loss=loss, corrections=list(corrections), patience=10**6,
                epochs=round(options.epochs * again), label_epochs=round(options.label_epochs * again),
                validate_every=max(1, round(options.label_epochs * again) // 4),
            )  # fmt: skip
            predictor = PREDICTORS[options.kind](
                session.noise, static.times, session.shape, corrections=corrections, order=solver.order
            )
            began, few = time.process_time(), slice(0, size)
            with tempfile.TemporaryDirectory() as folder:
                result = train_predictor(
                    predictor, objective, train.rows(few), validation, settings, Path(folder),
                    labels={static.steps: labels.rows(few)} if labels and loss != "end_to_end" else None,
                    progress=False,
                )  # fmt: skip
            gain.setdefault(way, {})[size] = round(result.gain, 4)
            print(
                f"{way:20} {size:6} samples: {(1 - result.gain) * before:.5f}  {-100 * result.gain:6.1f} %   "
                f"{time.process_time() - began:5.0f} s",
                flush=True,
            )
    print(json.dumps({"version": ts_adapt.__version__, "static": round(before, 6), "oracle": oracle, "gain": gain}))


if __name__ == "__main__":
    main()
