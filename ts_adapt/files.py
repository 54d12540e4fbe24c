"""Files that are whole or absent: atomic writes, checked reads, checksums, a lock.

    write   a temporary file beside the target -> flush, fsync -> rename over the target -> fsync of the folder

A process killed at any moment leaves the old file or the new one, never a part of either; what it may leave beside
them, a `.NAME.*.tmp`, `remove_leftovers` sweeps away. Tensors are safetensors, everything else is JSON; a pickle is
never read nor written. Whatever goes wrong with a file is a TsAdaptError of one sentence that names it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ts_adapt.interfaces import TsAdaptError

Schema = Mapping[str, type | tuple[type, ...]]
"""Required key of a JSON object -> the type, or types, of its value."""

Shapes = Mapping[str, Sequence[int | None]]
"""Required name of a tensor -> its shape, None for any size."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_MISSING = {errno.ENOENT, errno.ENOTDIR}


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `data` atomically; missing folders are made.

    durable=False leaves out the two fsyncs: still atomic when the process is killed, not when the power fails. For
    many small files that can be made again.

    Raises TsAdaptError if the disk is full or the folder cannot be written to; the old file is then untouched.
    """
    path = Path(path)
    with _explained(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            _sync_folder(path.parent)


def make_folder(path: Path) -> Path:
    """Make the folder `path`, unless it is there, and return it; TsAdaptError where none can be."""
    with _explained(path, "written"):
        path.mkdir(parents=True, exist_ok=True)
    return path


def read_bytes(path: Path, *, limit: int | None = None) -> bytes:
    """The content of `path`; TsAdaptError if it is missing, cannot be read, or has more than `limit` bytes."""
    with _explained(Path(path), "read"), open(path, "rb") as file:
        data = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(data) > limit:
        raise TsAdaptError(f"{path} has more than {limit} bytes; it is no file of the kind that is read here")
    return data


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically; see `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, schema: Schema | None = None) -> Any:
    """The JSON value in `path`; with a `schema`, an object that has these keys, of these types.

    Raises TsAdaptError if the file is missing, no JSON, or does not fit the schema.
    """
    value = parse_json(read_bytes(path), path)
    if schema is not None:
        check_schema(value, schema, Path(path))
    return value


def parse_json(data: bytes, what: Path | str) -> Any:
    """The JSON value in `data`; TsAdaptError, naming `what`, if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TsAdaptError(
            f"{what} is damaged, or no JSON file ({error}); restore it, or remove it and make it again"
        ) from error


def check_schema(value: Any, schema: Schema, what: Path | str) -> None:
    """TsAdaptError, naming `what` and the key, unless `value` is an object with the keys and types of `schema`."""
    if not isinstance(value, Mapping):
        raise TsAdaptError(f"{what} holds a {type(value).__name__}; expected an object with {', '.join(schema)}")
    for key, kind in schema.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if key not in value:
            raise TsAdaptError(f"{what} has no {key!r}; it is damaged or of another kind")
        if not isinstance(value[key], kinds) or (isinstance(value[key], bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise TsAdaptError(f"{key!r} of {what} is a {type(value[key]).__name__}; expected {names}")


def differing(kept: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of `now` that a record has `kept` another value of, as `group.key (old, now new)`."""
    found = []
    for key, value in now.items():
        former = kept.get(key)
        if isinstance(value, Mapping) and isinstance(former, Mapping):
            found += differing(former, value, f"{prefix}{key}.")
        elif former != value:
            both = [shortened(former), shortened(value)]
            found.append(f"{prefix}{key}" if both[0] == both[1] else f"{prefix}{key} ({both[0]}, now {both[1]})")
    return found


def shortened(value: Any, length: int = 40) -> str:
    """`value` as a text of at most `length` characters."""
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def replace_folder(folder: Path, new: Path) -> None:
    """Put the folder `new` in the place of `folder`, which is then removed; the two are in the same folder."""
    former = folder.with_name(f"{folder.name}.old")
    with _explained(folder, "written"):
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
            os.replace(folder, former)
        os.replace(new, folder)
        _sync_folder(folder.parent)
        shutil.rmtree(former, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """`tensors`, by name, as a safetensors file, atomically; returns the file's sha256.

    The same tensors give the same bytes. See `write_bytes` for the errors.
    """
    data = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, shapes: Shapes | None = None, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in `path`, on the CPU; with `shapes`, these are among them; with `sha256`, the file has that sum.

    Raises TsAdaptError naming the file if it is missing, truncated, altered, or without a tensor asked for.
    """
    data = read_bytes(path)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise TsAdaptError(f"{path} is damaged: its sha256 is not the one recorded; remove it and make it again")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise TsAdaptError(
            f"{path} is truncated, or no safetensors file ({error}); remove it and make it again"
        ) from error
    for name, shape in (shapes or {}).items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found is None:
            raise TsAdaptError(
                f"{path} has no tensor {name!r}, only {', '.join(sorted(tensors))}; remove it and make it again"
            )
        if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise TsAdaptError(
                f"{name!r} in {path} has shape {found}; expected ({wanted}), remove it and make it again"
            )
    return tensors


def sha256_of_file(path: Path) -> str:
    """The sha256 of the file's content, in hexadecimal."""
    with _explained(Path(path), "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """The sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, dtypes, shapes and values, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the system releases it however the process ends.

    Raises TsAdaptError at once if another process holds it; `what` says in that message what it is busy with.
    """
    import fcntl

    path = Path(path)
    with _explained(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (closed below, when the block has run)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "its number is unknown"
            raise TsAdaptError(
                f"{what} is in use by another process ({holder}); wait until it ends, or stop it"
            ) from error
        with _explained(path, "written"):
            file.truncate(0)
            file.write(f"process {os.getpid()}\n")
            file.flush()
        yield


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; the caller holds the folder's lock."""
    for leftover in Path(folder).glob(".*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path, verb: str) -> Iterator[None]:
    """Turns an OSError into a TsAdaptError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            text = f"the disk is full: {path} could not be written; free some space and run the same command again"
        elif error.errno in _FORBIDDEN:
            text = f"{path} cannot be {verb} ({error.strerror}); choose another folder, or change its permissions"
        elif error.errno in _MISSING and verb == "read":
            text = f"there is no file {path}; check the path, or make it first"
        else:
            text = f"{path} could not be {verb} ({error.strerror or error}); check the path"
        raise TsAdaptError(text) from error
