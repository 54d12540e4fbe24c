"""What a training does and when: its options, its phases, the order of its batches, its learning rate.

rate(k) of K steps = min(1, (k + 1) / W) (r + (1 - r) (1 + cos(pi k / K)) / 2)            W = WARM_UP, r = LAST_RATE
average            = the weights' exponential moving average, whose memory grows with the number of steps
one more pass      = minus the slope of the validations' share of the static distance, fitted to the last SEEN of them
"""

from __future__ import annotations

import math
import statistics
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.corrections import CORRECTIONS, PICTURES
from ts_adapt.numerics import warming_average
from ts_adapt.options import MANY, Between, Count, Decay, OneOf, Positive, Seed, Weight, check_options
from ts_adapt.predictors.losses import Labelled, Loss, end_to_end, regression
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.work import Work

WARM_UP = 20
"""Steps over which the learning rate rises."""
MOST_VALIDATION = 512
MEASURED, LOOKED_AT, DRAWN = 512, 128, 64
"""How many samples standardise the predictor's inputs, show its spread, and are drawn; at most."""
LAST_RATE = 0.04
"""Share of the learning rate at the end of its cosine."""
SEEN = 3
PREDICTED = ("shift", "scale", "history")
"""What predictors learn beside the times where nothing else is said, of any model, in grids."""
PredictedName = Annotated[str, OneOf(ChainMap(PICTURES, CORRECTIONS))]
"""What options name a correction by that a predictor may learn."""
THROUGH, REGRESSED = ("end_to_end", "both"), ("labels", "both")
USED_BY_LOSS = {
    "epochs": THROUGH, "lr": THROUGH, "label_epochs": REGRESSED, "label_lr": REGRESSED, "validate_every": REGRESSED,
}  # fmt: skip
"""Options of `TrainOptions` and the losses under which they are used; the others always are."""


