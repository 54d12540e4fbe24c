"""Fashion-MNIST (Zalando Research, MIT licence): 60,000 + 10,000 grey images of clothes, 28x28, ten classes.

The test images travel with the package; the training images come from Debian's package `dataset-fashion-mnist`
where it is installed, else from torchvision's downloader.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def load_fashion_mnist(split: str, root: str | Path = "train_data/fashion-mnist") -> tuple[Tensor, Tensor]:
    """The images `(n, 1, 28, 28)` uint8 and labels `(n,)` int64 of `split` ("train" or "test").

    Raises RuntimeError when neither Debian's package nor a download is to be had.
    """
    from torchvision.datasets import FashionMNIST

    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    if DEBIAN_FOLDER.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "FashionMNIST" / "raw"
            raw.mkdir(parents=True)
            for source in DEBIAN_FOLDER.glob("*.gz"):
                with gzip.open(source) as packed, open(raw / source.stem, "wb") as plain:
                    shutil.copyfileobj(packed, plain)
            data = FashionMNIST(folder, train=split == "train", download=False)
            return data.data.unsqueeze(1), data.targets
    try:
        data = FashionMNIST(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"Fashion-MNIST could not be downloaded ({error}); on Debian `apt install dataset-fashion-mnist` "
            "brings it without a network"
        ) from error
    return data.data.unsqueeze(1), data.targets


def to_model_range(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 in [0, 255], clipped and rounded, as diffusers' pipelines do."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
