"""Predictors: untrained they are the static grid; trained they use the sample; on disk they are data, not code."""

from __future__ import annotations

import json

import pytest
import torch

from ts_adapt.files import write_tensors
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive, positions, shares, times_at
from ts_adapt.predictors.store import load_predictor, save_predictor
from ts_adapt.predictors.training import Labelled, TrainOptions, predicted_times, train_predictor
from ts_adapt.search.per_sample import PerSampleOptions, search_per_sample

KINDS = [OneShot, Recursive]
STEPS = 4


def build(kind, noise, **options):
    torch.manual_seed(0)
    times = fixed.make("karras", noise, STEPS)
    return kind(noise, times, (1, 4, 4), width=8, hidden=32, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_predictor_is_the_static_grid(kind, problem):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise)
    times = predicted_times(predictor, objective, batch)
    assert torch.allclose(times, predictor.static_times.expand(len(batch), -1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_grids_are_valid_for_any_weights(kind, problem):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.normal_(0, 2.0)
    times = predicted_times(predictor, objective, batch)
    assert bool((times[:, 1:] < times[:, :-1]).all())
    assert bool((times[:, 0] == objective.denoiser.noise.t_max).all())
    assert bool((times[:, -1] == objective.denoiser.noise.t_min).all())
    assert float(times[:, 1].std()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_samples_equals_single_samples(kind, problem):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise)
    with torch.no_grad():
        for parameter in predictor.encoder.head.parameters():
            parameter.normal_(0, 0.3)
    together = predicted_times(predictor, objective, batch.rows(slice(0, 5)))
    alone = torch.cat([predicted_times(predictor, objective, batch.rows(slice(i, i + 1))) for i in range(5)])
    assert torch.allclose(together, alone, rtol=1e-4)


def test_positions_and_shares_invert(mixture):
    times = fixed.make("karras", mixture.noise, 6)
    u = positions(times, mixture.noise)
    assert torch.allclose(times_at(u, mixture.noise), times, rtol=1e-6, atol=1e-9)
    r, rebuilt = shares(times, mixture.noise), [torch.zeros(())]
    for share in r:
        rebuilt.append(rebuilt[-1] + share * (1 - rebuilt[-1]))
    assert torch.allclose(torch.stack(rebuilt).double(), u[:-1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_reach_the_grid(kind, problem):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise, classes=3)
    with torch.no_grad():
        predictor.encoder.last.weight.normal_(0, 0.5)
    labels = torch.arange(len(batch)) % 3
    one = predictor.policy().init(batch.x_T, {"class_labels": labels})
    first = one[0]
    two = predictor.policy().next(batch.x_T, batch.target, first, one[1])[0].t
    none_state = predictor.policy().init(batch.x_T, {})
    none = predictor.policy().next(batch.x_T, batch.target, none_state[0], none_state[1])[0].t
    assert not torch.allclose(two, none)


@pytest.fixture(scope="module")
def labelled(problem):
    objective, batch = problem
    static = TimeGrid(fixed.make("karras", objective.denoiser.noise, STEPS))
    labels = search_per_sample(objective, batch, static, PerSampleOptions(iterations=15, random_starts=0))
    return Labelled(batch, labels.times, labels.distance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["labels", "end_to_end"])
def test_training_lowers_the_distance_on_unseen_samples_or_keeps_the_static_grid(
    kind, loss, problem, labelled, tmp_path
):
    objective, _ = problem
    predictor = build(kind, objective.denoiser.noise)
    options = TrainOptions(loss=loss, epochs=10, end_to_end_epochs=25, end_to_end_lr=3e-3, batch_size=8)
    train, validation = labelled.rows(slice(0, 36)), labelled.rows(slice(36, None))
    result = train_predictor(predictor, objective, train, validation, options, tmp_path, progress=False)
    assert result.distance <= result.static_distance
    if loss == "end_to_end":
        assert result.distance < result.static_distance
    measured = float(objective.measure(predictor.policy(), validation.batch).mean())
    assert measured == pytest.approx(result.distance, rel=1e-4)
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("kind", KINDS)
def test_regression_can_fit_its_labels(kind, problem, labelled, tmp_path):
    """With enough epochs the regression loss falls far below 1, the loss of the best constant grid."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    objective, _ = problem
    predictor = build(kind, objective.denoiser.noise)
    options = TrainOptions(
        loss="labels", epochs=80, lr=1e-2, weight_decay=0.0, batch_size=8, patience=1000, validate_every=80
    )
    train_predictor(predictor, objective, labelled, labelled, options, tmp_path, progress=False)
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
    events.Reload()
    assert events.Scalars("train/labels")[-1].value < 0.3


def test_nothing_to_predict_in_one_step(problem, labelled, tmp_path):
    objective, _ = problem
    noise = objective.denoiser.noise
    predictor = OneShot(noise, fixed.make("linear", noise, 1), (1, 4, 4))
    with pytest.raises(TsAdaptError, match="nfe 2 or more"):
        train_predictor(predictor, objective, labelled, labelled, TrainOptions(), tmp_path)


def test_unknown_loss_is_refused(problem, labelled, tmp_path):
    objective, _ = problem
    with pytest.raises(TsAdaptError, match="labels, end_to_end, both"):
        train_predictor(
            build(OneShot, objective.denoiser.noise), objective, labelled, labelled, TrainOptions(loss="x"), tmp_path
        )


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_on_disk(kind, problem, tmp_path):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise)
    with torch.no_grad():
        predictor.encoder.last.weight.normal_(0, 0.2)
    save_predictor(tmp_path, predictor, {"solver": "unipc-3"})
    loaded, config = load_predictor(tmp_path, objective.denoiser.noise)
    assert config["solver"] == "unipc-3"
    assert torch.equal(predicted_times(loaded, objective, batch), predicted_times(predictor, objective, batch))


def test_a_bad_folder_is_refused_in_one_sentence(problem, tmp_path):
    objective, _ = problem
    noise = objective.denoiser.noise
    with pytest.raises(TsAdaptError, match="no predictor"):
        load_predictor(tmp_path, noise)
    predictor = build(OneShot, noise)
    save_predictor(tmp_path, predictor, {})
    tensors = {k: v.clone() for k, v in predictor.state_dict().items()}
    tensors["encoder.head.1.weight"][0, 0] = torch.nan
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(TsAdaptError, match="NaN"):
        load_predictor(tmp_path, noise)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "os.system"}))
    with pytest.raises(TsAdaptError, match="known: one-shot, recursive"):
        load_predictor(tmp_path, noise)


def test_regression_has_finite_gradients_where_log_snr_is_infinite():
    from ts_adapt.denoisers.analytic import GaussianMixtureDenoiser
    from ts_adapt.distances import l2
    from ts_adapt.noise import RectifiedFlow
    from ts_adapt.predictors.training import _regression
    from ts_adapt.sampling import initial_noise
    from ts_adapt.search.objective import Batch, Objective
    from ts_adapt.solvers import DDIM

    noise = RectifiedFlow()
    denoiser = GaussianMixtureDenoiser(noise, torch.zeros(2, 1, 4, 4), 0.1, prediction="velocity")
    x_T = initial_noise(0, range(6), (1, 4, 4))
    times = fixed.make("log_snr", noise, STEPS).expand(6, -1)
    data = Labelled(Batch(torch.arange(6), x_T, x_T, {}), times, torch.ones(6))
    for kind in KINDS:
        predictor = build(kind, noise)
        _regression(predictor, Objective(denoiser, DDIM(noise), l2), data)(predictor, torch.arange(6)).backward()
        assert all(torch.isfinite(p.grad).all() for p in predictor.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_solvers_can_be_trained_for(kind, problem, labelled, tmp_path):
    from ts_adapt.search.objective import Objective
    from ts_adapt.solvers import DDIM

    objective, _ = problem
    noisy = Objective(objective.denoiser, DDIM(objective.denoiser.noise, eta=1.0), objective.distance)
    options = TrainOptions(loss="labels", epochs=1)
    result = train_predictor(
        build(kind, noisy.denoiser.noise), noisy, labelled, labelled, options, tmp_path, progress=False
    )
    assert result.epochs == 1
