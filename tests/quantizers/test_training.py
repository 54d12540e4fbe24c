"""Training of quantized networks: losses, batches, a broken-off training goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers import training
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.methods import tdq
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.methods.tdq import TDQ, TDQOptions
from ts_adapt.quantizers.quantization import quantize, quantized_layers, restore
from ts_adapt.quantizers.training import FineTuneOptions, fine_tune, image_batches


@pytest.fixture
def calls(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Of a whole network; its predictors are fitted in fewer steps."""
    monkeypatch.setattr(tdq, "FIT_STEPS", 60)
    return calls


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)


@pytest.mark.parametrize(("name", "what"), [("tdq-w2a4+qat", "all"), ("tdq-w8a3", "activations")])
def test_training_lowers_the_loss_and_leaves_the_network_alone(
    denoiser: Any, calls: list[Call], name: str, what: str
) -> None:
    network = denoiser.network
    full = calls[1].run(network)
    same_at_every_step = training.reproduction_batches(network, calls[-1:], 6)
    quantize(network, build(name)[0], calls)
    options = FineTuneOptions(steps=24, lr=3e-3, train=what)
    weights = [layer.stored() for _, layer in quantized_layers(network)]
    losses = fine_tune(network, same_at_every_step, training.reproduction_loss, options, progress=False)
    assert losses[-1] < 0.6 * losses[0]
    after = [layer.stored() for _, layer in quantized_layers(network)]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True)) == (what == "activations")
    assert not any(p.requires_grad for p in network.parameters())
    restore(network)
    assert torch.equal(calls[1].run(network), full)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_diffusion_loss_is_that_of_the_target(denoiser: Any, prediction: str) -> None:
    denoiser.prediction = prediction
    batch = image_batches(images(), 8)(0)
    loss = training.diffusion_loss(denoiser)
    values = []
    denoiser.call = lambda network, x, timestep, condition: values.append((x, timestep)) or x
    found = loss(denoiser.network, batch, torch.Generator().manual_seed(0))
    x_t, t = values[0]
    alpha, sigma = (
        c(t.double()).float().view(-1, 1, 1, 1) for c in (denoiser.noise_schedule.alpha, denoiser.noise_schedule.sigma)
    )
    eps = (x_t - alpha * batch.x0) / sigma
    target = eps if prediction == "epsilon" else alpha * eps - sigma * batch.x0
    assert torch.allclose(found, (x_t - target).square().mean(), rtol=1e-3)
    assert abs(float(eps.mean())) < 0.2 and 0.8 < float(eps.std()) < 1.2


def test_a_teachers_own_network_has_no_loss(denoiser: Any) -> None:
    loss = training.teacher_loss(denoiser, denoiser.network)
    assert float(loss(denoiser.network, image_batches(images(), 8)(0), torch.Generator())) == 0


def test_a_broken_off_training_ends_where_it_would_have(
    denoiser: Any, calls: list[Call], make: Any, tmp_path: Path
) -> None:
    batches, loss = image_batches(images(), 8), training.diffusion_loss(denoiser)
    quantizer = build("tdq-w4a4+qat")[0]
    options = FineTuneOptions(steps=6, lr=1e-3, checkpoint_every=2)
    whole = quantize(denoiser.network, quantizer, calls)
    straight = fine_tune(whole, batches, loss, options, progress=False)
    broken = quantize(make("unet"), quantizer, calls)

    def until_four(number: int) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return batches(number)

    with pytest.raises(KeyboardInterrupt):
        fine_tune(broken, until_four, loss, options, checkpoint=tmp_path / "kept", progress=False)
    resumed = quantize(make("unet"), quantizer, calls)
    kept = {"checkpoint": tmp_path / "kept", "tensorboard": tmp_path}
    rarely = replace(options, checkpoint_every=6)
    result = fine_tune(resumed, batches, loss, rarely, **kept, progress=False)
    assert result == straight and len(result) == 6
    for (_, ours), (_, theirs) in zip(quantized_layers(whole), quantized_layers(resumed), strict=True):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert list(tmp_path.rglob("events.out.tfevents*"))
    with pytest.raises(TsAdaptError, match=r"other options\.lr"):
        fine_tune(resumed, batches, loss, FineTuneOptions(steps=6, lr=1e-2), **kept, progress=False)


def test_batches_cover_the_images_and_depend_on_their_number_alone() -> None:
    x = torch.arange(10.0)[:, None]
    batches = image_batches(x, 5, condition={"class_labels": torch.arange(10)}, seed=1)
    first, second = batches(0), batches(1)
    assert sorted([*first.x0.flatten().tolist(), *second.x0.flatten().tolist()]) == list(range(10))
    assert torch.equal(first.condition["class_labels"], first.x0.flatten().long())
    assert torch.equal(batches(0).x0, first.x0) and not torch.equal(batches(2).x0, first.x0)


