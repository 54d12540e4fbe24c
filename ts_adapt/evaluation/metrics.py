"""Metrics of sets of images, in their features f, and bootstrap intervals of per-sample values.

    Frechet          |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))    means m and covariances C of features
                     with C = F' F the last trace is the sum of the singular values of F_1 F_2'; of n < D features F
                     are the n centred ones, so that nothing of D x D is made
    kernel           the unbiased MMD^2 with k(f, g) = (f.g / D + 1)^3    averaged over subsets; may be below zero
    M(F)             the balls around the features f_i of a set, each as wide as the distance to its k-th nearest other
    precision        the share of the samples' features in M(real): how many of them look real
    recall           the share of the real features in M(samples): how much of what is real is met
    Inception score  exp E_x KL(p(y|x) || p(y)), the mean over parts of the samples
    interval         the quantiles, over resamples of the samples with replacement (percentile bootstrap), of the mean,
                     or of the ratio of two means of the same samples

Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID), Kynkaanniemi et al. 2019 (arXiv:1904.06991; k = 3), Salimans et
al. 2016, Efron 1979. Kernel distances are clean-fid's; Frechet distances agree with its. Numbers of different features
have nothing to do with one another, and all but the intervals depend on how many samples there are: compare equal
numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError

CHUNK = 1024
"""Rows of a matrix of distances that are in memory at once."""


class FeatureStatistics:
    """The count, mean `(D,)` and covariance `(D, D)` of features met so far, in float64.

    Parts are merged exactly (Chan et al. 1983), so that neither the batches nor their order matter beyond rounding.
    The scatter S, the sum of (f - m)(f - m)', is kept as rows R with S = R' R while these are fewer than D.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
        self._rows: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Self:
        """Of all features `(n, D)` at once."""
        return cls().update(features)

    @classmethod
    def from_moments(cls, mean: np.ndarray, covariance: np.ndarray, count: int) -> Self:
        """From a known mean and (n - 1) covariance of `count` features, such as `zoo.reference_statistics()`."""
        made = cls()
        made.count, made._mean = count, np.asarray(mean, np.float64)
        made._scatter = np.asarray(covariance, np.float64) * (count - 1)
        return made

    def update(self, features: Tensor | np.ndarray) -> Self:
        """Add features `(n, D)`; TsAdaptError for another width, another shape, or non-finite numbers."""
        if isinstance(features, Tensor):
            features = features.detach().cpu().double().numpy()
        features = np.asarray(features, np.float64)
        if features.ndim != 2:
            raise TsAdaptError(f"features have shape {features.shape}; expected (n, D)")
        if not np.isfinite(features).all():
            raise TsAdaptError("features hold a NaN or infinite value; look for one in the images")
        if len(features) == 0:
            return self
        count, mean = len(features), features.mean(0)
        rows = features - mean
        if self._mean is None:
            self._mean = np.zeros_like(mean)
        if mean.shape != self._mean.shape:
            raise TsAdaptError(f"features of width {mean.shape[0]} were added to some of width {self._mean.shape[0]}")
        total = self.count + count
        if self.count:
            rows = np.concatenate([rows, (mean - self._mean)[None] * np.sqrt(self.count * count / total)])
        self._add(rows)
        self._mean = self._mean + (mean - self._mean) * (count / total)
        self.count = total
        self.__dict__.pop("factor", None)
        return self

    def _add(self, rows: np.ndarray) -> None:
        """R' R of `rows` `(r, D)` to the scatter."""
        if self._scatter is None and self._rows is not None:
            rows = np.concatenate([self._rows, rows])
        if self._scatter is None and len(rows) < rows.shape[1]:
            self._rows = rows
            return
        self._scatter = rows.T @ rows + (0 if self._scatter is None else self._scatter)
        self._rows = None

    @property
    def mean(self) -> np.ndarray:
        """`(D,)`; TsAdaptError before the first features."""
        if self._mean is None:
            raise TsAdaptError("there are no features yet; update(features) first")
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """`(D, D)`, unbiased (n - 1); TsAdaptError below two features."""
        found: np.ndarray = self._whole() / self._freedom
        return found

    @cached_property
    def factor(self) -> np.ndarray:
        """F `(r, D)`, r at most D, with F' F the covariance; TsAdaptError below two features."""
        freedom = self._freedom
        if self._rows is not None:
            factor: np.ndarray = self._rows / np.sqrt(freedom)
            return factor
        found, directions = np.linalg.eigh(self._whole() / freedom)
        factor = np.sqrt(found.clip(0))[:, None] * directions.T
        return factor

    def _whole(self) -> np.ndarray:
        """The scatter `(D, D)`; TsAdaptError before the first features."""
        rows = np.zeros((0, len(self.mean))) if self._rows is None else self._rows
        found: np.ndarray = rows.T @ rows if self._scatter is None else self._scatter
        return found

    @property
    def _freedom(self) -> int:
        if self.count < 2:
            raise TsAdaptError(f"a covariance needs at least 2 features; there are {self.count}")
        return self.count - 1


