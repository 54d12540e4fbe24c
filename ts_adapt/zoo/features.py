"""The data sets that models of the zoo were trained on, as networks know them: one folder each.

features.safetensors    a `FeatureNet`: its maps serve a perceptual distance, its pooled features a Frechet distance
judge.safetensors       a `Judge`, which only scores
judged.safetensors      mean (D,), covariance (D, D) and count of the judge's features of real pictures, and the
                        features (m, D) of others, which say what is the least to be expected of any model
matching.safetensors    a `DualEncoder`, and words.json, the words that it knows; of captioned data
statistics.safetensors  of the feature network, and test-images.npz: of Fashion-MNIST alone
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.files import read_json, read_tensors
from ts_adapt.zoo.networks import CHANNELS, GREY, STRIDES, DualEncoder, FeatureNet, Judge, Shape

WEIGHTS, STATISTICS, TEST_IMAGES = "features.safetensors", "statistics.safetensors", "test-images.npz"
JUDGE, JUDGED = "judge.safetensors", "judged.safetensors"
MATCHING, WORDS = "matching.safetensors", "words.json"
TRAINING_IMAGES = 60_000
JUDGING_IMAGES = 5_000
"""Of Fashion-MNIST's test images the first ones judge; a distribution may be learned from the others."""
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class DataSet:
    """Pictures of one `shape`, (C, H, W), and how the networks that know them are built."""

    name: str
    shape: Shape
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    classes: int
    """Of the feature network."""
    judged: int
    """Classes of the judge."""

    @property
    def folder(self) -> Path:
        return Path(__file__).parent / self.name

    def feature_net(self) -> FeatureNet:
        return FeatureNet(self.channels, self.strides, self.classes, self.shape)

    def judge(self) -> Judge:
        return Judge(self.judged, self.shape)


FASHION = DataSet("fashion-mnist", GREY, CHANNELS, STRIDES, classes=10, judged=10)
EMOJI = DataSet("emoji", (3, 64, 64), (24, 32, 64, 96, 128), (2, 1, 2, 2, 2), classes=12, judged=157)
DATA = {data.shape: data for data in (FASHION, EMOJI)}
FOLDER = FASHION.folder


def data_of(shape: tuple[int, ...]) -> DataSet:
    """The data set whose pictures are of `shape`; TsAdaptError where the zoo has none."""
    if shape not in DATA:
        known = " and ".join(f"{' x '.join(map(str, each))} ({data.name})" for each, data in DATA.items())
        raise TsAdaptError(
            f"the zoo's networks know images of {known}, and these are {' x '.join(map(str, shape))}: use a distance "
            "without a network (l2, l1) or lpips, and features of inception or pixels"
        )
    return DATA[shape]


def load_features(
    path: str | Path | None = None, device: torch.device | str = "cpu", shape: tuple[int, ...] = GREY
) -> FeatureNet:
    """The feature network for images of `shape`, frozen. `path`: a safetensors file; None: the zoo's own.

    Raises TsAdaptError for a shape that it has none for, and for a file that is missing, damaged, of another network.
    """
    data = data_of(shape)
    return _read(data.feature_net(), data.folder / WEIGHTS if path is None else Path(path)).to(device)


def load_judge(shape: tuple[int, ...], device: torch.device | str = "cpu", folder: Path | None = None) -> Judge:
    """The judge of images of `shape`, frozen; its file is in `folder`, or None: in the zoo.

    Raises TsAdaptError as `load_features`.
    """
    data = data_of(shape)
    return _read(data.judge(), (folder or data.folder) / JUDGE).to(device)


def load_matching(folder: Path | None = None, device: torch.device | str = "cpu") -> DualEncoder:
    """The dual encoder of emoji, frozen, whose files are in `folder`, or None: in the zoo.

    Raises TsAdaptError where a file is missing or damaged.
    """
    folder = folder or EMOJI.folder
    return _read(DualEncoder(read_json(_existing(folder / WORDS))), folder / MATCHING).to(device)


def judged(shape: tuple[int, ...], folder: Path | None = None) -> dict[str, np.ndarray]:
    """What the judge sees in real pictures of `shape`: mean, covariance, count, features of others; float64.

    folder  as of `load_judge`
    """
    stored = load_arrays(_existing((folder or data_of(shape).folder) / JUDGED))
    return {name: value.astype(np.float64) for name, value in stored.items()}


def reference_statistics() -> tuple[np.ndarray, np.ndarray]:
    """Mean `(128,)` and covariance `(128, 128)`, float64, of the pooled features of Fashion-MNIST's training images.

    The covariance is the unbiased one (n - 1), as in clean-fid.
    """
    stored = load_arrays(_existing(FOLDER / STATISTICS))
    return stored["mean"], stored["covariance"]


def test_images() -> tuple[Tensor, Tensor]:
    """The 10,000 test images `(10000, 1, 28, 28)` uint8 and their labels `(10000,)` int64 of Fashion-MNIST."""
    with np.load(_existing(FOLDER / TEST_IMAGES), allow_pickle=False) as stored:
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    return images.unsqueeze(1), labels.long()


@torch.inference_mode()
def pooled_features(network: FeatureNet, images: Tensor, batch: int = 500) -> Tensor:
    """The pooled features `(n, D)` of float images `(n, C, H, W)` in [-1, 1], a batch at a time."""
    return torch.cat([network(part).pooled for part in torch.split(images, batch)])


def _read(net: Net, path: Path) -> Net:
    """`net` with the weights in the file, frozen and in evaluation mode."""
    tensors = read_tensors(_existing(path), {name: tuple(value.shape) for name, value in net.state_dict().items()})
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})
    return net.eval().requires_grad_(False)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise TsAdaptError(f"{path} is missing; reinstall ts_adapt")
    return path
