"""A denoiser that a function of the user's own makes, by the function's place.

    package.module:function     as Python imports it; the current folder counts as a place for modules
    path/to/file.py:function    a file

The function takes no arguments and returns a denoiser: `from_edm(network, shape)`, `NetworkDenoiser(network, ...)`, or
any other that derives from `interfaces.Denoiser`. Its code is run, as that of a script is.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ts_adapt.errors import TsAdaptError, raised
from ts_adapt.interfaces import Denoiser

PLACE = re.compile(r"(?P<file>.+\.py):(?P<made>[A-Za-z_]\w*)|(?P<module>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)")


def is_place(name: str) -> bool:
    """Whether `name` says where a function is, and is not the name of a model, a folder or a hub id."""
    return PLACE.fullmatch(name) is not None


def from_code(name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """The denoiser that the function at `name` makes, moved to `device` and `dtype` where they are given.

    Its network is put in evaluation mode and frozen, so that gradients reach the times only.
    Raises TsAdaptError where there is no such function, where it raises, and for a result that is no denoiser.
    """
    found = PLACE.fullmatch(name)
    if found is None:
        raise TsAdaptError(f"{name!r} is no function's place; give package.module:function or path/file.py:function")
    file = Path(found["file"]).expanduser() if found["file"] else None
    function = found["made"] or found["function"]
    with _beside(file.resolve().parent if file else Path.cwd()):
        with _explained(f"{name!r} cannot be imported", "mend that first"):
            module = _of_file(file) if file else importlib.import_module(found["module"])
        make = getattr(module, function, None)
        if not callable(make):
            there = inspect.getmembers(module, inspect.isfunction)
            known = ", ".join(key for key, value in there if value.__module__ == module.__name__ and key[0] != "_")
            raise TsAdaptError(f"{name!r}: there is no function {function}; there are {known or 'none'}")
        with _explained(f"{name!r} has made no denoiser", "it is called without arguments"):
            made = make()
    if not isinstance(made, Denoiser):
        raise TsAdaptError(
            f"{name!r} has returned {type(made).__name__}, not a denoiser; return from_edm(network, shape), "
            "NetworkDenoiser(network, noise_schedule, prediction, shape=shape), or one derived from "
            "ts_adapt.interfaces.Denoiser"
        )
    if made.network is not None:
        made.network.eval().requires_grad_(False)
    move: Any = getattr(made, "to", None)
    if move is not None and (device is not None or dtype is not None):
        move(device=device, dtype=dtype)
    return made


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TsAdaptError(f"there is no file {path}; check the path of the function that makes the model")
    name = f"ts_adapt_from_{path.stem}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import does: dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Within the block modules in `folder` are found too, behind all others."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Turns what the user's code raises in the block into a TsAdaptError that says what came of it, and the remedy."""
    try:
        yield
    except TsAdaptError:
        raise
    except Exception as error:
        raise TsAdaptError(f"{what} ({raised(error, 160)}); {remedy}") from error