@dataclass
class TrainOptions:
    """How a predictor is trained."""

    loss: Literal["end_to_end", "labels", "both"] = "end_to_end"
    """end_to_end, labels (needs those of search --method per-sample), or both: labels first."""
    corrections: list[PredictedName] | None = None
    """What is predicted beside the times: what grids have, and changes of pictures, start (of x_T) and residual (of
    every x0; recursive alone); None: shift, scale, history, guidance where the model is guided, embedding where the
    network has one of the time, and where states are pictures residual, or start of one-shot predictors."""
    distribution: Weight = 0.0
    """end_to_end: weight of the distance to real images as a set, as in the group static."""
    adversarial: Weight = 0.0
    """end_to_end: weight of the loss of a discriminator, as in the group static."""
    caption: Weight = 0.0
    """end_to_end: weight of how badly images show their prompts, as in the group static."""
    samples: Annotated[int, Between(10, MANY)] = 512
    """Training samples, the last of which validate."""
    validation: Count | None = None
    """How many of them do; None: a fifth, at most 512."""
    epochs: Count = 4
    """Passes through the solver."""
    lr: Positive = 2e-3
    batch_size: Count = 16
    """Few samples a step make many steps, and it is steps that a training is short of."""
    label_epochs: Count = 60
    """Passes over the labels."""
    label_lr: Positive = 1e-3
    weight_decay: Annotated[float, Between(0, 1000)] = 0.01
    ema: Decay = 0.98
    patience: Count = 20
    """Epochs without a better validation distance before a phase ends."""
    validate_every: Count = 5
    """Epochs over the labels between two validations; end to end validates at every epoch."""
    width: Annotated[int, Between(1, 1024)] = 24
    hidden: Annotated[int, Between(1, 8192)] = 128
    dropout: Annotated[float, Between(0, 0.9)] = 0.0
    """Share of the hidden features that a sample is trained without, drawn anew for each of its solves."""
    seed: Seed = 0

    @property
    def record(self) -> dict[str, Any]:
        """The options as what they make keeps them: no dropout, no weight of a discriminator or of captions is None, as
        if there were no such option."""
        return {**asdict(self), **{name: getattr(self, name) or None for name in ("dropout", "adversarial", "caption")}}

    @property
    def of_training(self) -> dict[str, Any]:
        """Of `record` what the loss uses, and neither the samples nor the network say: all that weights depend on."""
        elsewhere = {"samples", "validation", "corrections", "width", "hidden"}
        idle = {name for name, losses in USED_BY_LOSS.items() if self.loss not in losses}
        return {name: value for name, value in self.record.items() if name not in elsewhere | idle}

    def check_beside(self) -> None:
        """TsAdaptError where something is to be minimised beside the distance, and there are labels alone."""
        beside = [name for name in ("distribution", "adversarial", "caption") if getattr(self, name)]
        if beside and self.loss == "labels":
            what = beside[0]
            raise TsAdaptError(f"labels teach times, no {what}; set train.loss to end_to_end, or train.{what} to 0")

    @property
    def validating(self) -> int:
        """The number of samples that validate; TsAdaptError where none is left to learn from."""
        count = min(max(1, self.samples // 5), MOST_VALIDATION) if self.validation is None else self.validation
        if count >= self.samples:
            raise TsAdaptError(f"train.validation is {count} of train.samples {self.samples}; leave some to learn from")
        return count

    def solves(self, train: int, validation: int) -> Work:
        """About how many solves, for each NFE, a training takes that does not end early."""
        validated = validation + min(validation, LOOKED_AT)  # of which the spread is looked at
        through = Work(validated, train).times(self.epochs)
        regressed = Work(-(-self.label_epochs // self.validate_every) * validated)
        ends = Work(min(train, MEASURED) + 2 * validation + min(validation, DRAWN))  # measured first and last, drawn
        return ends + {"end_to_end": through, "labels": regressed, "both": through + regressed}[self.loss]


@dataclass(frozen=True)
class Phase:
    """One loss, for a number of epochs. `samples`: how many rows there are to learn from, by the number of steps.

    loss        makes it: what it looks at is computed when the phase begins
    keeps_last  whether of what is better than the static grid the last is kept, not the best (`search.adversarial`)
    validated   whether what is minimised is what validates, so that the two can be held against each other
    """

    name: str
    epochs: int
    lr: float
    validate_every: int
    samples: Mapping[int, int]
    loss: Callable[[], Loss]
    keeps_last: bool = False
    validated: bool = False


def phases_of(
    options: TrainOptions, predictor: OneShot | Recursive, objectives: Mapping[int, Objective], train: Batch,
    labels: Mapping[int, Labelled] | None,
) -> list[Phase]:  # fmt: skip
    """The phases of a training; TsAdaptError for an unknown loss, and for labels that are missing or have corrections.

    objectives     what is minimised through the solver, for each number of steps
    train, labels  what is learned from through the solver, and by regression
    """
    given, objective = labels or {}, next(iter(objectives.values()))
    regressed = Phase(
        "labels", options.label_epochs, options.label_lr, options.validate_every,
        {steps: len(data.batch) for steps, data in given.items()}, lambda: regression(predictor, objective, given),
    )  # fmt: skip
    through = Phase(
        "end-to-end", options.epochs, options.lr, 1,
        dict.fromkeys(predictor.learned, len(train)), lambda: end_to_end(predictor, objectives, train),
        keeps_last=options.adversarial > 0, validated=not options.adversarial,
    )  # fmt: skip
    check_options(options, "train.")
    known = {"end_to_end": [through], "labels": [regressed], "both": [regressed, through]}
    if options.loss != "end_to_end" and not set(predictor.learned) <= set(given):
        raise TsAdaptError(f"loss {options.loss!r} learns from labels, and none were given; take end_to_end")
    if options.loss != "end_to_end" and any(data.grid.corrections for data in given.values()):
        raise TsAdaptError(
            "the labels have corrections, without which their times are not the best; regression learns times only: "
            "give it labels searched without corrections"
        )
    return known[options.loss]


def optimizer_of(predictor: OneShot | Recursive, options: TrainOptions) -> torch.optim.AdamW:
    return torch.optim.AdamW(predictor.parameters(), betas=(0.9, 0.98), weight_decay=options.weight_decay)


def averaged(predictor: OneShot | Recursive, options: TrainOptions) -> AveragedModel:
    """The moving average of its weights, which is now what they are."""
    return AveragedModel(predictor, avg_fn=warming_average(options.ema), use_buffers=False)


def batches_of(samples: Mapping[int, int], size: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """(N, rows) of one epoch: for every N all of its samples once; a round has a batch of each N that has some left."""
    batches = {steps: torch.randperm(count, generator=generator).split(size) for steps, count in samples.items()}
    for turn in range(max(map(len, batches.values()))):
        here = [steps for steps, parts in batches.items() if turn < len(parts)]
        for place in torch.randperm(len(here), generator=generator).tolist():
            yield here[place], batches[here[place]][turn]


def kept_of(share: float, rows: int, width: int, generator: torch.Generator) -> Tensor | None:
    """What dropout multiplies `(rows, width)` features by, 0 for a `share` of them; None where nothing is dropped."""
    if not share:
        return None
    return (torch.rand(rows, width, generator=generator) >= share) / (1 - share)


def rate(step: int, steps: int) -> float:
    """The learning rate at `step` of `steps`, over its peak: a short rise, then a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def going_on(curve: Sequence[tuple[int, float]], seconds: float, trained: float | None = None) -> str:
    """What the validations of a phase, (passes, share of the static grids' distance), say of one more pass.

    seconds  that a pass takes
    trained  the share on the samples that were learned from, in the last pass: far below the other, more of them would
             gain more than more passes
    """
    passes, share = curve[-1]
    said, last = f"pass {passes}: {100 * share:.2f} % of the static distance", list(zip(*curve[-SEEN:], strict=True))
    if trained is not None:
        said += f" ({100 * trained:.2f} % on the samples of training)"
    if len(curve) < 2:
        return f"{said}; one more takes {seconds:.0f} s"
    slope = 100 * statistics.linear_regression(*last).slope
    promised = f"{abs(slope):.2f} points {'less' if slope < 0 else 'more'}"
    return f"{said}; by the last slope one more makes it {promised}, in {seconds:.0f} s"