def frechet(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The Frechet distance of two Gaussians with these moments; TsAdaptError for features of different widths."""
    if first.mean.shape != second.mean.shape:
        raise TsAdaptError(f"features of widths {first.mean.shape[0]} and {second.mean.shape[0]} cannot be compared")
    a, b = first.factor, second.factor
    apart = first.mean - second.mean
    return float(apart @ apart + np.vdot(a, a) + np.vdot(b, b) - 2 * np.linalg.norm(a @ b.T, "nuc"))


def kid(
    first: Tensor | np.ndarray, second: Tensor | np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> float:
    """The kernel distance of features `(n, D)` and `(m, D)`, clean-fid's; random by `seed` alone.

    It averages over `subsets` of at most `size` features. Raises TsAdaptError for features of different widths.
    """
    from cleanfid.fid import kernel_distance

    a, b = (np.asarray(f.detach().cpu() if isinstance(f, Tensor) else f, np.float64) for f in (first, second))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise TsAdaptError(f"features have shapes {a.shape} and {b.shape}; expected (n, D) and (m, D), n and m over 1")
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        return float(kernel_distance(a, b, num_subsets=subsets, max_subset_size=size))
    finally:
        np.random.set_state(state)


class Manifold:
    """M(F) of `features` `(n, D)`; TsAdaptError for k or fewer of them, and for non-finite numbers."""

    def __init__(self, features: Tensor, k: int = 3) -> None:
        self.features = features.detach().double()
        if self.features.ndim != 2 or k < 1 or len(features) <= k:
            raise TsAdaptError(
                f"features have shape {tuple(features.shape)} and k is {k}; expected (n, D) with n above k, and k from "
                "1 on"
            )
        if not bool(torch.isfinite(self.features).all()):
            raise TsAdaptError("features hold a NaN or infinite value; look for one in the images")
        nearest = [torch.cdist(part, self.features).kthvalue(k + 1).values for part in self.features.split(CHUNK)]
        self.radii = torch.cat(nearest)

    def share(self, features: Tensor) -> float:
        """The share of `features` `(m, D)` that lie in at least one ball; TsAdaptError for another width."""
        others = features.detach().double()
        if others.ndim != 2 or not len(others) or others.shape[1] != self.features.shape[1]:
            raise TsAdaptError(
                f"features have shapes {tuple(self.features.shape)} and {tuple(features.shape)}; expected (n, D) and "
                "(m, D)"
            )
        inside = [(torch.cdist(part, self.features) <= self.radii).any(1) for part in others.split(CHUNK)]
        return float(torch.cat(inside).double().mean())


def inception_score(probabilities: Tensor, parts: int = 10) -> float:
    """Of the class probabilities `(n, C)` of samples, in `parts` parts, or one where there are fewer samples.

    Raises TsAdaptError for no samples, and for rows that are no probabilities.
    """
    p = probabilities.detach().double()
    if p.ndim != 2 or not len(p) or bool((p < 0).any()) or not torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-3):
        raise TsAdaptError(f"probabilities of shape {tuple(p.shape)} were given; expected rows (n, C) that sum to one")
    scores = []
    for part in p.tensor_split(parts if len(p) >= parts else 1):
        marginal = part.mean(0, keepdim=True)
        apart = torch.xlogy(part, part) - torch.xlogy(part, marginal)
        scores.append(apart.sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def bootstrap_interval(
    values: Tensor | np.ndarray | Iterable[float], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The ends (low, high) of the interval of the mean of per-sample `values` `(n,)`.

    Raises TsAdaptError for no values, non-finite ones, or a level outside (0, 1).
    """
    v = _values(values)
    return _interval(lambda drawn: float(v[drawn].mean()), len(v), level, resamples, seed)


def ratio_interval(
    first: Tensor | np.ndarray | Iterable[float],
    second: Tensor | np.ndarray | Iterable[float],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The ends (low, high) of the interval of mean(first) / mean(second) - 1, of the same samples in the same order.

    Pairs are resampled together, what makes one sample harder than another cancels, and values that are not negative
    never fall by more than 1. An interval without zero means that the two differ at this level. Raises as
    `bootstrap_interval` does.
    """
    a, b = _values(first), _values(second)
    if a.shape != b.shape:
        raise TsAdaptError(f"paired values come from the same samples; got {len(a)} and {len(b)}")
    return _interval(lambda drawn: ratio(a[drawn], b[drawn]), len(a), level, resamples, seed)


def ratio(
    first: Tensor | np.ndarray | Iterable[float],
    second: Tensor | np.ndarray | Iterable[float],
) -> float:
    """mean(first) / mean(second) - 1; where there is nothing to divide by, mean(first)."""
    a, b = float(_values(first).mean()), float(_values(second).mean())
    return a / b - 1 if b else a


def _interval(
    statistic: Callable[[np.ndarray], float], count: int, level: float, resamples: int, seed: int
) -> tuple[float, float]:
    """The quantiles of `statistic` over resamples, places `(count,)` drawn with replacement."""
    if not 0 < level < 1 or resamples < 1:
        raise TsAdaptError(f"level is {level}, resamples {resamples}; expected 0 < level < 1 and at least 1 resample")
    draw = np.random.default_rng(seed)
    found = [statistic(draw.integers(count, size=count)) for _ in range(resamples)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _values(values: Tensor | np.ndarray | Iterable[float]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    v = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.float64)
    if v.ndim != 1 or len(v) == 0 or not np.isfinite(v).all():
        raise TsAdaptError(f"per-sample values are finite, (n,) with n at least 1; got shape {v.shape}")
    return v
