"""Features of images: those of Inception, those of the zoo's networks, which work offline, or the pixels themselves.

The zoo's networks know images of the shapes that its models make. `zoo` is the one that the distance `features`
compares images by; `judge` is another, of another architecture, which no loss has seen.

Inception (Szegedy et al. 2015; the weights of 2015-12-05, read by clean-fid), which makes Frechet and kernel distances
FID and KID proper, says more than its features:

    features       `(n, 2048)` the pooled last layer: FID, KID, precision and recall
    probabilities  `(n, 1008)` softmax of W features, without the bias, as Salimans et al. 2016 have it: Inception score
    spatial        `(n, 2023)` the first 7 channels of the 17x17 map of `mixed_6/conv`: sFID (Nash et al. 2021)

Images are rounded to 8 bits first, as if saved and read; for Inception clean-fid resizes them to 299x299.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ts_adapt.errors import TsAdaptError, one_line, unknown
from ts_adapt.pictures import picture_files, read_picture
from ts_adapt.zoo.data import to_model_range, to_uint8
from ts_adapt.zoo.features import load_features, load_judge
from ts_adapt.zoo.networks import GREY, Features

Extractor = Callable[[Tensor], Tensor]
"""Images `(B, C, H, W)` in [-1, 1] -> features `(B, D)`."""
Look = Callable[[Tensor], Mapping[str, Tensor]]
"""Images -> what there is to know of each, by name."""
WEIGHTS = "inception-2015-12-05.pt"
TO_SPATIAL = (
    "conv", "conv_1", "conv_2", "pool0", "conv_3", "conv_4", "pool1",
    "mixed", "mixed_1", "mixed_2", "mixed_3", "mixed_4", "mixed_5", "mixed_6.conv",
)  # fmt: skip
"""The layers that lead to the spatial features."""
SPATIAL_CHANNELS = 7
INCEPTION_WIDTH = 2048
"""Features of an image."""


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
    from cleanfid.downloads_helper import inception_url

    offline = (
        f"put {inception_url}, fetched elsewhere, into a folder and name that by evaluate.inception, or set "
        "evaluate.features to pixels (zoo, for its models), which need no network"
    )
    if folder is not None and not (folder / WEIGHTS).is_file():
        raise TsAdaptError(f"{folder} has no {WEIGHTS}; {offline}")
    try:
        from cleanfid.inception_torchscript import InceptionV3W

        where = tempfile.gettempdir() if folder is None else str(folder)
        return InceptionV3W(where, download=folder is None).to(device).eval()
    except (OSError, RuntimeError) as error:
        raise TsAdaptError(f"Inception's weights cannot be had ({one_line(error)}); {offline}") from error


def make_extractor(
    name: str,
    *,
    shape: Sequence[int] = GREY,
    device: torch.device | str = "cpu",
    inception: str | Path | None = None,
) -> Extractor:
    """The feature extractor called `name`: "zoo" and "judge" (see the module's head), "inception" (any size, resized by
    clean-fid), or "pixels" (the samples themselves, unrounded: for small analytic models).

    shape      (C, H, W) of the images, for which the zoo's networks are chosen
    inception  the folder of clean-fid's Inception weights (`inception-2015-12-05.pt`); None: clean-fid downloads them

    Raises TsAdaptError for an unknown name, for a shape that the zoo's networks do not know, and where Inception's
    weights are not to be had.
    """
    if name not in EXTRACTORS:
        raise unknown("feature extractor", name, EXTRACTORS)
    return EXTRACTORS[name](None if inception is None else Path(inception), torch.device(device), tuple(shape))


def _zoo(folder: Path | None, device: torch.device, shape: tuple[int, ...]) -> Extractor:
    return _pooled(load_features(device=device, shape=shape), device)


def _judge(folder: Path | None, device: torch.device, shape: tuple[int, ...]) -> Extractor:
    return _pooled(load_judge(shape, device).features, device)


def _pooled(network: Callable[[Tensor], Features], device: torch.device) -> Extractor:
    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        return network(to_model_range(to_uint8(images)).to(device)).pooled

    return extract


EXTRACTORS: dict[str, Callable[[Path | None, torch.device, tuple[int, ...]], Extractor]] = {
    "zoo": _zoo,
    "judge": _judge,
    "inception": lambda folder, device, shape: Inception(folder, device),
    "pixels": lambda folder, device, shape: lambda images: images.flatten(1).double().cpu(),
}
"""By name: (folder of Inception's weights, device, shape of the images) -> the extractor."""


def taken_shape(name: str, model: Sequence[int] | None) -> Sequence[int] | None:
    """Of the images (C, H, W) that the extractor called `name` takes, `model` being that of a model's images; None: of
    any size."""
    return None if name == "inception" else model


def folder_features(
    extract: Extractor, folder: str | Path, shape: Sequence[int] | None = None, *, batch_size: int = 64
) -> Tensor:
    """The features `(n, D)` of the images in `folder`; see `folder_looks`."""
    return folder_looks(lambda images: {"features": extract(images)}, folder, shape, batch_size=batch_size)["features"]


def folder_looks(
    look: Look, folder: str | Path, shape: Sequence[int] | None = None, *, batch_size: int = 64, progress: bool = False
) -> dict[str, Tensor]:
    """What `look` finds in the images in `folder` and the folders inside it, `(n, ...)`, in the order of their names.

    shape  as of `read_image`

    Raises TsAdaptError for a missing folder, one without images or with a single one, a file that is no image or of
    another size, and images whose features have several widths.
    """
    files, found = picture_files(folder), dict[str, list[Tensor]]()
    if len(files) == 1:
        raise TsAdaptError(
            f"{folder} holds one image, {files[0].name}, and sets of images are compared; give a folder of two or more"
        )
    with tqdm(total=len(files), desc=f"features of {folder}", unit="image", disable=not progress, leave=False) as bar:
        for start in range(0, len(files), batch_size):
            images = [read_image(file, shape) for file in files[start : start + batch_size]]
            one_size = all(image.shape == images[0].shape for image in images)
            for part in [torch.cat(images)] if one_size else images:
                for name, value in look(part).items():
                    found.setdefault(name, []).append(value.cpu())
            bar.update(len(images))
    if any(len({part.shape[1:] for part in parts}) > 1 for parts in found.values()):
        raise TsAdaptError(f"the images in {folder} have several sizes; make them all of one size")
    return {name: torch.cat(parts) for name, parts in found.items()}


def read_image(file: Path, shape: Sequence[int] | None = None) -> Tensor:
    """`(1, C, H, W)` in [-1, 1]; TsAdaptError for what is no image, or of another size.

    shape  (C, H, W), read as grey for C = 1, else as RGB; None: RGB of any size
    """
    mode = "L" if shape is not None and shape[0] == 1 else "RGB"
    pixels = torch.from_numpy(np.array(read_picture(file, mode)))
    found = to_model_range((pixels.unsqueeze(-1) if mode == "L" else pixels).permute(2, 0, 1).unsqueeze(0))
    size = tuple(found.shape[1:])
    if shape is not None and size != tuple(shape):
        raise TsAdaptError(f"{file} is of {size}, the model's samples are of {tuple(shape)}; resize the images to that")
    return found


def looks_of(extract: Extractor, images: Tensor) -> dict[str, Tensor]:
    """The `features` of `images`, and what else an extractor knows of them."""
    return extract.looks(images) if isinstance(extract, Inception) else {"features": extract(images)}
