"""Training of predictors: what helps is learned, what does not is not kept; a killed one goes on, bit for bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from interrupting import interrupted
from small_predictors import KINDS, OF_ANY, STEPS, build, logged, randomised, split, train
from ts_adapt.denoisers.analytic import GaussianMixtureDenoiser
from ts_adapt.distances import l2
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import RectifiedFlow
from ts_adapt.predictors.diagnosis import predicted
from ts_adapt.predictors.losses import Labelled, end_to_end, regression
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.phases import USED_BY_LOSS, TrainOptions, kept_of
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.training import train_predictor
from ts_adapt.sampling import initial_noise
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.per_sample import PerSampleOptions, search_per_sample
from ts_adapt.solvers import DDIM
from ts_adapt.storage.files import read_tensors, write_tensors


@pytest.fixture(scope="module")
def labelled(problem):
    objective, batch = problem
    static = TimeGrid(fixed.make("karras", objective.denoiser.noise_schedule, STEPS))
    labels = search_per_sample(objective, batch, static, PerSampleOptions(iterations=15, random_starts=0))
    return Labelled(batch, labels.grid, labels.distance)


@pytest.mark.parametrize("corrections", [(), OF_ANY], ids=["times", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_through_the_solver_lowers_the_distance_on_unseen_samples(kind, corrections, problem, tmp_path):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise_schedule, corrections=corrections)
    result = train(predictor, problem, tmp_path, TrainOptions(epochs=20, lr=4e-3, batch_size=8))
    assert result.learned[STEPS] < result.static[STEPS] and result.gain > 0
    measured = float(objective.measure(predictor.policy(), split(batch)[1]).mean())
    assert measured == pytest.approx(result.learned[STEPS], rel=1e-4)
    assert "validation/relative" in logged(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_help_for_sure_is_not_kept(kind, problem, labelled, tmp_path):
    """Regression on a few labels may hurt; then the predictor stays the static grid."""
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise_schedule)
    options, few = TrainOptions(loss="labels", label_epochs=10, batch_size=8), {STEPS: labelled.rows(slice(0, 4))}
    result = train(predictor, problem, tmp_path, options, labels=few)
    assert result.learned[STEPS] <= result.static[STEPS]
    if result.gain == 0:
        times = predicted(predictor, objective, batch).times
        torch.testing.assert_close(times, predictor.static_times.expand(len(batch), -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calls", [4, 15], ids=["in the labels", "end to end"])
def test_a_killed_training_goes_on_as_if_it_had_not_been(kind, calls, problem, labelled, tmp_path):
    """Killed at any evaluation, it resumes after its last validated epoch: the same weights, bit for bit."""
    objective, batch = problem
    options = TrainOptions(loss="both", epochs=4, label_epochs=4, validate_every=1, batch_size=12)

    def run(folder, objective):
        predictor = build(kind, objective.denoiser.noise_schedule, corrections=OF_ANY)
        given = {"labels": {STEPS: labelled}, "checkpoint": tmp_path / folder / "training.safetensors"}
        return train(predictor, (objective, batch), tmp_path / folder, options, **given), predictor.state_dict()

    objective = replace(objective, derivative="exact")
    whole, weights = run("whole", objective)
    with pytest.raises(KeyboardInterrupt):
        run("killed", replace(objective, distance=interrupted(objective.distance, calls)))
    assert (tmp_path / "killed/training.safetensors").exists()
    resumed, again = run("killed", objective)
    assert resumed == whole
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_a_damaged_checkpoint_is_not_used_and_one_of_other_options_is_refused(problem, tmp_path):
    path, results = tmp_path / "training.safetensors", []
    for content in (None, b"junk", "foreign"):
        predictor = build(OneShot, problem[0].denoiser.noise_schedule)
        if content == "foreign":
            write_tensors(path, {"weights/x": torch.ones(2), "progress": torch.ones(5)})
        elif content:
            path.write_bytes(content)
        results.append(train(predictor, problem, tmp_path, TrainOptions(epochs=1, batch_size=24), checkpoint=path))
    assert results[0] == results[1] == results[2]
    options = TrainOptions(epochs=1, batch_size=24, lr=1e-4)
    with pytest.raises(TsAdaptError, match=r"of a training with other options\.lr"):
        train(predictor, problem, tmp_path, options, checkpoint=path)


@pytest.mark.parametrize("loss", ["end_to_end", "labels", "both"])
def test_an_option_changes_what_is_learned_where_a_result_of_the_loss_records_it(loss, problem, labelled, tmp_path):
    options = TrainOptions(loss=loss, epochs=2, label_epochs=2, validate_every=2, batch_size=24)

    def trained(*changed):
        predictor, path = build(Recursive, problem[0].denoiser.noise_schedule), tmp_path / f"{changed}.safetensors"
        other = replace(options, **{name: getattr(options, name) / 2 for name in changed if name.endswith("lr")})
        other = replace(other, **{name: 1 for name in changed if not name.endswith("lr")})
        train(predictor, problem, tmp_path, other, labels={STEPS: labelled}, checkpoint=path)
        return {key: value for key, value in read_tensors(path).items() if key.startswith("weights/")}

    plain, idle = trained(), [name for name, under in USED_BY_LOSS.items() if loss not in under]
    assert plain
    torch.testing.assert_close(trained(*idle), plain, rtol=0, atol=0)
    for name in USED_BY_LOSS.keys() - {*idle, "validate_every"}:
        other = trained(name)
        assert any(not torch.equal(other[key], value) for key, value in plain.items()), name


@pytest.mark.parametrize("kind", KINDS)
def test_regression_can_fit_its_labels(kind, problem, labelled, tmp_path):
    """With enough epochs the regression loss falls far below 1, the loss of the best constant grid."""
    predictor = build(kind, problem[0].denoiser.noise_schedule)
    options = TrainOptions(
        loss="labels", label_epochs=60, label_lr=2e-2, weight_decay=0.0, batch_size=12, patience=1000, validate_every=60
    )
    train(predictor, problem, tmp_path, options, labels={STEPS: labelled})
    assert logged(tmp_path)["train/labels"][-1] < 0.3


def test_nothing_to_predict_in_one_step_without_corrections(problem, tmp_path):
    objective, batch = problem
    noise_schedule = objective.denoiser.noise_schedule
    with pytest.raises(TsAdaptError, match="nfe 2 or more"):
        train(build(OneShot, noise_schedule, 1), problem, tmp_path, TrainOptions())
    options = TrainOptions(epochs=20, lr=1e-2, batch_size=8)
    for kind, correction in ((Recursive, "coefficients"), (Recursive, "start"), (OneShot, "start")):
        predictor = build(kind, noise_schedule, 1, corrections=[correction])
        assert train_predictor(predictor, objective, batch, batch, options, tmp_path, progress=False).gain > 0
    with pytest.raises(TsAdaptError, match="end to end"):
        train(predictor, problem, tmp_path, TrainOptions(loss="labels"))


@pytest.mark.parametrize("loss", ["labels", "end_to_end"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_of_training_alone_and_none_at_zero(kind, loss, problem, labelled, tmp_path):
    met: list[tuple[bool, bool]] = []

    def trained(folder, **options):
        predictor = build(kind, problem[0].denoiser.noise_schedule)
        predictor.encoder.dense.register_forward_hook(
            lambda dense, args, out: met.append((out.requires_grad, predictor.encoder.kept is not None))
        )
        options = TrainOptions(loss=loss, epochs=1, label_epochs=1, validate_every=1, batch_size=12, lr=1e-3, **options)
        path = tmp_path / folder / "state.safetensors"
        train(predictor, problem, tmp_path, options, labels={STEPS: labelled}, checkpoint=path)
        assert predictor.encoder.kept is None
        return read_tensors(path)

    none, zero = trained("none"), trained("zero", dropout=0.0)
    assert {dropped for _, dropped in met} == {False}
    met.clear()
    half, again = trained("half", dropout=0.5), trained("again", dropout=0.5)
    assert {(True, True), (False, False)} == set(met), "with gradients, and only with them, features are dropped"
    for key, value in none.items():
        assert torch.equal(value, zero[key]) and torch.equal(half[key], again[key])
    assert any(not torch.equal(none[key], half[key]) for key in none)


def test_what_is_kept_has_the_mean_of_all_and_each_sample_its_own():
    kept = kept_of(0.25, 400, 200, torch.Generator().manual_seed(0))
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(kept.mean()) == pytest.approx(1, abs=0.01) and len(kept.unique(dim=0)) == 400
    assert kept_of(0.0, 4, 4, torch.Generator()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_of_samples_that_are_solved_alone_features_are_dropped_as_in_a_batch(kind, problem, tmp_path):
    objective, batch = problem
    single = copy.copy(objective.denoiser)
    single.alone = True
    objectives = {False: objective, True: replace(objective, denoiser=single)}
    predictor = randomised(build(kind, objective.denoiser.noise_schedule, corrections=["shift", "start"]))
    torch.nn.init.normal_(predictor.start.weight, 0, 0.3)
    kept = kept_of(0.5, 4, predictor.options["hidden"], torch.Generator().manual_seed(0))
    rows, gradients = torch.tensor([7, 3, 0, 5]), {}
    for alone, each in objectives.items():
        predictor.zero_grad()
        with predictor.encoder.dropping(kept):
            end_to_end(predictor, {STEPS: each.differentiated("exact")}, batch)(STEPS, rows).backward()
        gradients[alone] = [parameter.grad for parameter in predictor.parameters()]
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-3, atol=1e-5)
    together, one_by_one = (vars(predicted(predictor, each, batch)) for each in objectives.values())
    torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)
    train(predictor, (objectives[True], batch), tmp_path, TrainOptions(epochs=1, batch_size=16, dropout=0.5))


def test_an_unknown_loss_and_labels_that_are_missing_or_have_corrections_are_refused(problem, labelled, tmp_path):
    predictor = build(OneShot, problem[0].denoiser.noise_schedule)
    corrected = replace(labelled.grid, output_scale=torch.ones_like(labelled.grid.times[:, :-1]))
    for loss, labels, message in (
        ("x", None, "end_to_end, labels, both"),
        ("labels", None, "none were given"),
        ("both", {STEPS: replace(labelled, grid=corrected)}, "searched without corrections"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            train(predictor, problem, tmp_path, TrainOptions(loss=loss), labels=labels)


def test_regression_has_finite_gradients_where_log_snr_is_infinite():
    noise_schedule = RectifiedFlow()
    denoiser = GaussianMixtureDenoiser(noise_schedule, torch.zeros(2, 1, 4, 4), 0.1, prediction="velocity")
    x_T = initial_noise(0, range(6), (1, 4, 4))
    times = fixed.make("log_snr", noise_schedule, STEPS).expand(6, -1)
    data = Labelled(Batch(torch.arange(6), x_T, x_T, {}), TimeGrid(times), torch.ones(6))
    for kind in KINDS:
        predictor = build(kind, noise_schedule)
        loss = regression(predictor, Objective(denoiser, DDIM(noise_schedule), l2), {STEPS: data})
        loss(STEPS, torch.arange(6)).backward()
        assert all(torch.isfinite(p.grad).all() for p in predictor.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_solvers_can_be_trained_for(kind, problem, tmp_path):
    objective, batch = problem
    noisy = Objective(objective.denoiser, DDIM(objective.denoiser.noise_schedule, eta=1.0), objective.distance)
    predictor = build(kind, noisy.denoiser.noise_schedule, order=1, corrections=OF_ANY)
    assert train(predictor, (noisy, batch), tmp_path, TrainOptions(epochs=1)).epochs == 1
