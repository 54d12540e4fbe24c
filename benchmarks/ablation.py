"""What each part of a learned schedule is worth: predictors trained with one thing changed at a time.

Every variant starts from the same static grid (times only), sees the same training samples for the same number of
passes, and is measured on the same validation samples: the paired distance to the teacher, mean and median, and the
share of samples that are nearer than along the static grid. "shared" variants learn only what all samples share: a
static grid with corrections, trained in the same way. Of a model that is not guided those with guidance are left out.

    ts-adapt teach --config configs/fashion.yml --split train
    ts-adapt search --config configs/fashion.yml --solvers unipc-3 --nfe 5
    python benchmarks/ablation.py

The last line is one JSON object: {"static": distance, "gain": {variant: share of its mean that is gone}}.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workload import Experiment, last_line  # isort: skip  (first: it loads ts_adapt)
import ts_adapt
from ts_adapt.evaluation.comparison import share_of_wins
from ts_adapt.jobs.train import new_predictor
from ts_adapt.predictors.phases import PREDICTED
from ts_adapt.predictors.training import train_predictor


@dataclass(frozen=True)
class Variant:
    """`shared`: the network is frozen at zero, only what all samples share is learned; `share` of the samples."""

    kind: str = "recursive"
    corrections: Sequence[str] = PREDICTED
    shared: bool = False
    share: float = 1.0


VARIANTS: dict[str, Variant] = {
    "shared, times": Variant(corrections=(), shared=True),
    "shared, all": Variant(shared=True),
    "one-shot, times": Variant("one-shot", ()),
    "one-shot, all": Variant("one-shot"),
    "recursive, times": Variant(corrections=()),
    "recursive, times and shift": Variant(corrections=("shift",)),
    "recursive, times and scale": Variant(corrections=("scale",)),
    "recursive, times and coefficients": Variant(corrections=("coefficients",)),
    "recursive, all": Variant(),
    "recursive, start": Variant(corrections=("start",)),
    "recursive, all and start": Variant(corrections=(*PREDICTED, "start")),
    "recursive, residual": Variant(corrections=("residual",)),
    "recursive, all and residual": Variant(corrections=(*PREDICTED, "residual")),
    "recursive, all, start and residual": Variant(corrections=(*PREDICTED, "start", "residual")),
    "shared, guidance": Variant(corrections=("guidance",), shared=True),
    "recursive, times and guidance": Variant(corrections=("guidance",)),
    "recursive, all and guidance": Variant(corrections=(*PREDICTED, "guidance")),
    "recursive, all, guidance and start": Variant(corrections=(*PREDICTED, "guidance", "start")),
    "one-shot, all and guidance": Variant("one-shot", (*PREDICTED, "guidance")),
    "one-shot, all and start": Variant("one-shot", (*PREDICTED, "start")),
    "recursive, all, a half of the samples": Variant(share=0.5),
    "recursive, all, a quarter of the samples": Variant(share=0.25),
}


def main() -> None:
    parser = Experiment.parser(__doc__)
    parser.add_argument("--samples", type=int, default=2048, help="training samples")
    parser.add_argument("--validation", type=int, default=512, help="validation samples, behind the training samples")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    given = Experiment.of(options)
    _, batch = given.session.teacher("train", options.samples + options.validation)
    train, validation = batch.rows(slice(0, options.samples)), batch.rows(slice(options.samples, None))
    along, gain = given.objective.measure(given.static, validation), {}
    before = float(along.mean())
    print(
        f"{options.solver}, NFE {options.nfe}, {options.samples} samples x {options.epochs}; static grid {before:.5f}, "
        f"median {float(along.median()):.5f}"
    )
    for name in options.variants:
        variant = VARIANTS[name]
        if "guidance" in variant.corrections and not given.session.guides:
            continue
        predictor: Any = new_predictor(
            given.session, variant.kind, [given.static], given.solver.order, variant.corrections
        )
        if variant.shared:
            predictor.requires_grad_(False)
            predictor.encoder.bias.requires_grad_(True)
        count, began = int(variant.share * len(train)), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            settings = replace(given.config.train, epochs=round(options.epochs / variant.share), loss="end_to_end")
            result = train_predictor(
                predictor, given.objective, train.rows(slice(0, count)), validation, settings, Path(folder),
                progress=False,
            )  # fmt: skip
        gain[name], took = result.gain, time.process_time() - began
        found = given.objective.measure(predictor.eval().policy(given.static.steps), validation)
        print(
            f"{name:42} {float(found.mean()):.5f} {0.0 - 100 * result.gain:6.1f} %   median {float(found.median()):.5f}"
            f"   nearer on {100 * share_of_wins(found, along):3.0f} %   {took:5.0f} s",
            flush=True,
        )
    last_line(version=ts_adapt.__version__, static=before, gain=gain)


if __name__ == "__main__":
    main()
