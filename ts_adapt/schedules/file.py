"""The portable JSON of a learned schedule: one grid (or one grid of corrections) with what it was learned for.

    format, version   "ts_adapt-schedule", 1
    solver, nfe       the solver's name and the denoiser evaluations a sample
    times             N+1 real times of the model's noise schedule, decreasing
    edm_sigmas, log_snr    the same places as sigma/alpha and as log(alpha/sigma), for other programs; infinite: null
    model_times       N times told to the network in place of the times themselves, or null
    output_scale      N factors on the network's predictions, or null
    coefficients      N rows of corrections to the solver's coefficients, or null
    history           N rows of N + 1 weights on what was met before, or null
    guidance          N factors on the guidance scale, or null
    ...               and any other correction of `grids.corrections`

and in `about`, each where it is known (null or left out where not):

    order             the solver's order of convergence
    model             the model's name, folder or hub id
    prediction        what its network predicts: epsilon, sample, v or velocity
    method, source    how the grid was found (static, blackbox, fixed, imported) and the name or file it is from
    seed              of the search
    distance          the loss: the distance to the teacher that was minimised
    teacher           the hash of the teacher's manifest, that is of everything its samples depend on
    teacher_solver, teacher_nfe, teacher_grid, teacher_seed    the fine solve itself
    made_with         the options of the search that found it, by the names that they have in a config
    guidance_scale    what the samples were guided by; 1: by nothing, though they could have been; [a, b]: each by one
                      of its own from a to b
    other_scales      further scales of guidance of the pipeline's call, by the names of its arguments (`OTHER_SCALES`)
    shape             of the samples that it was found on, where the pipeline's scheduler shifts its times by their size
    measured          name -> {"value": number, "evaluator": what measured it, "samples": how many, ...}

Whatever else it holds travels along. A plain list of sigmas cannot carry corrections; this file does. Grids per sample
are labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError, one_line, unknown
from ts_adapt.grids.corrections import field_names, grid_of
from ts_adapt.interfaces import MAX_STEPS, NoiseSchedule, TimeGrid
from ts_adapt.numerics import validate_grid
from ts_adapt.parameterization import PARAMETERIZATIONS
from ts_adapt.storage.files import (
    Schema,
    check_schema,
    null_for_infinite,
    parse_json,
    read_bytes,
    shortened,
    write_bytes,
)
from ts_adapt.storage.layout import SCHEDULE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BYTES = 64 * 2**20
"""A longer file is refused before it is read whole: a thousand steps with an embedding of 3072 numbers fill it."""

CARRIED = ("format", "version", "solver", "nfe", "times", "edm_sigmas", "log_snr")
REQUIRED: Schema = {
    "solver": str, "nfe": int, "times": list, "edm_sigmas": (list, type(None)), "log_snr": (list, type(None))
}  # fmt: skip
ABOUT: Schema = {
    "order": int, "model": str, "prediction": str, "method": str, "source": str, "seed": int, "distance": str,
    "teacher": str, "teacher_solver": str, "teacher_nfe": int, "teacher_grid": str, "teacher_seed": int,
    "made_with": dict, "shape": list, "measured": dict, "guidance_scale": (int, float, list), "other_scales": dict,
}  # fmt: skip
"""The named places of `about` and the type that each has, if it is not null."""
OTHER_SCALES: dict[str, tuple[str, ...]] = {
    "true_cfg_scale": ("negative_prompt", "negative_prompt_embeds"), "guidance_scale_2": (),
    "distilled_guidance_scale": (), "image_guidance_scale": (), "img_guidance_scale": (),
}  # fmt: skip
"""Scales that calls of pipelines take besides `guidance_scale` (FLUX and Qwen-Image, Wan's second network, edits of
images) -> the arguments without any of which nothing is guided by it."""
AS_FAR = 2.0
"""The factor between guidance scales over which a schedule holds (docs/diffusers.md)."""
LOG_SNR_TOLERANCE = 1e-3
"""How far the file's log-SNR may lie from that of a noise schedule for which the file is still accepted."""


