"""NetworkDenoiser around real, tiny, untrained networks of diffusers, against conversions written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from tiny_networks import small
from ts_adapt.denoisers import NetworkDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.noise import BetaTable, RectifiedFlow, VarianceExploding

VP = BetaTable.from_config({})


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return small("UNet2DModel")


def _batch(n: int = 3, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_x0_is_that_of_diffusers_ddim_at_integer_timesteps(unet: UNet2DModel, kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    noise_schedule = BetaTable.from_config(scheduler.config)
    denoiser = NetworkDenoiser(unet, noise_schedule, {"v_prediction": "v"}.get(kind, kind))
    x = _batch()
    for t in (3, 400, 900):
        raw = unet(x, t).sample
        expected = scheduler.step(raw, t, x).pred_original_sample
        torch.testing.assert_close(denoiser(x, torch.tensor(float(t))), expected, rtol=2e-4, atol=2e-4)


def test_a_batch_with_times_of_its_own_is_as_many_single_calls(unet: UNet2DModel) -> None:
    denoiser = NetworkDenoiser(unet, VP, "v")
    x, t = _batch(), torch.tensor([10.5, 500.25, 998.0], dtype=torch.float64)
    scales, told = torch.tensor([0.9, 1.0, 1.2]), torch.tensor([20.0, 480.0, 999.0])
    whole = denoiser(x, t, model_time=told, output_scale=scales)
    for i in range(3):
        one = denoiser(x[i : i + 1], t[i], model_time=told[i], output_scale=scales[i])
        torch.testing.assert_close(whole[i : i + 1], one, rtol=1e-4, atol=1e-5)
    assert denoiser.evaluations == 4


def test_output_scale_multiplies_the_raw_prediction_and_model_time_reaches_the_network_only(unet: UNet2DModel) -> None:
    denoiser = NetworkDenoiser(unet, VP, "epsilon")
    x, t, told = _batch(), torch.tensor(300.0), torch.tensor(350.0)
    alpha, sigma = VP.alpha(t).float(), VP.sigma(t).float()
    expected = (x - sigma * 1.5 * unet(x, told).sample) / alpha
    got = denoiser(x, t, model_time=told, output_scale=torch.tensor(1.5))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_times_model_times_and_scales(unet: UNet2DModel) -> None:
    network = copy.deepcopy(unet).double()
    denoiser = NetworkDenoiser(network, VP, "v")
    x = _batch(2).double()
    t, told = torch.tensor([200.3, 700.6]).double(), torch.tensor([210.4, 690.7]).double()
    scales = torch.tensor([1.1, 0.9]).double()
    leaves = [v.requires_grad_() for v in (t, told, scales)]

    def loss(t: Tensor, told: Tensor, scales: Tensor) -> Tensor:
        return denoiser(x, t, model_time=told, output_scale=scales).square().mean()

    grads = torch.autograd.grad(loss(*leaves), leaves)
    step = 2e-2  # timesteps pass through float32: not much smaller
    for which, grad in enumerate(grads):
        for i in range(2):
            shift = torch.zeros(2).double()
            shift[i] = step if which < 2 else 1e-4
            up, down = ([v + s * shift if k == which else v for k, v in enumerate(leaves)] for s in (1, -1))
            difference = (loss(*up) - loss(*down)) / (2 * shift[i])
            torch.testing.assert_close(grad[i], difference, rtol=2e-2, atol=1e-7)


def test_clipping_is_off_unless_asked_for(unet: UNet2DModel) -> None:
    x, t = 5 * _batch(), torch.tensor(800.0)
    free = NetworkDenoiser(unet, VP, "epsilon")(x, t)
    assert free.abs().max() > 1
    torch.testing.assert_close(NetworkDenoiser(unet, VP, "epsilon", clip_x0=True)(x, t), free.clamp(-1, 1))


def test_the_network_runs_in_its_precision_and_x0_comes_in_that_of_the_state(unet: UNet2DModel) -> None:
    half = NetworkDenoiser(copy.deepcopy(unet), VP, "v").to(dtype=torch.bfloat16)
    assert next(half.network.parameters()).dtype == torch.bfloat16
    x, t = _batch(), torch.tensor(999.0)
    out = half(x, t)
    assert out.dtype == torch.float32
    assert half.timestep(t, x).tolist() == [999.0] * 3
    torch.testing.assert_close(out, NetworkDenoiser(unet, VP, "v")(x, t), rtol=0.05, atol=0.05)


LABELS, TEXT = torch.tensor([0, 3]), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
CONDITIONED = {
    "UNet2DModel": ({"num_class_embeds": 4}, {"class_labels": LABELS}),
    "UNet2DConditionModel": ({"cross_attention_dim": 8}, {"encoder_hidden_states": TEXT.double()}),
    "DiTTransformer2DModel": ({"num_embeds_ada_norm": 10}, {"class_labels": LABELS}),
    "SD3Transformer2DModel": (
        {"joint_attention_dim": 8, "pooled_projection_dim": 8},
        {"encoder_hidden_states": TEXT, "pooled_projections": TEXT[:, 0]},
    ),
}


@pytest.mark.parametrize("kind", CONDITIONED)
def test_conditions_reach_the_network_and_a_learned_variance_is_left_out(kind: str) -> None:
    options, condition = CONDITIONED[kind]
    network = small(kind, **options)
    denoiser = NetworkDenoiser(network, VP, "sample")
    x, t = _batch(2, denoiser.shape), torch.tensor([50.0, 700.0])
    told = {key: value.float() if value.is_floating_point() else value for key, value in condition.items()}
    got = denoiser(x, t, **condition)
    torch.testing.assert_close(got, network(x, timestep=t, **told).sample[:, : x.shape[1]])
    assert not torch.equal(got, denoiser(x, t, **{key: value.flip(0) for key, value in condition.items()}))


def test_flux_style_transformer_takes_patches_as_tokens() -> None:
    network = small("FluxTransformer2DModel", joint_attention_dim=8, pooled_projection_dim=8)
    x, text, pooled = _batch(2, (4, 8, 8)), torch.randn(2, 3, 8), torch.randn(2, 8)
    t = torch.tensor(0.4)
    denoiser = NetworkDenoiser(network, RectifiedFlow(), "velocity", shape=(4, 8, 8))
    got = denoiser(x, t, encoder_hidden_states=text, pooled_projections=pooled)
    places = [(row, column) for row in range(4) for column in range(4)]
    tokens = torch.stack([x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1) for r, c in places], 1)
    u = network(
        tokens,
        timestep=t.expand(2),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        img_ids=torch.tensor([(0, r, c) for r, c in places], dtype=torch.float32),
        txt_ids=torch.zeros(3, 3),
    ).sample
    for k, (r, c) in enumerate(places):
        here = (slice(None), slice(None), slice(2 * r, 2 * r + 2), slice(2 * c, 2 * c + 2))
        torch.testing.assert_close(got[here], x[here] - t * u[:, k].reshape(2, 4, 2, 2))


def test_a_plain_module_is_called_by_position() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
            return (x * t[:, None],)

    denoiser = NetworkDenoiser(Plain(), VarianceExploding(), "sample", shape=(2,))
    torch.testing.assert_close(denoiser(torch.ones(3, 2), torch.tensor(4.0)), torch.full((3, 2), 4.0))


@pytest.mark.parametrize("answered", [(3, 1, 4, 4), (3, 2, 1, 1), (1, 2, 4, 4), (), (3, 6, 4, 4)])
def test_an_answer_of_another_shape_is_refused_not_broadcast(answered: tuple[int, ...]) -> None:
    class Answering(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.ones(answered)

    denoiser = NetworkDenoiser(Answering(), VP, "epsilon", shape=(2, 4, 4))
    with pytest.raises(TsAdaptError, match=r"\(3, 2, 4, 4\)"):
        denoiser(torch.zeros(3, 2, 4, 4), torch.tensor(4.0))


def test_what_cannot_be_is_refused(unet: UNet2DModel) -> None:
    with pytest.raises(TsAdaptError, match=r"prediction 'eps' is not known.*epsilon"):
        NetworkDenoiser(unet, VP, "eps")
    with pytest.raises(TsAdaptError, match=r"pass shape="):
        NetworkDenoiser(nn.Identity(), VP, "v")
    with pytest.raises(TsAdaptError, match=r"\(2,\) for a batch of 3"):
        NetworkDenoiser(unet, VP, "v")(_batch(), torch.tensor([1.0, 2.0]))
