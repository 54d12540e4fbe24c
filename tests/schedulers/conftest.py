"""Tiny pipelines, built once for the tests of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ts_adapt.schedulers.attach import detach
from ts_adapt.schedulers.scheduler import LearnedScheduler


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return {}


@pytest.fixture
def pipes(tiny: Any, built: dict[str, Any]) -> Iterator[Callable[[str], Any]]:
    """The pipelines by name, each built when it is first asked for; what a test attaches is detached behind it."""

    def pipe(name: str) -> Any:
        if name not in built:
            built[name] = tiny.pipeline(name)
        return built[name]

    yield pipe
    for one in built.values():
        if isinstance(one.scheduler, LearnedScheduler):
            detach(one)
