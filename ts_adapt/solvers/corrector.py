"""UniPC's corrector (UniC, Zhao et al. 2023), for any solver of one evaluation a step; UniPC itself.

The evaluation x0_t at the predicted x_t also tells how good that prediction was. Before it predicts x_s, a corrected
solver takes the last step, from r to t, again, now with x0_t among the places of the interpolation:

    x_t <- (sigma_t / sigma_r) x_r + alpha_t (1 - e^-h) x0_r + sum_k w_k (x0_k - x0_r) + w (x0_t - x0_r)

with h = lambda_t - lambda_r, over `order - 1` past values and x0_t. The weights integrate Lagrange's polynomial in
lambda exactly; at order 1, w = alpha_t B(h) / 2. x0_t is not evaluated anew, so NFE stays N; the last state, where
nothing is evaluated, is never corrected. Behind a predictor of order p, the corrector of order p converges with p + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Node, NoiseSchedule, Solver
from ts_adapt.numerics import combine
from ts_adapt.solvers.coefficients import (
    Defaults,
    Met,
    Place,
    check_order,
    check_variant,
    data_weights,
    first_order,
    half_weight,
    place,
)
from ts_adapt.solvers.multistep import UniP


@dataclass(frozen=True)
class CorrectorMemory:
    """inner    the predictor's own memory
    x        x_r, the corrected state at the last evaluation, `(B, ...)`; None before the first
    at       alpha, sigma, log_snr there
    history  x0_r and the x0 before it
    """

    inner: Any
    x: Tensor | None = None
    at: Place | None = None
    history: Met = field(default_factory=Met)


class Corrected(Defaults):
    """`solver` with UniPC's corrector before every step but the first.

    solver             deterministic, one evaluation a step: DDIM, DPM-Solver++, DEIS, iPNDM, UniP
    order              of the corrector, 1 to 3; lower at the start, as the history allows
    variant            B(h) of the corrector of order 1: "bh1" (h) or "bh2" (1 - e^-h)
    lower_order_final  the correction of a step has at most the order of the steps left when it began

    The solver is given the corrected x_t with the x0 evaluated at the uncorrected one. Learned coefficients belong to
    the solver's prediction. A step from infinite log-SNR is not corrected.
    """

    def __init__(self, solver: Solver, order: int = 2, variant: str = "bh2", lower_order_final: bool = True) -> None:
        if solver.needs_noise or solver.evaluations_per_step != 1 or isinstance(solver, Corrected):
            raise TsAdaptError(
                f"{type(solver).__name__} cannot be corrected: the corrector takes a deterministic solver with one "
                "evaluation a step and no corrector of its own, such as DDIM, DPMSolverPP or DEIS"
            )
        self.solver = solver
        super().__init__(solver.noise_schedule)
        self.corrector_order = check_order("UniPC's corrector", order, (1, 2, 3))
        self.order = solver.order
        self.variant, self.lower_order_final = check_variant(variant), lower_order_final

    def init(self, x: Tensor) -> CorrectorMemory:
        return CorrectorMemory(self.solver.init(x))

    def update(
        self, x_t: Tensor, x0: Tensor, node: Node, next_node: Node, memory: CorrectorMemory, noise: Tensor | None = None
    ) -> tuple[Tensor, CorrectorMemory]:
        """x_s predicted from the corrected x_t, and the memory; x0 is the evaluation at the uncorrected x_t."""
        t = place(self.noise_schedule, node.t)
        if memory.x is not None and memory.at is not None:
            x_t = self._correct(memory.x, memory.at, t, x0, memory.history, node)
        x_s, inner = self.solver.update(x_t, x0, node, next_node, memory.inner)
        history = memory.history.push(x0, t.log_snr, keep=self.corrector_order)
        return x_s, CorrectorMemory(inner, x_t, t, history)

    def _correct(self, x_r: Tensor, r: Place, t: Place, x0: Tensor, history: Met, node: Node) -> Tensor:
        order = min(self.corrector_order, len(history.values))
        if self.lower_order_final:
            order = min(order, node.steps - node.index + 1)
        x0_r, *past = history.values[:order]
        if order == 1:
            weights = [half_weight(r, t, t.log_snr - r.log_snr, self.variant)]
        else:
            weights = data_weights(r, t, history.log_snrs[1:order], end=True)
        weight_x, weight_x0 = first_order(r, t)
        weight_x0 = weight_x0 - sum(weights[1:], weights[0])
        return combine((weight_x, x_r), (weight_x0, x0_r), *zip(weights, (*past, x0), strict=True))


class UniPC(Corrected):
    """UniPC, orders 1 to 3: the predictor UniP with the corrector of the same order and variant.

    variant            "bh1" or "bh2", B(h) of the paper
    lower_order_final  at most as many orders as steps are left, at any number of steps, as diffusers does
    """

    def __init__(
        self, noise_schedule: NoiseSchedule, order: int = 2, variant: str = "bh2", lower_order_final: bool = True
    ) -> None:
        super().__init__(UniP(noise_schedule, order, variant, lower_order_final), order, variant, lower_order_final)
