"""Schedules in other programs' words: each list is read here by the rule of the program that it is for."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers import AysSchedules
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import noise_schedules
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed, parametric
from ts_adapt.grids.published import ays
from ts_adapt.interfaces import NoiseSchedule, TimeGrid
from ts_adapt.noise import ContinuousVP, Cosine, RectifiedFlow, VarianceExploding, edm_sigma
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.schedules.formats import (
    CLIPPED_SIGMA,
    READERS,
    WRITERS,
    is_flow,
    read_sigmas,
    read_timesteps,
    write_a1111,
    write_comfyui,
    write_sigmas,
    write_timesteps,
)

TABLE, ZERO_SNR = noise_schedules.NOISES["sd"], noise_schedules.NOISES["zero_snr"]
NOISES = [TABLE, ZERO_SNR, ContinuousVP(), Cosine(), VarianceExploding(), VarianceExploding(1e-5, 700), RectifiedFlow()]
NAMES = ["table", "zero-snr", "vp", "cosine", "ve", "wide-ve", "flow"]


def schedule(noise_schedule: NoiseSchedule, steps: int = 5, name: str = "log_snr") -> LearnedGrid:
    return LearnedGrid(TimeGrid(fixed.make(name, noise_schedule, steps)), "unipc-3", steps, {"model": "a/model"})


def as_manual_sigmas(text: str) -> list[float]:
    """ComfyUI's node takes what looks like a number, and knows no exponents."""
    return [float(word) for word in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]


def as_stable_diffusion_cpp(text: str) -> list[float]:
    """Between commas, stripped; a word that starts with no number is an error."""
    return [float(word.strip()) for word in text.split(",") if word.strip()]


def program_sigmas(noise_schedule: NoiseSchedule, times: Tensor) -> Tensor:
    if isinstance(noise_schedule, RectifiedFlow):
        return noise_schedule.sigma(times)
    return edm_sigma(noise_schedule, times).clamp(max=CLIPPED_SIGMA)


@pytest.mark.parametrize("noise_schedule", NOISES, ids=NAMES)
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_both_programs_read_the_same_falling_sigmas_that_end_in_0(noise_schedule: NoiseSchedule, steps: int) -> None:
    text, _ = write_sigmas(made := schedule(noise_schedule, steps), "title", noise_schedule)
    values = as_stable_diffusion_cpp(text)
    assert values == as_manual_sigmas(text)
    node = json.loads(write_comfyui(made, "title", noise_schedule)[0])["1"]
    assert node["class_type"] == "ManualSigmas" and node["_meta"]["title"] == "title"
    assert as_manual_sigmas(node["inputs"]["sigmas"]) == values
    assert len(values) == steps + 1 and values[-1] == 0
    single = torch.tensor(values, dtype=torch.float32)
    assert bool((single.diff() < 0).all())
    expected = program_sigmas(noise_schedule, made.grid.times)[:-1].float()
    assert torch.allclose(single[:-1], expected, rtol=1.2e-7, atol=0), "to the last bit of a float32"


@pytest.mark.parametrize("noise_schedule", NOISES, ids=NAMES)
def test_a_file_needs_no_model(noise_schedule: NoiseSchedule) -> None:
    made = schedule(noise_schedule)
    alone = LearnedGrid.parse(made.text(noise_schedule).encode(), "a.json")
    for kind in ("sigmas", "comfyui", "a1111", "json"):
        assert WRITERS[kind](alone, "t", None) == WRITERS[kind](made, "t", noise_schedule), kind


@pytest.mark.parametrize("noise_schedule", NOISES, ids=NAMES)
def test_only_the_times_of_a_flow_are_taken_for_those_of_a_flow(noise_schedule: NoiseSchedule) -> None:
    for steps in (1, 6):
        times = schedule(noise_schedule, steps).grid.times
        assert is_flow(times, noise_schedule.log_snr(times)) == isinstance(noise_schedule, RectifiedFlow)


