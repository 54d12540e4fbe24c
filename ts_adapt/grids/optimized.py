"""Time grids that minimise an error bound and need no model: DMN.

In the step from lambda_n to lambda_{n+1} a multistep solver of order p puts for x0 the polynomial through its last p
values, l_nk being Lagrange's:

    x_{n+1} = (sigma_{n+1} / sigma_n) x_n + sigma_{n+1} sum_k w_nk x0_k,      w_nk = int e^lambda l_nk(lambda) dlambda

An error e_k of the value x0_k thus reaches x_N as sigma_N w_nk e_k, once for every step n that uses it. The error of a
network is taken to be the same everywhere in eps, e = sigma / alpha = exp(-lambda): grids depend on the range of lambda
only. DMN (Xue et al. 2024) minimises over lambda_1 .. lambda_{N-1} the size that these errors can have in x_N:

    sum_n ( sum_k (w_nk e_k)^2 )^(1/2)

This takes every step by itself. The paper adds up by values, sum_k | sum_n w_nk | e_k: the errors of one value in
different steps cancel in it, and its many minima are grids made for that cancellation, with steps of very unequal
length, for which the authors' code takes some steps by themselves too. The bound here is smooth, and optimisers of
different kinds and starts end in the same minimum.

The order of step n is min(p, n + 1, N - n): as the history allows, and lower again at the end.

Written from the mathematics of arXiv 2402.17376. Its constrained trust region is replaced by scipy's L-BFGS-B with
exact gradients in logits (grids/parametric.py), whose grids rise without constraints.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import pin_ends
from ts_adapt.grids.parametric import weights_of
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.numerics import check_steps, finite_log_snr_range, validate_times

ITERATIONS = 500


def dmn(noise_schedule: NoiseSchedule, steps: int, order: int) -> Tensor:
    """The DMN grid over `steps` intervals: times `(steps+1,)`, float64, from t_max to t_min.

    order  p of the solver that will use the grid

    Where lambda is infinite at an end, the range is `numerics.finite_log_snr_range`. Raises TsAdaptError for `steps`
    or `order` below 1.
    """
    check_steps(steps)
    if order < 1:
        raise TsAdaptError(f"order is {order}; a solver has order 1 at least")
    noisy, clean = finite_log_snr_range(noise_schedule)
    times = noise_schedule.time(_minimum(noisy, clean, steps, order))
    return validate_times(pin_ends(times, noise_schedule), noise_schedule, what=f"the DMN grid over {steps} steps")


def error_bound(log_snr: Tensor, order: int) -> Tensor:
    """The bound `()` that `dmn` minimises, for finite lambda_0 < .. < lambda_N `(N+1,)`, float64; differentiable.

    In units of sigma_N.
    """
    steps = len(log_snr) - 1
    error, bound = torch.exp(-log_snr), log_snr.new_zeros(())
    for n in range(steps):
        p = min(order, n + 1, steps - n)
        used = slice(n + 1 - p, n + 1)
        bound = bound + torch.linalg.vector_norm(_weights(log_snr[used], log_snr[n + 1]) * error[used])
    return bound


def _weights(places: Tensor, end: Tensor) -> Tensor:
    """w_k `(p,)`: the integrals of e^lambda l_k from the last of `places` `(p,)` to `end` `()`.

    They are exact for e^lambda u^j, u = lambda - end, j < p: sum_k w_k u_k^j = e^end m_j, where m_j = int e^u u^j du
    from -h to 0 obeys m_j = -(-h)^j e^-h - j m_{j-1}.
    """
    u = places - end
    h = -u[-1]
    moments = [-torch.expm1(-h)]
    for j in range(1, len(places)):
        moments.append(-((-h) ** j) * torch.exp(-h) - j * moments[-1])
    powers = torch.stack([u**j for j in range(len(places))])
    weights: Tensor = torch.exp(end) * torch.linalg.solve(powers, torch.stack(moments))
    return weights


def _minimum(noisy: float, clean: float, steps: int, order: int) -> Tensor:
    """The lambda `(N+1,)` from `noisy` to `clean` with the smallest bound, found from the uniform one."""

    def spread(logits: Tensor) -> Tensor:
        return noisy + (clean - noisy) * pad(weights_of(logits).cumsum(0), (1, 0))

    def log_bound(logits: np.ndarray) -> tuple[float, np.ndarray]:
        variables = torch.from_numpy(logits).requires_grad_()
        value = error_bound(spread(variables), order).log()
        (gradient,) = torch.autograd.grad(value, variables)
        return value.item(), gradient.numpy()

    from scipy.optimize import minimize  # half a second to import

    options = {"maxiter": ITERATIONS, "ftol": 1e-14, "gtol": 1e-9}
    found = minimize(log_bound, np.zeros(steps), jac=True, method="L-BFGS-B", options=options)
    return spread(torch.from_numpy(found.x))
