"""One predictor for several numbers of steps: each is as if alone, learned with the others, and judged by itself."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from small_predictors import KINDS, OF_ANY, build, logged, randomised, split, train
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.parametric import between
from ts_adapt.interfaces import COEFFICIENTS, HISTORY, TimeGrid
from ts_adapt.predictors.changes import BOUND
from ts_adapt.predictors.diagnosis import chosen, predicted, spread
from ts_adapt.predictors.losses import Labelled
from ts_adapt.predictors.phases import TrainOptions, batches_of, going_on
from ts_adapt.predictors.recursive import Recursive, shares_of_rest
from ts_adapt.predictors.store import load_predictor, nfes_of, save_predictor
from ts_adapt.predictors.training import choose_kept, train_predictor
from ts_adapt.sampling import generator_for
from ts_adapt.search.per_sample import PerSampleOptions, search_per_sample

SERVED = (2, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_steps_has_places_of_its_own(kind, mixture):
    predictor = build(kind, mixture.noise_schedule, (7, 1, 3))
    assert predictor.learned == (1, 3, 7)
    places = [place for steps in (1, 3, 7) for place in range(1000)[predictor.places(steps)]]
    assert places == list(range(len(predictor.encoder.mean)))
    for steps in predictor.learned:
        assert torch.equal(predictor.static(steps), fixed.make("karras", mixture.noise_schedule, steps))


@pytest.mark.parametrize("kind", KINDS)
def test_alone_or_among_others_a_number_of_steps_has_the_same_grids(kind, problem):
    """A predictor for one N is the case of one N: with its weights at that N's places the grids are the same."""
    objective, batch = problem
    among = randomised(build(kind, objective.denoiser.noise_schedule, (2, 3, 4), corrections=OF_ANY))
    alone = build(kind, objective.denoiser.noise_schedule, (3,), corrections=OF_ANY)
    weights, places = among.state_dict(), among.places(3)
    outputs = alone.encoder.bias.shape[1]
    for key, value in alone.state_dict().items():
        if key.startswith("encoder.") and value.shape[:1] != weights[key].shape[:1]:
            weights[key] = weights[key][places]
    weights["encoder.weight"] = weights["encoder.weight"][..., :outputs]
    weights["encoder.bias"] = weights["encoder.bias"][..., :outputs]
    alone.load_state_dict({**weights, "static_times": alone.static_times})
    chosen_alone, chosen_among = (vars(predicted(each, objective, batch, 3)) for each in (alone, among))
    torch.testing.assert_close(chosen_alone, chosen_among, rtol=1e-3, atol=1e-5)


def test_what_one_more_pass_promises_is_the_slope_of_the_last_three():
    assert going_on([(1, 0.9)], 61.4) == "pass 1: 90.00 % of the static distance; one more takes 61 s"
    falling = going_on([(0, 1.0), (5, 0.9), (10, 0.8), (15, 0.7)], 2)
    assert "pass 15: 70.00 %" in falling and "2.00 points less, in 2 s" in falling
    assert "1.00 points more" in going_on([(0, 0.1), (1, 0.70), (2, 0.71), (3, 0.72)], 2)
    assert "(31.00 % on the samples of training)" in going_on([(0, 1.0), (1, 0.5)], 2, 0.31)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_beyond_those_that_were_learned_are_refused(kind, mixture):
    predictor = build(kind, mixture.noise_schedule, SERVED)
    for steps in (1, 6):
        with pytest.raises(TsAdaptError, match=f"learned for 2, 4 steps, which serves 2 to 5, not for {steps}"):
            predictor.policy(steps)
    with pytest.raises(TsAdaptError, match="learned for 4 steps, not for 5"):
        build(kind, mixture.noise_schedule, 4).policy(5)
    with pytest.raises(TsAdaptError, match="learned for 2, 4 steps; say which"):
        predictor.policy()
    for served in ((), (3, 3)):
        with pytest.raises(TsAdaptError, match="static grids of different N"):
            build(kind, mixture.noise_schedule, served)


