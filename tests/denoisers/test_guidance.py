"""Classifier-free guidance: equal to guiding the raw prediction, one evaluation, one half where one is enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_networks import small
from ts_adapt.denoisers import Guided, NetworkDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Denoiser
from ts_adapt.noise import BetaTable
from ts_adapt.parameterization import to_x0

NULL = 3
VP = BetaTable.from_config({})


class Recorded(NetworkDenoiser):
    """Keeps the batch sizes it was called with, and the last condition."""

    batches: list[int]
    condition: dict[str, Any]

    def __call__(self, x_t: Tensor, t: Tensor, **options: Any) -> Tensor:
        self.batches.append(len(x_t))
        self.condition = options
        return super().__call__(x_t, t, **options)


@pytest.fixture(params=["epsilon", "v", "sample"])
def denoiser(request: pytest.FixtureRequest) -> Recorded:
    torch.manual_seed(0)
    network = small("UNet2DModel", num_class_embeds=NULL + 1)
    made = Recorded(network, VP, request.param)
    made.batches = []
    return made


X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
T = torch.tensor([100.0, 400.0, 700.0], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2])


@torch.no_grad()
def test_guiding_x0_is_guiding_the_raw_prediction_also_scaled(denoiser: Recorded) -> None:
    w, gain = 2.5, torch.tensor([0.8, 1.0, 1.3])
    net = denoiser.network
    none = net(X, T.float(), class_labels=torch.full_like(LABELS, NULL)).sample
    given = net(X, T.float(), class_labels=LABELS).sample
    raw = gain[:, None, None, None] * (none + w * (given - none))
    expected = to_x0(raw, X, VP.alpha(T), VP.sigma(T), denoiser.prediction)
    got = Guided(denoiser, w, {"class_labels": NULL})(X, T, output_scale=gain, class_labels=LABELS)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_doubled_batch_is_one_evaluation_and_scale_one_needs_no_second_half(denoiser: Recorded) -> None:
    guided = Guided(denoiser, 2.0, {"class_labels": NULL})
    guided(X, T, class_labels=LABELS)
    assert (guided.evaluations, denoiser.batches) == (1, [6])
    plain = Guided(denoiser, 1.0, {"class_labels": NULL})(X, T, class_labels=LABELS)
    assert (guided.evaluations, denoiser.batches) == (2, [6, 3])
    torch.testing.assert_close(plain, denoiser(X, T, class_labels=LABELS))
    guided.evaluations = 0
    assert denoiser.evaluations == 0


@torch.no_grad()
def test_scales_of_each_sample_are_as_many_single_calls(denoiser: Recorded) -> None:
    scales = torch.tensor([0.0, 1.0, 4.0])
    whole = Guided(denoiser, scales, {"class_labels": NULL})(X, T, class_labels=LABELS)
    for i in range(3):
        one = Guided(denoiser, float(scales[i]), {"class_labels": NULL})
        expected = one(X[i : i + 1], T[i], class_labels=LABELS[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], expected, rtol=1e-4, atol=1e-4)
    called = Guided(denoiser, 9.0, {"class_labels": NULL})(X, T, guidance_scale=scales, class_labels=LABELS)
    torch.testing.assert_close(called, whole)


@torch.no_grad()
def test_the_same_scale_for_each_sample_is_the_one_scale_to_the_bit(denoiser: Recorded) -> None:
    told = Guided(denoiser, None, {"class_labels": NULL})
    one = Guided(denoiser, 2.7, {"class_labels": NULL})
    for more in ({}, {"guidance_factor": torch.tensor(0.8).double()}):
        scales = torch.full((3,), 2.7, dtype=torch.float64)
        each = told(X, T, guidance_scale=scales, class_labels=LABELS, **more)
        assert torch.equal(each, one(X, T, class_labels=LABELS, **more))
    assert told.guidance_scale is None
    with pytest.raises(TsAdaptError, match="give the call guidance_scale"):
        told(X, T, class_labels=LABELS)


@torch.no_grad()
def test_shared_times_model_times_and_the_denoisers_own_null_condition(denoiser: Recorded) -> None:
    denoiser.null_condition = {"class_labels": NULL}
    guided = Guided(denoiser, 3.0)
    told = torch.tensor([110.0, 390.0, 720.0])
    got = guided(X, torch.tensor(300.0), model_time=told, class_labels=LABELS)
    none = denoiser(X, torch.tensor(300.0), model_time=told, class_labels=torch.full_like(LABELS, NULL))
    given = denoiser(X, torch.tensor(300.0), model_time=told, class_labels=LABELS)
    torch.testing.assert_close(got, none + 3 * (given - none), rtol=1e-4, atol=1e-4)
    assert isinstance(guided, Denoiser)
    assert guided.shape == (1, 8, 8)
    clipped = Guided(denoiser, 3.0, clip_x0=True)(X, torch.tensor(300.0), model_time=told, class_labels=LABELS)
    torch.testing.assert_close(clipped, got.clamp(-1, 1))


def test_nested_conditions_are_doubled_part_by_part() -> None:
    seen: dict[str, Any] = {}

    class Stub(Denoiser):
        noise_schedule, evaluations = VP, 0

        def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
            seen.update(condition)
            return x

    empty = {"encoder_hidden_states": torch.zeros(1, 2, 4), "added": {"text": torch.zeros(1, 5)}}
    condition = {
        "encoder_hidden_states": torch.ones(3, 2, 4),
        "added": {"text": torch.ones(3, 5), "ids": torch.ones(3, 6)},
        "mode": "plain",
    }
    Guided(Stub(), 5.0, empty)(X, T, **condition)
    assert seen["encoder_hidden_states"].shape == (6, 2, 4)
    assert seen["encoder_hidden_states"][:3].eq(0).all() and seen["encoder_hidden_states"][3:].eq(1).all()
    assert seen["added"]["text"][:3].eq(0).all()
    assert seen["added"]["ids"].shape == (6, 6) and seen["added"]["ids"].eq(1).all()
    assert seen["mode"] == "plain"


def test_gradients_reach_times_and_scales(denoiser: Recorded) -> None:
    t, w = T.clone().requires_grad_(), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    Guided(denoiser, w, {"class_labels": NULL})(X, t, class_labels=LABELS).square().mean().backward()
    for value in (t, w):
        assert value.grad is not None and value.grad.isfinite().all() and (value.grad != 0).all()


def test_what_cannot_be_is_refused(denoiser: Recorded) -> None:
    with pytest.raises(TsAdaptError, match="guidance needs the condition that stands for none"):
        Guided(denoiser, 2.0)
    with pytest.raises(TsAdaptError, match="needs the condition class_labels"):
        Guided(denoiser, 2.0, {"class_labels": NULL})(X, T)
    with pytest.raises(TsAdaptError, match="2 rows for a batch of 3"):
        Guided(denoiser, 2.0, {"class_labels": NULL})(X, T, class_labels=LABELS[:2])
    denoiser.clip_x0 = True
    with pytest.raises(TsAdaptError, match="clips x0 before guidance"):
        Guided(denoiser, 2.0, {"class_labels": NULL})
