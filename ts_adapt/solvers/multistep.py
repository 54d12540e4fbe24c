"""Linear multistep solvers: DPM-Solver++, UniP (UniPC's predictor), DEIS and iPNDM.

All of them add to the DDIM step from t to s weighted differences to past predictions v_k (k = 1: the newest):

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) x0 + sum_k w_k (v_k - v_0)

                  v     w_k
    DPM-Solver++  x0    exact integral of the polynomial in lambda, or the published approximations of it
    UniP          x0    the same; at order 2 with the integral of u replaced by B(h) h / 2
    DEIS          eps   exact integral of the polynomial in lambda ('tab', in log rho)
    iPNDM         eps   Adams-Bashforth's constants for equal steps of rho = sigma / alpha

At the start the order is what the history allows. Learned coefficients c_k add c_k alpha_s (1 - e^-h) v_k for x0, and
c_k (sigma_s - sigma_t) v_k for eps: a correction of 1 weighs as much as a first-order step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ts_adapt.interfaces import Node, NoiseSchedule
from ts_adapt.numerics import combine
from ts_adapt.parameterization import to_epsilon
from ts_adapt.solvers.coefficients import (
    Defaults,
    Met,
    Place,
    check_end,
    check_order,
    check_variant,
    data_weights,
    finite_step,
    first_order,
    half_weight,
    lagrange_weights,
    learned_terms,
    moments,
    place,
)

FEW_STEPS = 15
"""Below this number of steps DPM-Solver++ and DEIS lower their order at the end, as diffusers does."""

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""b_k of equal steps, newest first."""


class Multistep(Defaults):
    """The step above; subclasses give the predictions they interpolate and the weights w_k."""

    interpolates = "x0"
    lower_order_final = False
    few_steps: float = FEW_STEPS

    def __init__(self, noise_schedule: NoiseSchedule, order: int) -> None:
        super().__init__(noise_schedule)
        self.order = order

    def update(
        self, x_t: Tensor, x0: Tensor, node: Node, next_node: Node, memory: Met, noise: Tensor | None = None
    ) -> tuple[Tensor, Met]:
        """x_s at `next_node.t` and the memory with this step's prediction; states `(B, ...)`."""
        check_end(self, next_node.t)
        t, s = place(self.noise_schedule, node.t), place(self.noise_schedule, next_node.t)
        value = x0 if self.interpolates == "x0" else to_epsilon(x0, x_t, t.alpha, t.sigma)
        weight_x, weight_x0 = first_order(t, s)
        past = min(len(memory.values), self.order_at(node) - 1)
        terms = [(weight_x, x_t), (weight_x0, x0)]
        if past:
            weights = self.weights(t, s, memory.log_snrs[:past])
            rest = -sum(weights[1:], weights[0])
            if value is x0:
                terms[1] = (weight_x0 + rest, x0)
            else:
                terms.append((rest, value))
            terms += zip(weights, memory.values[:past], strict=True)
        unit = weight_x0 if self.interpolates == "x0" else s.sigma - t.sigma
        terms += learned_terms(next_node, self.order, unit, (value, *memory.values))
        return combine(*terms), memory.push(value, t.log_snr, keep=self.order - 1)

    def order_at(self, node: Node) -> int:
        """The highest order allowed at `node`, whatever the history."""
        lowered = self.lower_order_final and node.steps < self.few_steps
        return min(self.order, node.steps - node.index) if lowered else self.order

    def weights(self, t: Place, s: Place, past: Sequence[Tensor]) -> list[Tensor]:
        """w_k, `()` or `(B,)`, for the past evaluations at log-SNR `past`; the order is `len(past) + 1`."""
        raise NotImplementedError


