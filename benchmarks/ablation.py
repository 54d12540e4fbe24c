"""What each part of a learned schedule is worth: predictors trained with one thing changed at a time.

Every variant starts from the same static grid (times only), sees the same training samples for the same number of
passes, and is measured on the same validation samples: the mean paired distance to the teacher, relative to the static
grid's. "shared" variants learn only what all samples share: a static grid with corrections, trained in the same way.

    ts-adapt teach --config configs/fashion.yml --split train
    ts-adapt search --config configs/fashion.yml --solvers unipc-3 --nfe 5
    python benchmarks/ablation.py

The last line is one JSON object: {"static": distance, "gain": {variant: share of it that is gone}}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ts_adapt
from ts_adapt.cli import parse
from ts_adapt.grids.space import CORRECTIONS
from ts_adapt.jobs.session import Session
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.training import train_predictor


@dataclass(frozen=True)
class Variant:
    """`shared`: the network is frozen at zero, only what all samples share is learned; `share` of the samples."""

    kind: type[OneShot | Recursive] = Recursive
    corrections: tuple[str, ...] = CORRECTIONS
    shared: bool = False
    share: float = 1.0


VARIANTS: dict[str, Variant] = {
    "shared, times": Variant(corrections=(), shared=True),
    "shared, all": Variant(shared=True),
    "one-shot, times": Variant(OneShot, ()),
    "one-shot, all": Variant(OneShot),
    "recursive, times": Variant(corrections=()),
    "recursive, times and shift": Variant(corrections=("shift",)),
    "recursive, times and scale": Variant(corrections=("scale",)),
    "recursive, times and coefficients": Variant(corrections=("coefficients",)),
    "recursive, all": Variant(),
    "recursive, all, a half of the samples": Variant(share=0.5),
    "recursive, all, a quarter of the samples": Variant(share=0.25),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fashion.yml")
    parser.add_argument("--data_root", help="where the teacher and the static grid are, if not where the config says")
    parser.add_argument("--solver", default="unipc-3")
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2048, help="training samples")
    parser.add_argument("--validation", type=int, default=512, help="validation samples, behind the training samples")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    place = ["--data_root", options.data_root] if options.data_root else []
    _, _, config = parse(["train", "--config", options.config, *place])
    session = Session(config, progress=False)
    _, batch = session.teacher("train", options.samples + options.validation)
    train, validation = batch.rows(slice(0, options.samples)), batch.rows(slice(options.samples, None))
    solver, static = session.solver(options.solver), session.static(options.solver, options.nfe).grid
    objective = session.objective(solver)
    before, gain = float(objective.measure(static, validation).mean()), {}
    print(
        f"{options.solver}, NFE {options.nfe}, {options.samples} samples x {options.epochs}; static grid {before:.5f}"
    )
    for name in options.variants:
        variant = VARIANTS[name]
        predictor: Any = variant.kind(
            session.noise, static.times, session.shape, corrections=variant.corrections, order=solver.order
        )
        if variant.shared:
            predictor.requires_grad_(False)
            predictor.encoder.bias.requires_grad_(True)
        count, began = int(variant.share * len(train)), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            settings = replace(config.train, epochs=round(options.epochs / variant.share), loss="end_to_end")
            result = train_predictor(
                predictor, objective, train.rows(slice(0, count)), validation, settings, Path(folder), progress=False
            )
        gain[name] = round(result.gain, 4)
        print(
            f"{name:42} {(1 - result.gain) * before:.5f}  {-100 * result.gain:6.1f} %   "
            f"{time.process_time() - began:5.0f} s",
            flush=True,
        )
    print(json.dumps({"version": ts_adapt.__version__, "static": round(before, 6), "gain": gain}))


if __name__ == "__main__":
    main()
