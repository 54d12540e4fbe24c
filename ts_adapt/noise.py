"""Noise schedules: alpha_t and sigma_t as functions of continuous time, and the inverse of log-SNR.

    x_t = alpha_t x_0 + sigma_t eps,      lambda_t = log(alpha_t / sigma_t)   (the half log-SNR, strictly decreasing)

Variance-preserving (VP) families have alpha^2 + sigma^2 = 1, so that lambda alone determines both:

    alpha = sqrt(sigmoid(2 lambda)),   sigma = sqrt(sigmoid(-2 lambda))

    BetaTable        the discrete DDPM tables of diffusers; t is the real-valued timestep in [0, T-1], and lambda is
                     interpolated linearly between the table's entries, so that integers reproduce the table
    ContinuousVP     lambda from int beta = b0 t + (b1 - b0) t^2 / 2, t in [t_min, 1]            (Song et al. 2021)
    Cosine           alpha = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s))                 (Nichol, Dhariwal 2021)
    VarianceExploding  alpha = 1, sigma = t: EDM's variables; t is the `edm_sigma`               (Karras et al. 2022)
    Preconditioned   the same, of a network that sees x_t in the unit of its variance           (EDM's, in diffusers)
    RectifiedFlow    alpha = 1 - t, sigma = t, t in [0, 1]; lambda is infinite at both ends      (Liu et al. 2023)

All in float64, differentiable; shapes pass through. `OnGrid` looks the values of one of them up at the times of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import NoiseSchedule


def _f64(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x).to(torch.float64)


class _VariancePreserving(NoiseSchedule):
    """alpha and sigma from `log_snr`, for schedules with alpha^2 + sigma^2 = 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self.log_snr(t)).sqrt()


