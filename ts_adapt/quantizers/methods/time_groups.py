"""Time-grouped activations: T timesteps share G quantizers (APQ-DM, Wang et al. 2024, section 3.2).

    x^(t) = sum_g softmax(a_t)_g Q_g(x)
    minimise over a and the ranges of Q_g    mean_t [ sum |x^ - x|^p / sum |x|^p ] + 0.8 mean_t H(softmax(a_t))

p is that of `ranges` for activations, in the paper 2. The entropy H drives every timestep to one quantizer; after
training that one alone is kept, and a timestep between two takes the nearest one's. The quantizers start from timesteps
whose ranges are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ts_adapt.quantizers.calibration.layer_inputs import InputRecord
from ts_adapt.quantizers.calibration.ranges import activation_power, least_error
from ts_adapt.quantizers.layers.activations import GroupedActivation
from ts_adapt.quantizers.layers.affine import fake_quantize, scale_and_zero
from ts_adapt.quantizers.layers.timestep import TimestepListener

ENTROPY_WEIGHT = 0.8
FIT_STEPS = 100
LOGIT_LR, RANGE_LR = 0.2, 0.02
FIT_VALUES = 1024
SHARPNESS = 4.0


@dataclass
class Assignment:
    """logits `(T, G)`; low and high `(G,)`, the ranges of the quantizers."""

    logits: Tensor
    low: Tensor
    high: Tensor

    def quantizer(
        self, record: InputRecord, bits: int, listener: TimestepListener | None, exponents: Tensor | None = None
    ) -> GroupedActivation:
        """The part that keeps for each timestep its likeliest quantizer."""
        scale, zero = scale_and_zero(self.low, self.high, bits, False, exact_zero=True)
        return GroupedActivation(bits, record.times, self.logits.argmax(1), scale, zero, listener, exponents)


def assign(record: InputRecord, bits: int, groups: int) -> Assignment:
    """Train the assignment of the timesteps of `record` to `groups` quantizers, and their ranges."""
    x, weights = record.rows(FIT_VALUES)
    share = weights / weights.sum(1, keepdim=True)
    power, largest = activation_power(bits), x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    whole = (share * (x.abs() / largest).pow(power)).sum(1).clamp(min=1e-30)
    bounds = least_error(x, bits, False, exact_zero=True, weights=weights, power=power)
    low, high = bounds[0].squeeze(1).clamp(max=0), bounds[1].squeeze(1).clamp(min=0)
    size = (high - low).clamp(min=1e-30).log()
    label = _clusters(size, groups)
    count = int(label.max()) + 1
    mean = torch.stack([torch.stack([low[label == g].mean(), high[label == g].mean()]) for g in range(count)])
    centre = torch.stack([size[label == g].mean() for g in range(count)])

    logits = (-SHARPNESS * (size[:, None] - centre).abs()).requires_grad_()
    stretch = torch.zeros(count, 2, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [logits], "lr": LOGIT_LR}, {"params": [stretch], "lr": RANGE_LR}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)

    with torch.enable_grad():
        for step in range(FIT_STEPS):
            shares = logits.softmax(1)
            low, high = (mean * stretch.exp()).unbind(1)
            scale, zero = scale_and_zero(low, high, bits, False, exact_zero=True)
            each = fake_quantize(x, scale[:, None, None], zero[:, None, None], bits, False)
            mixed = (shares.T[:, :, None] * each).sum(0)
            error = ((share * ((mixed - x).abs() / largest).pow(power)).sum(1) / whole).mean()
            entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            loss = error + ENTROPY_WEIGHT * step / FIT_STEPS * entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    low, high = (mean * stretch.detach().exp()).unbind(1)
    return Assignment(logits.detach(), low, high)


def _clusters(size: Tensor, groups: int) -> Tensor:
    """Labels `(T,)` of at most `groups` clusters of the numbers `size` `(T,)`: cut at the widest gaps."""
    order = size.argsort()
    gaps = size[order].diff()
    cuts = gaps.argsort(descending=True)[: groups - 1]
    cuts = cuts[gaps[cuts] > 0]
    steps = torch.zeros(len(size), dtype=torch.long)
    steps[cuts + 1] = 1
    label = torch.empty_like(steps)
    label[order] = steps.cumsum(0)
    return label
