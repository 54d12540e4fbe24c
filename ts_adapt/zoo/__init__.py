"""The embedded models: data, weights, feature network, reference statistics, learned schedules. Paths and features, no
denoiser."""

from pathlib import Path

from ts_adapt.zoo.features import load_features, load_judge, load_matching, reference_statistics, test_images
from ts_adapt.zoo.networks import FeatureNet, Features

__all__ = [
    "MODELS",
    "FeatureNet",
    "Features",
    "load_features",
    "load_judge",
    "load_matching",
    "paths",
    "reference_statistics",
    "schedules",
    "test_images",
]

MODELS = {
    "fashion-ddpm": None,
    "fashion-ddpm-plain": None,
    "fashion-ddpm-class": 10,
    "emoji-sd": None,
    "emoji-sd3": None,
}
"""Name of a model -> its null class, which stands for "no class"; None: the model has no classes."""


def paths() -> dict[str, Path]:
    """The pipeline folder of each model of the zoo."""
    return {name: Path(__file__).parent / name for name in MODELS}


def schedules() -> dict[str, Path]:
    """The folder of each learned schedule of the zoo, for `LearnedScheduler.from_pretrained`.

    For a model and a solver, at NFE 3, 5, 7 and 10: static grids, and `...-recursive`, a predictor.
    """
    return {folder.name: folder for folder in sorted((Path(__file__).parent / "schedules").iterdir())}
