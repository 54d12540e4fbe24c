"""from_edm against the preconditioning written out around a raw network F."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ts_adapt.denoisers import from_edm
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Denoiser

DATA = 0.5
X = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def coefficients(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sigma = sigma.double().reshape(-1, 1, 1, 1)
    total = sigma**2 + DATA**2
    return DATA**2 / total, sigma * DATA / total.sqrt(), 1 / total.sqrt()


def raw(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
    shift = 0 if class_labels is None else class_labels[:, :1, None, None]
    return torch.tanh(x) * torch.cos(0.25 * sigma.double().reshape(-1, 1, 1, 1).log()) + x.square() + shift


def D(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
    assert sigma.shape == (len(x),)
    skip, out, scale_in = coefficients(sigma)
    return skip * x + out * raw(scale_in * x, sigma, class_labels)


def test_x0_is_D_at_its_own_sigma_with_labels_and_counted() -> None:
    denoiser = from_edm(D, (2, 4, 4))
    sigma, labels = torch.tensor([0.01, 1.0, 70.0]), torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(denoiser(X, sigma, class_labels=labels), D(X, sigma, labels))
    torch.testing.assert_close(denoiser(X, torch.tensor(2.0)), D(X, torch.full((3,), 2.0)))
    assert denoiser.evaluations == 2
    assert isinstance(denoiser, Denoiser)
    assert (denoiser.shape, denoiser.noise_schedule.t_min, denoiser.noise_schedule.t_max) == ((2, 4, 4), 0.002, 80.0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_output_scale_multiplies_F_and_model_time_is_told_to_F_alone(scaled: bool, shifted: bool) -> None:
    sigma = torch.tensor([0.125, 1.0, 32.0])
    told = sigma * torch.tensor([1.5, 0.75, 1.25]) if shifted else sigma
    gain = torch.tensor([0.8, 1.1, 1.3]) if scaled else torch.ones(3)
    skip, out, scale_in = coefficients(sigma)
    expected = skip * X + out * gain.double().reshape(-1, 1, 1, 1) * raw(scale_in * X, told)
    got = from_edm(D, (2, 4, 4))(X, sigma, model_time=told if shifted else None, output_scale=gain if scaled else None)
    torch.testing.assert_close(got, expected)


def test_differentiable_in_time_scale_and_state() -> None:
    denoiser = from_edm(lambda x, sigma: D(x, sigma), (2, 4, 4))
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.5, 1.0, 2.0], [0.9, 1.0, 1.2])]
    denoiser(X, leaves[0], model_time=1.1 * leaves[0], output_scale=leaves[1]).square().mean().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.ne(0).all() for leaf in leaves)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TsAdaptError, match="0 < sigma_min < sigma_max"):
        from_edm(D, (2, 4, 4), sigma_min=0.0)
    with pytest.raises(TsAdaptError, match="2 times for a batch of 3"):
        from_edm(D, (2, 4, 4))(X, torch.tensor([1.0, 2.0]))
    with pytest.raises(TsAdaptError, match=r"\(3, 2, 4, 4\) by \(3, 1, 4, 4\)"):
        from_edm(lambda x, sigma: x.mean(1, keepdim=True), (2, 4, 4))(X, torch.tensor(1.0))


def test_the_size_is_read_off_a_network_that_says_it() -> None:
    class Network(torch.nn.Module):
        img_channels, img_resolution, sigma_data = 3, 16, 1.0

        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return x

    denoiser = from_edm(Network())
    assert (denoiser.shape, denoiser.sigma_data) == ((3, 16, 16), 1.0)
    assert from_edm(Network(), (1, 8, 8), sigma_data=0.5).sigma_data == 0.5
    with pytest.raises(TsAdaptError, match=r"give shape=\(C, H, W\)"):
        from_edm(lambda x, sigma: x)


def test_its_network_is_told_sigma_beside_each_sample() -> None:
    denoiser = from_edm(D, (2, 4, 4))
    assert torch.equal(denoiser.timestep(torch.tensor(2.0).double(), X), torch.full((3,), 2.0))
    assert torch.equal(denoiser.timestep(torch.tensor([0.5, 1.0, 2.0]).double(), X), torch.tensor([0.5, 1.0, 2.0]))
