"""What networks predict, and its conversion to x0, given x_t = alpha x0 + sigma eps.

    epsilon     eps                        x0 = (x_t - sigma eps) / alpha
    sample      x0
    v           alpha eps - sigma x0       x0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2)
    minus_v     sigma x0 - alpha eps       EDM's F
    velocity    eps - x0 (rectified flow)  x0 = (x_t - sigma u) / (alpha + sigma)

The names are ours; `PREDICTION_TYPES` maps diffusers' `prediction_type` to them. alpha, sigma: `()` or `(B,)`.
"""

from __future__ import annotations

from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.numerics import combine

PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
PARAMETERIZATIONS = ("epsilon", "sample", "v", "minus_v", "velocity")


def to_x0(prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """x0 `(B, ...)` from the network's prediction of kind `epsilon`, `sample`, `v`, `minus_v` or `velocity`."""
    check_prediction(kind)
    if kind == "epsilon":
        return combine((1 / alpha, x_t), (-sigma / alpha, prediction))
    if kind == "sample":
        return prediction
    if kind in ("v", "minus_v"):
        norm = alpha.square() + sigma.square()
        return combine((alpha / norm, x_t), ((-sigma if kind == "v" else sigma) / norm, prediction))
    return combine((1 / (alpha + sigma), x_t), (-sigma / (alpha + sigma), prediction))


def from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """The inverse of `to_x0`: the prediction of `kind` that x0 stands for."""
    check_prediction(kind)
    if kind == "sample":
        return x0
    eps = to_epsilon(x0, x_t, alpha, sigma)
    if kind == "epsilon":
        return eps
    if kind == "v":
        return combine((alpha, eps), (-sigma, x0))
    if kind == "minus_v":
        return combine((-alpha, eps), (sigma, x0))
    return eps - x0


def to_epsilon(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """eps = (x_t - alpha x0) / sigma."""
    return combine((1 / sigma, x_t), (-alpha / sigma, x0))


def check_prediction(kind: str) -> None:
    """TsAdaptError unless `kind` is one of PARAMETERIZATIONS."""
    if kind not in PARAMETERIZATIONS:
        raise TsAdaptError(f"prediction {kind!r} is not known; expected one of {', '.join(PARAMETERIZATIONS)}")