class BetaTable(_VariancePreserving):
    """The VP schedule of a table of betas `(T,)`; t is the (real-valued) timestep, from T-1 (noise) to 0 (data).

    lambda is linear between neighbouring entries. Beyond the table lies sigma 0, at t = -1, to which lambda rises as
    -log(1 + t): published samplers end there (alpha^2 = 1 before the first beta), and no network knows it. A table
    whose last alpha is 0 (zero terminal SNR, Lin et al. 2024) has lambda -> -infinity as t -> T-1, through lambda_{T-2}
    + log(T-1 - t) in the last cell.

    Raises TsAdaptError if a beta lies outside (0, 1), the last one excepted, which may be 1.
    """

    t_min = t_max = 0.0
    t_end = -1.0

    def __init__(self, betas: Tensor) -> None:
        betas = _f64(betas).detach().cpu()
        if betas.ndim != 1 or len(betas) < 2:
            raise TsAdaptError(f"a beta table has shape (T,) with T >= 2; got {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()) or not bool((betas[:-1] < 1).all()):
            raise TsAdaptError("betas lie in (0, 1); only the last may be 1 (zero terminal SNR)")
        log_alpha2 = torch.log1p(-betas).cumsum(0)  # log alpha^2; -inf in the last place for zero terminal SNR
        log_sigma2 = torch.log(-torch.expm1(log_alpha2))
        self._table = 0.5 * (log_alpha2 - log_sigma2)
        self.zero_terminal_snr = bool(torch.isinf(self._table[-1]))
        self.t_max = float(len(betas) - 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BetaTable:
        """From the config of any diffusers scheduler with betas: `beta_schedule` linear, scaled_linear or
        squaredcos_cap_v2, or `trained_betas`; then alpha^2 / sigma^2 divided by `snr_shift_scale` (CogVideoX), and the
        last alpha brought to 0 by `rescale_betas_zero_snr`.
        """
        steps = int(config.get("num_train_timesteps", 1000))
        kind, trained = config.get("beta_schedule", "linear"), config.get("trained_betas")
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        if trained is not None:
            betas = torch.as_tensor(trained, dtype=torch.float64)
        elif kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
        elif kind == "squaredcos_cap_v2":
            edges = torch.arange(steps + 1, dtype=torch.float64) / steps
            alpha_bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        else:
            raise TsAdaptError(
                f"beta_schedule {kind!r} is unknown; expected linear, scaled_linear, squaredcos_cap_v2 or trained_betas"
            )
        shift = float(config.get("snr_shift_scale", 1.0))
        if shift != 1 or config.get("rescale_betas_zero_snr"):
            alpha2 = torch.cumprod(1 - betas, 0)
            alpha2 = alpha2 / (shift + (1 - shift) * alpha2)
            if config.get("rescale_betas_zero_snr"):
                alpha = alpha2.sqrt()
                alpha2 = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()
            betas = 1 - torch.cat([alpha2[:1], alpha2[1:] / alpha2[:-1]])
        return cls(betas)

    def _finite_table(self, device: torch.device) -> Tensor:
        table = self._table.to(device)
        if self.zero_terminal_snr:
            table = torch.cat([table[:-1], table[-2:-1]])
        return table

    def log_snr(self, t: Tensor) -> Tensor:
        t = _f64(t)
        table = self._finite_table(t.device)
        low = t.detach().floor().long().clamp(0, len(table) - 2)
        value = table[low] + (t - low) * (table[low + 1] - table[low])
        value = value - torch.log1p(torch.where(t < 0, t, torch.zeros_like(t)))
        if self.zero_terminal_snr:
            last = low == len(table) - 2
            value = value + torch.where(last, torch.log1p(-torch.where(last, t - low, torch.zeros_like(t))), 0.0)
        return value

    def time(self, log_snr: Tensor) -> Tensor:
        lam = _f64(log_snr)
        table = self._finite_table(lam.device)
        if self.zero_terminal_snr:
            beyond = lam < table[-1]
            tail = len(table) - 1 - torch.exp(torch.where(beyond, lam - table[-1], torch.zeros_like(lam)))
        rising = table.flip(0) if not self.zero_terminal_snr else table[:-1].flip(0)
        high = torch.searchsorted(rising, lam.detach().contiguous(), right=True).clamp(1, len(rising) - 1)
        slot = len(rising) - 1 - high  # the cell [slot, slot + 1] of the table holds lam
        value = slot + (lam - table[slot]) / (table[slot + 1] - table[slot])
        return torch.where(beyond, tail, value) if self.zero_terminal_snr else value


@dataclass(frozen=True)
class ContinuousVP(_VariancePreserving):
    """dx = -beta(t)/2 x dt + sqrt(beta(t)) dw with beta(t) = b0 + (b1 - b0) t, t in [t_min, 1]."""

    beta_0: float = 0.1
    beta_1: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def log_snr(self, t: Tensor) -> Tensor:
        t = _f64(t)
        integral = self.beta_0 * t + 0.5 * (self.beta_1 - self.beta_0) * t.square()
        return -0.5 * torch.log(torch.expm1(integral))

    def time(self, log_snr: Tensor) -> Tensor:
        integral = torch.nn.functional.softplus(-2 * _f64(log_snr), threshold=1e9)
        slope = self.beta_1 - self.beta_0
        return 2 * integral / (self.beta_0 + torch.sqrt(self.beta_0**2 + 2 * slope * integral))


@dataclass(frozen=True)
class Cosine(_VariancePreserving):
    """Nichol & Dhariwal's cosine schedule in continuous time, t in [t_min, t_max] inside (0, 1)."""

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.995

    def _log_alpha(self, angle: Tensor) -> Tensor:
        return torch.log(torch.cos(angle)) - math.log(math.cos(math.pi / 2 * self.s / (1 + self.s)))

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha = self._log_alpha(math.pi / 2 * (_f64(t) + self.s) / (1 + self.s))
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))

    def time(self, log_snr: Tensor) -> Tensor:
        alpha = torch.sigmoid(2 * _f64(log_snr)).sqrt()
        angle = torch.acos(alpha * math.cos(math.pi / 2 * self.s / (1 + self.s)))
        return angle * (1 + self.s) / (math.pi / 2) - self.s


