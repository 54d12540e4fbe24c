"""The distance to real images as a set: unbiased, with the right gradient, learned from beside the paired one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from small_predictors import build, split, start, train
from ts_adapt.config import Config
from ts_adapt.distances import features_of, l2
from ts_adapt.distances import make as make_distance
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation import quality
from ts_adapt.jobs import matched_images
from ts_adapt.jobs.session import Session
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.search.distribution import Matching, Real, forget, shares_of
from ts_adapt.search.static import search_static
from ts_adapt.search.static_options import StaticOptions

STEPS = 3


def drawn(count, seed, width=6, mean=0.0):
    return mean + torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(x, y):
    """MMD^2 pair by pair."""
    square = float(sum(f @ f for f in y)) / y.numel()

    def k(f, g):
        return (float(f @ g) / (len(f) * square) + 1) ** 3

    def among(z):
        return sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))

    return among(x) + among(y) - 2 * sum(k(f, g) for f in x for g in y) / (len(x) * len(y))


def test_the_shares_add_up_to_the_unbiased_estimate_pair_by_pair():
    x, y = drawn(7, 0), drawn(9, 1, mean=0.4)
    shares = shares_of(x, x, Real(y, l2))
    assert shares.shape == (7,)
    assert float(shares.mean()) == pytest.approx(by_loops(x, y), rel=1e-10)


def test_a_weight_means_the_same_whatever_the_size_of_the_features():
    x, y = drawn(7, 0), drawn(9, 1, mean=0.4)
    assert torch.allclose(shares_of(x, x, Real(y, l2)), shares_of(20 * x, 20 * x, Real(20 * y, l2)))


def test_their_spread_says_how_far_the_estimate_may_be_off():
    real, count = Real(drawn(4000, 1, width=3), l2), 60
    shares = torch.stack([shares_of(x, x, real) for x in drawn(400 * count, 0, width=3, mean=0.3).split(count)])
    true = float(shares.mean(1).std())
    assert float(shares.std(1).mean()) / count**0.5 == pytest.approx(true, rel=0.15)


def test_it_is_zero_in_the_mean_for_equal_laws_also_with_a_memory_and_not_for_others():
    means = {}
    for mean in (0.0, 0.5):
        found = []
        for seed in range(0, 1200, 3):
            x, y = drawn(20, seed, width=3, mean=mean), drawn(24, seed + 1, width=3)
            found.append(float(shares_of(x[:8], x, Real(y, l2)).mean()))
        values = torch.tensor(found)
        means[mean] = float(values.mean() / values.std() * len(values) ** 0.5)
    assert abs(means[0.0]) < 3 < 10 < means[0.5]


def test_the_gradient_is_that_of_the_estimate():
    x, y = drawn(6, 0).requires_grad_(), drawn(9, 1)
    ours = torch.autograd.grad(shares_of(x, x, Real(y, l2)).mean(), x)[0]

    def estimate(x):
        size = 6 * y.square().mean()
        k = (x @ x.T / size + 1).pow(3)
        return (k.sum() - k.diagonal().sum()) / 30 - 2 * (x @ y.T / size + 1).pow(3).mean()

    assert torch.allclose(ours, torch.autograd.grad(estimate(x), x)[0], rtol=1e-10)


def test_only_what_is_learned_from_is_remembered_until_it_is_forgotten(problem):
    x, y, real = drawn(6, 0).requires_grad_(), drawn(6, 1), Real(drawn(9, 2), l2)
    loss = Matching(l2, real, 0.5)
    objective = replace(problem[0], distance=loss)
    alone = loss(x.detach(), y)
    assert torch.allclose(alone, l2(x, y) + 0.5 * shares_of(x, x, real))
    assert torch.allclose(loss(x, y), alone)
    later = drawn(6, 3).requires_grad_()
    both = torch.cat([later, x])
    assert torch.allclose(loss(later, y), l2(later, y) + 0.5 * shares_of(later, both, real))
    assert torch.allclose(loss(x.detach(), y), alone)
    forget(objective)
    assert torch.allclose(loss(x, y), alone)


def test_an_image_that_is_not_finite_counts_for_no_other_and_a_lone_one_is_compared_with_none():
    x, real = drawn(5, 0), Real(drawn(9, 2), l2)
    broken = torch.cat([x, torch.full((1, 6), torch.nan, dtype=torch.float64)])
    assert torch.allclose(shares_of(broken, broken, real)[:5], shares_of(x, x, real))
    assert torch.equal(shares_of(x[:1], x[:1], real), torch.zeros(1, dtype=torch.float64))
    with pytest.raises(TsAdaptError, match="at least 2"):
        Real(x[:1], l2)


def test_what_is_validated_does_not_depend_on_how_the_samples_are_cut(problem):
    objective, batch = problem
    grid = start(objective, STEPS)["log_snr"]
    objective = replace(objective, distance=Matching(l2, Real(objective.denoiser.draw(50, 1), l2), 1.0))
    whole = objective(grid, batch).float()
    for size in (len(batch), 13, len(batch) - 1):
        assert torch.allclose(objective.measure(grid, batch, size), whole, rtol=1e-5)


def test_features_of_large_images_are_asked_of_a_network():
    parts = iter(drawn(2 * 5, 0).split(5))
    assert Real(parts, l2).features.shape == (10, 6)
    with pytest.raises(TsAdaptError, match="give a distance with a network"):
        Real(torch.zeros(2, 3, 64, 64), l2)


def test_features_are_those_of_the_network_of_the_distance():
    images = torch.rand(3, 1, 28, 28)
    zoo = make_distance("features")
    assert torch.equal(features_of(zoo)(images), zoo.network(images).pooled)
    assert torch.equal(features_of(l2)(images), images.flatten(1))


@torch.no_grad()
def mmd(objective, grid, batch, images):
    ends = objective.denoiser.decode(objective.student(grid, batch)).flatten(1).double()
    return float(shares_of(ends, ends, Real(images, l2)).mean())


def test_a_search_nears_the_data_where_the_teacher_is_far_from_them(narrow):
    objective, batch, images = narrow
    train, validation = split(batch)
    far, paired = {}, {}
    for weight in (0.0, 10.0):
        options = StaticOptions(
            method="adam", iterations=40, lr=0.06, batch_size=16, validate_every=5, corrections=["scale", "history"],
            distribution=weight,
        )  # fmt: skip
        given = Real(images, l2) if weight else None
        result = search_static(
            objective, train, validation, start(objective, STEPS), options, real=given, progress=False
        )
        far[weight] = mmd(objective, result.grid, batch, images)
        paired[weight] = float(objective.measure(result.grid, validation).mean())
        whole = paired[weight] + weight * mmd(objective, result.grid, validation, images)
        assert result.distance == pytest.approx(whole, rel=1e-3)
    assert far[10.0] < 0.5 * far[0.0] and paired[10.0] > paired[0.0]


def test_a_predictor_learns_it_too(narrow, tmp_path):
    objective, batch, images = narrow
    far = {}
    for weight in (0.0, 10.0):
        predictor = build(OneShot, objective.denoiser.noise_schedule, STEPS, corrections=["scale", "history"])
        options = TrainOptions(epochs=8, lr=0.03, batch_size=16, distribution=weight)
        train(predictor, narrow[:2], tmp_path / str(weight), options, real=Real(images, l2) if weight else None)
        far[weight] = mmd(objective, predictor.policy(), batch, images)
    assert far[10.0] < 0.5 * far[0.0]


def test_embedded_images_that_are_learned_from_do_not_judge(monkeypatch):
    images = torch.arange(10_000).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28).to(torch.float32)
    for module in (matched_images.zoo, quality):
        monkeypatch.setattr(module, "test_images", lambda: (images, None))
    for module in (matched_images, quality):
        monkeypatch.setattr(module, "to_model_range", lambda part: part)
    judge = quality.reference_of(lambda x: x[:, 0, 0, :1], "zoo", shape=(1, 28, 28)).features.flatten()
    session = Session(Config())
    session.config.distance = "l2"
    session.config.distribution.images = 9000
    learned_from = session.real_images.features[:, 0]
    assert len(learned_from) == 5000 and not set(learned_from.tolist()) & set(judge.tolist())
    assert session.real_images is session.real_images
