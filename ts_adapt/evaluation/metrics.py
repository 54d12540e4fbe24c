"""Metrics of sets of images: Frechet and kernel distances of features, bootstrap intervals of per-sample values.

    Frechet  |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))       means m and covariances C of features
    kernel   the unbiased MMD^2 with k(f, g) = (f.g / D + 1)^3       averaged over subsets; may come out below zero
    interval the quantiles, over resamples of the samples with replacement (percentile bootstrap), of the mean, or of
             the ratio of two means of the same samples

Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID), Efron 1979. The distances themselves are clean-fid's. Features
are those of Inception ("inception"), which makes it FID and KID proper, or those of the zoo's classifier ("zoo"),
which works offline; numbers of the two have nothing to do with one another, and both depend on how many samples
there are: compare equal numbers only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ts_adapt.evaluation.inception import Inception
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.zoo import load_features
from ts_adapt.zoo.data import to_model_range, to_uint8
from ts_adapt.zoo.features import IMAGE_SHAPE

Extractor = Callable[[Tensor], Tensor]
"""Images `(B, C, H, W)` in [-1, 1] -> features `(B, D)`. Images are rounded to 8 bits first, as if saved and read."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class FeatureStatistics:
    """The count, mean `(D,)` and covariance `(D, D)` of features met so far, in float64.

    Parts are merged exactly (Chan et al. 1983), so that neither the batches nor their order matter beyond rounding.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
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
        scatter = (features - mean).T @ (features - mean)
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean, scatter
            return self
        if mean.shape != self._mean.shape:
            raise TsAdaptError(f"features of width {mean.shape[0]} were added to some of width {self._mean.shape[0]}")
        total = self.count + count
        apart = mean - self._mean
        self._scatter = self._scatter + scatter + np.outer(apart, apart) * (self.count * count / total)
        self._mean = self._mean + apart * (count / total)
        self.count = total
        return self

    @property
    def mean(self) -> np.ndarray:
        """`(D,)`; TsAdaptError before the first features."""
        if self._mean is None:
            raise TsAdaptError("there are no features yet; update(features) first")
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """`(D, D)`, unbiased (n - 1); TsAdaptError below two features."""
        if self._scatter is None or self.count < 2:
            raise TsAdaptError(f"a covariance needs at least 2 features; there are {self.count}")
        return self._scatter / (self.count - 1)


def frechet(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The Frechet distance of two Gaussians with these moments; clean-fid's.

    Raises TsAdaptError for features of different widths, and where covariances of too few samples have no real root.
    """
    from cleanfid.fid import frechet_distance

    if first.mean.shape != second.mean.shape:
        raise TsAdaptError(f"features of widths {first.mean.shape[0]} and {second.mean.shape[0]} cannot be compared")
    try:
        return float(frechet_distance(first.mean, first.covariance, second.mean, second.covariance))
    except ValueError as error:
        raise TsAdaptError(
            f"the covariances of {first.count} and {second.count} samples have no real root ({error}); "
            "take more samples"
        ) from error


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


def make_extractor(name: str, *, device: torch.device | str = "cpu", inception: str | Path | None = None) -> Extractor:
    """The feature extractor called `name`: "zoo" (grey 28x28, offline), "inception" (any size, resized by clean-fid),
    or "pixels" (the samples themselves, unrounded: for small analytic models).

    inception  the folder of clean-fid's Inception weights (`inception-2015-12-05.pt`); None: clean-fid downloads them

    Raises TsAdaptError for an unknown name, and where Inception's weights are not to be had.
    """
    if name not in EXTRACTORS:
        near = difflib.get_close_matches(name, EXTRACTORS, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TsAdaptError(f"unknown feature extractor {name!r}; {hint}known: {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](None if inception is None else Path(inception), torch.device(device))


def _zoo(folder: Path | None, device: torch.device) -> Extractor:
    network = load_features(device=device)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        pooled: Tensor = network(to_model_range(to_uint8(images)).to(device)).pooled
        return pooled

    return extract


def _pixels(folder: Path | None, device: torch.device) -> Extractor:
    return lambda images: images.flatten(1).double().cpu()


EXTRACTORS: dict[str, Callable[[Path | None, torch.device], Extractor]] = {
    "zoo": _zoo,
    "inception": Inception,
    "pixels": _pixels,
}


def taken_shape(name: str, model: Sequence[int] | None) -> Sequence[int] | None:
    """Of the images (C, H, W) that the extractor called `name` takes; None: of any size.

    model  the shape of the images of a model, whose `pixels` are compared
    """
    return {"zoo": IMAGE_SHAPE, "pixels": model}.get(name)


def folder_features(
    extract: Extractor, folder: str | Path, shape: Sequence[int] | None = None, *, batch_size: int = 64
) -> Tensor:
    """The features `(n, D)` of the images in `folder` and the folders inside it, in the order of their names.

    shape  as of `read_image`

    Raises TsAdaptError for a missing folder, one without images, a file that is no image or of another size, and images
    whose features have several widths.
    """
    files, features = image_files(folder), []
    for start in range(0, len(files), batch_size):
        images = [read_image(file, shape) for file in files[start : start + batch_size]]
        one_size = all(image.shape == images[0].shape for image in images)
        features += [extract(part).cpu() for part in ([torch.cat(images)] if one_size else images)]
    if len({part.shape[1] for part in features}) > 1:
        raise TsAdaptError(f"the images in {folder} have several sizes; make them all of one size")
    return torch.cat(features)


def image_files(folder: str | Path) -> list[Path]:
    """The images in `folder` and the folders inside it, in the order of their names; TsAdaptError if there are none."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise TsAdaptError(f"{folder} holds no images; expected a folder of {', '.join(IMAGE_SUFFIXES)}")
    return files


def read_image(file: Path, shape: Sequence[int] | None = None) -> Tensor:
    """`(1, C, H, W)` in [-1, 1]; TsAdaptError for what is no image, or of another size.

    shape  (C, H, W), read as grey for C = 1, else as RGB; None: RGB of any size
    """
    mode = "L" if shape is not None and shape[0] == 1 else "RGB"
    try:
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.array(image.convert(mode)))
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise TsAdaptError(f"{file} is no image that can be read; remove it, or put it right") from error
    found = to_model_range((pixels.unsqueeze(-1) if mode == "L" else pixels).permute(2, 0, 1).unsqueeze(0))
    size = tuple(found.shape[1:])
    if shape is not None and size != tuple(shape):
        raise TsAdaptError(f"{file} is of {size}, the model's samples are of {tuple(shape)}; resize the images to that")
    return found


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