def test_a_condition_is_dropped_as_often_as_asked_for_and_the_rest_stays() -> None:
    x, null = torch.arange(8.0)[:, None], {"text": torch.full((1, 2), -1.0), "more": {"part": torch.tensor([-1.0])}}
    condition = {"text": x.expand(8, 2).clone(), "more": {"part": x[:, 0]}, "other": x}
    batches = image_batches(x, 4, condition=condition, null=null, dropout=0.25, seed=2)
    met = [batches(number) for number in range(200)]
    dropped = torch.cat([batch.condition["text"][:, 0] == -1 for batch in met])
    assert 0.2 < float(dropped.double().mean()) < 0.3
    for batch in met:
        there = batch.condition["text"][:, 0] != -1
        assert torch.equal(batch.condition["text"][there], batch.x0[there].expand(-1, 2))
        assert torch.equal(batch.condition["more"]["part"] == -1, ~there) and torch.equal(
            batch.condition["other"], batch.x0
        )
    assert torch.equal(batches(7).condition["text"], met[7].condition["text"])


def test_schedules_of_the_rate_begin_at_the_top_and_fall() -> None:
    at = {name: [decay(k / 6) for k in range(7)] for name, decay in training.DECAYS.items()}
    assert all(values[0] == 1 and values == sorted(values, reverse=True) for values in at.values())
    assert at["cosine"][3] == at["linear"][3] == pytest.approx(0.5) and set(at["constant"]) == {1.0}
    assert at["cosine"][1] > at["linear"][1] and at["cosine"][6] == at["linear"][6] == 0


def test_the_rate_rises_and_falls_and_the_average_is_what_remains(
    denoiser: Any, calls: list[Call], make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six steps, two of them to warm up; a training that is gone on with has the same average."""
    batches, loss, quantizer = (
        image_batches(images(), 8),
        training.diffusion_loss(denoiser, "l1"),
        build("tdq-w4a4+qat")[0],
    )
    options = FineTuneOptions(steps=6, lr=1e-3, warm_up=2, schedule="linear", ema=0.5, checkpoint_every=3)
    rates, weights = [], []
    step = torch.optim.Adam.step

    def seen(self: Any, *rest: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        made = step(self, *rest)
        weights.append([p.detach().clone() for p in self.param_groups[0]["params"]])
        return made

    network = quantize(denoiser.network, quantizer, calls)
    mean = [p.detach().clone() for p in training.trainable(network).values()]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", seen)
        fine_tune(network, batches, loss, options, progress=False)
    assert rates == pytest.approx([1e-3 * min(1, (k + 1) / 3) * (1 - k / 6) for k in range(6)])
    for k, now in enumerate(weights):
        decay = min(0.5, (1 + k) / (10 + k))
        mean = [decay * a + (1 - decay) * b for a, b in zip(mean, now, strict=True)]
    kept = list(training.trainable(network).values())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(kept, mean, strict=True))
    assert any(not torch.allclose(a, b, atol=1e-6) for a, b in zip(kept, weights[-1], strict=True))

    def until_four(number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return batches(number)

    file = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(quantize(make("unet"), quantizer, calls), until_four, loss, options, checkpoint=file, progress=False)
    resumed = quantize(make("unet"), quantizer, calls)
    fine_tune(resumed, batches, loss, options, checkpoint=file, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(kept, training.trainable(resumed).values(), strict=True))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_norm_is_of_absolute_values_or_of_squares(denoiser: Any, norm: str) -> None:
    teacher = training.plain_copy(denoiser.network)
    with torch.no_grad():
        denoiser.network.conv_out.bias += 0.25
    found = training.teacher_loss(denoiser, teacher, norm)(
        denoiser.network, image_batches(images(), 8)(0), torch.Generator()
    )
    assert float(found) == pytest.approx({"l1": 0.25, "l2": 0.0625}[norm], rel=1e-4)


def test_bad_input_is_explained(denoiser: Any, calls: list[Call]) -> None:
    with pytest.raises(TsAdaptError, match="batch_size is 20 for 16 images"):
        image_batches(images(), 20)
    with pytest.raises(TsAdaptError, match="'y' has 3 rows for 16 images"):
        image_batches(images(), 4, condition={"y": torch.zeros(3)})
    quantize(denoiser.network, TDQ(TDQOptions(bits=None)), calls)
    with pytest.raises(TsAdaptError, match="left nothing to train"):
        training.trainable(denoiser.network, "weights")
    with pytest.raises(TsAdaptError, match="unknown part to train"):
        training.trainable(denoiser.network, "activation")
    batches = image_batches(torch.full((4, 1, 8, 8), torch.nan), 4)
    with pytest.raises(TsAdaptError, match="the loss is nan at step 0"):
        fine_tune(denoiser.network, batches, training.diffusion_loss(denoiser), progress=False)