def in_common(abouts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of `abouts`, of one file or of several, say alike."""
    first, *rest = abouts
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in rest)}


@dataclass(frozen=True)
class LearnedGrid:
    """A shared time grid with its corrections, the solver and NFE that it is for, and its provenance.

    solver   the solver's name; nfe: the evaluations a sample it spends
    about    whatever else is known, under the names of the module's head
    log_snr  `(N+1,)`, float64: log(alpha/sigma) at the times, where a file has told it; may be infinite at its ends
    """

    grid: TimeGrid
    solver: str
    nfe: int
    about: dict[str, Any] = field(default_factory=dict)
    log_snr: Tensor | None = None

    def text(self, noise_schedule: NoiseSchedule | None = None) -> str:
        """The file's text; `noise_schedule` is that of the model, and may be left out where `log_snr` is known."""
        if self.grid.per_sample:
            raise TsAdaptError("a schedule file holds one shared grid; grids per sample are kept as labels")
        check_about(self.about, "the schedule")
        lam = self.log_snr if noise_schedule is None else noise_schedule.log_snr(self.grid.times)
        content = {
            **SCHEDULE.head,
            "solver": self.solver,
            "nfe": self.nfe,
            "times": self.grid.times.tolist(),
            "edm_sigmas": None if lam is None else torch.exp(-lam).tolist(),
            "log_snr": None if lam is None else lam.tolist(),
            **dict.fromkeys(field_names()),
            **{name: value.tolist() for name, value in self.grid.corrections.items()},
            **self.about,
        }
        return json.dumps(null_for_infinite(content), indent=2, ensure_ascii=False) + "\n"

    def plot(self, noise_schedule: NoiseSchedule) -> Figure:
        """Its log-SNR at every step, as a figure of matplotlib; `noise_schedule` is that of the model."""
        from ts_adapt.plots import plot_schedules

        name = str(self.about.get("method") or "learned")
        return plot_schedules({name: self.grid.times}, noise_schedule, f"{self.solver}, NFE {self.nfe}")

    def save(self, path: str | Path, noise_schedule: NoiseSchedule | None = None) -> None:
        """Write the schedule to `path`, atomically; see `text`."""
        write_bytes(Path(path), self.text(noise_schedule).encode())

    @classmethod
    def load(cls, path: str | Path, noise_schedule: NoiseSchedule | None = None) -> LearnedGrid:
        """Read `path`; TsAdaptError naming the file where it is no valid schedule (for `noise_schedule`, if given)."""
        return cls.parse(read_bytes(Path(path), limit=MAX_BYTES), path, noise_schedule)

    @classmethod
    def parse(cls, data: bytes, what: Path | str, noise_schedule: NoiseSchedule | None = None) -> LearnedGrid:
        """The schedule in the bytes of a file; TsAdaptError naming it `what` where it is no valid one."""
        content = parse_json(data, what)
        SCHEDULE.check(content, what, "give a schedule file, as `ts-adapt export` writes it")
        check_schema(content, REQUIRED, what)
        about = {k: v for k, v in content.items() if k not in (*CARRIED, *field_names())}
        check_about(about, what)
        try:
            given = {name: content.get(name) for name in ("times", *field_names())}
            parts = {name: torch.tensor(v, dtype=torch.float64) for name, v in given.items() if v is not None}
            grid = validate_grid(grid_of(parts), noise_schedule)
            log_snr = _log_snr_of(content.get("log_snr"), grid) if not grid.per_sample else None
        except TsAdaptError as error:
            raise TsAdaptError(f"{what}: {error}") from error
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise TsAdaptError(f"{what} is no valid schedule file: {one_line(error)}") from error
        if grid.per_sample:
            raise TsAdaptError(f"{what} holds {len(grid.times)} grids; a schedule file holds one, give another")
        if not 1 <= grid.steps <= MAX_STEPS:
            raise TsAdaptError(f"{what} has {grid.steps} steps; between 1 and {MAX_STEPS} are accepted")
        if content["nfe"] < grid.steps:
            raise TsAdaptError(f"{what} has {grid.steps} steps and nfe {content['nfe']}; each step takes an evaluation")
        learned = cls(grid, content["solver"], content["nfe"], about, log_snr)
        if noise_schedule is not None:
            learned.check_noise(noise_schedule, what)
        return learned

    def check_noise(self, noise_schedule: NoiseSchedule, what: Path | str) -> None:
        """TsAdaptError, naming `what`, unless the log-SNR that the file has told is that of `noise_schedule`."""
        if self.log_snr is None:
            return
        there = noise_schedule.log_snr(self.grid.times)
        same = (self.log_snr == there) | ((self.log_snr - there).abs() <= LOG_SNR_TOLERANCE)
        if not bool(same.all()):
            place, model = int((~same).nonzero()[0]), self.about.get("model")
            raise TsAdaptError(
                f"{what} is for another noise schedule{f', that of {model}' if model else ''}: at time "
                f"{float(self.grid.times[place]):.6g} its log-SNR is {float(self.log_snr[place]):.4g}, this model's "
                f"{float(there[place]):.4g}; give the model it was made for, or export it as sigmas and import these"
            )


def size_remark(then: Sequence[int], now: Sequence[int]) -> str:
    """What there is to say where a schedule found for samples of the shape `then` meets some of the shape `now`."""
    return (
        f"the schedule was found for samples of shape {tuple(then)}, and these are of {tuple(now)}: pipelines of this "
        "kind shift their times by the size, so find one for it"
    )


def other_scales(arguments: Mapping[str, Any]) -> dict[str, float]:
    """The scales of `OTHER_SCALES` among the arguments of a pipeline's call; one that nothing is guided by is 1."""
    return {
        name: float(arguments[name]) if not needed or any(arguments.get(one) is not None for one in needed) else 1.0
        for name, needed in OTHER_SCALES.items()
        if isinstance(arguments.get(name), int | float)
    }


def guidance_remarks(about: Mapping[str, Any], scale: Any, others: Mapping[str, Any]) -> list[str]:
    """What there is to say where a schedule meets samples under another guidance: `scale_remark` of each scale that is
    known in `about`, of samples that are guided by `scale` and `others`."""
    more = about.get("other_scales")
    then = {"guidance_scale": about.get("guidance_scale"), **(more if isinstance(more, Mapping) else {})}
    now = {"guidance_scale": scale, **others}
    found = [scale_remark(name, known, now.get(name)) for name, known in then.items()]
    return [said for said in found if said]


def scale_remark(name: str, then: Any, now: Any) -> str | None:
    """What there is to say where a schedule found under `then`, of the argument `name`, meets samples guided by `now`;
    None where it holds.

    Either is a number, or the two ends of a range; anything else is not known. Found for a range, it holds within that.
    Scales below 1, which most pipelines have for none, count as 1, but for a range that has some.
    """
    learned, called = ends_of(then), ends_of(now)
    if learned is None or called is None:
        return None
    factor = AS_FAR if learned[0] == learned[1] else 1.0
    least = 1.0 if factor > 1 or learned[0] >= 1 else -math.inf
    (low, high), (lowest, highest) = ([max(end, least) for end in ends] for ends in (learned, called))
    if low / factor <= lowest and highest <= high * factor:
        return None
    of, by = (f"{a:g}" if a == b else f"{a:g} to {b:g}" for a, b in (learned, called))
    return (
        f"the schedule was found under {name} {of}, and these samples are guided by {by}: so far from its own "
        "a fixed grid may be better; call with that scale, or find a schedule for this one"
    )


def ends_of(scale: Any) -> tuple[float, float] | None:
    """The least and the greatest of a scale, or of the two ends of a range of them; None: it is neither."""
    ends = [*scale] if isinstance(scale, list | tuple) and len(scale) == 2 else [scale, scale]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends) or not ends[0] <= ends[1]:
        return None
    return ends[0], ends[1]


