"""Denoisers of distributions whose x0 = E[x_0 | x_t] is known: what solvers and schedules are proved on.

Gaussian, x_0 ~ N(m, v), elementwise:

    s_t^2 = alpha_t^2 v + sigma_t^2                          the variance of x_t
    x0    = m + (alpha_t v / s_t^2) (x_t - alpha_t m)
    x_s   = alpha_s m + (s_s / s_t) (x_t - alpha_t m)        the probability-flow ODE, solved

Mixture of isotropic Gaussians, x_0 ~ sum_k p_k N(m_k, v_k I): the same x0 for each component, averaged with

    p(k | x_t) = softmax_k( log p_k - (D/2) log s_{t,k}^2 - |x_t - alpha_t m_k|^2 / (2 s_{t,k}^2) )

A network's raw prediction has its equivalent here: with `model_time` or `output_scale`, the prediction of kind
`prediction` is formed at the model time, multiplied, and converted to x0 at t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Denoiser, NoiseSchedule
from ts_adapt.noise import ContinuousVP
from ts_adapt.numerics import expand, scale
from ts_adapt.parameterization import check_prediction, from_x0, to_x0


class AnalyticDenoiser(Denoiser):
    """A denoiser from `posterior_mean(x_t, t)`, which subclasses give.

    noise_schedule  alpha and sigma of its times
    shape           of a sample, without the batch
    prediction      the kind of raw prediction that `output_scale` multiplies: epsilon, sample, v or velocity
    evaluations     counts the calls
    """

    prediction: str

    def __init__(self, noise_schedule: NoiseSchedule, shape: tuple[int, ...], prediction: str) -> None:
        check_prediction(prediction)
        self.noise_schedule, self.shape, self.prediction = noise_schedule, shape, prediction
        self.evaluations = 0

    def posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] `(B, ...)`, t `()` or `(B,)`; not counted as an evaluation."""
        raise NotImplementedError

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        model_time: Tensor | None = None,
        output_scale: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        """x0 `(B, ...)` from x_t at t, as in `interfaces.Denoiser`; a condition changes nothing."""
        self.evaluations += 1
        if x_t.shape[1:] != self.shape:
            raise TsAdaptError(
                f"the state has shape {tuple(x_t.shape)}; expected (B, {', '.join(map(str, self.shape))})"
            )
        if model_time is None and output_scale is None:
            return self.posterior_mean(x_t, t)
        told = t if model_time is None else model_time
        x0 = self.posterior_mean(x_t, told)
        raw = from_x0(x0, x_t, self.noise_schedule.alpha(told), self.noise_schedule.sigma(told), self.prediction)
        if output_scale is not None:
            raw = scale(output_scale, raw)
        return to_x0(raw, x_t, self.noise_schedule.alpha(t), self.noise_schedule.sigma(t), self.prediction)


