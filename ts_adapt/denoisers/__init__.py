"""Denoisers: exact ones, networks, guided ones, those inside pipelines and EDM's."""

from ts_adapt.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from ts_adapt.denoisers.edm import EDMDenoiser, from_edm
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.denoisers.pipeline import encode_prompts, from_pipeline

__all__ = [
    "EDMDenoiser",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "Guided",
    "NetworkDenoiser",
    "encode_prompts",
    "from_edm",
    "from_pipeline",
]
