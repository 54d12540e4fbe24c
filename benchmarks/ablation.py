"""What each part of a learned schedule is worth: predictors trained with one thing changed at a time.

Every variant starts from the same static grid (times only), sees the same training samples for the same number of
passes, begins with weights of the same seed, and is judged on the same samples, training ones behind all that were
learned from or validated on, those of the static grid too:

    the paired distance to the teacher, mean and median, and the share of samples nearer than along the static grid
    the Frechet distance to the data and the recall of as many of them, in the features of `evaluate.features`
    what it costs: operations of sampling beside the static grid's, seconds of the processor in training

"shared" variants learn only what all samples share: a static grid with corrections, trained in the same way. What this
model or config has not for a variant is said before any is learned, and the variant left out: guidance, prompts for
captions, images for data and the discriminator, a judge with other features than data is matched in.

    ts-adapt teach --config configs/plain.yml --split train
    ts-adapt search --config configs/plain.yml --solvers unipc-3 --nfe 5 --static.corrections []
    python benchmarks/ablation.py --config configs/plain.yml

The last line is one JSON object: {"static": distance, "gain": {variant: share of its mean that is gone}, "found":
{variant: {"mean", "median", "nearer", "frechet", "recall", "operations", "seconds"}}}.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from workload import Experiment, last_line  # isort: skip  (first: it loads ts_adapt)
import torch

import ts_adapt
from ts_adapt import Batch, TimeGrid
from ts_adapt.distances import LOOKS
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.comparison import share_of_wins
from ts_adapt.evaluation.features import Extractor
from ts_adapt.evaluation.metrics import FeatureStatistics, frechet
from ts_adapt.evaluation.quality import Reference, quality_of
from ts_adapt.evaluation.records import Entry, Run, kept_run
from ts_adapt.evaluation.sample import join_parts, missing_parts, sample_part
from ts_adapt.grids.corrections import PICTURES
from ts_adapt.interfaces import EMBEDDING, GUIDANCE, StepPolicy
from ts_adapt.jobs.evaluate import reference_images
from ts_adapt.jobs.matched_images import check_images
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.train import new_predictor
from ts_adapt.predictors.phases import PREDICTED
from ts_adapt.predictors.training import train_predictor


@dataclass(frozen=True)
class Variant:
    """`shared`: the network is frozen at zero, only what all samples share is learned, a grid; `share` of the samples;
    `losses`: what is minimised beside the paired distance, by the name of its weight."""

    kind: str = "recursive"
    corrections: Sequence[str] = PREDICTED
    shared: bool = False
    share: float = 1.0
    losses: Mapping[str, Any] = field(default_factory=dict)


CHANGED = (*PREDICTED, "residual")
TOLD = (*PREDICTED, "guidance", "embedding")
VARIANTS: dict[str, Variant] = {
    "shared, times": Variant(corrections=(), shared=True),
    "shared, all": Variant(shared=True),
    "one-shot, times": Variant("one-shot", ()),
    "one-shot, all": Variant("one-shot"),
    "recursive, times": Variant(corrections=()),
    "recursive, times and shift": Variant(corrections=("shift",)),
    "recursive, times and scale": Variant(corrections=("scale",)),
    "recursive, times and history": Variant(corrections=("history",)),
    "recursive, all": Variant(),
    "recursive, start": Variant(corrections=("start",)),
    "recursive, all and start": Variant(corrections=(*PREDICTED, "start")),
    "recursive, residual": Variant(corrections=("residual",)),
    "recursive, all and residual": Variant(corrections=CHANGED),
    "recursive, all and residual, data .3": Variant(corrections=CHANGED, losses={"distribution": 0.3}),
    "recursive, all and residual, data 1": Variant(corrections=CHANGED, losses={"distribution": 1.0}),
    "recursive, all and residual, discriminator .03": Variant(corrections=CHANGED, losses={"adversarial": 0.03}),
    "recursive, all and residual, discriminator .3": Variant(corrections=CHANGED, losses={"adversarial": 0.3}),
    "recursive, all, data .3": Variant(losses={"distribution": 0.3}),
    "recursive, all, captions .2": Variant(losses={"caption": 0.2}),
    "recursive, all, start and residual": Variant(corrections=(*PREDICTED, "start", "residual")),
    "shared, guidance": Variant(corrections=("guidance",), shared=True),
    "shared, all and guidance": Variant(corrections=(*PREDICTED, "guidance"), shared=True),
    "shared, embedding": Variant(corrections=("embedding",), shared=True),
    "shared, all and embedding": Variant(corrections=(*PREDICTED, "embedding"), shared=True),
    "shared, all, guidance and embedding": Variant(corrections=TOLD, shared=True),
    "one-shot, all and embedding": Variant("one-shot", (*PREDICTED, "embedding")),
    "one-shot, all, guidance and embedding": Variant("one-shot", TOLD),
    "one-shot, all, guidance, embedding and start": Variant("one-shot", (*TOLD, "start")),
    "recursive, times and embedding": Variant(corrections=("embedding",)),
    "recursive, all and embedding": Variant(corrections=(*PREDICTED, "embedding")),
    "recursive, all, embedding and residual": Variant(corrections=(*PREDICTED, "embedding", "residual")),
    "recursive, all, guidance and embedding": Variant(corrections=TOLD),
    "recursive, all, guidance, embedding and start": Variant(corrections=(*TOLD, "start")),
    "recursive, all, guidance, embedding and residual": Variant(corrections=(*TOLD, "residual")),
    "recursive, times and guidance": Variant(corrections=("guidance",)),
    "recursive, all and guidance": Variant(corrections=(*PREDICTED, "guidance")),
    "recursive, all, guidance and start": Variant(corrections=(*PREDICTED, "guidance", "start")),
    "recursive, all, guidance and residual": Variant(corrections=(*PREDICTED, "guidance", "residual")),
    "recursive, all, guidance, start and residual": Variant(corrections=(*PREDICTED, "guidance", "start", "residual")),
    "one-shot, all and guidance": Variant("one-shot", (*PREDICTED, "guidance")),
    "one-shot, all and start": Variant("one-shot", (*PREDICTED, "start")),
    "one-shot, all, guidance and start": Variant("one-shot", (*PREDICTED, "guidance", "start")),
    "recursive, all, a half of the samples": Variant(share=0.5),
    "recursive, all, a quarter of the samples": Variant(share=0.25),
}


@dataclass(frozen=True)
class Judged:
    """A schedule on the judging samples."""

    mean: float
    median: float
    nearer: float
    frechet: float
    recall: float
    operations: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Judge:
    """The samples that schedules are judged on, and the data."""

    given: Experiment
    batch: Batch
    extractor: Extractor
    reference: Reference

    def run(self, schedule: StepPolicy | TimeGrid, size: int = 128) -> Run:
        """What `evaluate` keeps of a schedule, its cost too."""
        entry = Entry(*self.given.place, "judged", "judged", schedule, "judged", len(self.batch))
        with tempfile.TemporaryDirectory() as name:
            folder, objective = Path(name), self.given.objective
            for rows in missing_parts(entry, folder, size):
                sample_part(entry, objective, self.batch, self.extractor, folder, rows, batch_size=size)
            join_parts(entry, objective, self.batch, folder, batch_size=size)
            found = kept_run(entry, folder)
        assert found is not None
        return found

    @cached_property
    def along(self) -> Run:
        """Of the static grid."""
        return self.run(self.given.static)

    def judge(self, schedule: StepPolicy | TimeGrid) -> Judged:
        run = self.along if schedule is self.given.static else self.run(schedule)
        recall = quality_of({"features": run.features}, len(self.batch), self.reference).recall
        assert recall is not None
        return Judged(
            float(run.distance.mean()), float(run.distance.median()),
            share_of_wins(run.distance, self.along.distance),
            frechet(FeatureStatistics.of(run.features), self.reference.statistics), recall,
            run.cost.flops / self.along.cost.flops,
        )  # fmt: skip


def main() -> None:
    parser = Experiment.parser(__doc__)
    parser.add_argument("--samples", type=int, default=2048, help="training samples")
    parser.add_argument("--validation", type=int, default=512, help="validation samples, behind the training samples")
    parser.add_argument("--judged", type=int, default=1024, help="samples that all are judged on, behind these")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    options, more = parser.parse_known_args()
    given = Experiment.of(options, more)
    session, config, learned = given.session, given.config, options.samples + options.validation
    unfit = {name: _unfit(session, VARIANTS[name]) for name in options.variants}
    variants = {name: VARIANTS[name] for name, reason in unfit.items() if not reason}
    for reason in dict.fromkeys(filter(None, unfit.values())):
        print(f"left out: {'; '.join(name for name in unfit if unfit[name] == reason)}\n  {reason}", flush=True)
    unseen = max(learned, config.static_samples + config.static_validating)
    _, batch = session.teacher("train", unseen + options.judged)
    train, validation = batch.rows(slice(0, options.samples)), batch.rows(slice(options.samples, learned))
    extractor = session.extractor()
    reference = reference_images(session, extractor)
    if reference is None or not len(reference.features):
        raise TsAdaptError("there are no real images to judge by; evaluate.reference names a folder of them")
    judge = Judge(given, batch.rows(slice(unseen, None)), extractor, reference)
    print(f"{options.solver}, NFE {options.nfe}, {options.samples} samples x {options.epochs}, {options.judged} judged")
    found = {"static": judge.judge(given.static)}
    _show("static", found["static"])
    for name, variant in variants.items():
        predictor, seconds = _trained(given, variant, train, validation, options.epochs)
        judged = judge.judge(predictor.eval().policy(given.static.steps))
        found[name] = replace(judged, seconds=seconds, operations=1.0 if variant.shared else judged.operations)
        _show(name, found[name])
    gain = {name: 1 - each.mean / found["static"].mean for name, each in found.items()}
    last_line(
        version=ts_adapt.__version__, static=found["static"].mean, gain=gain,
        found={name: asdict(each) for name, each in found.items()},
    )  # fmt: skip


def _unfit(session: Session, variant: Variant) -> str:
    """Why `variant` cannot be learned here; empty where it can."""
    if GUIDANCE.name in variant.corrections and not session.guides:
        return "nothing guides the model; give --guidance"
    if EMBEDDING.name in variant.corrections and not session.embedding_width:
        return "no module of the network embeds the time"
    if PICTURES.keys() & {*variant.corrections} and session.seen_shape != session.shape:
        return f"samples of shape {session.shape} are no pictures, which could be changed"
    if "caption" in variant.losses and session.config.teacher.prompts_of("train") is None:
        return "there are no prompts; give --teacher.prompts"
    if "distribution" in variant.losses and LOOKS[session.distance] == session.features:
        return f"{session.features} features judge, in which data would be matched; give another --evaluate.features"
    if {"distribution", "adversarial"} & variant.losses.keys():
        try:
            check_images(session)
        except TsAdaptError as error:
            return str(error)
    return ""


def _trained(given: Experiment, variant: Variant, train: Batch, validation: Batch, epochs: int) -> tuple[Any, float]:
    """A predictor, and the seconds that its training took."""
    session = given.session
    settings = replace(given.config.train, epochs=round(epochs / variant.share), loss="end_to_end", **variant.losses)
    torch.manual_seed(settings.seed)
    predictor: Any = new_predictor(session, variant.kind, [given.static], given.solver.order, variant.corrections)
    if variant.shared:
        predictor.requires_grad_(False)
        predictor.encoder.bias.requires_grad_(True)
    asked = session.learned_beside(settings)  # which all variants share: before the clock starts
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train_predictor(
            predictor, given.objective, train.rows(slice(0, int(variant.share * len(train)))), validation, settings,
            folder, **asked, progress=False,
        )  # fmt: skip
    return predictor, time.process_time() - began


def _show(name: str, found: Judged) -> None:
    print(
        f"{name:46} mean {found.mean:.5f}   median {found.median:.5f}   nearer on {100 * found.nearer:3.0f} %   "
        f"Frechet {found.frechet:.3f}   recall {found.recall:.3f}   operations x {found.operations:.3f}   "
        f"{found.seconds:5.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
