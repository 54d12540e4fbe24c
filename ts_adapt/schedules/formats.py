"""Schedules as other programs write and read them.

    sigmas      s_0, s_1, .., s_{N-1}, 0 with commas between: stable-diffusion.cpp's --sigmas, ComfyUI's ManualSigmas
    comfyui     the same list inside a ManualSigmas node, as ComfyUI's API format
    a1111       a Python file that adds the list to the schedulers of AUTOMATIC1111's web UI and of Forge
    timesteps   N integers, the timesteps of a table of betas at which the network is evaluated (diffusers' `timesteps`)
    json        the portable file of `schedules.file`, which alone carries everything

The sigma of these programs is sigma_t / alpha_t (k-diffusion's, EDM's) for epsilon and v models and for VE, and t
itself for rectified flows. A schedule is known to be one of a flow by its numbers: alpha_t = 1 - t, sigma_t = t gives

    sigma_t / alpha_t = t / (1 - t)      at every time of the grid, which no other noise schedule does.

Ends. The programs denoise fully in their last step, to sigma 0, where a grid of ours may end at a small sigma
(t_min): writing replaces the last sigma by 0. A first sigma that is infinite (zero terminal SNR) is written as these
programs clip it. Reading undoes both (`grids.given`).

ManualSigmas finds its numbers by the pattern [-+]?digits[.digits], without exponents, so none are written; the programs
compute in float32, for which nine digits suffice. For other numbers of steps the a1111 file interpolates as AYS does
(Sabour et al. 2024): log s linear in i/n through s_0 .. s_N, the last one then replaced by 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from decimal import Decimal

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.given import CLIPPED_SIGMA, from_sigmas, from_timesteps
from ts_adapt.grids.published import round_to_timesteps
from ts_adapt.interfaces import MAX_STEPS, NoiseSchedule
from ts_adapt.noise import BetaTable
from ts_adapt.schedules.file import LearnedGrid

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_SEPARATOR = re.compile(r"\s*,\s*|\s+")

Written = tuple[str, list[str]]
"""A format's text, and a sentence for each thing that it changes or drops."""


def is_flow(times: Tensor, log_snr: Tensor) -> bool:
    """Whether the times `(N+1,)` and log-SNR `(N+1,)` are those of a rectified flow."""
    inside = (times >= 0) & (times <= 1)
    return bool(inside.all()) and torch.allclose(torch.sigmoid(-log_snr), times, rtol=1e-9, atol=1e-12)


def program_sigmas(schedule: LearnedGrid, noise_schedule: NoiseSchedule | None = None) -> tuple[Tensor, list[str]]:
    """The sigmas of other programs at the schedule's times, `(N+1,)`, float64, the last one still its own; all remarks.

    `noise_schedule` is that of the model, and may be left out where the schedule knows its log-SNR. Raises TsAdaptError
    if neither is known, or if two sigmas are the same number in float32.
    """
    times, log_snr = schedule.grid.times, schedule.log_snr
    if noise_schedule is not None:
        sigmas = noise_schedule.program_sigma(times)
    elif log_snr is not None:
        sigmas = times if is_flow(times, log_snr) else torch.exp(-log_snr)
    else:
        raise TsAdaptError("the schedule does not tell its log-SNR; give the model that it is for")
    remarks, last = _dropped(schedule), float(sigmas[-1])
    if math.isinf(float(sigmas[0])):
        sigmas = torch.cat([sigmas.new_tensor([CLIPPED_SIGMA]), sigmas[1:]])
        remarks.append(f"the first sigma is infinite (zero terminal SNR) and is written as {CLIPPED_SIGMA:.6g}")
    if last != 0:
        remarks.append(f"the last sigma, {last:.4g}, is written as 0: these programs denoise fully in their last step")
    single = sigmas.to(torch.float32)
    falls = single.diff() < 0
    if not bool(falls.all()):
        place = int((~falls).nonzero()[0])
        raise TsAdaptError(
            f"sigmas {place} and {place + 1} of the schedule, {float(sigmas[place]):.9g} and "
            f"{float(sigmas[place + 1]):.9g}, do not fall in float32; other programs need a grid of fewer steps"
        )
    return sigmas, remarks


