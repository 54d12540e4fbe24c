"""Pipelines of the families, built once for the tests of a file."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def family() -> Callable[[str], Any]:
    """The pipelines and the arguments of their calls by name, each built when it is first asked for."""
    families, built = import_module("tiny_families"), {}

    def found(name: str) -> Any:
        if name not in built:
            built[name] = families.family(name)
        return built[name]

    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two pictures of one colour each."""
    folder: Path = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "white")):
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
    return folder