@pytest.mark.parametrize("noise_schedule", NOISES, ids=NAMES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sigmas_written_and_read_are_the_schedule(noise_schedule: NoiseSchedule, steps: int) -> None:
    text, _ = write_sigmas(made := schedule(noise_schedule, steps), "", noise_schedule)
    times, remarks = read_sigmas(text, "the list", noise_schedule)
    assert times.shape == (steps + 1,) and times[0] == noise_schedule.t_max and times[-1] == noise_schedule.t_min
    assert torch.allclose(noise_schedule.log_snr(times)[1:-1], noise_schedule.log_snr(made.grid.times)[1:-1], atol=1e-8)
    reached = float(noise_schedule.log_snr(torch.tensor(noise_schedule.t_min))) == math.inf
    assert (len(remarks) == 0) == reached and all("t_min" in remark for remark in remarks)


def test_what_is_dropped_is_said() -> None:
    times = schedule(TABLE).grid.times
    ones = torch.ones(5, dtype=torch.float64)
    full = LearnedGrid(TimeGrid(times, times[:-1] - 1, ones, torch.zeros(5, 2)), "unipc-3", 5)
    for kind in ("sigmas", "comfyui", "a1111", "timesteps"):
        remarks = WRITERS[kind](full, "t", TABLE)[1]
        assert "the format cannot carry model times and output scale and coefficients: dropped" in remarks
        assert any("unipc-3" in remark for remark in remarks)
    assert WRITERS["json"](full, "t", TABLE)[1] == []
    assert not any("cannot carry" in remark for remark in write_sigmas(schedule(TABLE), "", TABLE)[1])


def test_the_changed_ends_are_said() -> None:
    assert any("is written as 0" in remark for remark in write_sigmas(schedule(TABLE), "", TABLE)[1])
    assert not any(
        "is written as 0" in remark for remark in write_sigmas(schedule(RectifiedFlow()), "", RectifiedFlow())[1]
    )
    assert any("zero terminal SNR" in remark for remark in write_sigmas(schedule(ZERO_SNR), "", ZERO_SNR)[1])


def test_sigmas_that_are_one_float32_are_refused() -> None:
    close = LearnedGrid(TimeGrid(torch.tensor([80.0, 1.0 + 1e-9, 1.0, 0.002], dtype=torch.float64)), "ddim", 3)
    with pytest.raises(TsAdaptError, match=r"sigmas 1 and 2 .* do not fall in float32"):
        write_sigmas(close, "", VarianceExploding())


# --- a1111


def executed(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(text, "a1111.py", "exec"), names)
    return names


@pytest.mark.parametrize("noise_schedule", NOISES, ids=NAMES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_a1111_file_gives_its_sigmas_and_interpolates_log_linearly(
    noise_schedule: NoiseSchedule, steps: int
) -> None:
    made = schedule(noise_schedule, steps, "karras")
    names = executed(write_a1111(made, "t", noise_schedule)[0])
    own = names["sigmas"](n=steps, sigma_min=0.03, sigma_max=14.6, inner_model=None, device=torch.device("cpu"))
    assert own.dtype == torch.float32
    assert torch.allclose(own[:-1], program_sigmas(noise_schedule, made.grid.times)[:-1].float(), rtol=1.2e-7, atol=0)
    assert own[-1] == 0
    nodes = torch.tensor(names["SIGMAS"], dtype=torch.float64)
    for n in (1, 2, 3, 8, 20):
        found = names["sigmas"](n=n, sigma_min=0.03, sigma_max=14.6, device="cpu")
        assert found.shape == (n + 1,) and found[-1] == 0 and bool((found.diff() < 0).all())
        place = torch.arange(n, dtype=torch.float64) * steps / n
        low = place.floor().long()
        expected = torch.lerp(nodes.log()[low], nodes.log()[low + 1], place - low)
        assert torch.allclose(found[:-1].double().log(), expected, atol=1e-6)


def test_the_a1111_file_interpolates_as_this_package_does() -> None:
    made = schedule(TABLE, 5, "karras")
    found = executed(write_a1111(made, "t", TABLE)[0])["sigmas"](9)
    own = edm_sigma(TABLE, parametric.interpolate(made.grid.times, TABLE, 9))
    assert torch.allclose(found[:-1].double(), own[:-1], rtol=1e-6)


@dataclass
class Scheduler:
    name: str
    label: str
    function: Callable[..., Tensor]


def test_the_a1111_file_adds_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ui = types.ModuleType("modules.sd_schedulers")
    ui.Scheduler, ui.schedulers, ui.schedulers_map = Scheduler, [Scheduler("karras", "Karras", print)], {}  # type: ignore[attr-defined]
    package = types.ModuleType("modules")
    package.sd_schedulers = ui  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modules", package)
    monkeypatch.setitem(sys.modules, "modules.sd_schedulers", ui)
    text, _ = write_a1111(schedule(TABLE), "My grid, NFE 5", TABLE)
    executed(text)
    names = executed(text)
    assert [entry.name for entry in ui.schedulers] == ["karras", "ts_adapt_my_grid_nfe_5"]
    assert (
        set(ui.schedulers_map)
        == {names["NAME"], names["LABEL"]}
        == {"ts_adapt_my_grid_nfe_5", "ts_adapt My grid, NFE 5"}
    )
    entry = ui.schedulers_map[names["LABEL"]]
    assert entry.function(n=5, sigma_min=0.1, sigma_max=10.0, device=torch.device("cpu")).shape == (6,)


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=20))
def test_words_of_a_schedule_never_become_code(title: str, model: str, key: str) -> None:
    noise_schedule = TABLE
    about = {"model": model + "\nraise SystemExit", f"{key}\nraise SystemExit": "'''\"\"\""}
    made = LearnedGrid(schedule(noise_schedule).grid, "ddim\nraise SystemExit", 5, about)
    names = executed(write_a1111(made, title, noise_schedule)[0])
    assert names["LABEL"] == f"ts_adapt {title}" and names["NAME"].isidentifier()


