"""`compare`: what it says is the distance to the fine solve, of every schedule on the same noises."""

from __future__ import annotations

import pytest
import torch

import ts_adapt
from ts_adapt.denoisers.analytic import example_mixture
from ts_adapt.errors import TsAdaptError


def test_distances_are_those_to_the_fine_solve() -> None:
    denoiser = example_mixture()
    noise_schedule = denoiser.noise_schedule
    learned = ts_adapt.LearnedGrid(ts_adapt.build_grid("linear", noise_schedule, 4), "ddim", 4, {"method": "static"})
    found = ts_adapt.compare(denoiser, ["karras", learned], "unipc-2", steps=3, samples=6, teacher_steps=20)
    assert [(side.name, side.schedule.solver, side.schedule.nfe) for side in found.sides] == [
        ("karras", "unipc-2", 3), ("static", "ddim", 4)
    ]  # fmt: skip
    x_T = ts_adapt.initial_noise(0, range(6), denoiser.shape)
    fine = ts_adapt.build_grid("log_snr", noise_schedule, 20)
    target = ts_adapt.integrate(denoiser, ts_adapt.build_solver("unipc-3", noise_schedule), fine, x_T).x
    assert torch.equal(ts_adapt.teacher_batch(denoiser, range(6), steps=20).target, target)
    for side in found.sides:
        solver = ts_adapt.build_solver(side.schedule.solver, noise_schedule)
        end = ts_adapt.integrate(denoiser, solver, side.schedule.grid, x_T).x
        apart = (end - target).square().flatten(1).mean(1)
        torch.testing.assert_close(
            torch.tensor([side.distance, side.median]), torch.stack([apart.mean(), apart.median()])
        )
    assert all(name in text for text in (repr(found), found._repr_markdown_()) for name in ("karras", "static"))
    for figure in (found.figure(), learned.plot(noise_schedule)):
        assert len(figure.axes[0].lines) == len({line.get_label() for line in figure.axes[0].lines}) > 0


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(TsAdaptError, match="no schedules"):
        ts_adapt.compare(example_mixture(), [])
