"""The analytic denoisers: posterior means by quadrature, the exact flow, corrections, counting, refusals."""

from __future__ import annotations

import pytest
import torch

from ts_adapt.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Denoiser
from ts_adapt.noise import ContinuousVP, RectifiedFlow, VarianceExploding
from ts_adapt.parameterization import to_epsilon, to_x0

NOISES = {"vp": ContinuousVP(), "ve": VarianceExploding(), "flow": RectifiedFlow()}


def gaussian(noise_schedule, **options):
    return GaussianDenoiser(noise_schedule, torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[0.3], [1.5]]), **options)


def mixture(noise_schedule, **options):
    means = torch.tensor([[-2.0], [0.5], [1.0]])
    return GaussianMixtureDenoiser(
        noise_schedule, means, torch.tensor([0.1, 0.5, 0.02]), torch.tensor([1.0, 2.0, 1.0]), **options
    )


def states(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("noise_schedule", NOISES.values(), ids=NOISES)
def test_mixture_is_the_posterior_mean(noise_schedule):
    """Against E[x_0 | x_t] = int x_0 p(x_0) p(x_t | x_0) / int p(x_0) p(x_t | x_0) on a fine grid of x_0."""
    denoiser = mixture(noise_schedule)
    x_0 = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    density = sum(
        p * torch.exp(-0.5 * (x_0 - m).square() / v) / v.sqrt()
        for p, m, v in zip(denoiser.weights, denoiser.means[:, 0], denoiser.variances, strict=True)
    )
    x_t = states(5, 1)
    for share in (0.3, 0.7):
        t = torch.tensor(
            noise_schedule.t_min + share**3 * (noise_schedule.t_max - noise_schedule.t_min), dtype=torch.float64
        )
        likelihood = torch.exp(-0.5 * ((x_t - noise_schedule.alpha(t) * x_0) / noise_schedule.sigma(t)).square())
        posterior = likelihood * density
        expected = (posterior * x_0).sum(1, keepdim=True) / posterior.sum(1, keepdim=True)
        torch.testing.assert_close(denoiser(x_t, t), expected, rtol=1e-6, atol=1e-8)


def test_mixture_of_one_is_the_gaussian():
    noise_schedule = ContinuousVP()
    one = GaussianMixtureDenoiser(noise_schedule, torch.tensor([[[0.5, -1.0]]]), 0.3)
    same = GaussianDenoiser(noise_schedule, torch.tensor([[0.5, -1.0]]), 0.3)
    x_t, t = states(4, 1, 2), torch.tensor([0.9, 0.5, 0.3, 0.1])
    torch.testing.assert_close(one(x_t, t), same(x_t, t))


@pytest.mark.parametrize("noise_schedule", NOISES.values(), ids=NOISES)
def test_solution_solves_the_ode(noise_schedule):
    """d(x/alpha)/d(edm_sigma) = eps along the solution, which runs back and through intermediate times."""
    denoiser, x_t = gaussian(noise_schedule), states(4, 2, 3)
    t, middle, s = (
        torch.tensor(noise_schedule.t_min + f * (noise_schedule.t_max - noise_schedule.t_min), dtype=torch.float64)
        for f in (0.8, 0.6, 0.3)
    )
    x_s = denoiser.solution(x_t, t, s)
    torch.testing.assert_close(denoiser.solution(x_s, s, t), x_t)
    torch.testing.assert_close(denoiser.solution(denoiser.solution(x_t, t, middle), middle, s), x_s)

    def scaled(time):
        return denoiser.solution(x_t, t, time) / noise_schedule.alpha(time)

    def edm_sigma(time):
        return noise_schedule.sigma(time) / noise_schedule.alpha(time)

    slope = torch.autograd.functional.jacobian(scaled, s) / torch.autograd.functional.jacobian(edm_sigma, s)
    eps = to_epsilon(denoiser(x_s, s), x_s, noise_schedule.alpha(s), noise_schedule.sigma(s))
    torch.testing.assert_close(slope, eps)


def test_solution_with_a_time_per_sample():
    denoiser, x_t = gaussian(ContinuousVP()), states(2, 2, 3)
    t, s = torch.tensor([0.9, 0.7]), torch.tensor([0.2, 0.5])
    together = denoiser.solution(x_t, t, s)
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], denoiser.solution(x_t[i : i + 1], t[i], s[i]))


