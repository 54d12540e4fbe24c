"""Moments of features as they are published: references of Frechet distances without their images.

NAME.npz                    mu (D,) and sigma (D, D): EDM's and ALD3's fid-refs, what clean-fid and pytorch-fid keep;
                            mu_s, sigma_s of the spatial features as well in the reference batches of ADM
clean-fid:NAME-SPLIT-SIZE   those of clean-fid, by its names (clean-fid:cifar10-train-32), which it downloads, or
                            made by its make_custom_stats (clean-fid:mine-custom-na)
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.evaluation.metrics import FeatureStatistics
from ts_adapt.storage.files import read_bytes

SUFFIX, CLEAN_FID = ".npz", "clean-fid:"
POOLED, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")


def are_moments(reference: str | Path) -> bool:
    """Whether a reference of this name is moments, and no folder of images."""
    return str(reference).startswith(CLEAN_FID) or Path(reference).suffix == SUFFIX


def read_moments(reference: str | Path) -> tuple[FeatureStatistics, FeatureStatistics | None]:
    """Of the pooled features, and of the spatial ones where they are kept; TsAdaptError where there are none."""
    if str(reference).startswith(CLEAN_FID):
        return _statistics(*_of_clean_fid(str(reference)), reference), None
    path = Path(reference)
    data = read_bytes(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as kept:
            names = [POOLED, *([SPATIAL] if all(name in kept for name in SPATIAL) else [])]
            found = [[np.asarray(kept[name], np.float64) for name in pair] for pair in names]
    except Exception as error:  # of the readers of zip, deflate and numpy each has its own for a damaged file
        raise TsAdaptError(f"{path} holds no numbers mu and sigma ({one_line(error)}); give another") from error
    pooled, *spatial = (_statistics(mean, covariance, path) for mean, covariance in found)
    return pooled, next(iter(spatial), None)


def _of_clean_fid(reference: str) -> tuple[np.ndarray, np.ndarray]:
    from cleanfid.features import get_reference_statistics

    name, *rest = reference.removeprefix(CLEAN_FID).rsplit("-", 2)
    if len(rest) < 2:
        raise TsAdaptError(
            f"{reference} is no name of clean-fid's; give NAME-SPLIT-SIZE, as {CLEAN_FID}cifar10-train-32"
        )
    split, size = rest
    try:
        mean, covariance = get_reference_statistics(name, size, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise TsAdaptError(
            f"clean-fid has no statistics {reference}, or they cannot be had ({one_line(error)}); check the name, or "
            "give a folder of images or an .npz file"
        ) from error
    return np.asarray(mean, np.float64), np.asarray(covariance, np.float64)


def _statistics(mean: np.ndarray, covariance: np.ndarray, of: str | Path) -> FeatureStatistics:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not np.isfinite(covariance.sum() + mean.sum()):
        raise TsAdaptError(
            f"{of} holds mu of {mean.shape} and sigma of {covariance.shape}; expected finite ones of (D,) and (D, D)"
        )
    return FeatureStatistics.from_moments(mean, covariance, count=2)  # how many is not said, and nothing depends on it