# --- timesteps


def test_timesteps_are_what_diffusers_takes() -> None:
    made = schedule(TABLE, 6)
    text, remarks = write_timesteps(made, "", TABLE)
    values = [int(word) for word in text.split(",")]
    scheduler = DPMSolverMultistepScheduler(**noise_schedules.SD)
    scheduler.set_timesteps(timesteps=values)
    assert scheduler.timesteps.tolist() == values and len(values) == 6
    wanted = edm_sigma(TABLE, torch.tensor(values, dtype=torch.float64))
    assert torch.allclose(scheduler.sigmas[:-1].double(), wanted, rtol=1e-4)
    assert any("rounded to integers" in remark for remark in remarks)
    times, _ = read_timesteps(text, "the list", TABLE)
    assert times.tolist() == [*values, 0]
    again, remarks = write_timesteps(LearnedGrid(TimeGrid(times), "ddim", 6), "", TABLE)
    assert again == text and not any("rounded" in remark for remark in remarks)


def test_timesteps_of_a_table_with_zero_terminal_snr() -> None:
    text, remarks = write_timesteps(schedule(ZERO_SNR, 4), "", ZERO_SNR)
    assert text.startswith("999,") and not any("nan" in remark for remark in remarks)


@pytest.mark.parametrize("noise_schedule", [ContinuousVP(), VarianceExploding(), RectifiedFlow()])
def test_models_without_a_table_have_no_timesteps(noise_schedule: NoiseSchedule) -> None:
    with pytest.raises(TsAdaptError, match=f"{type(noise_schedule).__name__}, has none; export sigmas"):
        write_timesteps(schedule(noise_schedule), "", noise_schedule)
    with pytest.raises(TsAdaptError, match=f"{type(noise_schedule).__name__}, has none; give sigmas"):
        read_timesteps("999, 400", "the list", noise_schedule)


# --- reading


@pytest.mark.parametrize("kind", ["StableDiffusion", "StableDiffusionXL"])
def test_the_published_ays_lists_are_read(kind: str) -> None:
    listed = AysSchedules[f"{kind}Timesteps"]
    times, remarks = read_timesteps(str(listed), "ays", TABLE)
    assert times.tolist() == [*listed, 0] and remarks == ["10 timesteps are 10 steps: the end, 0, is added"]
    assert torch.equal(times, read_timesteps(str([*listed, 0]), "ays", TABLE)[0])
    times, remarks = read_sigmas(str(AysSchedules[f"{kind}Sigmas"]), "ays", TABLE)
    table = {"StableDiffusion": "sd15", "StableDiffusionXL": "sdxl"}[kind]
    assert torch.allclose(times, ays(table, TABLE, 10), atol=1e-6)
    assert len(remarks) == 2 and "becomes 14.6146, the largest" in remarks[1] and "t_min" in remarks[0]


