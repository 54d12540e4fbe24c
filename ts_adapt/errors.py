"""What is said to a user: one sentence that says what to do."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path


class TsAdaptError(Exception):
    """An error of the user's input or of a file: one sentence that says what to do; the CLI exits with code 2."""


class TsAdaptWarning(UserWarning):
    """What is done all the same, and may not be what was meant; the CLI says it once, in a line of its own."""


class Unguided(TsAdaptError):
    """Factors on the guidance are given to what is not guided by none + w (condition - none)."""


def unknown(kind: str, name: str, known: Iterable[str]) -> TsAdaptError:
    """The error for a name that is not in a registry: lists what is, and suggests the near one."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return TsAdaptError(f"unknown {kind} {name!r}; {hint}known: {', '.join(names)}")


def one_line(said: object, length: int = 200) -> str:
    """What another library's error says, or any text, on one line of at most `length` characters; else its class."""
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def raised(error: BaseException, length: int = 200) -> str:
    """What other code has raised: its kind, what it says, and the last file and line where, but torch's own."""
    said = f"{type(error).__name__}: {one_line(error, length)}"
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "torch" not in Path(one.filename).parts]
    return f"{said} at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else said
