"""The portable JSON of a learned schedule: one grid (or one grid of corrections) with what it was learned for.

    format, version          "ts_adapt-schedule", 1
    times                    N+1 real times of the model's noise schedule, decreasing
    edm_sigmas, log_snr      the same places as sigma/alpha and as log(alpha/sigma), for other programs; infinite: null
    model_times, output_scale, coefficients    corrections, or null
    solver, nfe, model, prediction, teacher, distance, seed, measured    where it comes from

A plain list of sigmas cannot carry corrections or grids per sample; this file does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.files import read_json, write_json
from ts_adapt.interfaces import NoiseSchedule, TimeGrid, TsAdaptError
from ts_adapt.numerics import validate_grid

FORMAT, VERSION = "ts_adapt-schedule", 1
MAX_STEPS = 10_000


@dataclass(frozen=True)
class Schedule:
    """A shared grid and its provenance: `solver` name, `nfe`, and whatever else is known about it in `about`."""

    grid: TimeGrid
    solver: str
    nfe: int
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path, noise: NoiseSchedule) -> None:
        """Write the schedule to `path`, atomically."""
        if self.grid.per_sample:
            raise TsAdaptError("a schedule file holds one shared grid; grids per sample are kept as labels")
        lam = noise.log_snr(self.grid.times)
        write_json(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "solver": self.solver,
                "nfe": self.nfe,
                "times": self.grid.times.tolist(),
                "edm_sigmas": _finite_or_null(torch.exp(-lam)),
                "log_snr": _finite_or_null(lam),
                "model_times": _optional_list(self.grid.model_times),
                "output_scale": _optional_list(self.grid.output_scale),
                "coefficients": _optional_list(self.grid.coefficients),
                **self.about,
            },
        )

    @classmethod
    def load(cls, path: Path, noise: NoiseSchedule | None = None) -> Schedule:
        """Read `path`; TsAdaptError naming the file where it is no valid schedule (for `noise`, if given)."""
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise TsAdaptError(f"{path} is no schedule file: its format is not {FORMAT!r}")
        if data.get("version") != VERSION:
            raise TsAdaptError(f"{path} has version {data.get('version')!r}; this program reads version {VERSION}")
        try:
            grid = TimeGrid(
                _tensor(data["times"]),
                *(_tensor(data[key]) if data.get(key) is not None else None
                  for key in ("model_times", "output_scale", "coefficients")),
            )  # fmt: skip
            schedule = cls(validate_grid(grid, noise), str(data["solver"]), int(data["nfe"]), _about(data))
        except TsAdaptError as error:
            raise TsAdaptError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise TsAdaptError(f"{path} is no valid schedule file: {error}") from error
        if schedule.grid.per_sample:
            raise TsAdaptError(
                f"{path} holds {len(schedule.grid.times)} grids; a schedule file holds one, give another"
            )
        if not 1 <= schedule.grid.steps <= MAX_STEPS:
            raise TsAdaptError(f"{path} has {schedule.grid.steps} steps; between 1 and {MAX_STEPS} are accepted")
        return schedule


def _about(data: dict[str, Any]) -> dict[str, Any]:
    carried = {"format", "version", "solver", "nfe", "times", "edm_sigmas", "log_snr"}
    return {k: v for k, v in data.items() if k not in carried | {"model_times", "output_scale", "coefficients"}}


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _optional_list(value: Tensor | None) -> list[Any] | None:
    return None if value is None else value.tolist()


def _finite_or_null(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]
