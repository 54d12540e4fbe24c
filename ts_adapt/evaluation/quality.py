"""What sets of samples are measured by beside the Frechet distance of their features.

    kid                the kernel distance to real features (`metrics.kid`); may come out below zero
    precision, recall  how many samples look real, and how much of what is real is met (`metrics.Manifold`)
    inception_score    how sure of its class each is, and how many classes there are (`metrics.inception_score`)
    sfid               the Frechet distance of spatial features to real ones (Nash et al. 2021)
    clip_score         the mean over samples of how well they show their prompts (`clip`)

The first three are of whichever features the comparison is made in; Inception score and sFID need Inception's, CLIP
score needs prompts and CLIP's weights, the others real images. Where one does not apply it is None. All of them depend
on how many samples there are; as many real features are taken as there are samples, evenly picked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ts_adapt.evaluation.features import Extractor, folder_looks, looks_of, taken_shape
from ts_adapt.evaluation.metrics import FeatureStatistics, Manifold, frechet, inception_score, kid
from ts_adapt.evaluation.moments import are_moments, read_moments
from ts_adapt.zoo.data import to_model_range
from ts_adapt.zoo.features import JUDGING_IMAGES, TRAINING_IMAGES, judged, reference_statistics, test_images
from ts_adapt.zoo.networks import GREY

NEIGHBOURS = 3
SUBSET, SUBSETS = 1000, 20


@dataclass(frozen=True)
class Quality:
    """The measures of the module's head, by the names of their columns."""

    kid: float | None = None
    inception_score: float | None = None
    sfid: float | None = None
    precision: float | None = None
    recall: float | None = None
    clip_score: float | None = None


@dataclass(frozen=True)
class Reference:
    """What real images look like in the features of a comparison.

    statistics  that Frechet distances are measured to
    features    `(m, D)` of real images
    apart       whether these are other images than those of the statistics: then they say what is the least to be
                expected of any model
    spatial     statistics of the spatial features; None for others than Inception's
    """

    statistics: FeatureStatistics
    features: Tensor
    apart: bool
    spatial: FeatureStatistics | None = None
    _manifolds: dict[int, Manifold] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, looks: Mapping[str, Tensor]) -> Self:
        """Real images by their `features`, and `spatial` ones where they are known."""
        spatial = FeatureStatistics.of(looks["spatial"]) if "spatial" in looks else None
        return cls(FeatureStatistics.of(looks["features"]), looks["features"], False, spatial)

    def measures(self, own: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Those of `Quality` that need real images, or moments of them."""
        precision = recall = sfid = None
        if self.spatial is not None and "spatial" in own:
            sfid = frechet(FeatureStatistics.of(own["spatial"]), self.spatial)
        if not len(self.features):
            return {"sfid": sfid}
        features, real = own["features"], self._picked(len(own["features"]))
        if min(len(features), len(real)) > NEIGHBOURS:
            if len(real) not in self._manifolds:
                self._manifolds[len(real)] = Manifold(real, NEIGHBOURS)
            precision, recall = self._manifolds[len(real)].share(features), Manifold(features, NEIGHBOURS).share(real)
        distance = kid(features, real, subsets=SUBSETS if len(features) > SUBSET else 1, size=SUBSET)
        return {"kid": distance, "sfid": sfid, "precision": precision, "recall": recall}

    def _picked(self, count: int) -> Tensor:
        """`count` of the real features, or all of them, evenly picked."""
        return self.features[torch.linspace(0, len(self.features) - 1, min(count, len(self.features))).long()]


def quality_of(run: Mapping[str, Tensor], samples: int, reference: Reference | None) -> Quality:
    """Of the first `samples` samples of `run`: `features` `(n, D)`, and `probabilities`, `spatial`, `clip` if there are
    any. Without a reference, what needs none."""
    own = {name: tensor[:samples].float() for name, tensor in run.items()}
    return Quality(
        inception_score=inception_score(own["probabilities"]) if "probabilities" in own else None,
        clip_score=float(own["clip"].double().mean()) if "clip" in own else None,
        **({} if reference is None else reference.measures(own)),
    )


def reference_of(
    extract: Extractor,
    name: str,
    folder: str | Path | None = None,
    *,
    shape: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Reference | None:
    """Real images under the extractor called `name`; None where there are none.

    folder  of real images, or moments of their features as references of FID are published (`moments`), with which
            only Frechet distances are measured; None: the zoo's own, of the data whose pictures are of `shape`. The
            judge has statistics and features of both data sets, the other network those of Fashion-MNIST's 60,000
            training images and of the first JUDGING_IMAGES test images
    shape   (C, H, W) of the model's images, as which those in the folder are read, but for Inception

    Raises TsAdaptError as `folder_features` does.
    """
    if folder is not None and are_moments(folder):
        statistics, spatial = read_moments(folder)
        return Reference(statistics, torch.empty(0, len(statistics.mean)), False, spatial)
    if folder is not None:
        look, taken = partial(looks_of, extract), taken_shape(name, shape)
        looks = folder_looks(look, folder, taken, batch_size=batch_size, progress=progress)
        return Reference.of(looks)
    if name == "judge" and shape is not None:
        known = judged(tuple(shape))
        count = int(known["count"][0])
        return Reference(
            FeatureStatistics.from_moments(known["mean"], known["covariance"], count),
            torch.from_numpy(known["features"]),
            True,
        )
    if name != "zoo" or shape != GREY:
        return None
    test = torch.cat([extract(to_model_range(part)).cpu() for part in test_images()[0][:JUDGING_IMAGES].split(500)])
    return Reference(FeatureStatistics.from_moments(*reference_statistics(), TRAINING_IMAGES), test, True)