def write_sigmas(schedule: LearnedGrid, title: str, noise_schedule: NoiseSchedule | None = None) -> Written:
    """`s_0,..,s_{N-1},0`: N + 1 numbers without exponents."""
    sigmas, remarks = program_sigmas(schedule, noise_schedule)
    return ",".join(_ending_in_0(sigmas)) + "\n", remarks


def write_comfyui(schedule: LearnedGrid, title: str, noise_schedule: NoiseSchedule | None = None) -> Written:
    """A ManualSigmas node named `title`, as a workflow in API format: dropped on the canvas, it becomes that node."""
    sigmas, remarks = program_sigmas(schedule, noise_schedule)
    inputs = {"sigmas": ", ".join(_ending_in_0(sigmas))}
    node = {"class_type": "ManualSigmas", "inputs": inputs, "_meta": {"title": title}}
    return json.dumps({"1": node}, indent=2) + "\n", remarks


def write_a1111(schedule: LearnedGrid, title: str, noise_schedule: NoiseSchedule | None = None) -> Written:
    """A Python file with the function `sigmas(n, sigma_min, sigma_max, inner_model, device)`, which adds itself."""
    sigmas, remarks = program_sigmas(schedule, noise_schedule)
    positive = sigmas.tolist()
    if positive[-1] == 0:  # the node that other numbers of steps interpolate towards
        positive[-1] = positive[-2] ** 2 / positive[-3] if len(positive) > 2 else positive[-2] / 1000
    known = {"solver": schedule.solver, "nfe": schedule.nfe}
    known |= {key: value for key, value in schedule.about.items() if isinstance(value, str | int)}
    text = A1111.format(
        name=ascii("ts_adapt_" + re.sub(r"[^0-9a-z]+", "_", title.lower()).strip("_")),
        label=ascii(f"ts_adapt {title}"),
        about="\n".join(f"# {key.encode('unicode_escape').decode()}: {value!a}" for key, value in known.items()),
        sigmas="".join(f"    {_plain(value)},\n" for value in positive),
    )
    return text, remarks


def write_timesteps(schedule: LearnedGrid, title: str, noise_schedule: NoiseSchedule | None = None) -> Written:
    """`t_0,..,t_{N-1}`: the N evaluations, each at the integer timestep nearest in log sigma."""
    if noise_schedule is None:
        raise TsAdaptError("timesteps are rounded by a table of betas; give the model that the schedule is for")
    _require_table(noise_schedule, "the schedule has no timesteps", "export sigmas")
    times = schedule.grid.times[:-1]
    rounded = round_to_timesteps(schedule.grid.times, noise_schedule)[:-1]
    remarks = ["the end of the grid is not in the list: the scheduler that reads it adds its own"]
    moved = rounded != times
    if bool(moved.any()):
        most = float((noise_schedule.log_snr(rounded[moved]) - noise_schedule.log_snr(times[moved])).abs().max())
        remarks.append(f"the times are rounded to integers, which moves sigma by up to {100 * math.expm1(most):.2g} %")
    return ",".join(str(round(t)) for t in rounded.tolist()) + "\n", [*_dropped(schedule), *remarks]


def write_json(schedule: LearnedGrid, title: str, noise_schedule: NoiseSchedule | None = None) -> Written:
    """The portable file, from which nothing is dropped."""
    return schedule.text(noise_schedule), []


def read_sigmas(text: str, what: str, noise_schedule: NoiseSchedule) -> tuple[Tensor, list[str]]:
    """The times `(N+1,)` of N + 1 sigmas for a model with `noise_schedule`, and remarks: see `grids.given.from_sigmas`.

    Raises TsAdaptError, naming `what`, for anything but N + 1 falling numbers within the range.
    """
    return from_sigmas(_numbers(text, what), noise_schedule, what)


def read_timesteps(text: str, what: str, noise_schedule: NoiseSchedule) -> tuple[Tensor, list[str]]:
    """The times `(N+1,)` of N timesteps, or of N + 1 whose last is t_min, for a table of betas; remarks.

    Raises TsAdaptError, naming `what`, for another noise schedule, or anything but falling timesteps of the table.
    """
    _require_table(noise_schedule, f"{what} cannot be read as timesteps", "give sigmas")
    return from_timesteps(_numbers(text, what, least=1), noise_schedule, what)


