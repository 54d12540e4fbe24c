"""The loss that asks for the data: how far the student's images are from real ones as a set.

    k(f, g) = (f.g / D q + 1)^3                     f, g: features `(D,)` of images, of the network of the distance;
                                                    q: the mean square of those of real ones
    MMD^2   = mean_{i != j} k(x_i, x_j) - 2 mean_ij k(x_i, y_j) + mean_{i != j} k(y_i, y_j)      x student's, y real
    k_b     = mean_{x' in X_b} k(x_b, x')
    r_b     = 2 k_b - 2 mean_j k(x_b, y_j) + mean_{i != j} k(y_i, y_j) - mean_b k_b     mean_b r_b = MMD^2
    L_b     = distance_b + weight r_b

the unbiased kernel distance of KID (Binkowski et al. 2018), in units of the features, so that a weight means the same
for every network, and as a number of each sample, so that it goes wherever a distance goes. Each sample is in the pairs
of the others too, whence 2 k_b: the spread of r_b over sqrt(n) is the standard error of MMD^2 over the student's n
samples. X_b are the other images of the minibatch and, in learning, those of the minibatches before it, as they were
then: of a few dozen images alone the estimate is mostly noise. They are forgotten when the samples come round again, as
no image may be compared with itself. Learning follows the gradient of the expectation, 2 E grad (k(x, x') - k(x, y))
with x' and mean_b k_b held fixed.

A paired distance cannot be better than its teacher; the data can. Alone this loss learns to please its network, which
is why that network may not judge the result (`config`), and the paired distance stays beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ts_adapt.distances import features_of, towards
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Distance
from ts_adapt.search.objective import Objective

MEMORY = 512
"""How many images of minibatches before are compared with, at most."""
CHUNK = 256
"""Images, or rows of a matrix of kernels, that are in memory at once."""
WIDEST = 4096
"""Features of an image, at most: of the networks, and of the values of small images."""


def kernel(f: Tensor, g: Tensor, square: Tensor) -> Tensor:
    """k `(n, m)` of features `(n, D)` and `(m, D)`; `square` `()` is q."""
    return (f @ g.T / (f.shape[1] * square) + 1).pow(3)


class Real:
    """Features `(m, D)` of real `images` `(m, C, H, W)` in [-1, 1] as `distance` sees them, their mean square, and k
    among themselves.

    images  at once, or part by part, none of which is kept

    Raises TsAdaptError for fewer than two images, and where the features of one are more than WIDEST.
    """

    @torch.no_grad()
    def __init__(self, images: Tensor | Iterable[Tensor], distance: Distance) -> None:
        look, found = features_of(distance), []
        for part in images.split(CHUNK) if isinstance(images, Tensor) else images:
            found.append(look(part).double())
            if (width := found[-1].shape[1]) > WIDEST:
                raise TsAdaptError(
                    f"a distribution is matched in at most {WIDEST} features of an image, and the distance has "
                    f"{width}; give a distance with a network (features, lpips)"
                )
        count = sum(map(len, found))
        if count < 2:
            raise TsAdaptError(f"there are {count} real images; a distribution needs at least 2")
        self.features = torch.cat(found)
        self.square = self.features.square().mean().clamp_min(torch.finfo(torch.float64).tiny)
        total = sum(kernel(part, self.features, self.square).sum() for part in self.features.split(CHUNK))
        own = (self.features.square().mean(1) / self.square + 1).pow(3).sum()
        self.among = (total - own) / (count * (count - 1))


@dataclass
class Matching:
    """A Distance: the `paired` one and `weight` times each sample's share in MMD^2 to the `real` images.

    Where a gradient is asked for, the images met before are remembered and compared with, until they are forgotten.
    """

    paired: Distance
    real: Real
    weight: float
    memory: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.towards(y)(x)

    def towards(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        """x -> the loss of x whose pairs are `y`."""
        paired = towards(self.paired, y)
        return lambda x: paired(x) + self.weight * self._shares(x).to(x.dtype)

    def apart(self, x: Tensor, y: Tensor) -> Tensor:
        """The paired distances and the features of x, `(B, 1 + D)`: of a part of the samples, for `whole`."""
        paired = self.paired(x, y).double()
        return torch.cat([paired[:, None], features_of(self.paired)(x).double()], 1)

    def whole(self, parts: Tensor) -> Tensor:
        """The losses `(n,)` of all samples, of what `apart` has of them `(n, 1 + D)`."""
        found = parts[:, 1:]
        return parts[:, 0] + self.weight * shares_of(found, found, self.real)

    def _shares(self, x: Tensor) -> Tensor:
        """r_b `(B,)`, float64."""
        found = features_of(self.paired)(x).double()
        if not found.requires_grad:
            return shares_of(found, found, self.real)
        met = torch.cat([found.detach(), *([] if self.memory is None else [self.memory])])
        self.memory = met[:MEMORY]
        return shares_of(found, met, self.real)


def shares_of(found: Tensor, met: Tensor, real: Real) -> Tensor:
    """r_b `(B,)` of features `(B, D)`, each compared with all others in `met` `(n, D)`, which begins with the same.

    What is not finite counts for no other; 0 where nothing is left to compare with.
    """
    finite = torch.isfinite(met).all(1)
    there = torch.where(finite[:, None], met, 0.0).detach()
    places = torch.arange(len(met), device=found.device)
    apart, near, count = [], [], []
    for part, own in zip(found.split(CHUNK), places[: len(found)].split(CHUNK), strict=True):
        others = finite & (own[:, None] != places)
        count.append(others.sum(1))
        near.append(torch.where(others, kernel(part, there, real.square), 0.0).sum(1) / count[-1].clamp_min(1))
        apart.append(near[-1] - kernel(part, real.features, real.square).mean(1))
    there_is = torch.cat(count) > 0
    level = torch.cat(near).detach()[there_is & finite[: len(found)]].mean()
    return torch.where(there_is, 2 * torch.cat(apart) + real.among - level, 0.0)


def matching(objective: Objective, real: Real | None, weight: float) -> Objective:
    """`objective` with `weight` times each sample's share in MMD^2 to the `real` images beside its distance."""
    if real is None:
        raise TsAdaptError(
            f"a distribution of weight {weight:g} is that of real images, and none were given; give some"
        )
    return replace(objective, distance=Matching(objective.distance, real, weight))


def forget(objective: Objective) -> None:
    """Let `objective` remember no images: what follows depends on nothing before."""
    if isinstance(objective.distance, Matching):
        objective.distance.memory = None