@pytest.mark.filterwarnings("ignore:.*was not trained for")
@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_is_the_interpolated_static_grid_between_and_beside(kind, problem):
    objective, batch = problem
    noise_schedule = objective.denoiser.noise_schedule
    changes = ["start", "residual"] if kind is Recursive else ["start"]
    predictor = build(kind, noise_schedule, SERVED, corrections=[*OF_ANY, *changes])
    grids = {steps: fixed.make("karras", noise_schedule, steps) for steps in SERVED}
    for steps in (3, 5):
        expected = between(grids, noise_schedule, steps)
        times = predicted(predictor, objective, batch, steps).times
        torch.testing.assert_close(times, expected.expand(len(batch), -1), rtol=1e-9, atol=1e-9)
        along = [objective.student(each, batch) for each in (predictor.policy(steps), expected)]
        torch.testing.assert_close(*along, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*was not trained for")
@pytest.mark.parametrize("kind", KINDS)
def test_between_two_numbers_of_steps_corrections_are_linear(kind, problem):
    """On a line from the first step to the last, with an offset that grows with the number of steps; of a history too,
    as far back as each of the two reaches."""
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise_schedule, (3, 9), corrections=["coefficients", "history"])

    def line(steps):
        return torch.linspace(0, 1, steps, dtype=torch.float64)[:, None].expand(-1, 3) + steps

    for steps in predictor.learned:
        weights = line(steps)[:, :1].expand(-1, steps + 1)
        predictor.begun[steps] = TimeGrid.of(predictor.static(steps), {COEFFICIENTS: line(steps), HISTORY: weights})
        predictor.forget(steps)
    for share in (1, 0.25):
        predictor.keep(5, share)
        grid = predicted(predictor, objective, batch, 5)
        both, of_nine = line(5)[:, :1].expand(-1, 4), (line(9)[0, 0] + line(5)[:, :1] - 5) / 3
        history = torch.cat([both, of_nine.expand(-1, 2)], -1)
        for found, expected in ((grid.coefficients, line(5)), (grid.held[HISTORY], history)):
            torch.testing.assert_close(found, share * expected.expand(len(batch), -1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*was not trained for")
@pytest.mark.parametrize("share", [1, 0.25, 0])
def test_between_two_numbers_of_steps_a_residual_is_mixed_of_both_and_kept_by_its_share(share, problem):
    """Of changes on a line from the first step to the last, with an offset that grows with the number of steps."""
    objective, batch = problem
    predictor = build(Recursive, objective.denoiser.noise_schedule, (3, 5), corrections=["residual"])
    line = {steps: 0.02 * steps + 0.05 * torch.linspace(0, 1, steps) for steps in (3, 4, 5)}

    class Line(torch.nn.Module):
        def forward(self, seen, features, place):
            (steps,) = (steps for steps in (3, 5) if place in range(1000)[predictor.residual_places(steps)])
            return line[steps][place - predictor.residual_places(steps).start].expand(len(seen), 1, *seen.shape[2:])

    predictor.residual = Line()
    predictor.keep(4, share)
    found = chosen(predictor, objective, batch, 4)[1]["residual"]
    expected = share * line[4][:, None, None, None]
    torch.testing.assert_close(found, expected.expand(len(batch), -1, 1, 4, 4).to(found), rtol=1e-5, atol=1e-6)


def test_a_training_finds_out_how_much_is_kept_between(problem, tmp_path):
    """Corrections that double an error of the static grids lose everywhere; those that halve it gain, and are kept."""
    objective, batch = problem
    noise_schedule = objective.denoiser.noise_schedule
    options = TrainOptions(epochs=1, lr=1e-9, batch_size=48)
    found = {}
    for sign in (-1, 1):
        predictor = build(Recursive, noise_schedule, SERVED)
        with torch.no_grad():
            predictor.encoder.bias[:, 0] = sign * 0.03
        result = train_predictor(predictor, objective, batch, batch, options, tmp_path, progress=False)
        assert set(result.apart) == {2, 3, 4, 5} and set(result.learned) == set(SERVED)
        found[sign] = {steps: predictor.options["kept"][str(steps)] for steps in (3, 5)}
        for steps, share in found[sign].items():
            distance, static = result.apart[steps]
            assert float(distance.mean()) < float(static.mean()) if share else torch.equal(distance, static)
        predictor.options["kept"] = {"5": 0.3}
        assert choose_kept(predictor, objective, batch).keys() == {3} and predictor.without_k == []
        assert predictor.options["kept"] == {"3": found[sign][3], "5": 0.3}
    assert sorted(share > 0 for share in (found[-1][3], found[1][3])) == [False, True]


def test_an_epoch_has_every_sample_once_for_every_number_of_steps_in_turn():
    samples = {2: 10, 4: 10, 5: 4}
    epochs = [list(batches_of(samples, 4, generator_for(0, epoch))) for epoch in (0, 1)]
    again = list(batches_of(samples, 4, generator_for(0, 0)))
    for batches in epochs:
        seen = Counter((steps, int(row)) for steps, rows in batches for row in rows)
        assert seen == Counter((steps, row) for steps, count in samples.items() for row in range(count))
        assert [{steps for steps, _ in batches[:3]}, {steps for steps, _ in batches[3:5]}] == [{2, 4, 5}, {2, 4}]
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(epochs[0], again, strict=True))
    assert [steps for steps, _ in epochs[0]] != [steps for steps, _ in epochs[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_one_network_learns_every_number_of_steps(kind, problem, tmp_path):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise_schedule, SERVED, corrections=OF_ANY)
    result = train(predictor, problem, tmp_path, TrainOptions(epochs=20, lr=4e-3, batch_size=8))
    assert set(result.learned) == set(SERVED) and result.gain > 0.02
    for steps in SERVED:
        measured = float(objective.measure(predictor.policy(steps), split(batch)[1]).mean())
        assert measured == pytest.approx(result.learned[steps], rel=1e-4)
        assert measured < result.static[steps]


def test_labels_are_learned_for_every_number_of_steps(problem, tmp_path):
    objective, batch = problem
    predictor = build(Recursive, objective.denoiser.noise_schedule, SERVED)
    labels = {}
    for steps in SERVED:
        static = TimeGrid(predictor.static(steps))
        found = search_per_sample(objective, batch, static, PerSampleOptions(iterations=5, random_starts=0))
        labels[steps] = Labelled(batch, found.grid, found.distance).rows(slice(0, 8 * steps))
    options = TrainOptions(loss="labels", label_epochs=4, validate_every=2, batch_size=8)
    assert train(predictor, problem, tmp_path, options, labels=labels).epochs == 4
    with pytest.raises(TsAdaptError, match="none were given"):
        train(predictor, problem, tmp_path, options, labels={4: labels[4]})


def test_a_number_of_steps_that_gains_nothing_for_sure_stays_static_and_the_others_are_kept(problem, tmp_path):
    """Of two grids per N the network's bias leads from the worse to the better at N = 4, and the other way at N = 2."""
    objective, batch = problem
    noise_schedule = objective.denoiser.noise_schedule

    def worse_and_better(steps):
        grids = [fixed.make(name, noise_schedule, steps) for name in ("karras", "linear", "quadratic", "log_snr")]
        ordered = sorted(grids, key=lambda times: -float(objective.measure(times, batch).mean()))
        return ordered[0], ordered[-1]

    (worse2, better2), (worse4, better4) = worse_and_better(2), worse_and_better(4)
    torch.manual_seed(0)
    predictor = Recursive(noise_schedule, [better2, worse4], (1, 4, 4), width=8, hidden=16)
    with torch.no_grad():
        for steps, to in ((2, worse2), (4, better4)):
            f = torch.logit(shares_of_rest(to, noise_schedule)) - torch.logit(
                shares_of_rest(predictor.static(steps), noise_schedule)
            )
            predictor.encoder.bias[predictor.places(steps)][: steps - 1, 0] = f.float() / 10
    torch.testing.assert_close(predicted(predictor, objective, batch, 4).times[0], better4)
    options = TrainOptions(epochs=1, lr=1e-9, batch_size=48)
    result = train_predictor(predictor, objective, batch, batch, options, tmp_path, progress=False)
    assert result.learned[2] == result.static[2]
    assert result.learned[4] == pytest.approx(float(objective.measure(better4, batch).mean()), rel=1e-3)
    assert result.gain == pytest.approx((1 - result.learned[4] / result.static[4]) / 2)
    times = predicted(predictor, objective, batch, 2).times
    torch.testing.assert_close(times, better2.expand(len(batch), -1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(predicted(predictor, objective, batch, 4).times[0], better4, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_several_numbers_of_steps_come_back_from_disk(kind, problem, tmp_path):
    objective, batch = problem
    predictor = randomised(build(kind, objective.denoiser.noise_schedule, SERVED, corrections=OF_ANY))
    save_predictor(tmp_path, predictor, {"solver": "unipc-3", "nfe": [2, 4]})
    loaded, config = load_predictor(tmp_path, objective.denoiser.noise_schedule)
    assert nfes_of(config) == [2, 4] and loaded.learned == SERVED
    for steps in SERVED:
        assert torch.equal(
            predicted(loaded, objective, batch, steps).times, predicted(predictor, objective, batch, steps).times
        )
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "version": 1}))
    with pytest.raises(TsAdaptError, match=r"version 1; expected .*; train the predictor again"):
        load_predictor(tmp_path, objective.denoiser.noise_schedule)
    for steps in ([2], [4, 2, 1], [6], [-1, 8], "24", [2.0, 4.0], []):
        path.write_text(json.dumps({**whole, "network": {**whole["network"], "steps": steps}}))
        with pytest.raises(TsAdaptError, match="train it again"):
            load_predictor(tmp_path, objective.denoiser.noise_schedule)


@pytest.mark.parametrize("kind", KINDS)
def test_the_spread_tells_a_static_grid_from_one_for_each_sample(kind, problem, tmp_path):
    objective, batch = problem
    predictor = build(kind, objective.denoiser.noise_schedule, SERVED, corrections=[*OF_ANY, "start"])

    def found(steps):
        return spread(*chosen(predictor, objective, batch, steps), objective)

    with torch.no_grad():
        predictor.encoder.bias.fill_(0.03)
    assert found(4).keys() == {"times", *OF_ANY, "start"}
    assert all(value < 1e-6 for value in found(4).values())
    randomised(predictor)
    torch.nn.init.normal_(predictor.start.weight)
    assert all(value > 1e-3 for value in found(4).values()) and found(4)["start"] < BOUND
    predictor.forget(2)
    assert all(value < 1e-6 for value in found(2).values()) and found(4)["times"] > 1e-3


def test_what_is_predicted_is_logged_for_every_number_of_steps(problem, tmp_path):
    predictor = build(Recursive, problem[0].denoiser.noise_schedule, SERVED, corrections=OF_ANY)
    train(predictor, problem, tmp_path, TrainOptions(epochs=1))
    wanted = {"distance", *(f"spread/{what}" for what in ("times", *OF_ANY))}
    found = {f"validation/{what}/{steps}-steps" for what in wanted for steps in SERVED}
    assert {*found, "validation/relative"} <= logged(tmp_path).keys()
