"""Distances: zero for equals, per sample, differentiable, ordered as eyes order, refusing what they cannot compare."""

from __future__ import annotations

from urllib.error import URLError

import lpips
import pytest
import torch
from torch import Tensor, nn

from ts_adapt import zoo
from ts_adapt.distances import FeatureDistance, make, towards
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Distance
from ts_adapt.zoo import FeatureNet, Features
from ts_adapt.zoo.data import to_model_range


@pytest.fixture(scope="module")
def images() -> Tensor:
    return to_model_range(zoo.test_images()[0][:8])


@pytest.fixture(scope="module")
def random_lpips() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    return network


@pytest.fixture(params=["l2", "l1", "features", "lpips"])
def distance(request: pytest.FixtureRequest, random_lpips: nn.Module) -> Distance:
    return make(request.param, network=random_lpips if request.param == "lpips" else None)


def test_per_sample_symmetric_and_zero_for_equals(distance: Distance, images: Tensor) -> None:
    other = images.flip(0)
    d = distance(images, other)
    assert d.shape == (8,) and (d > 0).all()
    torch.testing.assert_close(d, distance(other, images), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance(images, images), torch.zeros(8))
    one = torch.cat([distance(images[i : i + 1], other[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(d, one, rtol=1e-3, atol=1e-5)


def test_towards_one_end_is_the_same(distance: Distance, images: Tensor) -> None:
    towards_first = towards(distance, images)
    for other in (images.flip(0), images):
        torch.testing.assert_close(towards_first(other), distance(other, images))


def test_towards_one_end_looks_at_it_once(images: Tensor) -> None:
    seen: list[Tensor] = []
    network = zoo.load_features()
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    distance = towards(FeatureDistance(network), images)
    for _ in range(3):
        distance(images.flip(0))
    assert len(seen) == 4 and seen[0] is images


def test_differentiable_in_both(distance: Distance, images: Tensor) -> None:
    x, y = images.clone().requires_grad_(), (0.9 * images).requires_grad_()
    distance(x, y).sum().backward()
    for leaf in (x, y):
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        assert (leaf.grad.flatten(1).norm(dim=1) > 0).all()


def test_more_noise_is_farther(distance: Distance, images: Tensor) -> None:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    near, far = (distance((images + s * noise).clamp(-1, 1), images).mean() for s in (0.05, 0.3))
    assert near < far


def test_dtype_is_that_of_the_images(distance: Distance, images: Tensor) -> None:
    assert distance(images[:2].double(), images[2:4].double()).dtype == torch.float64


def test_shapes_that_differ_are_refused(distance: Distance, images: Tensor) -> None:
    with pytest.raises(TsAdaptError, match="same shape"):
        distance(images, images[:3])


def test_l2_and_l1_are_means_over_a_sample_of_any_shape() -> None:
    x, y = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
    torch.testing.assert_close(make("l2")(x, y), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(make("l1")(x, y), torch.tensor([1.0, 1.0]))


def test_feature_distance_written_out_and_gradcheck() -> None:
    torch.manual_seed(0)
    small = FeatureNet(channels=(3, 4), strides=(2, 2)).double().requires_grad_(False)
    distance = FeatureDistance(small)
    x, y = torch.randn(2, 2, 1, 28, 28, dtype=torch.float64).unbind(0)
    expected = []
    for b in range(2):
        layers = []
        for hx, hy in zip(small(x).maps, small(y).maps, strict=True):
            places = []
            for row in range(hx.shape[2]):
                for column in range(hx.shape[3]):
                    u, v = hx[b, :, row, column], hy[b, :, row, column]
                    u, v = (h / (h.square().sum() + 1e-6).sqrt() for h in (u, v))
                    places.append((u - v).square().sum())
            layers.append(torch.stack(places).mean())
        expected.append(torch.stack(layers).mean())
    torch.testing.assert_close(distance(x, y), torch.stack(expected))
    direction = torch.randn_like(x)
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: distance(x + s * direction, y), (step,))


def test_feature_distance_ignores_the_strength_of_features() -> None:
    class Channels(nn.Module):
        def forward(self, x: Tensor) -> Features:
            return Features((x,), x.mean((2, 3)))

    distance = make("features", network=Channels())
    x = torch.rand(2, 3, 4, 4) + 0.5
    torch.testing.assert_close(distance(x, 3 * x), torch.zeros(2), atol=1e-6, rtol=0)
    assert (distance(x, x.flip(1)) > 1e-3).all()


def test_the_zoo_network_refuses_other_images() -> None:
    with pytest.raises(TsAdaptError, match=r"takes images \(B, 1, 28, 28\); got \(2, 3, 32, 32\): give a network"):
        make("features")(torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32))


def test_lpips_sees_grey_as_three_equal_channels(random_lpips: nn.Module) -> None:
    distance = make("lpips", network=random_lpips)
    x, y = torch.rand(2, 2, 1, 32, 32).unbind(0)
    colour = [image.repeat(1, 3, 1, 1) for image in (x, y)]
    torch.testing.assert_close(distance(x, y), random_lpips(*colour).flatten())
    with pytest.raises(TsAdaptError, match="decode latents first"):
        distance(torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32))


def test_lpips_without_a_network_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**options: object) -> None:
        assert options["net"] == "vgg"
        raise URLError("name resolution failed")

    monkeypatch.setattr(lpips, "LPIPS", unreachable)
    with pytest.raises(TsAdaptError, match=r"name resolution failed.*--distance features or --distance l2"):
        make("lpips")


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(TsAdaptError, match=r"unknown distance 'lpip'; did you mean 'lpips'\? known: l2, l1"):
        make("lpip")