def check_about(about: Mapping[str, Any], what: Path | str) -> None:
    """TsAdaptError, naming `what`, if one of the named places of `about` holds something else than it is for."""
    check_schema(about, {key: kind for key, kind in ABOUT.items() if about.get(key) is not None}, what)
    scale, prediction = about.get("guidance_scale"), about.get("prediction")
    if scale is not None and ends_of(scale) is None:
        raise TsAdaptError(
            f"'guidance_scale' of {what} is {shortened(scale)}; expected a number, or the two ends of a range"
        )
    if prediction is not None and prediction not in PARAMETERIZATIONS:
        raise TsAdaptError(f"{what}: {unknown('prediction', shortened(prediction), PARAMETERIZATIONS)}")
    for name, measurement in (about.get("measured") or {}).items():
        measured: Schema = {"value": (int, float, type(None)), "evaluator": str}
        check_schema(measurement, measured, f"measured.{name} of {what}")


def _log_snr_of(values: Any, grid: TimeGrid) -> Tensor | None:
    """The file's log-SNR as a tensor, null at the first place being -infinity, at the last infinity."""
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != grid.steps + 1:
        raise TsAdaptError(f"log_snr has to hold {grid.steps + 1} numbers, one for each of the times")
    ends = {0: -math.inf, grid.steps: math.inf}
    log_snr = torch.tensor(
        [ends.get(i, math.nan) if value is None else value for i, value in enumerate(values)], dtype=torch.float64
    )
    if log_snr.ndim != 1 or not bool((log_snr.diff() > 0).all()):
        raise TsAdaptError("log_snr does not rise strictly; it is the log-SNR of falling times")
    return log_snr
