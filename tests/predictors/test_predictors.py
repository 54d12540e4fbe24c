"""Predictors: untrained they are the static grid; trained they use the sample; on disk they are data, not code."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ts_adapt.files import write_tensors
from ts_adapt.grids import fixed
from ts_adapt.grids.space import CORRECTIONS
from ts_adapt.interfaces import Node, TimeGrid, TsAdaptError
from ts_adapt.predictors.diagnosis import predicted
from ts_adapt.predictors.encoder import Encoder, shorten_gradient
from ts_adapt.predictors.losses import Labelled, regression
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.recursive import Recursive, positions, shares, times_at
from ts_adapt.predictors.store import load_predictor, save_predictor
from ts_adapt.predictors.training import train_predictor
from ts_adapt.search.per_sample import PerSampleOptions, search_per_sample

KINDS = [OneShot, Recursive]
STEPS = 4


def build(kind, noise, steps=STEPS, **options):
    torch.manual_seed(0)
    times = fixed.make("karras", noise, steps)
    return kind(noise, times, (1, 4, 4), **{"width": 8, "hidden": 32, "order": 3, **options})


@pytest.mark.parametrize("corrections", [(), CORRECTIONS], ids=["times", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_untrained_predictor_is_the_static_grid(kind, corrections, problem):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise, corrections=corrections)
    times = predicted(predictor, objective, batch).times
    assert torch.allclose(times, predictor.static_times.expand(len(batch), -1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        objective.student(predictor.policy(), batch),
        objective.student(predictor.static_times, batch),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("corrections", [(), CORRECTIONS], ids=["times", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_predicted_grids_are_valid_for_any_weights(kind, corrections, problem):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise, corrections=corrections)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.normal_(0, 1.0)
    times = predicted(predictor, objective, batch).times
    assert bool((times[:, 1:] < times[:, :-1]).all())
    assert bool((times[:, 0] == objective.denoiser.noise.t_max).all())
    assert bool((times[:, -1] == objective.denoiser.noise.t_min).all())
    assert float(times[:, 1].std()) > 0


def test_times_that_do_not_fall_are_named(problem, monkeypatch):
    """Shares of nearly all that is left come to the end, in the precision of the times, before the last step."""
    objective, batch = problem
    predictor = build(Recursive, objective.denoiser.noise, steps=12)
    monkeypatch.setattr(Recursive, "share", lambda self, numbers, steps, step: torch.full_like(numbers[:, 0], 1 - 1e-4))
    with pytest.raises(TsAdaptError, match="time does not fall"):
        objective.student(predictor.policy(), batch)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_samples_equals_single_samples(kind, problem):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise, corrections=CORRECTIONS)
    with torch.no_grad():
        predictor.encoder.weight.normal_(0, 0.3)
    five = batch.rows(slice(0, 5))
    together = objective.student(predictor.policy(), five)
    alone = torch.cat([objective.student(predictor.policy(), five.rows(slice(i, i + 1))) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_correction_moves_the_samples_and_alone(kind, correction, problem):
    """Numbers behind the time's change what they are for, and nothing else."""
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise, corrections=[correction])
    behind = slice(STEPS if kind is OneShot else 1, None)
    with torch.no_grad():
        predictor.encoder.bias[:, behind] = 0.02
    nodes: list[Node] = []
    node, state = predictor.policy().init(batch.x_T, {})
    while node.index < node.steps:
        node, state = predictor.policy().next(batch.x_T, batch.target, node, state)
        nodes.append(node)
    inner, last = nodes[:-1], nodes[-1]
    has = {
        "shift": all(node.model_time is not None and not torch.equal(node.model_time, node.t) for node in inner),
        "scale": all(node.output_scale is not None and bool((node.output_scale > 1).all()) for node in inner),
        "coefficients": all(node.coefficients is not None and bool((node.coefficients > 0).all()) for node in nodes),
    }
    assert has == {name: name == correction for name in CORRECTIONS}
    assert (last.coefficients is None) == (correction != "coefficients")
    torch.testing.assert_close(predicted(predictor, objective, batch).times[0], predictor.static_times)
    assert not torch.allclose(
        objective.student(predictor.policy(), batch), objective.student(predictor.static_times, batch), atol=1e-5
    )


