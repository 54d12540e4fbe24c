"""The scheduler by itself: the steps of `integrate`, any times, any solver of one evaluation; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ts_adapt.assembly import SOLVERS, build_grid, build_solver
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.grids import fixed
from ts_adapt.grids.parametric import interpolate
from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.noise import BetaTable, edm_sigma
from ts_adapt.policies import FromNoise, as_policy
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.sampling import integrate
from ts_adapt.schedule_file import Schedule
from ts_adapt.schedulers.scheduler import SOLVER_FAMILIES, LearnedScheduler

CONFIG = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config
V_CONFIG = DDIMScheduler(prediction_type="v_prediction").config
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0).config
NOISE = BetaTable.from_config(CONFIG)
ONE_EVALUATION = [name for name in SOLVERS if name != "heun"] + ["dpmpp-2m+corrector", "ddim+corrector"]
X_T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Smooth(nn.Module):
    """A network whose answer depends on the state and on each row's time."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x + timestep.reshape(-1, 1, 1, 1) / 500)


def by_hand(schedule: LearnedScheduler, steps: int, x: Tensor = X_T, generator: Any = None, **options: Any) -> Tensor:
    """A loop of one's own, as the documentation shows it."""
    schedule.set_timesteps(steps, **options)
    for t in schedule.timesteps:
        timestep = schedule.network_timesteps(x)
        x = schedule.step(Smooth()(x, timestep), t, x, generator=generator).prev_sample
    return x


def our_own(schedule: LearnedScheduler, policy: Any, x: Tensor = X_T, **options: Any) -> Tensor:
    denoiser = NetworkDenoiser(
        Smooth(), schedule.noise, schedule.prediction, shape=(1, 4, 4), time_scale=schedule.time_scale
    )
    return integrate(denoiser, build_solver(schedule.config["solver"], schedule.noise), policy, x, **options).x


def grid(steps: int = 5, noise: Any = NOISE) -> TimeGrid:
    times = fixed.make("karras", noise, steps)
    return TimeGrid(torch.cat([times[:1], 0.9 * times[1:-1], times[-1:]]))


@pytest.mark.parametrize("solver", ONE_EVALUATION)
@pytest.mark.parametrize("config", [CONFIG, V_CONFIG], ids=["epsilon", "v"])
def test_steps_are_those_of_integrate(solver: str, config: Any) -> None:
    schedule = LearnedScheduler.from_grid(grid(), solver, config)
    found = by_hand(schedule, 5, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    expected = our_own(schedule, grid(), step_noise=lambda step: torch.randn(X_T.shape, generator=generator))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["unipc-3", "dpmpp-3m", "ipndm-4", "euler"])
