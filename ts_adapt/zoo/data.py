"""Fashion-MNIST (Zalando Research, MIT licence): 60,000 + 10,000 grey images of clothes, 28x28, ten classes.

The test images travel with the package; the training images come from Debian's package `dataset-fashion-mnist`
where it is installed (in `datasets/fashion-mnist` of a folder of XDG_DATA_DIRS, by default /usr/local/share and
/usr/share), else from torchvision's downloader.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

DATA_DIRS = "/usr/local/share:/usr/share"
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def load_fashion_mnist(split: str, root: str | Path = "train_data/fashion-mnist") -> tuple[Tensor, Tensor]:
    """The images `(n, 1, 28, 28)` uint8 and labels `(n,)` int64 of `split` ("train" or "test").

    Raises RuntimeError when neither Debian's package nor a download is to be had.
    """
    from torchvision.datasets import FashionMNIST

    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    installed = _installed()
    if installed is not None:
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "FashionMNIST" / "raw"
            raw.mkdir(parents=True)
            for source in installed.glob("*.gz"):
                with gzip.open(source) as packed, open(raw / source.stem, "wb") as plain:
                    shutil.copyfileobj(packed, plain)
            data = FashionMNIST(folder, train=split == "train", download=False)
            return data.data.unsqueeze(1), data.targets
    try:
        data = FashionMNIST(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"Fashion-MNIST could not be downloaded ({reason}); on Debian `apt install dataset-fashion-mnist` brings "
            "it without a network"
        ) from error
    return data.data.unsqueeze(1), data.targets


def _installed() -> Path | None:
    """The folder of Debian's package, https://specifications.freedesktop.org/basedir-spec saying where data lie."""
    places = (os.environ.get("XDG_DATA_DIRS") or DATA_DIRS).split(":")
    folders = (Path(place) / "datasets" / "fashion-mnist" for place in places)
    return next((folder for folder in folders if folder.is_dir()), None)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 in [0, 255], clipped and rounded, as diffusers' pipelines do."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
