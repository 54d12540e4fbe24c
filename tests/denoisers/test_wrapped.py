"""What a denoiser offers beside its call: by default, and through the denoisers that are put around another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ts_adapt import Guided, integrate
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.denoisers.time_derivative import TimeDerivative
from ts_adapt.interfaces import Denoiser
from ts_adapt.noise import ContinuousVP
from ts_adapt.solvers import DDIM
from ts_adapt.teacher.generate import class_labels_for, weights_hash

NOISE = ContinuousVP()
TOLD = (
    "noise_schedule", "shape", "network", "prediction", "null_condition", "encode", "decoder", "scheduler_config",
    "step_aware",
)  # fmt: skip


class Own(Denoiser):
    """No more than a user has to write."""

    noise_schedule, shape, evaluations = NOISE, (1, 2, 2), 0

    def __call__(self, x_t: Tensor, t: Tensor, **told: Any) -> Tensor:
        self.evaluations += 1
        return 0.5 * x_t


class Network(nn.Module):
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return 0.1 * x


def test_a_denoiser_of_one_s_own_needs_its_noise_schedule_its_shape_and_its_call():
    own, x_T = Own(), torch.ones(3, 1, 2, 2)
    x = integrate(own, DDIM(NOISE), torch.tensor([0.9, 0.5, 0.1]).double(), x_T).x
    assert x.shape == x_T.shape and own.evaluations == 2
    assert torch.equal(own.decode(x), x)
    assert class_labels_for(own) is None and weights_hash(own) == weights_hash(Own())
    assert own.draw(3, seed=0) is None


@pytest.mark.parametrize("wrap", [lambda d: Guided(d, 2.0), lambda d: TimeDerivative(d, "exact")])
def test_what_is_around_a_denoiser_tells_what_it_tells(wrap):
    inner = NetworkDenoiser(
        Network(), NOISE, "v", shape=(1, 2, 2), decoder=lambda x: -x, null_condition={"class_labels": 7},
        encode=lambda prompts: {}, scheduler_config={"prediction_type": "v_prediction"},
    )  # fmt: skip
    outer = wrap(inner)
    assert isinstance(outer, Denoiser)
    for name in TOLD:
        assert getattr(outer, name) == getattr(inner, name) is not None, name
    assert outer.call is inner.call  # what only some denoisers have
    t, x = torch.tensor([0.5, 0.2]).double(), torch.zeros(2, 1, 2, 2)
    inner.time_scale = 1000.0
    assert torch.equal(outer.timestep(t, x), torch.tensor([500.0, 200.0]))
    outer.evaluations = 5
    assert inner.evaluations == 5
    assert torch.equal(outer.decode(torch.ones(1)), -torch.ones(1))
