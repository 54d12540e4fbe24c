"""The zoo's data and feature network: what the files hold, and that they belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import train_classifier
from ts_adapt import zoo
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.metrics import FeatureStatistics, frechet
from ts_adapt.zoo import features
from ts_adapt.zoo.data import to_model_range, to_uint8
from ts_adapt.zoo.features import FOLDER, FeatureNet, load_features, pooled_features


@pytest.fixture(scope="module")
def network() -> FeatureNet:
    return load_features()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return to_model_range(zoo.test_images()[0][:2000])


def test_test_images_are_ten_thousand_of_ten_classes() -> None:
    images, labels = zoo.test_images()
    assert images.shape == (10_000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [1000] * 10


def test_images_round_trip_through_the_models_range() -> None:
    images = zoo.test_images()[0][:100]
    assert torch.equal(to_uint8(to_model_range(images)), images)
    assert (to_model_range(images).min(), to_model_range(images).max()) == (-1, 1)


@torch.no_grad()
def test_the_network_knows_clothes(network: FeatureNet, images: torch.Tensor) -> None:
    labels = zoo.test_images()[1][: len(images)]
    scores = torch.cat([network.classify(part) for part in images.split(500)])
    assert (scores.argmax(1) == labels).double().mean() >= 0.91


def test_features_have_the_promised_shapes_and_gradients(network: FeatureNet, images: torch.Tensor) -> None:
    x = images[:3].clone().requires_grad_()
    found = network(x)
    assert [tuple(m.shape[1:]) for m in found.maps] == [
        (16, 28, 28), (32, 14, 14), (48, 14, 14), (96, 7, 7), (128, 4, 4)
    ]  # fmt: skip
    assert found.pooled.shape == (3, 128)
    torch.testing.assert_close(found.pooled, found.maps[-1].mean((2, 3)))
    found.pooled.sum().backward()
    assert x.grad is not None and x.grad.flatten(1).norm(dim=1).min() > 0
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_files_stay_small_and_carry_their_licence() -> None:
    assert (FOLDER / features.WEIGHTS).stat().st_size < 1.2e6
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10e6
    assert "Zalando" in (FOLDER / "LICENSE").read_text()


def test_reference_statistics_are_those_of_real_clothes(network: FeatureNet, images: torch.Tensor) -> None:
    mean, covariance = zoo.reference_statistics()
    assert mean.shape == (128,) and covariance.shape == (128, 128)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(covariance, covariance.T, atol=1e-12)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9
    data = FeatureStatistics.from_moments(mean, covariance, features.TRAINING_IMAGES)
    real, noise = (
        frechet(FeatureStatistics.of(pooled_features(network, x)), data)
        for x in (images, torch.rand(2000, 1, 28, 28) * 2 - 1)
    )
    assert real < 0.05
    assert noise > 5


def test_other_images_and_missing_files_are_refused(network: FeatureNet, tmp_path: Path) -> None:
    with pytest.raises(TsAdaptError, match=r"takes images \(B, 1, 28, 28\); got \(2, 3, 32, 32\)"):
        network(torch.zeros(2, 3, 32, 32))
    with pytest.raises(TsAdaptError, match=r"none\.safetensors is missing"):
        load_features(tmp_path / "none.safetensors")


@torch.no_grad()
def test_folding_batch_normalisation_changes_nothing() -> None:
    torch.manual_seed(0)
    net = train_classifier.Normalised()
    for _ in range(3):
        net(torch.randn(16, 1, 28, 28))
    for norm in net.norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    net.eval()
    x = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(net.folded().classify(x), net(x), rtol=1e-4, atol=1e-4)


def test_shifting_moves_each_image_by_itself_and_fills_with_background() -> None:
    torch.manual_seed(0)
    dots = torch.full((64, 1, 9, 9), -1.0)
    dots[:, :, 4, 4] = 1.0
    moved = train_classifier.shifted(dots, 2)
    assert moved.shape == dots.shape
    assert (moved.flatten(1) == 1).sum(1).eq(1).all()
    places = {tuple(place) for place in (moved[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert len(places) > 10
    assert all(abs(row - 4) <= 2 and abs(column - 4) <= 2 for row, column in places)
