"""A noise schedule of every kind, by name."""

from __future__ import annotations

from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.noise import BetaTable, ContinuousVP, Cosine, RectifiedFlow, VarianceExploding

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NOISES: dict[str, NoiseSchedule] = {
    "sd": BetaTable.from_config(SD),
    "zero_snr": BetaTable.from_config({**SD, "rescale_betas_zero_snr": True}),
    "vp": ContinuousVP(),
    "cosine": Cosine(),
    "edm": VarianceExploding(),
    "edm_to_0": VarianceExploding(t_min=0.0),
    "flow": RectifiedFlow(),
}
PLAIN: dict[str, NoiseSchedule] = {
    "table": BetaTable.from_config({}),
    "zero_snr": BetaTable.from_config({"rescale_betas_zero_snr": True}),
    "vp": ContinuousVP(),
    "edm": VarianceExploding(),
    "flow": RectifiedFlow(),
}
"""Fewer, each as it is without options."""
