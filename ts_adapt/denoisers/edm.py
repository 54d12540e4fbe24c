"""EDM's preconditioned networks (Karras et al. 2022) as denoisers, in variance-exploding variables.

    x_t = x_0 + sigma eps,  t = sigma (the edm_sigma),  d = sigma_data
    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
    c_skip = d^2 / (sigma^2 + d^2),   c_out = sigma d / sqrt(sigma^2 + d^2),   c_in = 1 / sqrt(sigma^2 + d^2)

The raw prediction is F, but only D can be called. Where the network is told another sigma' than that of the state,
F is found from D at the state that sigma' scales to the same input, y = x c_in / c_in':

    F(c_in x; c_noise') = (D(y; sigma') - c_skip' y) / c_out'

The published checkpoints (github.com/NVlabs/edm) are pickles, which run code when opened; this package does not open
them. Whoever trusts one loads it with NVlabs' code and hands its "ema" over: `from_edm(ema, shape)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.network import step_aware_parts
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Denoiser, NoiseSchedule, StepAware
from ts_adapt.noise import VarianceExploding
from ts_adapt.numerics import as_node_times, combine, scale


class EDMDenoiser(Denoiser):
    """x0 = D(x; sigma) in the variables of EDM; see `from_edm`."""

    def __init__(
        self, D: Callable[..., Tensor], shape: Sequence[int], noise_schedule: NoiseSchedule, sigma_data: float
    ) -> None:
        self.D = D
        self.network = D if isinstance(D, nn.Module) else None
        self.shape = tuple(shape)
        self.noise_schedule = noise_schedule
        self.sigma_data = sigma_data
        self.evaluations = 0

    @property
    def step_aware(self) -> tuple[StepAware, ...]:
        return () if self.network is None else step_aware_parts(self.network)

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        model_time: Tensor | None = None,
        output_scale: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        """x0 `(B, ...)` in the dtype of `x_t`; `output_scale` multiplies F, `model_time` is the sigma told to F."""
        sigma = as_node_times(t)
        c_skip, c_out, c_in = self._preconditioning(sigma)
        if model_time is None:
            x0 = self._call(x_t, sigma, condition)
            if output_scale is None:
                return x0
            skip = scale(c_skip, x_t)
            return skip + scale(torch.as_tensor(output_scale), x0 - skip)
        told = as_node_times(model_time)
        told_skip, told_out, told_in = self._preconditioning(told)
        y = scale(c_in / told_in, x_t)
        gain = c_out / told_out
        if output_scale is not None:
            gain = gain * torch.as_tensor(output_scale).to(gain)
        return combine((c_skip, x_t), (gain, self._call(y, told, condition)), (-gain * told_skip, y))

    def _call(self, x: Tensor, sigma: Tensor, condition: dict[str, Any]) -> Tensor:
        if sigma.ndim == 1 and sigma.shape[0] != x.shape[0]:
            raise TsAdaptError(
                f"there are {sigma.shape[0]} times for a batch of {x.shape[0]}; give one, or one a sample"
            )
        self.evaluations += 1
        out = self.D(x, self.timestep(sigma, x), **condition)
        if out.shape != x.shape:
            raise TsAdaptError(
                f"the network answers states of shape {tuple(x.shape)} by {tuple(out.shape)}; give the shape that it "
                "was made for, or a network whose x0 has that of the state"
            )
        return out.to(x.dtype)

    def _preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in at `sigma`."""
        total = sigma.square() + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt()


def from_edm(
    D: Callable[..., Tensor],
    shape: Sequence[int] | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float | None = None,
) -> EDMDenoiser:
    """A denoiser from EDM's D(x, sigma, class_labels=...) -> x0.

    D           x `(B, C, H, W)`, sigma `(B,)` float32; `class_labels` and the like by name (NVlabs' are one-hot)
    shape       (C, H, W) of a sample; None: as NVlabs' networks say it (img_channels, img_resolution)
    sigma_min, sigma_max  the range of edm_sigma, i.e. t_min and t_max
    sigma_data  the standard deviation of the data that D was preconditioned with; None: what D says, else 0.5

    Raises TsAdaptError unless 0 < sigma_min < sigma_max and sigma_data > 0, and for a shape that is not known.
    """
    if shape is None:
        size = getattr(D, "img_resolution", None)
        if size is None:
            raise TsAdaptError("the network does not say its img_resolution; give shape=(C, H, W), that of a sample")
        shape = (getattr(D, "img_channels", 3), size, size)
    sigma_data = float(getattr(D, "sigma_data", 0.5)) if sigma_data is None else sigma_data
    if not 0 < sigma_min < sigma_max or sigma_data <= 0:
        raise TsAdaptError(
            f"sigma_min {sigma_min}, sigma_max {sigma_max}, sigma_data {sigma_data}; "
            "expected 0 < sigma_min < sigma_max and 0 < sigma_data"
        )
    return EDMDenoiser(D, shape, VarianceExploding(t_min=sigma_min, t_max=sigma_max), sigma_data)
