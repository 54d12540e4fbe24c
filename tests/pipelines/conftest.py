"""Pipelines of the families, built once for the tests of a file."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest


@pytest.fixture(scope="module")
def family() -> Callable[[str], Any]:
    """The pipelines and the arguments of their calls by name, each built when it is first asked for."""
    families, built = import_module("tiny_families"), {}

    def found(name: str) -> Any:
        if name not in built:
            built[name] = families.family(name)
        return built[name]

    return found