def test_a_0_behind_the_smallest_sigma_is_a_step_to_sigma_0() -> None:
    sigmas = edm_sigma(TABLE, fixed.make("karras", TABLE, 9)).tolist()
    times, remarks = read_sigmas(str([*sigmas, 0.0]), "karras", TABLE)
    assert torch.allclose(times[:-1], fixed.make("karras", TABLE, 9), atol=1e-6)
    assert times[-1] == TABLE.t_end < TABLE.t_min and not remarks
    flow = "1, 0.75, 0.001, 0"
    assert read_sigmas(flow, "flow", RectifiedFlow())[0].tolist() == [1, 0.75, 0.001, 0]


def test_a_list_with_ends_of_its_own_keeps_them() -> None:
    times, remarks = read_sigmas("7.5, 3, 1", "part", TABLE)
    assert torch.allclose(edm_sigma(TABLE, times), torch.tensor([7.5, 3, 1], dtype=torch.float64))
    assert len(remarks) == 2 and "starts at sigma 7.5" in remarks[0] and "ends at sigma 1" in remarks[1]
    assert "starts at timestep 600" in read_timesteps("600, 300", "part", TABLE)[1][-1]


@pytest.mark.parametrize(
    "text",
    ["14,5,1,0.5", "14, 5, 1, .5", "[14, 5, 1, 0.5]", "(14 5\n1 5e-1)", "14.\n5.0\r\n1\n0.5\n", "\t14 ,5,+1,0.5,",
     "[14, 5, 1, 0.5,]\n"],
)  # fmt: skip
def test_lists_are_read_however_they_are_separated(text: str) -> None:
    times, _ = read_sigmas(text, "the list", TABLE)
    assert torch.allclose(edm_sigma(TABLE, times), torch.tensor([14, 5, 1, 0.5], dtype=torch.float64))


BAD = {
    read_sigmas: [
        *((text, "is empty") for text in ("", " \n", "[]", ",")),
        ("14.6", "1 number"),
        ("14.6, nan, 0", "'nan' at place 1"),
        ("14.6, inf, 0", "'inf' at place 1"),
        ("1e999, 0", "'1e999' at place 0"),
        ("14.6, abc, 0", "'abc' at place 1"),
        ("14.6,,0", "'' at place 1"),
        ("14.6; 3; 0", "'14.6;' at place 0"),
        ("1_0, 0", "'1_0' at place 0"),
        ("0x10, 0", "'0x10' at place 0"),
        ('{"format": 1}', "'{\"format\":' at place 0"),
        ("14.6, 3, 3, 0", "sigma 3 at place 1 is there twice"),
        ("14.6, 3, 5, 0", "sigma 3 at place 1 is followed by 5"),
        ("0, 3, 14.6", "sigma 0 at place 0 is followed by 3"),
        ("14.6, 3, 0, 0", "sigma 0 at place 2 is there twice"),
        ("14.6, 3, 0, -1", "the sigma -1; sigmas are not negative"),
        ("80, 3, 0", "the sigma 80, outside the model's"),
        ("14.6, 3, 0.001", "the sigma 0.001, outside the model's"),
        ("14.6, " + "9" * 100_000, "999 at place 0|at place 1|is followed by"),
        (", ".join(str(20_000 - i) for i in range(20_000)), "more than 10001 numbers"),
    ],
    read_timesteps: [
        ("", "is empty"),
        ("0", "at least 2"),
        ("1000, 500", "the timestep 1000; those of the model run from 999 down to 0"),
        ("900, 500, -1", "the timestep -1"),
        ("900, 500, 500", "timestep 500 at place 1 is there twice"),
        ("13, 53, 116", "timestep 13 at place 0 is followed by 53"),
        ("999, x", "'x' at place 1"),
    ],
}


@pytest.mark.parametrize(("read", "text", "expected"), [(read, *case) for read, cases in BAD.items() for case in cases])
def test_a_bad_list_is_one_sentence(read: Any, text: str, expected: str) -> None:
    with pytest.raises(TsAdaptError, match=expected) as caught:
        read(text, "the list", TABLE)
    assert str(caught.value).startswith("the list") and "\n" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_a_grid_or_one_sentence(text: str) -> None:
    for reader in READERS.values():
        try:
            times, _ = reader(text, "the list", TABLE)
        except TsAdaptError as error:
            assert str(error).startswith("the list")
        else:
            assert bool((times.diff() < 0).all())