def test_inputs_are_seen_by_their_own_mean_and_deviation():
    """A picture that hardly differs between samples is seen as well as one that does; constant pixels are harmless."""
    torch.manual_seed(0)
    encoder = Encoder(1, 2, size=(4, 4), width=8, hidden=16)
    encoder.weight.data.normal_()
    pictures = torch.randn(200, 1, 4, 4)
    encoder.standardise(0, pictures)
    plain = encoder(pictures)
    encoder.standardise(0, 7 + 1e-3 * pictures)
    torch.testing.assert_close(encoder(7 + 1e-3 * pictures), plain, rtol=1e-2, atol=1e-2)
    encoder.standardise(0, torch.ones(20, 1, 4, 4))
    assert torch.isfinite(encoder(pictures)).all()


def test_no_row_has_more_than_its_share_of_the_gradient():
    numbers = torch.zeros(3, 2, requires_grad=True)
    pulled = torch.tensor([[3.0, 4.0], [0.3, 0.4], [torch.nan, 1.0]])
    (shorten_gradient(numbers * 1.0) * pulled).sum().backward()
    torch.testing.assert_close(numbers.grad, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 1.0]]))


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
        predictor.encoder.weight.normal_(0, 0.5)
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
    return Labelled(batch, labels.grid, labels.distance)


