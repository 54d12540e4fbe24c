"""The scheduler by itself: the steps of `integrate`, for any solver of one evaluation and any step policy."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from own_loops import CONFIG, FLOW, NOISE, V_CONFIG, X_T, Smooth, by_hand, grid, our_own
from ts_adapt.assembly import SOLVERS, build_solver
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import BetaTable
from ts_adapt.policies import FromNoise, as_policy
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.resolve import build_grid

ONE_EVALUATION = [name for name in SOLVERS if name != "heun"] + ["dpmpp-2m+corrector", "ddim+corrector"]


@pytest.mark.parametrize("solver", ONE_EVALUATION)
@pytest.mark.parametrize("config", [CONFIG, V_CONFIG], ids=["epsilon", "v"])
def test_steps_are_those_of_integrate(solver: str, config: Any) -> None:
    schedule = LearnedScheduler.from_grid(grid(), solver, config)
    found = by_hand(schedule, 5, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    expected = our_own(schedule, grid(), step_noise=lambda step: torch.randn(X_T.shape, generator=generator))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


ZERO_SNR = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).config


@pytest.mark.parametrize(
    ("name", "solver", "config"),
    [
        *((name, "unipc", CONFIG) for name in ("karras", "ddim+native", "karras+rounded", "ays-sd15")),
        *(("karras", solver, FLOW) for solver in ("unipc-3", "dpmpp-3m", "ipndm-4", "euler")),
        ("uniform", "unipc-2", ZERO_SNR),
    ],
)
def test_fixed_grids_by_name(name: str, solver: str, config: Any) -> None:
    """Of a flow both ends are at infinite log-SNR, with zero terminal SNR the first."""
    schedule = LearnedScheduler.from_grid(name, solver, config)
    expected, found = build_grid(name, schedule.noise_schedule, 6), by_hand(schedule, 6)
    torch.testing.assert_close(found, our_own(schedule, expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(schedule.timesteps, schedule.noise_schedule.timestep(expected.times[:-1]).float())
    assert torch.isfinite(found).all()


def corrected(order: int, own: bool) -> TimeGrid:
    """A grid with all corrections, shared or each sample's own, for a solver of `order`."""
    factor = torch.linspace(0.95, 1.0, 3).double()[:, None] if own else torch.ones(()).double()
    times = grid().times
    times = torch.cat(
        [part.expand(*factor.shape[:1], -1) for part in (times[:1], factor * times[1:-1], times[-1:])], -1
    )
    scale, spread = torch.linspace(0.95, 1.05, 5).double(), torch.linspace(-0.05, 0.05, 5 * order).double()
    return TimeGrid(times, 0.97 * times[..., :-1], factor * scale, factor[..., None] * spread.reshape(5, order))


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("solver", ONE_EVALUATION)
def test_corrections_of_a_grid_are_followed(solver: str, own: bool) -> None:
    given = corrected(build_solver(solver, NOISE).order, own)
    schedule = LearnedScheduler.from_grid(given, solver, CONFIG)

    def expected(followed: TimeGrid | Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return our_own(schedule, followed, step_noise=lambda step: torch.randn(X_T.shape, generator=generator))

    found = by_hand(schedule, 5, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, expected(given), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, expected(given.times), rtol=1e-3)


@pytest.mark.parametrize("served", [(4,), (3, 4, 6)])
@pytest.mark.parametrize("kind", [OneShot, Recursive])
def test_predictors_by_hand(kind: Any, served: tuple[int, ...], tiny: Any) -> None:
    """At every number of steps that they serve, one after the other, learned or not."""
    predictor = tiny.predictor(kind, NOISE, (1, 4, 4), *served)
    schedule = LearnedScheduler.from_predictors(predictor, "unipc-3", CONFIG)
    for steps in (*served, *((5, 7, 2) if len(served) > 1 else ()), served[0]):
        said = nullcontext() if steps in served else pytest.warns(UserWarning, match=f"not trained for {steps} steps")
        with torch.no_grad(), said:
            found, expected = by_hand(schedule, steps), our_own(schedule, predictor.policy(steps))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", [name for name in ONE_EVALUATION if name != "ddpm"])
@pytest.mark.parametrize("begin", [0, 3, 8, 9])
def test_a_loop_over_the_later_timesteps_begins_there(begin: int, solver: str) -> None:
    """Along alpha x0 + sigma eps with a network that knows eps, every solver is exact, whatever the place."""
    schedule = LearnedScheduler.from_grid("uniform", solver, CONFIG)
    schedule.set_timesteps(10)
    one, timesteps = torch.ones(3, 1, 4, 4), schedule.timesteps[begin:]
    x = schedule.add_noise(one, one, timesteps[:1])
    for place, t in enumerate(timesteps, begin + 1):
        x = schedule.step(one, t, x).prev_sample
        assert schedule.step_index == place
        after = torch.tensor(0.0) if place == 10 else schedule.timesteps[place]
        torch.testing.assert_close(x, schedule.add_noise(one, one, after), rtol=1e-5, atol=1e-5)
    assert schedule.begin_index == begin


FORMS: dict[str, Any] = {
    "float": float,
    "whole": int,
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float64": lambda t: t.double(),
    "of each": lambda t: t.expand(3),
    "numpy": lambda t: t.numpy(),
    "copy": lambda t: t.clone(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [CONFIG, FLOW], ids=["betas", "flow"])
def test_timesteps_in_whatever_form_a_loop_hands_them_on(config: Any, form: str) -> None:
    schedule = LearnedScheduler.from_grid("karras", "unipc-3", config)
    schedule.set_timesteps(6)
    ends = []
    for handed in (lambda t: t, FORMS[form]):
        schedule.set_timesteps(6)
        x = X_T
        for t in schedule.timesteps[2:]:
            x = schedule.step(Smooth()(x, t), handed(t), x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)


def test_a_timestep_that_is_not_the_next_is_refused() -> None:
    schedule = LearnedScheduler.from_grid(grid(), "unipc-2", CONFIG)
    schedule.set_timesteps(5)
    t = schedule.timesteps
    for wrong in (5.0, t[1] + 1, torch.tensor(1e9), float("nan"), -1):
        with pytest.raises(TsAdaptError, match=r"is not the next of the run, which is 999 at place 0 of 5"):
            schedule.step(X_T, wrong, X_T)
    for wrong in ("x", None, torch.empty(0), [[]]):
        with pytest.raises(TsAdaptError, match="takes one of the timesteps; got"):
            schedule.step(X_T, wrong, X_T)
    schedule.step(X_T, t[1], X_T)
    for wrong in (t[0], t[1], t[3], float(t[4])):
        with pytest.raises(
            TsAdaptError, match=r"is not the next of the run, .* at place 2 of 5; hand step\(\) the time"
        ):
            schedule.step(X_T, wrong, X_T)
    schedule.step(X_T, t[2], X_T)
    schedule.set_timesteps(5)
    schedule.set_begin_index(2)
    with pytest.raises(TsAdaptError, match="is not the next of the run"):
        schedule.step(X_T, t[3], X_T)
    schedule.step(X_T, t[2], X_T)


@pytest.mark.parametrize("known", [True, False], ids=["set_begin_index", "timestep"])
def test_a_recursive_schedule_begins_inside_and_tells_the_network_its_times(known: bool, tiny: Any) -> None:
    predictor = tiny.predictor(Recursive, NOISE, (1, 4, 4))
    schedule = LearnedScheduler.from_predictors(predictor, "unipc-3", CONFIG)
    schedule.set_timesteps(4)
    x, timesteps = X_T, schedule.timesteps[2:]
    if known:
        schedule.set_begin_index(2)
    else:
        with pytest.raises(TsAdaptError, match=r"told the time of place 0 of the run and the step is that of place 2"):
            schedule.step(Smooth()(x, schedule.network_timesteps(x)), timesteps[0], x)
    with torch.no_grad():
        for t in timesteps:
            told = schedule.network_timesteps(x, timestep=None if known else t)
            x = schedule.step(Smooth()(x, told), t, x).prev_sample
        torch.testing.assert_close(x, our_own(schedule, predictor.policy(first=2)), rtol=1e-6, atol=1e-6)


def test_a_loop_over_the_later_timesteps_of_what_sees_pure_noise_is_refused(tiny: Any) -> None:
    oneshot = LearnedScheduler.from_predictors(tiny.predictor(OneShot, NOISE, (1, 4, 4)), "unipc-3", CONFIG)
    oneshot.set_timesteps(4)
    for use in (lambda t: oneshot.network_timesteps(X_T, timestep=t), lambda t: oneshot.step(X_T, t, X_T)):
        with pytest.raises(TsAdaptError, match="cannot begin inside, as img2img does"):
            use(oneshot.timesteps[1])


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_sample_keeps_its_precision_and_half_is_computed_in_float32(dtype: torch.dtype) -> None:
    schedule = LearnedScheduler.from_grid(grid(), "unipc-2", CONFIG)
    x, raw = X_T.to(dtype), torch.randn_like(X_T).to(dtype)
    ends = []
    for state, prediction in ((x, raw), (x.float(), raw.float())):
        schedule.set_timesteps(5)
        ends.append(schedule.step(prediction, schedule.timesteps[0], state))
    assert ends[0].prev_sample.dtype == ends[0].pred_original_sample.dtype == dtype
    torch.testing.assert_close(ends[0].prev_sample, ends[1].prev_sample.to(dtype), rtol=1e-6, atol=1e-6)


def test_learned_variances_are_dropped_and_x0_is_clipped_when_asked() -> None:
    raw = torch.randn(3, 2, 4, 4)
    plain = LearnedScheduler.from_grid("uniform", "ddim", CONFIG)
    clipped = LearnedScheduler.from_grid("uniform", "ddim", CONFIG, clip_x0=True)
    for schedule in (plain, clipped):
        schedule.set_timesteps(3)
    out = plain.step(raw, 999, X_T)
    assert out.prev_sample.shape == X_T.shape and float(out.pred_original_sample.abs().max()) > 1
    assert float(clipped.step(raw, 999, X_T).pred_original_sample.abs().max()) == 1
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
    in_full = of_flow.add_noise(x.double(), eps.double(), torch.tensor([300.0]))
    torch.testing.assert_close(in_full, 0.7 * x.double() + 0.3 * eps.double(), rtol=1e-14, atol=1e-14)


def test_from_config_takes_over_betas_and_prediction_type() -> None:
    schedule = LearnedScheduler.from_config(V_CONFIG, grid="karras", solver="unipc")
    assert schedule.config["solver"] == "unipc-2" and schedule.prediction == "v"
    t = torch.arange(999.0)
    torch.testing.assert_close(schedule.noise_schedule.log_snr(t), BetaTable.from_config(V_CONFIG).log_snr(t))
    again = LearnedScheduler.from_config(schedule.config)
    assert {**again.config} == {**schedule.config}
    assert DDIMScheduler.from_config(schedule.config).config["prediction_type"] == "v_prediction"
    assert LearnedScheduler.from_config(FLOW).prediction == "velocity"
