"""Inception as FID knows it (Szegedy et al. 2015; the weights of 2015-12-05, read by clean-fid), and what else it says.

    features       `(n, 2048)` the pooled last layer: FID, KID, precision and recall
    probabilities  `(n, 1008)` softmax of W features, without the bias, as Salimans et al. 2016 have it: Inception score
    spatial        `(n, 2023)` the first 7 channels of the 17x17 map of `mixed_6/conv`: sFID (Nash et al. 2021)

Images are rounded to 8 bits and resized to 299x299 by clean-fid first.
"""

from __future__ import annotations

import tempfile
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ts_adapt.interfaces import TsAdaptError, one_line
from ts_adapt.zoo.data import to_uint8

WEIGHTS = "inception-2015-12-05.pt"
TO_SPATIAL = (
    "conv", "conv_1", "conv_2", "pool0", "conv_3", "conv_4", "pool1",
    "mixed", "mixed_1", "mixed_2", "mixed_3", "mixed_4", "mixed_5", "mixed_6.conv",
)  # fmt: skip
"""The layers that lead to the spatial features."""
SPATIAL_CHANNELS = 7


class Inception:
    """The extractor `inception`: images `(n, C, H, W)` in [-1, 1], C 1 or 3, -> features.

    folder  with the weights; None: clean-fid downloads them into the folder of temporary files

    Raises TsAdaptError where the weights are not to be had.
    """

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        from cleanfid.resize import build_resizer

        self.device = device
        self._network, self._resize = _network(folder, device), build_resizer("clean")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features: Tensor = self._network(self._resized(images))
        return features

    @torch.no_grad()
    def looks(self, images: Tensor) -> dict[str, Tensor]:
        """All three kinds of features, by name."""
        x = self._resized(images)
        features = self._network(x)
        weight = self._network.base.output.weight.to(features)
        spatial = (x - 128) / 128
        for name in TO_SPATIAL:
            spatial = attrgetter(name)(self._network.layers)(spatial)
        return {
            "features": features,
            "probabilities": (features @ weight.T).softmax(1),
            "spatial": spatial[:, :SPATIAL_CHANNELS].flatten(1),
        }

    def _resized(self, images: Tensor) -> Tensor:
        """`(n, 3, 299, 299)` in [0, 255]."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise TsAdaptError(f"Inception takes images (B, 1, H, W) or (B, 3, H, W); got {tuple(images.shape)}")
        pixels = to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        resized = torch.from_numpy(np.stack([self._resize(image) for image in pixels])).permute(0, 3, 1, 2)
        return resized.float().to(self.device)


def _network(folder: Path | None, device: torch.device) -> Any:
    offline = f"put {WEIGHTS} into a folder and name it, or use the zoo's features, which need no network"
    if folder is not None and not (folder / WEIGHTS).is_file():
        raise TsAdaptError(f"{folder} has no {WEIGHTS}; {offline}")
    try:
        from cleanfid.inception_torchscript import InceptionV3W

        where = tempfile.gettempdir() if folder is None else str(folder)
        return InceptionV3W(where, download=folder is None).to(device).eval()
    except (OSError, RuntimeError) as error:
        raise TsAdaptError(f"Inception's weights cannot be had ({one_line(error)}); {offline}") from error
