"""Results that are made by one process at a time, and folders that are replaced as a whole.

    making(path)    .NAME.lock beside the result is held; what a killed process left is put in order first
    if_free(lock)   the same, but where another process holds it the block runs without
    replaced        NAME -> NAME.old, NAME.new -> NAME, then NAME.old is removed: at any moment one of them is whole

A lock is the system's own: it is free again however its holder ended, and no clock decides about it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.files import explained, sync_folder


class InUse(TsAdaptError):
    """Another process holds the lock."""


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the system releases it however the process ends.

    Raises InUse at once if another process holds it; `what` says in that message what it is busy with.
    """
    with explained(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (closed below, when the block has run)
    with file:
        with explained(path, "written"):
            if not _locked(file):
                file.seek(0)
                holder = file.read().strip() or "its number is unknown"
                raise InUse(f"{what} is in use by another process ({holder}); wait until it ends, or stop it")
            file.truncate(0)
            file.write(f"process {os.getpid()}\n")
            file.flush()
        yield


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Hold `path`, a result that is one file or one folder, while the block makes it, against other processes.

    What processes that were killed left of it is put in order first: temporary files, and a folder half replaced.
    Raises InUse at once if another process is making it.
    """
    with hold(path.with_name(f".{path.name}.lock"), str(path)):
        former = _former(path)
        if former.is_dir():
            with explained(path, "written"):
                shutil.rmtree(former) if path.exists() else os.replace(former, path)
        remove_leftovers(path.parent, f".{path.stem}.*.tmp")
        for folder in (path, beside(path)):
            remove_leftovers(folder)
            remove_leftovers(folder, "*/.*.tmp")
        yield


@contextmanager
def if_free(lock: AbstractContextManager[None]) -> Iterator[bool]:
    """Hold `lock` while the block runs, unless another process does; the block is told whether it is held."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
            free = True
        except InUse:
            free = False
        yield free


def remove_leftovers(folder: Path, pattern: str = ".*.tmp") -> None:
    """Remove the temporary files of processes that were killed; the caller holds a lock on what they are of."""
    for leftover in folder.glob(pattern):
        with suppress(OSError):
            leftover.unlink()


def beside(folder: Path) -> Path:
    """NAME.new: where a new result is made while the old one stays in `folder`."""
    return folder.with_name(f"{folder.name}.new")


def replace_folder(folder: Path, new: Path) -> None:
    """Put the folder `new`, such as that `beside` it, in the place of `folder`, which is then removed."""
    former = _former(folder)
    with explained(folder, "written"):
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
            os.replace(folder, former)
        os.replace(new, folder)
        sync_folder(folder.parent)
        shutil.rmtree(former, ignore_errors=True)


def _locked(file: IO[str]) -> bool:
    """Whether the system's lock of `file` is ours now; False if another process has it."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _former(folder: Path) -> Path:
    """Where `folder` is moved while it is replaced."""
    return folder.with_name(f"{folder.name}.old")
