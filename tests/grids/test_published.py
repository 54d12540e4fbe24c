"""Align Your Steps: the tables, their interpolation and range; rounding to integer timesteps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules

from noise_schedules import NOISES, assert_falls
from noise_schedules import SD as CONFIG
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import make
from ts_adapt.grids.published import TABLES, ays, round_to_timesteps
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.noise import BetaTable, RectifiedFlow, VarianceExploding

SD = NOISES["sd"]
SVD = VarianceExploding(t_min=0.002, t_max=700.0)
OWN: list[tuple[str, NoiseSchedule]] = [("sd15", SD), ("sdxl", SD), ("svd", SVD)]
PUBLISHED: dict[str, Any] = AysSchedules
KEYS = {"sd15": "StableDiffusionSigmas", "sdxl": "StableDiffusionXLSigmas", "svd": "StableDiffusionVideoSigmas"}


@pytest.mark.parametrize("table", sorted(TABLES))
def test_tables_equal_those_of_diffusers(table: str) -> None:
    assert [*TABLES[table].sigmas, 0.0] == PUBLISHED[KEYS[table]]


@pytest.mark.parametrize("key", ["StableDiffusionTimesteps", "StableDiffusionXLTimesteps"])
def test_times_agree_with_the_published_integer_timesteps(key: str) -> None:
    table = "sdxl" if "XL" in key else "sd15"
    worst = max(abs(a - b) for a, b in zip(ays(table, SD, 10)[:-1].tolist(), PUBLISHED[key], strict=True))
    assert worst < (2.0 if table == "sd15" else 6.0)  # the authors rounded, the more so in the SDXL sigmas


@pytest.mark.parametrize(("table", "noise_schedule"), OWN)
@pytest.mark.parametrize("steps", [1, 2, 5, 7, 10, 20, 33])
def test_log_sigma_is_that_of_the_table_interpolated_between_the_shared_ends(
    table: str, noise_schedule: NoiseSchedule, steps: int
) -> None:
    nodes = np.log([*TABLES[table].sigmas, TABLES[table].sigma_min])
    expected = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), nodes)
    times = ays(table, noise_schedule, steps)
    np.testing.assert_allclose(-noise_schedule.log_snr(times).numpy()[1:-1], expected[1:-1], rtol=1e-9)
    assert_falls(times, noise_schedule, steps)


@pytest.mark.parametrize(
    ("table", "noise_schedule"), [("svd", SD), ("sd15", SVD), ("sd15", RectifiedFlow()), ("svd", VarianceExploding())]
)
def test_a_table_for_another_range_is_refused_unless_rescaled(table: str, noise_schedule: NoiseSchedule) -> None:
    with pytest.raises(TsAdaptError, match="rescale=True"):
        ays(table, noise_schedule, 10)
    assert_falls(ays(table, noise_schedule, 10, rescale=True), noise_schedule, 10)


def test_rescaling_is_affine_in_log_sigma() -> None:
    noise_schedule = VarianceExploding()
    own, other = ays("svd", SVD, 10).log(), ays("svd", noise_schedule, 10, rescale=True).log()
    slope = math.log(80 / 0.002) / math.log(700 / 0.002)
    torch.testing.assert_close(other - other[-1], slope * (own - own[-1]))


def test_native_starts_at_the_table_and_ends_in_sigma_0_where_it_can() -> None:
    to_zero = VarianceExploding(t_min=0.0, t_max=705.0)
    native = ays("svd", to_zero, 10, native=True)
    torch.testing.assert_close(native, torch.tensor([*TABLES["svd"].sigmas, 0.0], dtype=torch.float64))
    assert float(ays("svd", to_zero, 10)[0]) == 705.0
    assert float(SD.sigma(ays("sd15", SD, 10, native=True)[-1])) == 0


@pytest.mark.parametrize(
    ("table", "key"), [("sd15", "StableDiffusionTimesteps"), ("sdxl", "StableDiffusionXLTimesteps")]
)
def test_the_original_of_a_table_is_of_the_authors_integers(table: str, key: str) -> None:
    """For 10 steps as published; for others log s interpolated as they do it, the nearest of the table's sigmas."""
    assert ays(table, SD, 10, native=True)[:-1].tolist() == PUBLISHED[key]
    sigmas = np.exp(-SD.log_snr(torch.arange(1000, dtype=torch.float64)).numpy())
    for steps in (1, 3, 5, 7, 20, 25):
        nodes = np.log([*TABLES[table].sigmas, TABLES[table].sigma_min])[::-1]
        found = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), nodes))[::-1]
        nearest = [int(np.abs(sigmas - sigma).argmin()) for sigma in found[:-1]]
        assert ays(table, SD, steps, native=True)[:-1].tolist() == nearest


def test_the_authors_integers_are_those_of_a_table_of_a_thousand() -> None:
    """Of one of another length with the same ends, the timesteps nearest to the published sigmas."""
    shorter = SD.log_snr(torch.linspace(0, 999, 500, dtype=torch.float64))
    alpha2 = torch.sigmoid(2 * shorter)
    table = BetaTable(1 - torch.cat([alpha2[:1], alpha2[1:] / alpha2[:-1]]))
    found = ays("sd15", table, 10, native=True)
    sigmas = np.exp(-table.log_snr(torch.arange(500, dtype=torch.float64)).numpy())
    nearest = [int(np.abs(sigmas - sigma).argmin()) for sigma in TABLES["sd15"].sigmas]
    assert found.tolist() == [*nearest, -1] and found[0] == 499


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(TsAdaptError, match="steps is 0"):
        ays("sd15", SD, 0)


@pytest.mark.parametrize("config", [CONFIG, {}, {**CONFIG, "rescale_betas_zero_snr": True}])
def test_rounding_takes_the_timestep_nearest_in_log_sigma(config: dict[str, object]) -> None:
    noise_schedule = BetaTable.from_config(config)
    times = torch.stack([make("linear", noise_schedule, 13), make("quadratic", noise_schedule, 13)])
    table = noise_schedule.log_snr(torch.arange(1000, dtype=torch.float64))
    nearest = (noise_schedule.log_snr(times[:, 1:-1])[..., None] - table).abs().argmin(-1)
    rounded = round_to_timesteps(times, noise_schedule)
    assert torch.equal(rounded[:, 1:-1], nearest.double())
    assert torch.equal(rounded[:, [0, -1]], times[:, [0, -1]])
    assert torch.equal(round_to_timesteps(rounded, noise_schedule), rounded)


def test_rounding_refuses_duplicates_and_names_the_places() -> None:
    times = torch.tensor([999.0, 500.4, 500.2, 3.1, 2.9, 0.0], dtype=torch.float64)
    for given, noise_schedule, message in (
        (times, SD, "places 1 and 2, 3 and 4;"),
        (torch.stack([make("linear", SD, 5), times]), SD, "places 1 and 2 of sample 1"),
        (torch.tensor([1.0, 0.0]), RectifiedFlow(), "BetaTable"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            round_to_timesteps(given, noise_schedule)