def _require_table(noise_schedule: NoiseSchedule, complaint: str, instead: str) -> None:
    if not isinstance(noise_schedule, BetaTable):
        raise TsAdaptError(
            f"{complaint}: they are those of a table of betas, and the model's noise schedule, "
            f"{type(noise_schedule).__name__}, has none; {instead}"
        )


def _numbers(text: str, what: str, *, least: int = 2) -> list[float]:
    """The numbers of a list with commas or white space between, in brackets or not."""
    body = text.strip()
    if len(body) > 1 and body[0] + body[-1] in ("[]", "()"):
        body = body[1:-1].strip()
    body = body.removesuffix(",").rstrip()
    if not body:
        raise TsAdaptError(f"{what} is empty; give numbers with commas between them")
    words = _SEPARATOR.split(body, MAX_STEPS + 1)
    values: list[float] = []
    for place, word in enumerate(words[: MAX_STEPS + 1]):
        if not _NUMBER.fullmatch(word) or not math.isfinite(float(word)):
            raise TsAdaptError(
                f"{what} holds {word[:40]!r} at place {place}, which is no finite number; "
                "give numbers with commas between them"
            )
        values.append(float(word))
    if len(words) < least:
        raise TsAdaptError(f"{what} holds {len(words)} number; a grid of one step has {least}")
    if len(words) > MAX_STEPS + 1:
        raise TsAdaptError(
            f"{what} holds more than {MAX_STEPS + 1} numbers; a grid of {MAX_STEPS} steps is the longest"
        )
    return values


def _plain(value: float) -> str:
    """`value` with nine significant digits and no exponent."""
    text = format(Decimal(f"{value:.9g}"), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _ending_in_0(sigmas: Tensor) -> list[str]:
    return [*(_plain(value) for value in sigmas[:-1].tolist()), "0"]


def _dropped(schedule: LearnedGrid) -> list[str]:
    """What is to be said of all that a list of numbers cannot carry."""
    lost = [name.replace("_", " ") for name in schedule.grid.corrections]
    remarks = [f"the format cannot carry {' and '.join(lost)}: dropped"] if lost else []
    return [*remarks, f"the solver is not carried along: the schedule is for {schedule.solver}, choose the like of it"]


WRITERS: dict[str, Callable[[LearnedGrid, str, NoiseSchedule | None], Written]] = {
    "json": write_json,
    "sigmas": write_sigmas,
    "comfyui": write_comfyui,
    "a1111": write_a1111,
    "timesteps": write_timesteps,
}
READERS: dict[str, Callable[[str, str, NoiseSchedule], tuple[Tensor, list[str]]]] = {
    "sigmas": read_sigmas,
    "timesteps": read_timesteps,
}

A1111 = '''"""A schedule of ts_adapt for AUTOMATIC1111's Stable Diffusion web UI and for Forge.

Put this file into extensions/ts_adapt/scripts/ of the web UI and start it anew: LABEL is then one of its schedule
types. With as many steps as the schedule has it gives the schedule's own sigmas, with any other number log sigma
interpolated linearly between them. Samplers that discard the sigma before the last ask for one step more.
"""

from importlib import import_module

import torch

NAME = {name}
LABEL = {label}
{about}
# Where the model is evaluated, then the end, in place of which the sampler is given 0.
SIGMAS = (
{sigmas})


def sigmas(n, sigma_min=None, sigma_max=None, inner_model=None, device="cpu"):
    """n + 1 sigmas, the last 0; the web UI's own range and model are not looked at."""
    values = []
    for i in range(n):
        k, rest = divmod(i * (len(SIGMAS) - 1), n)
        values.append(SIGMAS[k] * (SIGMAS[k + 1] / SIGMAS[k]) ** (rest / n))
    return torch.tensor([*values, 0.0], dtype=torch.float32, device=device)


try:
    sd_schedulers = import_module("modules.sd_schedulers")
except ImportError:  # not inside the web UI
    pass
else:
    entry = sd_schedulers.Scheduler(NAME, LABEL, sigmas)
    sd_schedulers.schedulers[:] = [*(s for s in sd_schedulers.schedulers if s.name != NAME), entry]
    sd_schedulers.schedulers_map.update({{NAME: entry, LABEL: entry}})
'''
