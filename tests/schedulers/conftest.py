"""Tiny pipelines, built once for the tests of a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def pipes(tiny: Any) -> Callable[[str], Any]:
    """The pipelines by name, each built when it is first asked for."""
    built: dict[str, Any] = {}

    def pipe(name: str) -> Any:
        if name not in built:
            built[name] = tiny.pipeline(name)
        return built[name]

    return pipe
