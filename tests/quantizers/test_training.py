"""Training of quantized networks: losses, batches, a broken-off training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ts_adapt.interfaces import TsAdaptError
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
    result = fine_tune(resumed, batches, loss, options, **kept, progress=False)
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