def test_rectified_flow_with_both_ends_at_infinite_log_snr(solver: str) -> None:
    schedule = LearnedScheduler.from_grid("karras", solver, FLOW)
    times = fixed.make("karras", schedule.noise, 6)
    torch.testing.assert_close(by_hand(schedule, 6), our_own(schedule, times), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(schedule.timesteps, (1000 * times[:-1]).float())


@pytest.mark.parametrize("name", ["karras", "ddim+native", "karras+rounded", "ays-sd15"])
def test_fixed_grids_by_name(name: str) -> None:
    schedule = LearnedScheduler.from_grid(name, "unipc", CONFIG)
    expected = build_grid(name, NOISE, 6)
    torch.testing.assert_close(by_hand(schedule, 6), our_own(schedule, expected), rtol=1e-6, atol=1e-6)


def test_zero_terminal_snr() -> None:
    config = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).config
    schedule = LearnedScheduler.from_grid("uniform", "unipc-2", config)
    assert schedule.noise.zero_terminal_snr
    found = by_hand(schedule, 5)
    torch.testing.assert_close(found, our_own(schedule, fixed.make("uniform", schedule.noise, 5)), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(found).all()


def test_corrections_of_a_grid_are_followed() -> None:
    torch.manual_seed(0)
    times = grid().times
    corrected = TimeGrid(
        times, model_times=0.97 * times[:-1], output_scale=1 + 0.1 * torch.rand(5).double(),
        coefficients=0.05 * torch.randn(5, 3).double(),
    )  # fmt: skip
    schedule = LearnedScheduler.from_grid(corrected, "unipc-3", CONFIG)
    found = by_hand(schedule, 5)
    torch.testing.assert_close(found, our_own(schedule, corrected), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, our_own(schedule, times), rtol=1e-3)


def test_one_grid_for_each_image() -> None:
    rows = torch.stack([grid().times, fixed.make("uniform", NOISE, 5), fixed.make("quadratic", NOISE, 5)])
    schedule = LearnedScheduler.from_grid(rows, "unipc-3", CONFIG)
    found = by_hand(schedule, 5)
    for i in range(3):
        alone = our_own(schedule, rows[i], X_T[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    schedule.set_timesteps(5)
    with pytest.raises(TsAdaptError, match="3 grids for a batch of 2"):
        schedule.network_timesteps(X_T[:2])


@pytest.mark.parametrize("kind", [OneShot, Recursive])
def test_predictors_by_hand(kind: Any, tiny: Any) -> None:
    predictor = tiny.predictor(kind, NOISE, (1, 4, 4))
    schedule = LearnedScheduler.from_predictors(predictor, "unipc-3", CONFIG)
    with torch.no_grad():
        found, expected = by_hand(schedule, 4), our_own(schedule, predictor.policy())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_recursive_schedule_begins_inside(tiny: Any) -> None:
    predictor = tiny.predictor(Recursive, NOISE, (1, 4, 4))
    schedule = LearnedScheduler.from_predictors(predictor, "unipc-3", CONFIG)
    schedule.set_timesteps(4)
    schedule.set_begin_index(2)
    x = X_T
    with torch.no_grad():
        for t in schedule.timesteps[2:]:
            x = schedule.step(Smooth()(x, schedule.network_timesteps(x)), t, x).prev_sample
        torch.testing.assert_close(x, our_own(schedule, predictor.policy(2)), rtol=1e-6, atol=1e-6)


def test_any_step_policy() -> None:
    def spread(x_T: Tensor, condition: Any) -> TimeGrid:
        shift = x_T.flatten(1).mean(1).double().sigmoid().unsqueeze(1)
        times = grid().times.expand(len(x_T), -1)
        return TimeGrid(torch.cat([times[:, :1], (0.8 + 0.2 * shift) * times[:, 1:-1], times[:, -1:]], 1))

    schedule = LearnedScheduler.from_policy(FromNoise(spread), grid().times, "dpmpp-2m", CONFIG)
    torch.testing.assert_close(by_hand(schedule, 5), our_own(schedule, FromNoise(spread)), rtol=1e-6, atol=1e-6)
    with pytest.raises(TsAdaptError, match="learned for 5"):
        schedule.set_timesteps(4)
    with pytest.raises(TsAdaptError, match="cannot be saved"):
        schedule.save_pretrained("nowhere")
    longer = LearnedScheduler.from_policy(as_policy(grid(6)), grid().times, "dpmpp-2m", CONFIG)
    longer.set_timesteps(5)
    with pytest.raises(TsAdaptError, match="takes 6 steps where 5"):
        longer.network_timesteps(X_T)


def test_the_steps_of_diffusers_at_its_own_times() -> None:
    """DPM-Solver++(2M) down to diffusers' last sigma, with times given by hand."""
    theirs = DPMSolverMultistepScheduler.from_config(CONFIG, final_sigmas_type="sigma_min")
    whole = [999, 700, 420, 200, 60]
    theirs.set_timesteps(timesteps=whole)
    ours = LearnedScheduler.from_config(CONFIG, solver="dpmpp-2m")
    ours.set_timesteps(timesteps=whole)
    x = y = X_T
    for t in theirs.timesteps:
        x = theirs.step(Smooth()(x, t.float()), t, x).prev_sample
        y = ours.step(Smooth()(y, t.float()), t, y).prev_sample
    torch.testing.assert_close(y, x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("solver", ["unipc-2", "deis-2", "ipndm-4"])
def test_any_real_times_in_solvers_that_diffusers_gives_none(solver: str) -> None:
    times = torch.tensor([998.75, 700.9, 420.25, 60.5])
    schedule = LearnedScheduler.from_grid("uniform", solver, CONFIG)
    found = by_hand(schedule, 4, timesteps=times)
    assert torch.equal(schedule.timesteps, times)
    whole = torch.cat([times.double(), torch.zeros(1).double()])
    torch.testing.assert_close(found, our_own(schedule, whole), rtol=1e-6, atol=1e-6)
    sigmas = edm_sigma(NOISE, times.double())
    torch.testing.assert_close(by_hand(schedule, 4, sigmas=[*sigmas.tolist(), 0.0]), found, rtol=1e-5, atol=1e-5)


def test_what_flux_passes_stands_for_the_number_of_steps() -> None:
    learned = fixed.make("log_snr", LearnedScheduler.from_config(FLOW).noise, 4)
    schedule = LearnedScheduler.from_grid(learned, "unipc-2", FLOW)
    schedule.set_timesteps(sigmas=torch.linspace(1, 0.25, 4).numpy(), mu=1.15)
    torch.testing.assert_close(schedule.timesteps, (1000 * learned[:-1]).float())
    schedule.set_timesteps(sigmas=[0.9, 0.5])
    torch.testing.assert_close(schedule.timesteps, torch.tensor([900.0, 500.0]))


def learned(steps: int) -> Schedule:
    return Schedule(grid(steps), "unipc-3", steps, {"model": "tiny", "distance": "l2", "seed": steps})


def test_between_learned_nfe_log_snr_is_interpolated() -> None:
    schedule = LearnedScheduler.from_schedules([learned(4), learned(8)], CONFIG)
    assert schedule.config["solver"] == "unipc-3"
    assert schedule.config["learned_for"] == {"model": "tiny", "distance": "l2"}
    for steps in (4, 8):
        schedule.set_timesteps(steps)
        torch.testing.assert_close(schedule.timesteps, grid(steps).times[:-1].float())
    schedule.set_timesteps(5)
    low, high = (NOISE.log_snr(interpolate(grid(n).times, NOISE, 5)) for n in (4, 8))
    expected = NOISE.time(0.75 * low + 0.25 * high)
    torch.testing.assert_close(schedule.timesteps.double(), expected[:-1], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(by_hand(schedule, 5), our_own(schedule, expected), rtol=1e-4, atol=1e-4)
    for steps in (3, 9):
        with pytest.raises(TsAdaptError, match=f"is {steps}; this schedule was learned for 4, 8"):
            schedule.set_timesteps(steps)


@settings(max_examples=25, deadline=None)
@given(first=st.integers(1, 6), more=st.integers(1, 6), seed=st.integers(0, 9))
def test_grids_in_between_fall_and_share_their_ends(first: int, more: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for steps in (first, first + more):
        inside = 998 * torch.rand(steps - 1, generator=generator, dtype=torch.float64).sort(descending=True)[0] + 0.5
        pair.append(Schedule(TimeGrid(torch.tensor([999.0, *inside.tolist(), 0.0]).double()), "ddim", steps))
    schedule = LearnedScheduler.from_schedules(pair, CONFIG)
    for steps in range(first, first + more + 1):
        schedule.set_timesteps(steps)
        times = schedule.run.plan.times  # type: ignore[union-attr]
        assert len(times) == steps + 1 and bool((times[1:] < times[:-1]).all())
        assert (float(times[0]), float(times[-1])) == (999.0, 0.0)


def test_corrections_are_not_interpolated() -> None:
    scaled = [Schedule(TimeGrid(grid(n).times, output_scale=torch.ones(n)), "ddim", n) for n in (4, 6)]
    with pytest.raises(TsAdaptError, match="corrections and grids per image are not interpolated"):
        LearnedScheduler.from_schedules(scaled, CONFIG).set_timesteps(5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_sample_keeps_its_precision_and_half_is_computed_in_float32(dtype: torch.dtype) -> None:
    schedule = LearnedScheduler.from_grid(grid(), "unipc-2", CONFIG)
    x, raw = X_T.to(dtype), torch.randn_like(X_T).to(dtype)
    ends = []
    for state, prediction in ((x, raw), (x.float(), raw.float())):
        schedule.set_timesteps(5)
        ends.append(schedule.step(prediction, 0, state))
    assert ends[0].prev_sample.dtype == ends[0].pred_original_sample.dtype == dtype
    torch.testing.assert_close(ends[0].prev_sample, ends[1].prev_sample.to(dtype), rtol=1e-6, atol=1e-6)


def test_learned_variances_are_dropped_and_x0_is_clipped_when_asked() -> None:
    raw = torch.randn(3, 2, 4, 4)
    plain = LearnedScheduler.from_grid("uniform", "ddim", CONFIG)
    clipped = LearnedScheduler.from_grid("uniform", "ddim", CONFIG, clip_x0=True)
    for schedule in (plain, clipped):
        schedule.set_timesteps(3)
    out = plain.step(raw, 0, X_T)
    assert out.prev_sample.shape == X_T.shape and float(out.pred_original_sample.abs().max()) > 1
    assert float(clipped.step(raw, 0, X_T).pred_original_sample.abs().max()) == 1
    assert len(LearnedScheduler.from_config(CONFIG)) == 1000


def test_add_noise_is_that_of_diffusers_at_whole_timesteps() -> None:
    x, eps, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 321, 999])
    theirs = DDIMScheduler.from_config(CONFIG).add_noise(x, eps, t)
    torch.testing.assert_close(LearnedScheduler.from_config(CONFIG).add_noise(x, eps, t), theirs, rtol=1e-5, atol=1e-5)
    of_flow = LearnedScheduler.from_config(FLOW)
    between = of_flow.scale_noise(x, torch.tensor([250.0]), eps)
    torch.testing.assert_close(between, 0.75 * x + 0.25 * eps)
    assert of_flow.init_noise_sigma == 1 and of_flow.order == 1
    assert torch.equal(of_flow.scale_model_input(x, 3), x)
    assert of_flow.add_noise(x.half(), eps.half(), torch.tensor(500.0)).dtype == torch.float16


def test_from_config_takes_over_betas_and_prediction_type() -> None:
    schedule = LearnedScheduler.from_config(V_CONFIG, grid="karras", solver="unipc")
    assert schedule.config["solver"] == "unipc-2" and schedule.prediction == "v"
    t = torch.arange(999.0)
    torch.testing.assert_close(schedule.noise.log_snr(t), BetaTable.from_config(V_CONFIG).log_snr(t))
    again = LearnedScheduler.from_config(schedule.config)
    assert {**again.config} == {**schedule.config}
    assert DDIMScheduler.from_config(schedule.config).config["prediction_type"] == "v_prediction"
    assert LearnedScheduler.from_config(FLOW).prediction == "velocity"


def test_families_of_solvers_stand_for_the_orders_of_diffusers() -> None:
    for family, name in SOLVER_FAMILIES.items():
        assert LearnedScheduler(solver=family).config["solver"] == name
        assert name in SOLVERS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun"}, "Heun evaluates the network 2 times a step"),
        ({"solver": "unipc-9"}, "unknown solver 'unipc-9'; did you mean"),
        ({"solver": 3}, "expected a solver's name"),
        ({"grid": "karas"}, "unknown grid 'karas'; did you mean 'karras'"),
        ({"grid": "karras", "predictors": [5]}, "more than one was given"),
        ({"grids": {}}, "`grids` of the schedule is empty"),
        ({"grids": [1, 2]}, "`grids` of a schedule are"),
        ({"grids": {"5": {"times": [3, 2]}}}, "the grid for 5 steps has 1"),
        ({"grids": {"1": {"times": [2, 3]}}}, "not decreasing"),
        ({"grids": {"1": {"times": [1e9, 3]}}}, "outside the noise schedule"),
        ({"grids": {"1": {"tmes": [3, 2]}}}, "`grids` of a schedule are"),
        ({"grids": {"x": {"times": [3, 2]}}}, "`grids` of a schedule are"),
        ({"grids": {"1": {"times": [3, "a"]}}}, "`grids` of a schedule are"),
        ({"predictors": 5}, "lists numbers of steps"),
        ({"predictors": [0]}, "lists numbers of steps"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000; expected"),
        ({"beta_start": "x"}, "the betas of the schedule are no numbers"),
        ({"beta_schedule": "cubic"}, "beta_schedule 'cubic' is unknown"),
        ({"prediction_type": "noise"}, "prediction_type 'noise'"),
    ],
)
def test_a_bad_config_is_refused_in_one_sentence(options: Any, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message) as caught:
        LearnedScheduler(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "5", None, True, 10**9])
def test_bad_numbers_of_steps(steps: Any) -> None:
    with pytest.raises(TsAdaptError, match="expected a whole number from 1 to"):
        LearnedScheduler().set_timesteps(steps)


def test_a_run_is_used_as_it_should_be() -> None:
    schedule = LearnedScheduler.from_grid(grid(), "unipc-2", CONFIG)
    for method in (
        lambda: schedule.step(X_T, 0, X_T),
        lambda: schedule.network_timesteps(X_T),
        lambda: schedule.set_begin_index(1),
    ):
        with pytest.raises(TsAdaptError, match=r"was called before set_timesteps\(num_inference_steps\)"):
            method()
    schedule.set_timesteps(5)
    schedule.step(X_T, 0, X_T)
    with pytest.raises(TsAdaptError, match="began with 3 samples and step 1 has 2"):
        schedule.step(X_T[:2], 0, X_T[:2])
    with pytest.raises(TsAdaptError, match="the run has begun"):
        schedule.set_begin_index(3)
    for _ in range(4):
        schedule.step(X_T, 0, X_T)
    for method in (lambda: schedule.step(X_T, 0, X_T), lambda: schedule.network_timesteps(X_T)):
        with pytest.raises(TsAdaptError, match=r"steps are done; call set_timesteps\(\)"):
            method()
    schedule.set_timesteps(5)
    schedule.step(X_T[:2], 0, X_T[:2])  # another batch, another run
    assert (schedule.step_index, schedule.begin_index) == (1, 0)
    with pytest.raises(TsAdaptError, match="place 5 of 5 steps"):
        schedule.set_timesteps(5)
        schedule.set_begin_index(5)
    with pytest.raises(TsAdaptError, match="solver='ddpm' draws noise"):
        schedule.step(X_T, 0, X_T, eta=0.5)


def test_times_of_its_own_have_to_reach_the_network(tiny: Any) -> None:
    predictor = tiny.predictor(OneShot, NOISE, (1, 4, 4))
    schedule = LearnedScheduler.from_predictors(predictor, "unipc-3", CONFIG)
    schedule.set_timesteps(4)
    with pytest.raises(TsAdaptError, match=r"ts_adapt.attach\(pipe, schedule\), or scheduler.network_timesteps"):
        schedule.step(X_T, 999, X_T)
    with pytest.raises(TsAdaptError, match="cannot begin inside"):
        schedule.set_begin_index(1)
    with pytest.raises(TsAdaptError, match="num_inference_steps is 5; this schedule was learned for 4"):
        schedule.set_timesteps(5)
    with pytest.raises(TsAdaptError, match="chooses the times of each image by itself"):
        schedule.set_timesteps(timesteps=[900, 100])
    with pytest.raises(TsAdaptError, match=r"learned for samples of shape \(1, 4, 4\), the pipeline's are \(1, 4, 5\)"):
        schedule.network_timesteps(torch.zeros(2, 1, 4, 5))
    untold = LearnedScheduler.from_grid(TimeGrid(grid().times, model_times=0.9 * grid().times[:-1]), "ddim", CONFIG)
    untold.set_timesteps(5)
    with pytest.raises(TsAdaptError, match="other times than the loop's timesteps"):
        untold.step(X_T, 999, X_T)
    bare = LearnedScheduler.from_config(schedule.config)
    with pytest.raises(TsAdaptError, match="holds no weights of predictors"):
        bare.set_timesteps(4)


def test_constructors_refuse_what_does_not_go_together(tiny: Any) -> None:
    one, other = tiny.predictor(OneShot, NOISE, (1, 4, 4)), tiny.predictor(Recursive, NOISE, (1, 4, 4), steps=5)
    with pytest.raises(TsAdaptError, match="predictors of one kind"):
        LearnedScheduler.from_predictors([one, other], "unipc-3", CONFIG)
    with pytest.raises(TsAdaptError, match="for the same NFE"):
        LearnedScheduler.from_predictors([one, one], "unipc-3", CONFIG)
    with pytest.raises(TsAdaptError, match="learned with another noise: the beta table"):
        LearnedScheduler.from_predictors(one, "unipc-3", V_CONFIG)
    with pytest.raises(TsAdaptError, match="share a solver and differ in NFE"):
        LearnedScheduler.from_schedules([learned(4), learned(4)], CONFIG)
    with pytest.raises(TsAdaptError, match="at least one"):
        LearnedScheduler.from_schedules([], CONFIG)
    for make in (
        lambda: LearnedScheduler.from_grid(grid()),
        lambda: LearnedScheduler.from_schedules(learned(4), None),  # type: ignore[arg-type]
        lambda: LearnedScheduler.from_predictors(one, "unipc-3", None),  # type: ignore[arg-type]
    ):
        with pytest.raises(TsAdaptError, match=r"pass config=pipe.scheduler.config"):
            make()
    family = LearnedScheduler.from_grid("karras", solver="unipc")
    with pytest.raises(TsAdaptError, match="has no noise schedule yet; attach it"):
        family.set_timesteps(5)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], "list of numbers"),
        ([[1.0]], "list of numbers"),
        ([5, 7], "not decreasing"),
        ([2000, 5], "outside the noise"),
    ],
)
def test_bad_times_given_by_hand(times: Any, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        LearnedScheduler().set_timesteps(timesteps=times)
