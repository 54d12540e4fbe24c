"""Predictors: untrained they are the static grid; valid grids with any weights; on disk they are data, not code."""

from __future__ import annotations

import json

import pytest
import torch

from noise_schedules import assert_falls
from small_predictors import KINDS, OF_ANY, STEPS, build, randomised, walked
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.parametric import positions, times_at
from ts_adapt.interfaces import HISTORY
from ts_adapt.numerics import shorten_gradient
from ts_adapt.predictors.diagnosis import predicted
from ts_adapt.predictors.encoder import Encoder
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive, shares_of_rest
from ts_adapt.predictors.store import load_predictor, made_for, save_predictor
from ts_adapt.storage.files import write_tensors


@pytest.mark.parametrize("corrections", [(), OF_ANY], ids=["times", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_untrained_predictor_is_the_static_grid(kind, corrections, problem):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise_schedule, corrections=corrections)
    times = predicted(predictor, objective, batch).times
    assert torch.allclose(times, predictor.static_times.expand(len(batch), -1), rtol=1e-6, atol=1e-9)
    along = [objective.student(each, batch) for each in (predictor.policy(), predictor.static_times)]
    torch.testing.assert_close(*along, rtol=0, atol=1e-5)


@pytest.mark.parametrize("corrections", [(), OF_ANY], ids=["times", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_predicted_grids_are_valid_for_any_weights(kind, corrections, problem):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise_schedule, corrections=corrections)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.normal_(0, 1.0)
    times = predicted(predictor, objective, batch).times
    assert_falls(times, objective.denoiser.noise_schedule, STEPS)
    assert float(times[:, 1].std()) > 0


def test_times_that_do_not_fall_are_named(problem, monkeypatch):
    """Shares of nearly all that is left come to the end, in the precision of the times, before the last step."""
    objective, batch = problem
    predictor = build(Recursive, objective.denoiser.noise_schedule, 12)
    monkeypatch.setattr(
        Recursive, "share_of_rest", lambda self, numbers, steps, step: torch.full_like(numbers[:, 0], 1 - 1e-4)
    )
    with pytest.raises(TsAdaptError, match="time does not fall"):
        objective.student(predictor.policy(), batch)


@pytest.mark.parametrize(
    ("kind", "place", "number", "message"),
    [*((kind, slice(None), 3e38, "NaN or infinite") for kind in KINDS), (Recursive, -1, torch.nan, "at the start")],
)
def test_corrections_that_overflow_are_named_also_before_the_first_step(kind, place, number, message, problem):
    """Weights near the largest float are finite; what they add up to is not."""
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise_schedule, corrections=OF_ANY)
    predictor.encoder.bias.data[place] = number
    with pytest.raises(TsAdaptError, match=message):
        objective.student(predictor.policy(), batch)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_samples_equals_single_samples(kind, problem):
    objective, batch = problem
    predictor = randomised(build(kind, objective.denoiser.noise_schedule, corrections=OF_ANY))
    five = batch.rows(slice(0, 5))
    together = objective.student(predictor.policy(), five)
    alone = torch.cat([objective.student(predictor.policy(), five.rows(slice(i, i + 1))) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("correction", OF_ANY)
@pytest.mark.parametrize("kind", KINDS)
def test_each_correction_moves_the_samples_and_alone(kind, correction, problem):
    """Numbers behind the time's change what they are for, and nothing else."""
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise_schedule, corrections=[correction])
    behind = slice(STEPS if kind is OneShot else 1, None)
    with torch.no_grad():
        predictor.encoder.bias[:, behind] = 0.02
    nodes = walked(predictor.policy(), batch)
    inner, last = nodes[:-1], nodes[-1]
    has = {
        "shift": all(node.model_time is not None and not torch.equal(node.model_time, node.t) for node in inner),
        "scale": all(node.output_scale is not None and bool((node.output_scale > 1).all()) for node in inner),
        "coefficients": all(node.coefficients is not None and bool((node.coefficients > 0).all()) for node in nodes),
        "history": all(HISTORY in node.held and bool((node.held[HISTORY] > 0).all()) for node in nodes),
    }
    assert has == {name: name == correction for name in OF_ANY}
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


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 1, 1), (1, 1, 2)])
def test_no_row_has_more_than_its_share_of_the_gradient(shape):
    """However many numbers a row has, and in whatever shape: of a picture its length is that of all pixels."""
    numbers = torch.zeros(3, *shape, requires_grad=True)
    pulled = torch.tensor([[3.0, 4.0], [0.3, 0.4], [torch.nan, 1.0]])
    (shorten_gradient(numbers * 1.0) * pulled.reshape(3, *shape)).sum().backward()
    torch.testing.assert_close(numbers.grad.reshape(3, 2), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 1.0]]))


def test_positions_and_shares_invert(mixture):
    times = fixed.make("karras", mixture.noise_schedule, 6)
    u = positions(times, mixture.noise_schedule)
    assert torch.allclose(times_at(u, mixture.noise_schedule), times, rtol=1e-6, atol=1e-9)
    r, rebuilt = shares_of_rest(times, mixture.noise_schedule), [torch.zeros(())]
    for share in r:
        rebuilt.append(rebuilt[-1] + share * (1 - rebuilt[-1]))
    assert torch.allclose(torch.stack(rebuilt).double(), u[:-1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_reach_the_grid(kind, problem):
    objective, batch = problem
    predictor = randomised(build(kind, objective.denoiser.noise_schedule, classes=3))

    def second(condition):
        node, state = predictor.policy().init(batch.x_T, condition)
        return predictor.policy().next(batch.x_T, batch.target, node, state)[0].t

    assert not torch.allclose(second({"class_labels": torch.arange(len(batch)) % 3}), second({}))


def test_a_bad_folder_is_refused_in_one_sentence(problem, tmp_path):
    objective, _ = problem
    noise_schedule = objective.denoiser.noise_schedule
    with pytest.raises(TsAdaptError, match="no predictor"):
        load_predictor(tmp_path, noise_schedule)
    predictor = build(OneShot, noise_schedule)
    save_predictor(tmp_path, predictor, {})
    tensors = {k: v.clone() for k, v in predictor.state_dict().items()}
    tensors["encoder.dense.weight"][0, 0] = torch.nan
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(TsAdaptError, match="NaN"):
        load_predictor(tmp_path, noise_schedule)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (({"nfe": None}, "'nfe' of"), ({"solver": 3}, "'solver' of"), ({"nfe": ["3"]}, "names no NFE")):
        with pytest.raises(TsAdaptError, match=said):
            made_for({"solver": "ddim", "nfe": [3], **change}, tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "os.system"}))
    with pytest.raises(TsAdaptError, match="known: one-shot, recursive"):
        load_predictor(tmp_path, noise_schedule)
