"""The embedded model: data, weights, feature network and reference statistics. Paths and features, no denoiser."""

from pathlib import Path

from ts_adapt.zoo.features import FeatureNet, Features, load_features, reference_statistics, test_images

__all__ = ["MODELS", "FeatureNet", "Features", "load_features", "paths", "reference_statistics", "test_images"]

MODELS = {
    "fashion-ddpm": None,
    "fashion-ddpm-class": 10,
}
"""Name of a model -> its null class, which stands for "no class"; None: the model has no classes."""


def paths() -> dict[str, Path]:
    """The pipeline folder of each model of the zoo."""
    return {name: Path(__file__).parent / name for name in MODELS}
