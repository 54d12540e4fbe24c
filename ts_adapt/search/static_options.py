"""How a static grid is searched (`static`), and what that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.corrections import OF_MODEL_TIME, CorrectionName
from ts_adapt.options import MANY, SMALL, Between, Count, Decay, Positive, Seed, Weight
from ts_adapt.search.work import Work

Method = Literal["auto", "lbfgs", "adam", "smoothed", "forward"]
Target = Literal["mean", "geometric", "capped"]
BY_SAMPLE = ("adam", "smoothed")
"""Those that give each sample of a minibatch times of its own."""
STEPWISE = ("auto", "adam", "smoothed")
USED_BY_METHOD = {
    "iterations": (*STEPWISE, "lbfgs"), "batch_size": (*STEPWISE, "lbfgs"), "starts": ("lbfgs",),
    "tolerance": ("lbfgs",), "evaluations": ("auto", "forward"), "spread": ("auto", "forward"), "lr": STEPWISE,
    "ema": STEPWISE, "validate_every": STEPWISE, "smoothing": ("smoothed",), "clip": ("auto", "adam"),
    "soft_teacher": ("adam",), "seed": (*STEPWISE, "forward"),
}  # fmt: skip
"""Options of `StaticOptions` and the methods that use them; the others all do."""
CORRECTED = ("shift", "history")
"""What is learned beside the times where nothing else is said, of any model."""


@dataclass
class StaticOptions:
    """How the static grid is searched."""

    method: Method = "auto"
    """adam: gradient of minibatches; lbfgs: of all samples; smoothed: from perturbed grids; forward: CMA-ES, without
    gradient; auto: adam, or forward where no derivative can be trusted or none leads on."""
    target: Target = "mean"
    """Of the distances: their mean; their geometric mean, in which a few samples that are far off count no more than
    others; capped: their mean, each at most twice the median of the best start."""
    iterations: Count = 96
    """adam, smoothed: minibatches; lbfgs: at most."""
    evaluations: Count = 160
    """forward: how many grids are measured on all samples (under auto, on 96 at most)."""
    spread: Positive = 0.3
    """forward: standard deviation of the first draws, in the logits."""
    starts: Annotated[int, Between(1, 1000)] = 2
    """lbfgs: how many of the grids to start from, the best ones, are searched; where a search is cheap, take all."""
    tolerance: Annotated[float, Between(0, 1)] = 1e-4
    """lbfgs: stops when the mean distance falls by less than this share."""
    batch_size: Count = 24
    """adam, smoothed: of a minibatch; lbfgs: of the parts whose gradients are summed."""
    lr: Positive = 0.08
    smoothing: Positive = 0.2
    """smoothed: s, the standard deviation of the perturbed logits."""
    clip: Annotated[float, Between(SMALL, MANY)] = 1.0
    """adam: each sample's gradient is clipped to this norm before the mean."""
    ema: Decay = 0.9
    """adam, smoothed: decay of the moving average of the parameters."""
    validate_every: Count = 16
    """adam, smoothed: iterations; lbfgs validates after each."""
    corrections: list[CorrectionName] | None = None
    """What is learned beside the times: shift (of the model times), scale (of the output), coefficients,
    history (weights on all past predictions), guidance (factors on its scale), embedding (added to the network's
    embedding of the time); start and residual take a predictor. None: shift and embedding (not of pipelines that can be
    told only their loop's times, nor of networks without one), history, and guidance where the model is guided, by the
    job after the times alone; []: the times alone, which any program can follow."""
    soft_teacher: bool = False
    distribution: Weight = 0.0
    """adam: weight of the distance to real images as a set (the kernel distance of KID, unbiased, in the features of
    the distance's network), beside the paired distance to the teacher; images are those of the group distribution."""
    adversarial: Weight = 0.0
    """adam: weight of the loss of a discriminator that learns along, from the same images, beside that distance."""
    caption: Weight = 0.0
    """Weight of how badly images show their prompts (one minus the score of the dual encoder of option caption), beside
    the paired distance."""
    seed: Seed = 0

    def corrected(self, guides: bool, embeds: bool, told: bool = True) -> list[CorrectionName]:
        """What is learned beside the times of a model that is guided, or not, whose network has an embedding of the
        time, or not, and can be told others, or not."""
        if self.corrections is not None:
            return self.corrections
        there = [*CORRECTED, *(["guidance"] if guides else []), *(["embedding"] if embeds else [])]
        return [name for name in there if told or name not in OF_MODEL_TIME]

    def check_beside(self) -> None:
        """TsAdaptError where the method or the target cannot have what is to be minimised beside the distance."""
        if self.soft_teacher and self.method != "adam":
            raise TsAdaptError(
                "soft_teacher moves the starts by their gradient at each visit; set static.method to adam"
            )
        by_data = self.distribution or self.adversarial
        if by_data and (self.method != "adam" or self.target != "mean" or self.soft_teacher):
            raise TsAdaptError(
                f"static.{'distribution' if self.distribution else 'adversarial'} learns from real images by "
                "minibatches, in the mean, from the noises as they are; set static.method to adam, static.target to "
                "mean and static.soft_teacher to false"
            )
        if self.caption and self.target != "mean":
            raise TsAdaptError("a caption loss is added to the mean distance; set static.target to mean")

    def solves(self, train: int, validation: int) -> Work:
        """About how many solves a search takes that does not end early, from numbers of samples; of auto, where Adam
        leads on: else forward comes behind it."""
        batch, validations = min(self.batch_size, train), -(-self.iterations // self.validate_every)
        lbfgs = Work(validation, train).times(self.starts * self.iterations)
        forward = Work(self.evaluations * (train + validation // 4))  # two validations a generation of eight or more
        adam = Work(validations * validation, self.iterations * batch)
        return {
            "lbfgs": lbfgs,
            "forward": forward,
            "auto": adam,
            "adam": adam,
            "smoothed": Work(validations * validation + 2 * self.iterations * batch),
        }[self.method]
