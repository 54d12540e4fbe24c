"""The real images that a distribution is matched to, and what is said of it beside the results."""

from __future__ import annotations

import torch
from torch import Tensor

from ts_adapt import zoo
from ts_adapt.distances import LOOKS
from ts_adapt.evaluation.features import read_image
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.jobs.session import Session
from ts_adapt.pictures import picture_files
from ts_adapt.zoo.data import to_model_range

SEED = 3
"""Of samples of a model whose law is known; those that results are compared with have others."""


def matched_images(session: Session, weight: float) -> Tensor | None:
    """`(m, C, H, W)` in [-1, 1], beside the model; None where `weight` asks for none.

    Raises TsAdaptError for images of another size than the model's, and for fewer than two.
    """
    if not weight:
        return None
    options, shape = session.config.distribution, session.image_shape
    if options.data is not None:
        files = picture_files(options.data)[: options.images]
        images = torch.cat([read_image(file, shape) for file in files])
    else:
        drawn = session.denoiser.draw(options.images, SEED)
        images = to_model_range(zoo.test_images()[0][-options.images :]) if drawn is None else drawn
    if tuple(images.shape[1:]) != shape:
        raise TsAdaptError(
            f"the embedded images are of {tuple(images.shape[1:])}, the model's of {shape}; give a folder of real ones "
            "as --distribution.data"
        )
    return images.to(session.config.model.device)


def distribution_said(session: Session, weight: float) -> list[str]:
    """What is minimised beside the paired distance, in which features, to which images; nothing without `weight`."""
    if not weight:
        return []
    options, source = session.config.distribution, session.config.distribution.data
    if source is None:
        source = "the embedded test set" if session.denoiser.draw(1, SEED) is None else "the model's own law"
    return [
        f"minimised are distance {session.distance} to the teacher and {weight:g} times the unbiased MMD^2 (cubic "
        f"kernel, {LOOKS[session.distance]} features) to at most {options.images} images of {source}"
    ]