@pytest.mark.parametrize("corrections", [(), CORRECTIONS], ids=["times", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_through_the_solver_lowers_the_distance_on_unseen_samples(kind, corrections, problem, tmp_path):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise, corrections=corrections)
    options = TrainOptions(epochs=20, lr=4e-3, batch_size=8)
    train, validation = batch.rows(slice(0, 36)), batch.rows(slice(36, None))
    result = train_predictor(predictor, objective, train, validation, options, tmp_path, progress=False)
    assert result.learned[STEPS] < result.static[STEPS] and result.gain > 0
    measured = float(objective.measure(predictor.policy(), validation).mean())
    assert measured == pytest.approx(result.learned[STEPS], rel=1e-4)
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_help_for_sure_is_not_kept(kind, problem, labelled, tmp_path):
    """Regression on a few labels may hurt; then the predictor stays the static grid."""
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise)
    options = TrainOptions(loss="labels", label_epochs=10, batch_size=8)
    validation = batch.rows(slice(36, None))
    result = train_predictor(
        predictor,
        objective,
        batch,
        validation,
        options,
        tmp_path,
        labels={STEPS: labelled.rows(slice(0, 4))},
        progress=False,
    )
    assert result.learned[STEPS] <= result.static[STEPS]
    if result.gain == 0:
        times = predicted(predictor, objective, validation).times
        torch.testing.assert_close(times, predictor.static_times.expand(len(validation), -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calls", [4, 15], ids=["in the labels", "end to end"])
def test_a_killed_training_goes_on_as_if_it_had_not_been(kind, calls, problem, labelled, tmp_path):
    """Killed at any evaluation, it resumes after its last validated epoch: the same weights, bit for bit."""
    objective, batch = problem
    train, validation = batch.rows(slice(0, 36)), batch.rows(slice(36, None))
    options = TrainOptions(loss="both", epochs=4, label_epochs=4, validate_every=1, batch_size=12)

    def run(folder, objective):
        predictor = build(kind, objective.denoiser.noise, corrections=CORRECTIONS)
        result = train_predictor(
            predictor, objective, train, validation, options, tmp_path / folder, labels={STEPS: labelled},
            checkpoint=tmp_path / folder / "training.safetensors", progress=False,
        )  # fmt: skip
        return result, predictor.state_dict()

    left = [calls]

    def dying(x, y):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return objective.distance(x, y)

    whole, weights = run("whole", objective)
    with pytest.raises(KeyboardInterrupt):
        run("killed", replace(objective, distance=dying))
    assert (tmp_path / "killed/training.safetensors").exists()
    resumed, again = run("killed", objective)
    assert resumed == whole
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_a_damaged_or_foreign_checkpoint_is_not_used(problem, tmp_path):
    objective, batch = problem
    path, results = tmp_path / "training.safetensors", []
    for content in (None, b"junk", "foreign"):
        predictor = build(OneShot, objective.denoiser.noise)
        if content == "foreign":
            write_tensors(path, {"weights/x": torch.ones(2), "progress": torch.ones(5)})
        elif content:
            path.write_bytes(content)
        options = TrainOptions(epochs=1, batch_size=24)
        results.append(
            train_predictor(predictor, objective, batch, batch, options, tmp_path, checkpoint=path, progress=False)
        )
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("kind", KINDS)
def test_regression_can_fit_its_labels(kind, problem, labelled, tmp_path):
    """With enough epochs the regression loss falls far below 1, the loss of the best constant grid."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise)
    options = TrainOptions(
        loss="labels", label_epochs=60, label_lr=2e-2, weight_decay=0.0, batch_size=12, patience=1000, validate_every=60
    )
    train_predictor(predictor, objective, batch, batch, options, tmp_path, labels={STEPS: labelled}, progress=False)
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
    events.Reload()
    assert events.Scalars("train/labels")[-1].value < 0.3


def test_nothing_to_predict_in_one_step_without_corrections(problem, tmp_path):
    objective, batch = problem
    noise = objective.denoiser.noise
    with pytest.raises(TsAdaptError, match="nfe 2 or more"):
        train_predictor(build(OneShot, noise, steps=1), objective, batch, batch, TrainOptions(), tmp_path)
    predictor = build(Recursive, noise, steps=1, corrections=["coefficients"])
    options = TrainOptions(epochs=20, lr=1e-2, batch_size=8)
    assert train_predictor(predictor, objective, batch, batch, options, tmp_path, progress=False).gain > 0


def test_unknown_loss_and_missing_labels_are_refused(problem, tmp_path):
    objective, batch = problem
    for loss, message in (("x", "end_to_end, labels, both"), ("labels", "none were given")):
        with pytest.raises(TsAdaptError, match=message):
            train_predictor(
                build(OneShot, objective.denoiser.noise), objective, batch, batch, TrainOptions(loss=loss), tmp_path
            )


def test_labels_with_corrections_are_refused(labelled, problem, tmp_path):
    objective, batch = problem
    grid = replace(labelled.grid, output_scale=torch.ones_like(labelled.grid.times[:, :-1]))
    labels, options = {STEPS: replace(labelled, grid=grid)}, TrainOptions(loss="both")
    with pytest.raises(TsAdaptError, match="searched without corrections"):
        train_predictor(
            build(OneShot, objective.denoiser.noise), objective, batch, batch, options, tmp_path, labels=labels
        )


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_on_disk(kind, problem, tmp_path):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise, corrections=CORRECTIONS)
    with torch.no_grad():
        predictor.encoder.weight.normal_(0, 0.2)
    save_predictor(tmp_path, predictor, {"solver": "unipc-3"})
    loaded, config = load_predictor(tmp_path, objective.denoiser.noise)
    assert config["solver"] == "unipc-3"
    assert torch.equal(predicted(loaded, objective, batch).times, predicted(predictor, objective, batch).times)


def test_a_bad_folder_is_refused_in_one_sentence(problem, tmp_path):
    objective, _ = problem
    noise = objective.denoiser.noise
    with pytest.raises(TsAdaptError, match="no predictor"):
        load_predictor(tmp_path, noise)
    predictor = build(OneShot, noise)
    save_predictor(tmp_path, predictor, {})
    tensors = {k: v.clone() for k, v in predictor.state_dict().items()}
    tensors["encoder.dense.weight"][0, 0] = torch.nan
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
    from ts_adapt.sampling import initial_noise
    from ts_adapt.search.objective import Batch, Objective
    from ts_adapt.solvers import DDIM

    noise = RectifiedFlow()
    denoiser = GaussianMixtureDenoiser(noise, torch.zeros(2, 1, 4, 4), 0.1, prediction="velocity")
    x_T = initial_noise(0, range(6), (1, 4, 4))
    times = fixed.make("log_snr", noise, STEPS).expand(6, -1)
    data = Labelled(Batch(torch.arange(6), x_T, x_T, {}), TimeGrid(times), torch.ones(6))
    for kind in KINDS:
        predictor = build(kind, noise)
        loss = regression(predictor, Objective(denoiser, DDIM(noise), l2), {STEPS: data})
        loss(STEPS, torch.arange(6)).backward()
        assert all(torch.isfinite(p.grad).all() for p in predictor.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_solvers_can_be_trained_for(kind, problem, tmp_path):
    from ts_adapt.search.objective import Objective
    from ts_adapt.solvers import DDIM

    objective, batch = problem
    noisy = Objective(objective.denoiser, DDIM(objective.denoiser.noise, eta=1.0), objective.distance)
    predictor = build(kind, noisy.denoiser.noise, order=1, corrections=CORRECTIONS)
    options = TrainOptions(epochs=1)
    assert train_predictor(predictor, noisy, batch, batch, options, tmp_path, progress=False).epochs == 1