@pytest.mark.parametrize("make", [gaussian, mixture])
@pytest.mark.parametrize("kind", ["epsilon", "v", "velocity", "sample"])
def test_corrections_act_on_the_raw_prediction(make, kind):
    noise_schedule = ContinuousVP()
    denoiser = make(noise_schedule, prediction=kind)
    x_t, t, told = states(3, *denoiser.shape), torch.tensor(0.6), torch.tensor(0.5)
    torch.testing.assert_close(denoiser(x_t, t, model_time=t, output_scale=torch.ones(3)), denoiser(x_t, t))
    factor = torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64)
    raw = denoiser(x_t, t, model_time=told, output_scale=torch.tensor(0.0))
    torch.testing.assert_close(
        raw, to_x0(torch.zeros_like(x_t), x_t, noise_schedule.alpha(t), noise_schedule.sigma(t), kind)
    )
    plain, scaled = denoiser(x_t, t, model_time=told), denoiser(x_t, t, model_time=told, output_scale=factor)
    weight = factor.reshape(-1, *[1] * (x_t.ndim - 1))
    torch.testing.assert_close(scaled, raw + weight * (plain - raw))  # x0 is affine in the raw prediction


def test_epsilon_at_the_model_time():
    noise_schedule = ContinuousVP()
    denoiser, t, told = gaussian(noise_schedule), torch.tensor(0.6), torch.tensor(0.5)
    x_t = states(3, 2, 3)
    eps = to_epsilon(denoiser(x_t, told), x_t, noise_schedule.alpha(told), noise_schedule.sigma(told))
    expected = to_x0(eps, x_t, noise_schedule.alpha(t), noise_schedule.sigma(t), "epsilon")
    torch.testing.assert_close(denoiser(x_t, t, model_time=told), expected)


@pytest.mark.parametrize("make", [gaussian, mixture])
def test_counts_shape_decode_and_dtype(make):
    denoiser = make(ContinuousVP())
    assert isinstance(denoiser, Denoiser)
    x_t = states(3, *denoiser.shape).float()
    for _ in range(2):
        x0 = denoiser(x_t, torch.tensor(0.5))
    assert denoiser.evaluations == 2
    assert x0.dtype == torch.float32 and x0.shape == x_t.shape
    assert denoiser.decode(x_t) is x_t


@pytest.mark.parametrize("make", [gaussian, mixture])
def test_gradcheck_in_state_time_and_corrections(make):
    denoiser = make(ContinuousVP())
    inputs = (states(2, *denoiser.shape), torch.tensor([0.7, 0.3]), torch.tensor([0.6, 0.35]), torch.tensor([1.1, 0.9]))
    inputs = tuple(value.double().requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(lambda x, t, m, c: denoiser(x, t, model_time=m, output_scale=c), inputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: GaussianDenoiser(n, 0.0, 1.0), "broadcast"),
        (lambda n: GaussianDenoiser(n, torch.zeros(3), torch.ones(2)), "broadcast"),
        (lambda n: GaussianDenoiser(n, torch.zeros(3), 1.0, shape=(1,)), "broadcast"),
        (lambda n: GaussianDenoiser(n, torch.zeros(3), 0.0), "above 0"),
        (lambda n: GaussianDenoiser(n, torch.zeros(3), 1.0, prediction="noise"), "not known"),
        (lambda n: GaussianMixtureDenoiser(n, torch.zeros(3), 1.0), "expected"),
        (lambda n: GaussianMixtureDenoiser(n, torch.zeros(3, 2), torch.ones(2)), "variances"),
        (lambda n: GaussianMixtureDenoiser(n, torch.zeros(3, 2), 1.0, torch.tensor([1.0, -1.0, 1.0])), "weights"),
        (lambda n: GaussianDenoiser(n, torch.zeros(3), 1.0)(torch.zeros(2, 4), torch.tensor(0.5)), "shape"),
    ],
)
def test_refused(make, message):
    with pytest.raises(TsAdaptError, match=message):
        make(ContinuousVP())