class GaussianDenoiser(AnalyticDenoiser):
    """x_0 ~ N(mean, diag(variance)).

    mean, variance  tensors or floats that broadcast to `shape` (by default to their common shape); variance > 0
    """

    def __init__(
        self,
        noise_schedule: NoiseSchedule,
        mean: Tensor | float,
        variance: Tensor | float,
        shape: tuple[int, ...] | None = None,
        prediction: str = "epsilon",
    ) -> None:
        m, v = torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(variance, dtype=torch.float64)
        try:
            common = tuple(torch.broadcast_shapes(m.shape, v.shape, shape or ()))
        except RuntimeError:
            common = ()
        if not common or (shape is not None and common != tuple(shape)):
            raise TsAdaptError(
                f"mean {tuple(m.shape)} and variance {tuple(v.shape)} do not give samples of shape {shape}; "
                "expected shapes that broadcast to it, of at least one dimension"
            )
        if not bool((v > 0).all()):
            raise TsAdaptError(f"the smallest variance is {float(v.min())}; variances are above 0")
        super().__init__(noise_schedule, common, prediction)
        self.mean, self.variance = m.expand(common), v.expand(common)

    def posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = expand(self.noise_schedule.alpha(t), x_t), expand(self.noise_schedule.sigma(t), x_t)
        mean, variance = self.mean.to(x_t), self.variance.to(x_t)
        gain = alpha * variance / (alpha.square() * variance + sigma.square())
        return mean + gain * (x_t - alpha * mean)

    def solution(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact x_s `(B, ...)` of the probability-flow ODE through x_t at t; t, s `()` or `(B,)`, in any order."""
        mean, variance = self.mean.to(x_t), self.variance.to(x_t)
        alpha_t, alpha_s = expand(self.noise_schedule.alpha(t), x_t), expand(self.noise_schedule.alpha(s), x_t)
        variance_t = alpha_t.square() * variance + expand(self.noise_schedule.sigma(t), x_t).square()
        variance_s = alpha_s.square() * variance + expand(self.noise_schedule.sigma(s), x_t).square()
        return alpha_s * mean + (variance_s / variance_t).sqrt() * (x_t - alpha_t * mean)


class GaussianMixtureDenoiser(AnalyticDenoiser):
    """x_0 ~ sum_k p_k N(m_k, v_k I).

    means      `(K, *shape)`
    variances  `(K,)` or a float, above 0
    weights    `(K,)`, above 0, normalised here; None: equal
    """

    def __init__(
        self,
        noise_schedule: NoiseSchedule,
        means: Tensor,
        variances: Tensor | float,
        weights: Tensor | None = None,
        prediction: str = "epsilon",
    ) -> None:
        if means.ndim < 2:
            raise TsAdaptError(f"means have shape {tuple(means.shape)}; expected (K, ...), one mean a component")
        count = means.shape[0]
        super().__init__(noise_schedule, tuple(means.shape[1:]), prediction)
        self.means = means.to(torch.float64)
        self.variances = _per_component(variances, count, "variances")
        p = _per_component(1.0 if weights is None else weights, count, "weights")
        self.weights = p / p.sum()

    def posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        means, variances = self.means.to(x_t).flatten(1), self.variances.to(x_t)
        alpha, sigma = (
            expand(value, x_t.flatten(1)) for value in (self.noise_schedule.alpha(t), self.noise_schedule.sigma(t))
        )
        spread = alpha.square() * variances + sigma.square()  # s_k^2, (1, K) or (B, K)
        offset = x_t.flatten(1).unsqueeze(1) - alpha.unsqueeze(-1) * means  # (B, K, D)
        log_density = -0.5 * (offset.square().sum(-1) / spread + means.shape[1] * spread.log())
        share = torch.softmax(self.weights.to(x_t).log() + log_density, -1)
        component = means + (alpha * variances / spread).unsqueeze(-1) * offset
        return (share.unsqueeze(-1) * component).sum(1).reshape(x_t.shape)

    def draw(self, count: int, seed: int) -> Tensor:
        """`count` exact samples of the data, `(count, *shape)`, float32; a function of `seed`."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        eps = torch.randn((count, *self.shape), generator=generator, dtype=torch.float64)
        scale = self.variances[k].sqrt().reshape(-1, *[1] * len(self.shape))
        return (self.means[k] + scale * eps).float()


def example_mixture() -> GaussianMixtureDenoiser:
    """Eight separated modes on 1x4x4 pictures, continuous VP schedule: small, and yet no grid suits all noises."""
    generator = torch.Generator().manual_seed(3)
    means = 2 * torch.rand((8, 1, 4, 4), generator=generator, dtype=torch.float64) - 1
    variances = 10 ** (-2.5 + 1.5 * torch.rand(8, generator=generator, dtype=torch.float64))
    return GaussianMixtureDenoiser(ContinuousVP(), means, variances)


def _per_component(value: Tensor | float, count: int, what: str) -> Tensor:
    v = torch.as_tensor(value, dtype=torch.float64)
    if v.shape not in ((), (count,)) or not bool((v > 0).all()):
        raise TsAdaptError(f"{what} of the mixture have shape {tuple(v.shape)}; expected ({count},) values above 0")
    return v.expand(count)
