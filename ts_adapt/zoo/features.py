"""The feature network of the zoo, the statistics of the training images under it, and the test images.

    h_0 = x,   h_k = relu(conv_k(h_{k-1})),   k = 1..5      maps of 28x28, 14x14, 14x14, 7x7 and 4x4 places
    f   = mean over places of h_5                           pooled features, 128 numbers
    class scores = W f + b

Trained as a classifier with batch normalisation, which is then folded into the convolutions: normalising by fixed
statistics is an affine map of each channel, so what is left are plain convolutions, fast enough to differentiate
through in a search. The maps serve a perceptual distance, the pooled features a Frechet distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.interfaces import TsAdaptError
from ts_adapt.storage.files import read_tensors

FOLDER = Path(__file__).parent / "fashion-mnist"
WEIGHTS, STATISTICS, TEST_IMAGES = "features.safetensors", "statistics.safetensors", "test-images.npz"
IMAGE_SHAPE = (1, 28, 28)
TRAINING_IMAGES = 60_000
CHANNELS = (16, 32, 48, 96, 128)
STRIDES = (1, 2, 1, 2, 2)


@dataclass(frozen=True)
class Features:
    """maps    one `(B, C_k, H_k, W_k)` a stage, non-negative
    pooled  `(B, 128)`: the mean of the last map over its places
    """

    maps: tuple[Tensor, ...]
    pooled: Tensor


class FeatureNet(nn.Module):
    """A small classifier of images `(B, *shape)` in [-1, 1], 28x28 and grey, -> `Features`; see the module's head.

    Smaller or larger networks of the same kind come from other `channels` and `strides`, one number a stage, and
    networks for other images from another `shape`.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = CHANNELS,
        strides: tuple[int, ...] = STRIDES,
        classes: int = 10,
        shape: tuple[int, int, int] = IMAGE_SHAPE,
    ) -> None:
        super().__init__()
        self.shape = shape
        inputs = (shape[0], *channels[:-1])
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in zip(inputs, channels, strides, strict=True)
        )
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Features:
        """The feature maps and pooled features of `x`; TsAdaptError for images of another shape."""
        if tuple(x.shape[1:]) != self.shape:
            raise TsAdaptError(
                f"the zoo's feature network takes images (B, {', '.join(map(str, self.shape))}); got {tuple(x.shape)}: "
                "give a network of your own, or use a distance without one (l2, l1)"
            )
        maps = []
        for stage in self.stages:
            x = F.relu(stage(x))
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def classify(self, x: Tensor) -> Tensor:
        """The class scores (logits) `(B, classes)` of images `x`."""
        scores: Tensor = self.head(self.forward(x).pooled)
        return scores


def load_features(
    path: str | Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> FeatureNet:
    """The trained network, frozen and in evaluation mode. `path`: a safetensors file; None: the zoo's own.

    Raises TsAdaptError for a file that is missing, damaged, or of another network.
    """
    network, file = FeatureNet(), _existing(Path(path) if path is not None else FOLDER / WEIGHTS)
    tensors = read_tensors(file, {name: tuple(value.shape) for name, value in network.state_dict().items()})
    network.load_state_dict({name: tensors[name] for name in network.state_dict()})
    return network.eval().requires_grad_(False).to(device=device, dtype=dtype)


def reference_statistics() -> tuple[np.ndarray, np.ndarray]:
    """Mean `(128,)` and covariance `(128, 128)`, float64, of the pooled features of the 60,000 training images.

    The covariance is the unbiased one (n - 1), as in clean-fid.
    """
    stored = load_arrays(_existing(FOLDER / STATISTICS))
    return stored["mean"], stored["covariance"]


def test_images() -> tuple[Tensor, Tensor]:
    """The 10,000 test images `(10000, 1, 28, 28)` uint8 and their labels `(10000,)` int64."""
    with np.load(_existing(FOLDER / TEST_IMAGES), allow_pickle=False) as stored:
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    return images.unsqueeze(1), labels.long()


@torch.inference_mode()
def pooled_features(network: FeatureNet, images: Tensor, batch: int = 500) -> Tensor:
    """The pooled features `(n, 128)` of float images `(n, 1, 28, 28)` in [-1, 1], a batch at a time."""
    return torch.cat([network(part).pooled for part in torch.split(images, batch)])


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise TsAdaptError(f"{path} is missing; reinstall ts_adapt, or make it with scripts/train_classifier.py")
    return path