@dataclass(frozen=True)
class VarianceExploding(NoiseSchedule):
    """EDM's variables: alpha = 1, sigma = t; t is the edm_sigma in [t_min, t_max]."""

    t_min: float = 0.002
    t_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(_f64(t))

    def sigma(self, t: Tensor) -> Tensor:
        return _f64(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(_f64(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-_f64(log_snr))

    def reach(self, t: Tensor, share: float) -> Tensor:
        """EDM's networks are told log t."""
        return share * math.log(self.t_max / self.t_min) * t

    def at_share(self, share: Tensor) -> Tensor:
        return self.t_min * (self.t_max / self.t_min) ** share


TOLD = ("log", "arctan")
"""How networks of EDM's schedulers of diffusers are told sigma."""


@dataclass(frozen=True)
class Preconditioned(VarianceExploding):
    """EDM's variables, of a network F that is not preconditioned itself, as EDM's schedulers of diffusers have it.

    data_std  d: with c = 1 / sqrt(d^2 + sigma^2) it is shown c x_t, which is variance preserving in x0 / d
    told      "log": it is told log(sigma) / 4; "arctan": arctan(sigma) 2 / pi

    In those variables F is v, or -v: D = c_skip x_t -+ c_out F with EDM's coefficients. Published samplers take their
    last step to sigma 0.
    """

    data_std: float = 0.5
    told: str = "log"
    t_end = 0.0

    def timestep(self, t: Tensor) -> Tensor:
        return torch.log(_f64(t)) / 4 if self.told == "log" else torch.atan(_f64(t)) * (2 / math.pi)

    def time_of_timestep(self, timestep: Tensor) -> Tensor:
        return torch.exp(4 * _f64(timestep)) if self.told == "log" else torch.tan(_f64(timestep) * (math.pi / 2))


@dataclass(frozen=True)
class RectifiedFlow(NoiseSchedule):
    """alpha = 1 - t, sigma = t; pure noise at t = 1 (lambda = -infinity), data at t = 0 (lambda = infinity).

    The sigma of other programs is t itself, and the network's timestep time_scale * t.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    time_scale: float = 1000.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - _f64(t)

    def sigma(self, t: Tensor) -> Tensor:
        return _f64(t)

    def log_snr(self, t: Tensor) -> Tensor:
        t = _f64(t)
        return torch.log1p(-t) - torch.log(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-_f64(log_snr))

    def program_sigma(self, t: Tensor) -> Tensor:
        return _f64(t)

    def time_of_program_sigma(self, sigma: Tensor) -> Tensor:
        return _f64(sigma)


class OnGrid:
    """`noise_schedule`, with its values at `times` `(n,)` computed once, together, and then looked up.

    Times that are not among them, differentiable ones and those of a whole batch go to `noise_schedule`.
    """

    def __init__(self, noise_schedule: NoiseSchedule, times: Tensor) -> None:
        self.noise_schedule, self.data_std = noise_schedule, noise_schedule.data_std
        asked = {"alpha": noise_schedule.alpha, "sigma": noise_schedule.sigma, "log_snr": noise_schedule.log_snr}
        self._known = {name: dict(zip(times.tolist(), ask(times).unbind(), strict=True)) for name, ask in asked.items()}

    def __getattr__(self, name: str) -> Any:
        if name == "noise_schedule":  # of a copy that has none yet
            raise AttributeError(name)
        return getattr(self.noise_schedule, name)

    def _value(self, name: str, t: Tensor) -> Tensor:
        known = None if t.ndim or t.requires_grad or not t.is_cpu else self._known[name].get(float(t))
        found: Tensor = getattr(self.noise_schedule, name)(t) if known is None else known
        return found

    def alpha(self, t: Tensor) -> Tensor:
        return self._value("alpha", t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._value("sigma", t)

    def log_snr(self, t: Tensor) -> Tensor:
        return self._value("log_snr", t)


def edm_sigma(noise_schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma_t / alpha_t = exp(-lambda_t): the noise level in EDM's and k-diffusion's variables."""
    return torch.exp(-noise_schedule.log_snr(t))


def time_of_edm_sigma(noise_schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """The time at which sigma_t / alpha_t = `sigma`."""
    return noise_schedule.time(-torch.log(_f64(sigma)))
