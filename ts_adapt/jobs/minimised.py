"""What is minimised beside the paired distance, and what is said of it beside the results: who is learned by may not
judge."""

from __future__ import annotations

from pathlib import Path

from ts_adapt import dual_encoders
from ts_adapt.distances import LOOKS
from ts_adapt.jobs.experiment import Experiment
from ts_adapt.jobs.matched_images import source_of
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.prompts import read_prompts
from ts_adapt.search.captions import Captions
from ts_adapt.search.static_options import StaticOptions


def captions(session: Experiment) -> Captions:
    """What the training samples of `session` are asked to show, and the network that tells; TsAdaptError where it is
    not to be had."""
    return Captions(session.reader, read_prompts(Path(str(session.config.teacher.prompts_of("train")))))


def minimised_said(session: Experiment, options: StaticOptions | TrainOptions) -> list[str]:
    """What is minimised, by which networks, to which images; nothing where it is the paired distance alone."""
    config, parts = session.config, [f"distance {session.distance} to the teacher"]
    if options.distribution:
        parts.append(
            f"{options.distribution:g} times the unbiased MMD^2 (cubic kernel, {LOOKS[session.distance]} features) to "
            f"at most {config.distribution.images} images of {source_of(session)}"
        )
    if options.adversarial:
        parts.append(
            f"{options.adversarial:g} times the relativistic loss of a discriminator that learns along, on at most "
            f"{config.distribution.images} images of {source_of(session)}"
        )
    if options.caption:
        name = "the embedded dual encoder" if config.caption == dual_encoders.ZOO else config.caption
        parts.append(f"{options.caption:g} times one minus the score of image and prompt by {name}")
    return [f"minimised are {' and '.join(parts)}"] if len(parts) > 1 else []
