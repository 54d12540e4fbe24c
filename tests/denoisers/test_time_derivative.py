"""The derivative in the time told: what each way is on paper, that nothing else changes, where embeddings are found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import GaussianFourierProjection, Timesteps
from torch import Tensor, nn

from tiny_networks import WIDTH, XL, small
from ts_adapt.denoisers.analytic import example_mixture
from ts_adapt.denoisers.edm import from_edm
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.denoisers.time_derivative import GOLDEN, TimeDerivative
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import DERIVATIVES, TimeGrid
from ts_adapt.noise import BetaTable, RectifiedFlow
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.solvers import DDIM

SHAPE = (1, 4, 4)
SHARE = 0.02
LINEAR = BetaTable.from_config(
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
)


class Waves(nn.Module):
    """The sum of the components of a time embedding, weighted, whatever the state; and the state itself, shared out."""

    def __init__(self, components: int = 8) -> None:
        super().__init__()
        self.time_proj = Timesteps(components, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, components))

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        value = self.time_proj(timestep) @ self.weight
        if class_labels is not None:
            value = value * (1 + class_labels)
        return torch.sin(x) + value.reshape(-1, 1, 1, 1)


@pytest.fixture
def waves() -> NetworkDenoiser:
    return NetworkDenoiser(Waves().requires_grad_(False), LINEAR, "sample", shape=SHAPE)


def slope(denoiser: Any, t: Tensor, x: Tensor, **condition: Any) -> Tensor:
    """The derivative of the sum of x0, over all samples, in t."""
    t = t.clone().requires_grad_()
    (found,) = torch.autograd.grad(denoiser(x, t, **condition).double().sum(), t)
    return found


def frequencies(components: int = 8) -> Tensor:
    half = components // 2
    return torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / half)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_slow_damps_each_frequency_as_a_gaussian_mean_does(waves, shape):
    x, t = initial_noise(0, range(3), SHAPE), torch.full(shape, 417.3, dtype=torch.float64)
    f, w = frequencies(), SHARE * (waves.noise_schedule.t_max - waves.noise_schedule.t_min)
    damped = f * torch.exp(-(f * w).square() / 2)
    cos, sin = torch.linspace(0.5, 1.5, 8, dtype=torch.float64).chunk(2)
    wanted = 16 * (damped * (-cos * torch.sin(f * 417.3) + sin * torch.cos(f * 417.3))).sum()
    found = slope(TimeDerivative(waves, "slow", SHARE), t, x)
    assert found.shape == shape
    assert torch.allclose(found if shape else found / 3, wanted.expand(shape), rtol=2e-3)
    assert not torch.allclose(slope(waves, t, x) if shape else slope(waves, t, x) / 3, wanted.expand(shape), rtol=0.1)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_secant_is_the_difference_over_distances_that_vary_from_sample_to_sample(waves, shape):
    x, t = initial_noise(0, range(3), SHAPE), torch.full(shape, 417.3, dtype=torch.float64)
    reach = SHARE * 999 * (0.5 + torch.arange(3, dtype=torch.float64) * GOLDEN % 1)
    at = torch.full((3,), 417.3, dtype=torch.float64)
    rise = (waves(x, at + reach) - waves(x, at - reach)).double().flatten(1).sum(1) / (2 * reach)
    found = slope(TimeDerivative(waves, "secant", SHARE), t, x)
    assert torch.allclose(found, rise if shape else rise.sum(), rtol=1e-5)


def test_secant_stays_between_the_ends(waves):
    x, end = initial_noise(0, range(2), SHAPE), torch.tensor(999.0, dtype=torch.float64)
    rise = [
        (waves(x[b : b + 1], end) - waves(x[b : b + 1], end - reach)).double().sum() / reach
        for b, reach in enumerate(SHARE * 999 * torch.tensor([0.5, 0.5 + GOLDEN], dtype=torch.float64))
    ]
    assert torch.allclose(slope(TimeDerivative(waves, "secant", SHARE), end, x), sum(rise), rtol=1e-5)


@pytest.mark.parametrize("way", DERIVATIVES)
def test_the_forward_pass_and_all_other_derivatives_are_the_denoiser_s(way):
    waves = NetworkDenoiser(Waves().requires_grad_(False), LINEAR, "epsilon", shape=SHAPE)
    taken = TimeDerivative(waves, way)
    x = initial_noise(0, range(3), SHAPE).requires_grad_()
    t = torch.tensor([900.0, 500.0, 10.0], dtype=torch.float64, requires_grad=True)
    told = (t.detach() + 3).requires_grad_()
    scale = torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64, requires_grad=True)
    found, wanted = (each(x, t, model_time=told, output_scale=scale) for each in (taken, waves))
    assert torch.equal(found, wanted)
    for theirs, ours in zip(
        torch.autograd.grad(wanted.square().sum(), (x, t, scale)),
        torch.autograd.grad(found.square().sum(), (x, t, scale)),
        strict=True,
    ):
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("way", ["slow", "secant"])
def test_every_way_is_exact_where_the_network_is_smooth(way):
    mixture = example_mixture()
    network = SmoothlyTold(mixture)
    denoiser = NetworkDenoiser(network, mixture.noise_schedule, "sample", shape=mixture.shape, time_scale=1000.0)
    x, t = initial_noise(0, range(64), mixture.shape), torch.tensor(0.6, dtype=torch.float64)
    assert torch.allclose(slope(TimeDerivative(denoiser, way, 0.01), t, x), slope(denoiser, t, x), rtol=0.02)


class SmoothlyTold(nn.Module):
    """A mixture that reads the time off the slowest component of an embedding."""

    def __init__(self, mixture: Any) -> None:
        super().__init__()
        self.mixture, self.time_proj = mixture, Timesteps(8, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = torch.asin(self.time_proj(timestep)[:, 7].double()) / frequencies()[3] / 1000
        mean: Tensor = self.mixture(x, t)
        return mean


@pytest.mark.parametrize("way", ["slow", "secant"])
@pytest.mark.parametrize("kind", ["waves", "edm"])
def test_checkpointing_gives_the_same_gradient_and_counts_no_more(waves, way, kind):
    if kind == "edm":
        torch.manual_seed(0)
        waves = from_edm(Fourier().requires_grad_(False), SHAPE, sigma_min=0.01, sigma_max=9.0)
    x, solver = initial_noise(0, range(2), SHAPE), DDIM(waves.noise_schedule)
    gradients, counts = [], []
    for checkpoint in (False, True):
        taken = TimeDerivative(waves, way)
        taken.evaluations = 0
        shares = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64)
        times = (
            waves.noise_schedule.t_min + shares * (waves.noise_schedule.t_max - waves.noise_schedule.t_min)
        ).requires_grad_()
        end = integrate(taken, solver, TimeGrid(times), x, checkpoint=checkpoint).x
        gradients.append(torch.autograd.grad(end.sum(), times)[0])
        counts.append(waves.evaluations)
    assert torch.allclose(*gradients, rtol=1e-5)
    assert counts == [3, 3]


@pytest.mark.parametrize("way", DERIVATIVES)
def test_guidance_is_followed_through_both_halves(waves, way):
    x, t = initial_noise(0, range(3), SHAPE), torch.tensor([900.0, 500.0, 40.0], dtype=torch.float64)
    label = torch.tensor([1.0, 2.0, 0.5])
    guided = TimeDerivative(Guided(waves, 2.5, {"class_labels": 0.0}), way)
    plain = TimeDerivative(waves, way)
    if way == "secant":  # its distances go by the place in the batch, which guidance doubles inside
        wanted = slope(plain, t, x, class_labels=2.5 * label)
    else:
        wanted = 2.5 * slope(plain, t, x, class_labels=label) - 1.5 * slope(plain, t, x, class_labels=0 * label)
    assert torch.allclose(slope(guided, t, x, class_labels=label), wanted, rtol=1e-4)


class Fourier(nn.Module):
    """EDM's kind: D(x, sigma) with Fourier features of log sigma / 4."""

    def __init__(self) -> None:
        super().__init__()
        self.map_noise = GaussianFourierProjection(16, scale=1.0, log=False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * self.map_noise(sigma.log() / 4).sum(1).reshape(-1, 1, 1, 1)


ONE_BLOCK = {
    "block_out_channels": (8,), "layers_per_block": 2, "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}  # fmt: skip
SIZES = {"text_embeds": torch.zeros(2, WIDTH), "time_ids": torch.ones(2, 6)}
TEXT = {"encoder_hidden_states": torch.zeros(2, 3, WIDTH)}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DDPM": ("UNet2DModel", ONE_BLOCK, {}),
    "Fourier": ("UNet2DModel", {"time_embedding_type": "fourier"}, {}),
    "SD": ("UNet2DConditionModel", {}, TEXT),
    "SDXL": ("UNet2DConditionModel", XL, {**TEXT, "added_cond_kwargs": SIZES}),
    "SD3": ("SD3Transformer2DModel", {}, {**TEXT, "pooled_projections": torch.zeros(2, 6)}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_found_in_every_family_of_networks(family):
    torch.manual_seed(0)
    kind, options, condition = FAMILIES[family]
    trained = (RectifiedFlow(), "velocity") if family == "SD3" else (LINEAR, "epsilon")
    denoiser = NetworkDenoiser(small(kind, **options), *trained)
    x = initial_noise(0, range(2), denoiser.shape)
    t_max = denoiser.noise_schedule.t_max
    found, wanted, xi = [], [], torch.linspace(-3, 3, 31, dtype=torch.float64)
    weight = torch.exp(-xi.square() / 2)
    for place in torch.linspace(0.2, 0.8, 9, dtype=torch.float64) * t_max:
        told = place.clone().requires_grad_()
        x0 = TimeDerivative(denoiser, "slow", 0.05)(x, place, model_time=told, **condition)
        found.append(torch.autograd.grad(x0.double().sum(), told)[0])
        with torch.no_grad():
            around = [denoiser(x, place, model_time=place + 0.05 * t_max * each, **condition) for each in xi]
        values = torch.stack([each.double().sum() for each in around])
        wanted.append((weight * xi * values).sum() / (weight * xi.square()).sum() / (0.05 * t_max))
    assert torch.cosine_similarity(torch.stack(found), torch.stack(wanted), dim=0) > 0.8


def test_two_experts_have_an_embedding_each():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = Waves(), Waves()

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            expert = self.early if float(timestep[0]) > 500 else self.late
            out: Tensor = expert(x, timestep)
            return out

    both = NetworkDenoiser(Experts().requires_grad_(False), LINEAR, "sample", shape=SHAPE)
    one = NetworkDenoiser(Waves().requires_grad_(False), LINEAR, "sample", shape=SHAPE)
    x, taken = initial_noise(0, range(2), SHAPE), TimeDerivative(both, "slow", SHARE)
    for t in torch.tensor([700.3, 300.3], dtype=torch.float64):
        assert torch.allclose(slope(taken, t, x), slope(TimeDerivative(one, "slow", SHARE), t, x))


def test_the_embedding_is_looked_at_within_the_range_of_times_alone():
    class Logarithmic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = GaussianFourierProjection(8, scale=0.1, log=True)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x + self.embed(timestep).sum(1).reshape(-1, 1, 1, 1)

    torch.manual_seed(0)
    denoiser = NetworkDenoiser(Logarithmic().requires_grad_(False), LINEAR, "sample", shape=SHAPE)
    x = initial_noise(0, range(2), SHAPE)
    for place in (5.0, 100.0, 990.0):
        t = torch.tensor(place, dtype=torch.float64)
        found, exact = slope(TimeDerivative(denoiser, "slow", 0.001), t, x), slope(denoiser, t, x)
        assert torch.allclose(found, exact, rtol=0.1), place


def test_an_interrupted_call_leaves_no_hooks(waves):
    network, taken = waves.network, TimeDerivative(waves, "slow")
    slope(taken, torch.tensor(500.0).double(), initial_noise(0, range(2), SHAPE))
    broken = network.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slope(taken, torch.tensor(500.0).double(), initial_noise(0, range(2), SHAPE))
    broken.remove()
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_edm_s_smooth_embedding_is_left_as_it_is():
    torch.manual_seed(0)
    denoiser = from_edm(Fourier().requires_grad_(False), SHAPE)
    x, t = initial_noise(0, range(2), SHAPE), torch.tensor(2.0, dtype=torch.float64)
    assert torch.allclose(slope(TimeDerivative(denoiser, "slow", 0.01), t, x), slope(denoiser, t, x), rtol=0.05)


def test_a_network_without_an_embedding_is_refused_with_the_way_that_works():
    class Bare(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x * timestep.reshape(-1, 1, 1, 1)

    denoiser = NetworkDenoiser(Bare(), LINEAR, "epsilon", shape=SHAPE)
    with pytest.raises(TsAdaptError, match="secant"):
        slope(TimeDerivative(denoiser, "slow"), torch.tensor(500.0).double(), initial_noise(0, range(2), SHAPE))
    with pytest.raises(TsAdaptError, match="secant"):
        TimeDerivative(example_mixture(), "slow")
    for wrong in ({"way": "exactly"}, {"way": "slow", "width": 0.0}, {"way": "slow", "width": float("nan")}):
        with pytest.raises(TsAdaptError):
            TimeDerivative(denoiser, **wrong)
