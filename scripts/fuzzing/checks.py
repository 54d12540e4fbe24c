"""What has to hold of whatever any reader accepts."""

from __future__ import annotations

import json
from typing import Any

import torch

from ts_adapt.interfaces import MAX_STEPS, NoiseSchedule, TimeGrid
from ts_adapt.numerics import validate_grid
from ts_adapt.storage.files import is_finite


def finite(*values: torch.Tensor | None) -> None:
    for value in values:
        assert value is None or is_finite(value)


def strict(text: str) -> Any:
    """JSON as its standard has it, without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} was written")

    return json.loads(text, parse_constant=refuse)


def check_grid(grid: TimeGrid, noise_schedule: NoiseSchedule | None = None) -> None:
    assert 1 <= grid.steps <= MAX_STEPS
    validate_grid(grid, noise_schedule)
    finite(grid.times, *grid.held.values())
