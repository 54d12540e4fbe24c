"""Solvers without memory: DDIM, Euler and Heun.

DDIM (Song et al. 2021), with h = lambda_s - lambda_t and the noise scale eta:

    x_s = alpha_s x0 + sqrt(sigma_s^2 - sigma_eta^2) eps + sigma_eta noise,    sigma_eta^2 = eta^2 sigma_s^2 (1 - e^-2h)

which for alpha^2 + sigma^2 = 1 is the paper's eta^2 (1 - a_s)/(1 - a_t) (1 - a_t/a_s), a = alpha^2, and holds for any
other noise schedule too; eta = 1 samples the posterior q(x_s | x_t, x0): DDPM's ancestral step.

Euler and Heun (Karras et al. 2022) in y = x / alpha against the edm_sigma rho = sigma / alpha:

    dy/drho = eps = (y - x0) / rho
    Euler   y_s = y_t + (rho_s - rho_t) eps_t
    Heun    y_s = y_t + (rho_s - rho_t) (eps_t + eps_s') / 2,    eps_s' evaluated at Euler's y_s

Euler is DDIM at eta = 0, and is written in its form, which stays finite where alpha_t = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Node, NoiseSchedule
from ts_adapt.numerics import combine, scale
from ts_adapt.parameterization import to_epsilon
from ts_adapt.solvers.coefficients import Defaults, Met, Place, check_end, first_order, learned_terms, place


class DDIM(Defaults):
    """DDIM: order 1; deterministic at eta = 0, DDPM's ancestral sampling at eta = 1.

    eta  in [0, 1]; above 0 every step needs standard normal noise

    One learned coefficient a step: x_s += c (alpha_s (1 - e^-h)) x0.
    """

    order = 1

    def __init__(self, noise_schedule: NoiseSchedule, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise TsAdaptError(f"eta is {eta}; it runs from 0 (deterministic) to 1 (ancestral)")
        super().__init__(noise_schedule)
        self.eta, self.needs_noise = eta, eta > 0

    def update(
        self, x_t: Tensor, x0: Tensor, node: Node, next_node: Node, memory: Met, noise: Tensor | None = None
    ) -> tuple[Tensor, Met]:
        """x_s at `next_node.t`, from x_t, x0 and, for eta > 0, standard normal `noise`, all `(B, ...)`."""
        t, s = place(self.noise_schedule, node.t), place(self.noise_schedule, next_node.t)
        weight_x, weight_x0 = first_order(t, s)
        terms = learned_terms(next_node, self.order, weight_x0, (x0,))
        if self.needs_noise:
            if noise is None:
                raise TsAdaptError(f"DDIM with eta = {self.eta} needs noise of shape {tuple(x_t.shape)}; got none")
            kept, shrunk, sigma_eta = self._renewal(t, s)
            weight_x, weight_x0 = weight_x * kept, weight_x0 + shrunk
            terms.append((sigma_eta, noise))
        return combine((weight_x, x_t), (weight_x0, x0), *terms), memory

    def _renewal(self, t: Place, s: Place) -> tuple[Tensor, Tensor, Tensor]:
        """q = sqrt(1 - eta^2 (1 - e^-2h)), the share of eps that is kept; alpha_s e^-h (1 - q); sigma_eta."""
        h = s.log_snr - t.log_snr
        renewed = -torch.expm1(-2 * h)
        kept_squared = (1 - self.eta**2) + self.eta**2 * torch.exp(-2 * h)
        none = kept_squared == 0
        kept = torch.where(none, 0.0, torch.where(none, 1.0, kept_squared).sqrt())
        shrunk = s.alpha * torch.exp(-h) * self.eta**2 * renewed / (1 + kept)
        return kept, shrunk, self.eta * s.sigma * renewed.sqrt()


class Euler(DDIM):
    """Euler's method in EDM's variables: order 1. The same map as deterministic DDIM."""

    def __init__(self, noise_schedule: NoiseSchedule) -> None:
        super().__init__(noise_schedule)


class Heun(Defaults):
    """Heun's method in EDM's variables: order 2, two evaluations a step; for teachers.

    The second evaluation is at the end of the step, so a grid must end at sigma > 0. Where alpha_t = 0, edm_sigma is
    infinite and the trapezoid has no limit: that step is Euler's.
    """

    order = 2
    evaluations_per_step = 2
    reaches_0 = False

    def update(
        self, x_t: Tensor, x0: Tensor, node: Node, next_node: Node, memory: Met, noise: Tensor | None = None
    ) -> tuple[Tensor, Met]:
        """Refused: a step of Heun evaluates the denoiser, which `update` never does."""
        raise TsAdaptError(
            "Heun evaluates the denoiser inside a step: use `step` (or sampling.integrate), not `update`"
        )

    def step(
        self,
        evaluate: Callable[[Tensor, Node], Tensor],
        x_t: Tensor,
        x0: Tensor,
        node: Node,
        next_node: Node,
        memory: Met,
    ) -> tuple[Tensor, Met]:
        """x_s at `next_node.t` from x_t and x0, `(B, ...)`; `evaluate(x, node)` -> x0 is called once, at `next_node`.

        Raises TsAdaptError at a terminal sigma of 0 and for learned coefficients, of which Heun has none.
        """
        if next_node.coefficients is not None:
            raise TsAdaptError("the grid has solver coefficients, and Heun takes none; use a multistep solver")
        t, s = place(self.noise_schedule, node.t), place(self.noise_schedule, next_node.t)
        check_end(self, next_node.t)
        weight_x, weight_x0 = first_order(t, s)
        euler = combine((weight_x, x_t), (weight_x0, x0))
        endless = t.alpha == 0
        half = torch.where(endless, 0.0, 0.5 * (s.sigma - s.alpha * t.sigma / torch.where(endless, 1.0, t.alpha)))
        turn = to_epsilon(evaluate(euler, next_node), euler, s.alpha, s.sigma) - to_epsilon(x0, x_t, t.alpha, t.sigma)
        return euler + scale(half, turn), memory
