"""AdaRound (Nagel et al. 2020): weights are rounded up or down, whichever keeps the layer's output.

    W^ = s (clamp(floor(W / s + z) + h(V)) - z),      h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)
    minimise over V   tr(D G D^T) / O + r sum_k (1 - |2 h(V_k) - 1|^beta),      D = W - W^

beta falls from 20 to 2, after a fifth of the iterations without the second term, and pushes h to 0 or 1. G is the
second moment of the layer's inputs, so no input is kept. r is relative to the error of rounding to the nearest, as
outputs of layers differ in size. Some hundred iterations do, at a higher rate than the paper's for ten thousand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ts_adapt.quantizers.calibration.layer_inputs import output_error
from ts_adapt.quantizers.layers import affine
from ts_adapt.quantizers.layers.weights import AffineWeight

STRETCH, OFFSET = 1.2, -0.1
BETA_START, BETA_END = 20.0, 2.0
WARM_UP = 0.2
LEARNING_RATE = 5e-2
STRENGTH = 5.0


def learned_codes(weight: Tensor, part: AffineWeight, moment: Tensor, iterations: int) -> Tensor:
    """The codes `(G, n)` of `weight` at the levels of `part`, for inputs of second `moment` `(groups, K, K)`.

    Never worse than rounding to the nearest on those inputs: where it would be, the codes are those.
    """
    scale, zero = part.levels()
    rows = affine.to_groups(weight.detach().float(), part.group, part.axis)
    low, high = affine.code_range(part.bits, part.symmetric)
    floor = (rows / scale + zero).floor()
    rest = rows / scale + zero - floor
    nearest, moment = part.read(), moment.float()

    def error(codes: Tensor) -> Tensor:
        kept = affine.from_groups(affine.dequantize(codes, scale, zero), part.shape, part.group, part.axis)
        return output_error(weight.detach().float() - kept, moment)

    with torch.enable_grad():
        v = (((rest - OFFSET) / STRETCH).clamp(1e-4, 1 - 1e-4)).logit().requires_grad_()
        optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
        unit = error(nearest).clamp(min=1e-30)
        for step in range(iterations):
            h = _h(v)
            loss = error((floor + h).clamp(low, high)) / unit
            progress = (step / iterations - WARM_UP) / (1 - WARM_UP)
            if progress >= 0:
                beta = BETA_END + (BETA_START - BETA_END) * (1 - progress)
                loss = loss + STRENGTH * (1 - (2 * h - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    learned = (floor + (_h(v.detach()) >= 0.5)).clamp(low, high)
    return learned if bool(error(learned) < unit) else nearest


def _h(v: Tensor) -> Tensor:
    return (STRETCH * v.sigmoid() + OFFSET).clamp(0, 1)
