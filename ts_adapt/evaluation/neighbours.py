"""Precision and recall of sets of samples (Kynkaanniemi et al. 2019, arXiv:1904.06991).

    M(F)       the balls around the features f_i of a set, each as wide as the distance to its k-th nearest other one
    precision  the share of the samples' features in M(real): how many of them look real
    recall     the share of the real features in M(samples): how much of what is real is met

Both depend on how many features there are: compare equal numbers only. Published: k = 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ts_adapt.interfaces import TsAdaptError

CHUNK = 1024
"""Rows of the distance matrix that are in memory at once."""


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
