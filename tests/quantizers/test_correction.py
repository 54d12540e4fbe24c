"""PTQD's correction: a known corruption is measured and undone, between the times too; noise is not added twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import CORRECTION, NetworkDenoiser, correction_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Node, NoiseSchedule
from ts_adapt.noise import BetaTable, Preconditioned
from ts_adapt.quantizers import storage
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.output import measured
from ts_adapt.quantizers.layers.correction import OutputCorrection
from ts_adapt.quantizers.layers.timestep import TimestepListener
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import is_quantized, quantize, restore
from ts_adapt.sampling import integrate, noise_for
from ts_adapt.schedulers.attach import attach
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.solvers import DDIM
from ts_adapt.solvers.absorbing import Absorbing, absorbing
from ts_adapt.storage.files import read_json, write_json

VP = BetaTable.from_config({})
EDM = Preconditioned(0.02, 80.0, data_std=0.7)
TIMES = [100.0, 400.0, 900.0]


class Said(nn.Module):
    """Says what its state is."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x


def corrupted(x: Tensor, time: float, noise: float) -> Tensor:
    """(1 + k) x + b + d of two channels; k and b are linear in the time."""
    generator = torch.Generator().manual_seed(int(time))
    bias = torch.tensor([0.2, -0.1]).view(1, 2, *[1] * (x.ndim - 2)) * time / 1000
    d = noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return (1 - 0.3 * time / 1000) * x + bias + d


def corrected(noise: float, shape: tuple[int, ...] = (2, 16, 16), samples: int = 32) -> tuple[Said, OutputCorrection]:
    network = Said()
    listener = TimestepListener(network)
    states = [torch.randn(samples, *shape, generator=torch.Generator().manual_seed(7 + place)) for place in range(3)]
    calls = [Call.of(network, x, torch.tensor(time)) for x, time in zip(states, TIMES, strict=True)]
    said = [corrupted(x, time, noise) for x, time in zip(states, TIMES, strict=True)]
    return network, measured(calls, states, said, listener)


@pytest.mark.parametrize("time", [100.0, 250.0, 400.0, 777.0, 900.0])
def test_a_linear_corruption_is_undone_at_any_time(time: float) -> None:
    network, part = corrected(0.0)
    x = torch.randn(4, 2, 5, 7)
    network(x, torch.tensor([time]))
    torch.testing.assert_close(part(corrupted(x, time, 0.0)), x, rtol=1e-4, atol=1e-4)
    assert float(part.left(4).max()) < 1e-5


def test_of_noise_the_variance_is_known_and_of_the_rest_nothing_is_left() -> None:
    network, part = corrected(0.4)
    for time, gain, bias, spread in zip(TIMES, part.gain, part.bias, part.spread, strict=True):
        assert float(gain) == pytest.approx(1 - 0.3 * time / 1000, abs=0.02)
        assert bias.tolist() == pytest.approx([0.2 * time / 1000, -0.1 * time / 1000], abs=0.02)
        assert float(spread) == pytest.approx(0.4, rel=0.03)
    x = torch.randn(64, 2, 16, 16)
    network(x, torch.tensor([900.0]))
    error = part(corrupted(x, 900.0, 0.4)) - x
    assert float(error.std()) == pytest.approx(float(part.left(1)), rel=0.03) == pytest.approx(0.4 / 0.73, rel=0.05)
    assert abs(float((error * x).mean() / x.square().mean())) < 0.03 and abs(float(error.mean())) < 0.03


def test_every_sample_of_a_mixed_batch_has_its_own_and_a_learned_variance_stays() -> None:
    network, part = corrected(0.0)
    x = torch.randn(2, 2, 4, 4)
    both = torch.cat([corrupted(x[:1], 100.0, 0.0), corrupted(x[1:], 900.0, 0.0)])
    network(x, torch.tensor([100.0, 900.0]))
    torch.testing.assert_close(part(both), x, rtol=1e-4, atol=1e-4)
    twice = torch.cat([both, x], 1)
    torch.testing.assert_close(part(twice), torch.cat([x, x], 1), rtol=1e-4, atol=1e-4)


def test_tokens_have_their_channels_last() -> None:
    network = Said()
    listener = TimestepListener(network)
    x = torch.randn(64, 9, 2)
    said = corrupted(x.movedim(-1, 1), 400.0, 0.0).movedim(1, -1)
    part = measured([Call.of(network, x, torch.tensor(400.0))], [x], [said], listener)
    network(x, torch.tensor([400.0]))
    torch.testing.assert_close(part(said), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("noise_schedule", "prediction"),
    [(VP, "epsilon"), (VP, "sample"), (VP, "v"), (VP, "velocity"), (EDM, "v"), (EDM, "minus_v")],
)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_stochastic_step_has_the_variance_that_it_is_meant_to_have(
    noise_schedule: NoiseSchedule, prediction: str, eta: float
) -> None:
    """Of the noise in x_s, that of the prediction included."""
    torch.manual_seed(0)
    network, part = corrected(0.3)
    network.add_module(CORRECTION, part)
    denoiser = NetworkDenoiser(network, noise_schedule, prediction, shape=(2, 16, 16))
    x, (t, s) = (
        torch.randn(400, 2, 16, 16),
        torch.tensor([400.0, 250.0] if noise_schedule is VP else [3.0, 0.6]).double(),
    )
    solver, node, end = DDIM(noise_schedule, eta), Node(0, 1, t), Node(1, 1, s)
    clean = denoiser(x, t)
    network.register_forward_hook(lambda module, args, raw: raw + float(part.left(1)) * torch.randn_like(raw))
    noisy, z, none = denoiser(x, t), torch.randn_like(x), torch.zeros_like(x)
    middle = solver.update(x, clean, node, end, solver.init(x), none)[0]

    def spread(solver: Any) -> float:
        return float((solver.update(x, noisy, node, end, solver.init(x), z)[0] - middle).std())

    meant = float((solver.update(x, clean, node, end, solver.init(x), z)[0] - middle).std())
    assert spread(absorbing(solver, network, prediction)) == pytest.approx(meant, rel=5e-3)
    assert spread(solver) > 1.015 * meant