class DPMSolverPP(Multistep):
    """DPM-Solver++(2M) and (3M), data prediction (Lu et al. 2022).

    order              2 or 3
    lower_order_final  with fewer than 15 steps, at most order 2 in the last but one and 1 in the last step
    exact              integrate the polynomial exactly. The published rules, the default and diffusers' too, put
                       (1 - e^-h) h / 2 for the integral of u in 2M (still of order 2), and half the integral of u^2 in
                       3M, which leaves 3M at order 2 of convergence; exact, it is of order 3

    A step to sigma = 0, and one whose past lies at infinite log-SNR, drops the terms that have no finite weight.
    """

    def __init__(
        self, noise_schedule: NoiseSchedule, order: int = 2, lower_order_final: bool = True, exact: bool = False
    ) -> None:
        super().__init__(noise_schedule, check_order("DPM-Solver++", order, (2, 3)))
        self.lower_order_final, self.exact = lower_order_final, exact

    def weights(self, t: Place, s: Place, past: Sequence[Tensor]) -> list[Tensor]:
        if self.exact:
            return data_weights(t, s, past)
        if len(past) == 1:
            return [half_weight(t, s, past[0] - t.log_snr, "bh2")]
        return data_weights(t, s, past, curvature=0.5)


class UniP(Multistep):
    """UniPC's predictor, orders 1 to 3 (Zhao et al. 2023).

    variant            B(h) of the paper, "bh1" or "bh2". Where the paper's linear system is solved, B(h) cancels and
                       the solution is Lagrange's polynomial, integrated; it remains at order 2, where the paper sets
                       the one unknown to 1/2
    lower_order_final  at most as many orders as steps are left, at any number of steps, as diffusers does for UniPC
    """

    few_steps = math.inf

    def __init__(
        self, noise_schedule: NoiseSchedule, order: int = 2, variant: str = "bh2", lower_order_final: bool = True
    ) -> None:
        super().__init__(noise_schedule, check_order("UniPC", order, (1, 2, 3)))
        self.variant, self.lower_order_final = check_variant(variant), lower_order_final

    def weights(self, t: Place, s: Place, past: Sequence[Tensor]) -> list[Tensor]:
        if len(past) == 1:
            return [half_weight(t, s, past[0] - t.log_snr, self.variant)]
        return data_weights(t, s, past)


class DEIS(Multistep):
    """DEIS 'tab', orders 1 to 3 (Zhang & Chen 2023): Lagrange's polynomial of eps in lambda, integrated exactly.

    lower_order_final  as in DPMSolverPP

    Raises TsAdaptError on a step to sigma = 0, where the polynomial's integral diverges.
    """

    interpolates = "eps"
    reaches_0 = False

    def __init__(self, noise_schedule: NoiseSchedule, order: int = 3, lower_order_final: bool = True) -> None:
        super().__init__(noise_schedule, check_order("DEIS", order, (1, 2, 3)))
        self.lower_order_final = lower_order_final

    def weights(self, t: Place, s: Place, past: Sequence[Tensor]) -> list[Tensor]:
        h, endless = finite_step(t, s)
        gaps = [log_snr - t.log_snr for log_snr in past]
        weights = lagrange_weights(gaps, h, moments(h, h, len(gaps)))
        return [torch.where(endless, 0.0, -s.sigma * w) for w in weights]


class IPNDM(Multistep):
    """iPNDM, orders 1 to 4 (Liu et al. 2022; Zhang & Chen 2023): Adams-Bashforth on eps in EDM's variables.

        y_s = y_t + (rho_s - rho_t) sum_k b_k eps_k,    y = x / alpha, rho = sigma / alpha

    The b_k are those of equal steps in rho, whatever the grid: the full order shows on such grids only; on grids that
    vary smoothly it is at most 2, on rough ones 1.
    """

    interpolates = "eps"

    def __init__(self, noise_schedule: NoiseSchedule, order: int = 4) -> None:
        super().__init__(noise_schedule, check_order("iPNDM", order, (1, 2, 3, 4)))

    def weights(self, t: Place, s: Place, past: Sequence[Tensor]) -> list[Tensor]:
        endless = t.alpha == 0
        rho_t = torch.where(endless, 0.0, t.sigma / torch.where(endless, 1.0, t.alpha))
        unit = s.alpha * rho_t * torch.expm1(t.log_snr - s.log_snr)  # alpha_s (rho_s - rho_t)
        return [b * unit for b in ADAMS_BASHFORTH[len(past) + 1][1:]]
