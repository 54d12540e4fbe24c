"""Write a data set of torchvision as a folder of PNG files: what `evaluate.reference` takes for FID to the data.

    python scripts/export_images.py CIFAR10 train_data/cifar10/reference

Downloads the training images into DIR/../raw where they are not there yet; files that are there are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ts_adapt  # noqa: F401  (first: it makes torchvision importable beside a CPU torch)

# isort: split
from torchvision import datasets
from tqdm import tqdm

DATASETS = {name: getattr(datasets, name) for name in ("CIFAR10", "CIFAR100", "FashionMNIST", "MNIST")}


def export(images: datasets.VisionDataset, folder: Path) -> int:
    """Write every image of `images` that is not in `folder` yet; returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(len(images)), desc=str(folder), unit="image"):
        path = folder / f"{number:06d}.png"
        if not path.exists():
            images[number][0].save(path.with_suffix(".part"), format="png")
            path.with_suffix(".part").rename(path)
    return len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DATASETS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    count = export(DATASETS[args.name](args.folder.parent / "raw", train=True, download=True), args.folder)
    print(f"{count} images in {args.folder}")


if __name__ == "__main__":
    main()
