"""The real images that a distribution is matched to, and that a discriminator learns from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ts_adapt import zoo
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import read_image
from ts_adapt.jobs.experiment import Experiment
from ts_adapt.pictures import picture_files
from ts_adapt.search.adversarial import seen
from ts_adapt.search.distribution import Real
from ts_adapt.zoo.data import to_model_range
from ts_adapt.zoo.features import JUDGING_IMAGES

SEED = 3
"""Of samples of a model whose law is known; those that results are compared with have others."""
PART = 64
"""Images that are in memory at once."""


def real_images(session: Experiment) -> Real:
    """What the distance of `session` sees in the images of its config.

    Raises TsAdaptError for images of another size than the model's, and as `Real` does.
    """
    return Real(_parts(session), session.compared_by())


def seen_images(session: Experiment) -> Tensor:
    """The images of the config of `session` as a discriminator sees them; errors as those of `real_images`."""
    return torch.cat([seen(part) for part in _parts(session)])


def check_images(session: Experiment) -> None:
    """TsAdaptError where the first images of the config of `session` cannot be learned from; errors as those of
    `real_images`."""
    next(_parts(session))


def _parts(session: Experiment) -> Iterator[Tensor]:
    """`(m, C, H, W)` in [-1, 1], beside the model."""
    options, shape = session.config.distribution, session.image_shape
    if options.data is not None:
        files = picture_files(options.data)[: options.images]
        parts = (torch.cat([read_image(one, shape) for one in files[i : i + PART]]) for i in range(0, len(files), PART))
    else:
        found = session.denoiser.draw(options.images, SEED)
        if found is None:
            found = to_model_range(zoo.test_images()[0][JUDGING_IMAGES:][-options.images :])
        parts = iter(found.split(PART))
    for images in parts:
        if tuple(images.shape[1:]) != shape:
            raise TsAdaptError(
                f"the embedded images are of {tuple(images.shape[1:])}, the model's of {shape}; give a folder of real "
                "ones as --distribution.data"
            )
        yield images.to(session.config.model.device)


def source_of(session: Experiment) -> str:
    """Where the real images are from, in words."""
    if session.config.distribution.data is not None:
        return session.config.distribution.data
    if session.denoiser.draw(1, SEED) is None:
        return "the embedded test images that do not judge"
    return "the model's own law"
