"""The loss of a discriminator: its formula, where it pushes, what it leads to, and that a killed training goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from interrupting import interrupted
from small_predictors import build, logged, split, start, train
from ts_adapt.config import Config
from ts_adapt.distances import l2
from ts_adapt.errors import TsAdaptError
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.search.adversarial import GAMMA, LARGEST, TURNS, Adversary, Discriminator, losses_of, opposed, seen
from ts_adapt.search.captions import Captions, asking
from ts_adapt.search.distribution import Real, forget, matching
from ts_adapt.search.static import search_static
from ts_adapt.search.static_options import StaticOptions
from ts_adapt.storage.files import read_tensors

FEW = 3


def drawn(count, seed, shape=(1, 8, 8), mean=0.0):
    return mean + torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_of_a_linear_one_is_the_formula():
    w, x, y = drawn(1, 0)[0], drawn(5, 1), drawn(5, 2)

    def score(images):
        return (images * w).flatten(1).sum(1) + 3.0

    found = losses_of(score, x, y)
    wanted = F.softplus(((x - y) * w).flatten(1).sum(1)) + 2 * GAMMA * 64 / 2 * w.square().sum()
    assert torch.allclose(found, wanted, rtol=1e-5)


def test_its_penalties_are_of_both_sides_and_lead_back_into_the_network():
    """D(x) = a mean(x^2) / 2: its slope at an image is a x / n."""
    a = torch.tensor(1.5, requires_grad=True)
    x, y = drawn(4, 1), drawn(4, 2, mean=1.0)

    def score(images):
        return a / 2 * images.square().flatten(1).mean(1)

    def size(z):
        return z.square().flatten(1).mean(1)

    (slope,) = torch.autograd.grad(losses_of(score, x, y).sum(), a)
    apart = (size(x) - size(y)) / 2
    wanted = torch.sigmoid(1.5 * apart) * apart + GAMMA * 1.5 * (size(x) + size(y))
    assert float(slope) == pytest.approx(float(wanted.sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 16, 16), (4, 64, 48), (2, 3 * LARGEST + 5, 40)])
def test_any_picture_is_seen_and_scored_alone(shape):
    torch.manual_seed(0)
    network, images = Discriminator(shape), torch.rand(2, *shape)
    torch.nn.init.normal_(network.score.weight)
    assert max(seen(images).shape[2:]) <= LARGEST
    assert torch.allclose(network(seen(images))[1:], network(seen(images[1:])), rtol=1e-4, atol=1e-5)


def test_what_is_no_picture_is_refused():
    with pytest.raises(TsAdaptError, match="set adversarial to 0"):
        Discriminator((3, 5, 16, 16))


def taught(steps, *, shift=1.0):
    """A discriminator that has met images that are off by `shift`, and how it scored real ones and these."""
    adversary = Adversary(drawn(64, 1), 0)
    for turn in range(steps):
        index = torch.arange(16) + 16 * turn
        adversary.loss(index, drawn(16, 100 + turn, mean=shift).requires_grad_())
        adversary.learn()
    with torch.no_grad():
        return adversary, adversary.network(drawn(64, 2)), adversary.network(drawn(64, 3, mean=shift))


def test_it_learns_to_tell_and_pushes_images_towards_the_real_ones():
    untaught, *before = taught(0)
    adversary, real, student = taught(15)
    assert adversary.level < 0.5 * untaught.level
    assert not any(bool(scores.any()) for scores in before) and float(real.mean() - student.mean()) > 1.0
    images = drawn(8, 4, mean=1.0).requires_grad_()
    loss = adversary.loss(torch.arange(8), images)
    (slope,) = torch.autograd.grad(loss.sum(), images)
    assert float(slope.mean()) > 0
    with torch.no_grad():
        nearer = (images - 0.5).requires_grad_()
    assert bool(adversary.loss(torch.arange(8), nearer).mean() < loss.mean())
    assert not any(parameter.requires_grad for parameter in adversary.network.parameters())


def test_pairs_depend_on_the_sample_and_the_step_not_on_who_holds_it():
    images, index = drawn(6, 5).requires_grad_(), torch.tensor([3, 70, 12, 40, 8, 1])
    adversary = taught(2)[0]
    whole = adversary.loss(index, images)
    parts = [adversary.loss(index[rows], images[rows]) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-4)
    adversary.learn()
    assert adversary.optimizer.state_dict()["state"][0]["step"] == 3 * TURNS
    assert not torch.allclose(adversary.loss(index, images), whole, rtol=1e-4)


def test_an_image_that_is_not_finite_teaches_nothing_and_nothing_is_asked_without_a_gradient():
    ends = []
    for broken in (False, True):
        adversary = Adversary(drawn(64, 1), 0)
        images = drawn(4, 2)
        images, index = (torch.cat([images, images[:1] / 0]), torch.arange(5)) if broken else (images, torch.arange(4))
        adversary.loss(index, images.requires_grad_())
        adversary.learn()
        ends.append(adversary.network.state_dict())
    assert all(torch.equal(ends[1][key], value) for key, value in ends[0].items())
    assert torch.equal(adversary.loss(torch.arange(4), drawn(4, 2)), torch.zeros(4))
    adversary.learn()
    assert all(torch.equal(ends[1][key], value) for key, value in adversary.network.state_dict().items())


class Brightness:
    """Sees the mean of a picture, and asks nothing of a prompt."""

    def pictures(self, images):
        return images.flatten(1).mean(1, keepdim=True)

    def captions(self, prompts):
        return torch.ones(len(prompts), 1)


def test_it_stands_beside_the_other_losses_where_a_gradient_is_asked_for(problem):
    objective, batch = problem
    grid, images = start(objective, FEW)["log_snr"], objective.denoiser.draw(50, 1)
    both = asking(matching(objective, Real(images, l2), 0.3), Captions(Brightness(), ["a"]), 0.7)
    adversary = Adversary(seen(images), 0)
    for _ in range(3):
        adversary.loss(batch.index, batch.x_T.clone().requires_grad_())
        adversary.learn()
    three = opposed(both, adversary, 0.5)
    assert torch.equal(three.measure(grid, batch), both.measure(grid, batch))
    x_T = batch.x_T.clone().requires_grad_()
    ends = objective.denoiser.decode(objective.student(grid, batch, x_T))
    wanted = both(grid, batch, x_T) + 0.5 * adversary.loss(batch.index, ends)
    forget(both)
    assert torch.allclose(three(grid, batch, x_T), wanted, rtol=1e-4)


def mean_square(objective, schedule, batch):
    with torch.no_grad():
        return float(objective.denoiser.decode(objective.student(schedule, batch)).square().mean())


def test_a_search_nears_the_data_where_the_teacher_is_far_from_them_by_as_many_evaluations(narrow):
    objective, batch, images = narrow
    train, validation = split(batch)
    real, sizes, calls = float(images.square().mean()), {}, {}
    for weight in (0.0, 2.0):
        options = StaticOptions(
            method="adam", iterations=40, lr=0.05, batch_size=16, validate_every=8, corrections=["scale", "history"],
            adversarial=weight,
        )  # fmt: skip
        given, before = images if weight else None, objective.denoiser.evaluations
        result = search_static(
            objective, train, validation, start(objective, FEW), options, images=given, progress=False
        )
        calls[weight] = objective.denoiser.evaluations - before
        sizes[weight] = abs(mean_square(objective, result.grid, batch) - real)
        assert result.distance == pytest.approx(float(objective.measure(result.grid, validation).mean()), rel=1e-5)
        better = [value for _, value in result.curve if value < result.curve[0][1]]
        assert result.distance == (better[-1] if weight else min(better))
    assert sizes[2.0] < 0.8 * sizes[0.0] and calls[2.0] == calls[0.0] > 0


@pytest.mark.parametrize(("kind", "corrections"), [(OneShot, ["scale", "history", "start"]), (Recursive, ["residual"])])
def test_a_predictor_learns_it_too(kind, corrections, narrow, tmp_path):
    objective, batch, images = narrow
    real, sizes = float(images.square().mean()), {}
    for weight in (0.0, 2.0):
        predictor = build(kind, objective.denoiser.noise_schedule, FEW, corrections=corrections)
        options = TrainOptions(epochs=10, lr=0.02, batch_size=16, adversarial=weight)
        result = train(predictor, narrow[:2], tmp_path / str(weight), options, images=images if weight else None)
        sizes[weight] = abs(mean_square(objective, predictor.policy(), batch) - real)
        assert result.gain > 0 and ("train/discriminator" in logged(tmp_path / str(weight))) == (weight > 0)
    assert sizes[2.0] < 0.8 * sizes[0.0]


@pytest.mark.parametrize(("kind", "change"), [(OneShot, "start"), (Recursive, "residual")])
def test_a_killed_training_goes_on_with_its_discriminator(kind, change, narrow, tmp_path):
    objective, batch, images = narrow
    options = TrainOptions(epochs=3, batch_size=12, lr=0.01, adversarial=2.0)

    def run(folder, objective):
        predictor = build(kind, objective.denoiser.noise_schedule, corrections=["shift", change])
        checkpoint = tmp_path / folder / "kept"
        result = train(predictor, (objective, batch), tmp_path / folder, options, images=images, checkpoint=checkpoint)
        return result, predictor.state_dict(), read_tensors(checkpoint)

    whole, weights, kept = run("whole", objective)
    with pytest.raises(KeyboardInterrupt):
        run("killed", replace(objective, distance=interrupted(objective.distance, 8)))
    half = read_tensors(tmp_path / "killed/kept")
    learned = [key for key in kept if key.startswith("discriminator/")]
    assert learned and not all(torch.equal(half[key], kept[key]) for key in learned)
    resumed, again, now = run("killed", objective)
    assert resumed == whole and now.keys() == kept.keys()
    assert all(torch.equal(again[key], value) for key, value in weights.items())
    assert all(torch.equal(now[key], value) for key, value in kept.items())


def test_without_a_weight_it_is_no_part_of_what_a_search_or_a_training_is(narrow, tmp_path):
    objective, _, images = narrow
    config = Config()
    config.static.adversarial = 0.5
    given = {"weight": 0.5, "data": None, "images": 5000}
    made = config.made_with("static")
    assert made["adversarial"] == given and "adversarial" not in made["static"]
    assert config.made_with("one-shot")["adversarial"] is None
    state, ends = torch.get_rng_state(), []
    for given in (None, images):
        predictor = build(OneShot, objective.denoiser.noise_schedule)
        path = tmp_path / str(len(ends))
        options = TrainOptions(epochs=2, batch_size=12)
        train(predictor, narrow[:2], path, options, images=given, checkpoint=path / "kept")
        ends.append(read_tensors(path / "kept"))
    assert ends[0].keys() == ends[1].keys() and not any(key.startswith("discriminator") for key in ends[0])
    assert all(torch.equal(ends[1][key], value) for key, value in ends[0].items())
    torch.set_rng_state(state)
    Adversary(images, 3)
    assert torch.equal(torch.get_rng_state(), state)