def test_noise_that_is_more_than_a_step_adds_leaves_none_to_add() -> None:
    network, part = corrected(5.0)
    network.add_module(CORRECTION, part)
    x, z, solver = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4), DDIM(VP, 0.1)
    node, end = Node(0, 1, torch.tensor(400.0).double()), Node(1, 1, torch.tensor(250.0).double())
    network(x, torch.tensor([400.0]))
    step = Absorbing(solver, network, "epsilon").update(x, x, node, end, solver.init(x), z)[0]
    assert torch.equal(step, solver.update(x, x, node, end, solver.init(x), torch.zeros_like(z))[0])
    t = node.t.clone().requires_grad_()
    step = Absorbing(solver, network, "epsilon").update(x, x, Node(0, 1, t), end, solver.init(x), z)[0]
    assert bool(torch.autograd.grad(step.sum(), t)[0].isfinite())


def test_it_is_put_on_with_any_quantizer_saved_loaded_and_taken_off(
    denoiser: Any, calls: list[Call], solve: Any, make: Any, tmp_path: Path, error: Callable[[], float]
) -> None:
    """The quantized network is nearer to the full one for it, and solves go on."""
    network = denoiser.network
    names = set(network._modules)
    method, layers = build("minmax-w3+ptqd")
    quantize(network, method, calls, layers=dataclasses.replace(layers, correct=False))
    plain = error()
    restore(network)
    quantize(network, method, calls, layers=layers)
    assert error() < plain
    said = calls[0].run(network)
    storage.save(network, tmp_path / "kept")
    other = storage.load(make("unet"), tmp_path / "kept")
    assert torch.equal(calls[0].run(other), said)
    _, grid, x_T = solve
    noise = noise_for(0, range(6), x_T)
    found = [integrate(denoiser, DDIM(denoiser.noise_schedule, eta), grid, x_T, step_noise=noise).x for eta in (0, 1)]
    assert all(bool(torch.isfinite(x).all()) for x in found)
    restore(network)
    assert set(network._modules) == names and not network._forward_hooks and correction_of(network) is None
    assert error() == 0
    config = read_json(tmp_path / "kept" / "config.json")
    config["replaced"][CORRECTION]["part"]["channels"] = 60000
    write_json(tmp_path / "kept" / "config.json", config)
    with pytest.raises(TsAdaptError, match="no numbers for 60000 channels"):
        storage.load(network, tmp_path / "kept")
    assert not is_quantized(network) and correction_of(network) is None


def test_a_guided_solve_absorbs_it_too(make: Any) -> None:
    network = make("sd")
    denoiser = NetworkDenoiser(network, VP, "epsilon")
    text, none = torch.randn(3, 5, 16), torch.randn(1, 5, 16)
    calls = [
        Call.of(network, torch.randn(3, 4, 8, 8), torch.tensor(time), encoder_hidden_states=text) for time in TIMES
    ]
    method, layers = build("minmax-w4+ptqd")
    quantize(network, method, calls, layers=layers)
    guided, x = Guided(denoiser, 3.0, {"encoder_hidden_states": none}), torch.randn(3, 4, 8, 8)
    times = torch.tensor([900.0, 500.0, 100.0]).double()
    seen: list[float] = []
    update = DDIM.update

    def heard(self: Any, x_t: Tensor, x0: Tensor, node: Any, next_node: Any, memory: Any, noise: Any = None) -> Any:
        if x_t.ndim == 4:
            seen.append(float(noise.std()))
        return update(self, x_t, x0, node, next_node, memory, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDIM, "update", heard)
        ones = torch.randn(3, 4, 8, 8)
        integrate(guided, DDIM(VP, 1.0), times, x, condition={"encoder_hidden_states": text}, step_noise=lambda _: ones)
    assert len(seen) == 2 and all(0 < value < float(ones.std()) for value in seen)


def test_a_pipelines_own_loop_absorbs_it_as_well(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("ddpm")
    method, layers = build("minmax-w4+ptqd")
    calls = [Call.of(pipe.unet, torch.randn(4, 1, 8, 8), torch.tensor(time)) for time in TIMES]
    quantize(pipe.unet, method, calls, layers=layers)
    attach(pipe, LearnedScheduler.from_grid("uniform", "ddpm"))
    shares: list[Tensor] = []
    share = Absorbing._share
    monkeypatch.setattr(Absorbing, "_share", lambda *given: shares.append(share(*given)) or shares[-1])
    pipe(2, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt")
    assert len(shares) == 3 and all(bool(((found >= 0) & (found <= 1)).all()) for found in shares)
    assert 0 < float(shares[1].max()) < 1


def test_what_is_trained_later_is_not_measured_now() -> None:
    with pytest.raises(TsAdaptError, match=r"\+ptqd measures a network as it is before \+qat trains it"):
        build("tdq-w4a8+qat+ptqd")
