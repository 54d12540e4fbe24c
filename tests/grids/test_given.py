"""Times from sigmas and timesteps: there and back, for tables and flows; what is changed is said."""

from __future__ import annotations

import pytest
import torch

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.given import CLIPPED_SIGMA, from_sigmas, from_timesteps
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.noise import BetaTable, RectifiedFlow, VarianceExploding, edm_sigma

TABLE = BetaTable(torch.linspace(1e-4, 0.02, 1000))
ZERO_SNR = BetaTable.from_config({"rescale_betas_zero_snr": True})


@pytest.mark.parametrize("noise_schedule", [TABLE, RectifiedFlow(), VarianceExploding()])
def test_sigmas_there_and_back(noise_schedule: NoiseSchedule) -> None:
    times = fixed.make("karras", noise_schedule, 6)
    sigmas = times if isinstance(noise_schedule, RectifiedFlow) else edm_sigma(noise_schedule, times)
    found, remarks = from_sigmas(sigmas.tolist(), noise_schedule, "the list")
    torch.testing.assert_close(found, times, rtol=1e-9, atol=1e-9)
    assert not remarks and (float(found[0]), float(found[-1])) == (noise_schedule.t_max, noise_schedule.t_min)


@pytest.mark.parametrize(
    ("noise_schedule", "scale"), [(TABLE, 1.0), (RectifiedFlow(), 1000.0), (RectifiedFlow(time_scale=1), 1.0)]
)
def test_timesteps_there_and_back(noise_schedule: NoiseSchedule, scale: float) -> None:
    times = fixed.make("karras", noise_schedule, 6)
    for given in (times, times[:-1]):
        found, remarks = from_timesteps((given * scale).tolist(), noise_schedule, "the list")
        torch.testing.assert_close(found, times, rtol=1e-12, atol=1e-12)
        assert len(remarks) == 7 - len(given)


def test_the_clipped_sigma_of_zero_terminal_snr_is_infinite() -> None:
    times, remarks = from_sigmas([CLIPPED_SIGMA, 10.0, 1.0, 0.0], ZERO_SNR, "the list")
    assert float(times[0]) == ZERO_SNR.t_max and not any("pure noise" in remark for remark in remarks)
    assert "starts at sigma 10, not at pure noise (inf)" in from_sigmas([10.0, 1.0, 0.0], ZERO_SNR, "the list")[1][-1]
    torch.testing.assert_close(edm_sigma(ZERO_SNR, times[1:3]), torch.tensor([10.0, 1.0]).double())


@pytest.mark.parametrize(("name", "steps"), [("karras", 2), ("karras", 6), ("ddim", 1), ("ddim", 6), ("log_snr", 6)])
def test_a_list_to_sigma_0_behind_the_last_timestep_comes_back(name: str, steps: int) -> None:
    times = fixed.make(name, TABLE, steps, native=True)
    found, remarks = from_sigmas(edm_sigma(TABLE, times).tolist(), TABLE, "the list")
    torch.testing.assert_close(found, times, rtol=1e-9, atol=1e-9)
    assert not any("left out" in remark for remark in remarks)


def test_a_0_that_is_reached_nowhere_is_one_step_fewer() -> None:
    times, (remark,) = from_sigmas([80.0, 1.0, 0.002, 0.0], VarianceExploding(), "the list")
    torch.testing.assert_close(times, torch.tensor([80.0, 1.0, 0.002]).double())
    assert "one step fewer" in remark


def test_ends_of_another_schedule_are_named() -> None:
    for read, given, noise_schedule, message in (
        (from_timesteps, [1200, 500], RectifiedFlow(), "the timestep 1200; those of the model run from 1000 down to 0"),
        (from_sigmas, [14.6, 1.0, 0.0], RectifiedFlow(), r"the sigma 14.6, outside the model's \[0, 1\]"),
        (from_sigmas, [3.0, float("nan"), 0.0], TABLE, "the sigma nan at place 1"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            read(given, noise_schedule, "the list")
    assert "starts at sigma 3, not at pure noise" in from_sigmas([3.0, 1.0, 0.0], TABLE, "the list")[1][-1]
