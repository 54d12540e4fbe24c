"""Fashion-MNIST is read from where Debian's package puts it, or from torchvision's folder; else a sentence helps."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ts_adapt.zoo.data import load_fashion_mnist


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_installed_set_is_found_by_the_data_folders(split: str, installed_images: tuple[Tensor, Tensor]) -> None:
    images, labels = load_fashion_mnist(split)
    assert torch.equal(images, installed_images[0]) and torch.equal(labels, installed_images[1])


def test_a_set_that_was_downloaded_once_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed_images: tuple[Tensor, Tensor]
) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (tmp_path / "share/datasets/fashion-mnist").iterdir():
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "nowhere"))
    images, labels = load_fashion_mnist("train", tmp_path)
    assert torch.equal(images, installed_images[0]) and torch.equal(labels, installed_images[1])


def test_without_package_and_network_it_is_said_how_to_get_it(tmp_path: Path, tries: Callable[[], list[str]]) -> None:
    with pytest.raises(RuntimeError, match=r"^Fashion-MNIST could not be downloaded .*apt install"):
        load_fashion_mnist("train", tmp_path)
    assert tries()
    with pytest.raises(ValueError, match="expected 'train' or 'test'"):
        load_fashion_mnist("validation")
