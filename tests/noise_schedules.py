"""A noise schedule of every kind, by name."""

from __future__ import annotations

import torch
from torch import Tensor

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


def assert_falls(times: Tensor, noise_schedule: NoiseSchedule, steps: int) -> None:
    """That `times` `(N+1,)` or `(B, N+1)` are strict grids of `steps` steps, exactly from t_max to t_min."""
    assert times.shape[-1] == steps + 1 and times.dtype == torch.float64
    assert bool((times[..., 0] == noise_schedule.t_max).all() & (times[..., -1] == noise_schedule.t_min).all())
    assert bool((times.diff() < 0).all())
