"""A stochastic solver for a network whose predictions are noisy by themselves: it adds so much less.

    x_s = ... + c x0 + sigma_z z        x0 with noise of the standard deviation q
    added instead                       sigma_z z sqrt(max(0, 1 - c^2 q^2 / sigma_z^2))

so that x_s has the variance that the solver means it to have (PTQD, He et al. 2023, section 3.3). q is what the
correction of a quantized network leaves, as noise of x0. Of guided predictions it is taken to be the same in both
halves, which see the same state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.network import correction_of, x0_from_raw
from ts_adapt.interfaces import Node, Solver
from ts_adapt.numerics import scale


def absorbing(solver: Solver, network: nn.Module | None, prediction: str | None) -> Solver:
    """`solver` for `network`, which predicts as `prediction` says; itself where there is nothing to absorb."""
    if not solver.needs_noise or network is None or prediction is None or isinstance(solver, Absorbing):
        return solver
    return solver if correction_of(network) is None else Absorbing(solver, network, prediction)


class Absorbing:
    """`solver`, right behind an evaluation of `network`."""

    needs_noise = True

    def __init__(self, solver: Solver, network: nn.Module, prediction: str) -> None:
        self.solver, self.network, self.prediction = solver, network, prediction
        self.noise_schedule, self.order = solver.noise_schedule, solver.order
        self.evaluations_per_step = solver.evaluations_per_step

    def init(self, x: Tensor) -> Any:
        return self.solver.init(x)

    def update(
        self, x_t: Tensor, x0: Tensor, node: Node, next_node: Node, memory: Any, noise: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """See `interfaces.Solver`."""
        if noise is not None:
            noise = scale(self._share(x_t, node, next_node), noise)
        return self.solver.update(x_t, x0, node, next_node, memory, noise)

    def _share(self, x_t: Tensor, node: Node, next_node: Node) -> Tensor:
        """What the noise is multiplied by, `(B,)`; a step is linear in x0 and in the noise, and so asked by ones."""
        none = torch.zeros(len(x_t), 1, dtype=torch.float64, device=x_t.device)
        one = none + 1
        c, sigma = (
            self.solver.update(none, x0, node, next_node, self.solver.init(none), z)[0].squeeze(1)
            for x0, z in ((one, none), (none, one))
        )
        correction: Any = correction_of(self.network)
        raw = correction.left(len(x_t)).to(one)[:, None]
        q = x0_from_raw(raw, none, node.t, self.noise_schedule, self.prediction, node.output_scale).squeeze(1)
        adds = sigma > 0
        share = 1 - (c * q / torch.where(adds, sigma, 1.0)).square()
        some = adds & (share > 0)
        return torch.where(some, torch.where(some, share, 1.0).sqrt(), (~adds).to(share))
