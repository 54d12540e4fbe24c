"""Files that are whole or absent: atomic writes, checked reads, checksums.

    write   a temporary file beside the target -> flush, fsync -> rename over the target -> fsync of the folder

A process killed at any moment leaves the old file or the new one, never a part of either; what it may leave beside
them, a `.NAME.*.tmp`, is swept away by who works there next (`folders`). Tensors are safetensors that carry a sha256 of
their values, everything else is JSON; a pickle is never read nor written. Whatever goes wrong with a file is a
TsAdaptError of one sentence that names it.

Files may be anybody's. What is read has a limit of bytes, JSON one of depth and of integers too, and every number in
it, of JSON or of a tensor, is finite.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ts_adapt.errors import TsAdaptError

Schema = Mapping[str, type | tuple[type, ...]]
"""Required key of a JSON object -> the type, or types, of its value."""

Shapes = Mapping[str, Sequence[int | None]]
"""Required name of a tensor -> its shape, None for any size."""

JSON_BYTES, TENSOR_BYTES = 256 * 2**20, 16 * 2**30
"""The largest files that are read, where a caller does not say less."""
JSON_DEPTH, JSON_INTEGER = 64, 2**64
PIECE = 2**20

UNUSUAL = {torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128}
"""Types that torch computes little with; nothing here writes them."""
MOST_DIMENSIONS = 16
_SUM = "sha256"
"""What the sum of the values is called among a safetensors file's metadata."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_MISSING = {errno.ENOENT, errno.ENOTDIR}


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `data` atomically; missing folders are made.

    durable=False leaves out the two fsyncs: still atomic when the process is killed, not when the power fails. For
    many small files that can be made again.

    Raises TsAdaptError if the disk is full or the folder cannot be written to; the old file is then untouched.
    """
    with explained(path, "written"):
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
            sync_folder(path.parent)


def append_bytes(path: Path, data: bytes) -> None:
    """Put `data` behind what is in `path`; a kill may leave a part of it. TsAdaptError where it cannot be written."""
    with explained(path, "written"), open(path, "ab") as file:
        file.write(data)


def make_folder(path: Path) -> Path:
    """Make the folder `path`, unless it is there, and return it; TsAdaptError where none can be."""
    with explained(path, "written"):
        path.mkdir(parents=True, exist_ok=True)
    return path


def check_place(path: Path, *, folder: bool) -> None:
    """TsAdaptError where `path`, a folder, or else a file, could not be written; nothing is made, nothing is left."""
    above = path if folder else path.parent
    with explained(path, "written"):
        if not folder and path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a device or a pipe, not a file"
            raise TsAdaptError(f"{path} is {what}; name a file to write")
        while not _is_there(above):
            above = above.parent
        if not above.is_dir():
            what = "a folder" if above == path else f"in a folder, and {above} is none"
            raise TsAdaptError(f"{path} has to be {what}; choose another place, or move what is there")
        with tempfile.TemporaryFile(dir=above):
            pass


def _is_there(path: Path) -> bool:
    """Whether there is anything, a link that leads nowhere too; OSError for a name that nothing can have."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_bytes(path: Path, *, limit: int | None = None) -> bytes:
    """The content of `path`; TsAdaptError if it is missing, cannot be read, or has more than `limit` bytes."""
    with explained(path, "read"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if limit is None or 0 < size <= limit:
            return file.read()
        pieces: list[bytes] = []
        while size <= limit and (piece := file.read(PIECE)):  # of a pipe or a device the size is not known before
            pieces.append(piece)
            size += len(piece)
    if size > limit:
        raise TsAdaptError(f"{path} has more than {limit} bytes; it is no file of the kind that is read here")
    return b"".join(pieces)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically, with null for infinite numbers and NaN; see `write_bytes`."""
    write_bytes(path, (json.dumps(null_for_infinite(value), indent=2, ensure_ascii=False) + "\n").encode())


def null_for_infinite(value: Any) -> Any:
    """`value` with None for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: null_for_infinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_infinite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, schema: Schema | None = None) -> Any:
    """The JSON value in `path`; with a `schema`, an object that has these keys, of these types.

    Raises TsAdaptError if the file is missing, no JSON (see `parse_json`), or does not fit the schema.
    """
    value = parse_json(read_bytes(path, limit=JSON_BYTES), path)
    if schema is not None:
        check_schema(value, schema, path)
    return value


def parse_json(data: bytes, what: Path | str) -> Any:
    """The JSON value in `data`.

    Raises TsAdaptError, naming `what`, if it is none, has a key twice, or holds what `check_plain` refuses.
    """
    try:
        value = json.loads(data, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise TsAdaptError(
            f"{what} is damaged, or no JSON file ({error}); restore it, or remove it and make it again"
        ) from error
    check_plain(value, what)
    return value


def check_plain(value: Any, what: Path | str, *, most: int | None = None) -> None:
    """TsAdaptError, naming `what`, if lists and objects are nested deeper than JSON_DEPTH, if a number is infinite, NaN
    or takes more than 64 bits, if a text is none (half a surrogate pair), or if there are more than `most` values."""
    seen, pending = 0, [(value, 0)]
    while pending:
        place, depth = pending.pop()
        seen += 1
        found = None
        if isinstance(place, dict | list):
            within = [part for entry in place.items() for part in entry] if isinstance(place, dict) else place
            pending += [(part, depth + 1) for part in within]
            found = f"is nested deeper than {JSON_DEPTH} levels" if depth >= JSON_DEPTH else None
        elif isinstance(place, float) and not math.isfinite(place):
            found = f"holds the number {place}, and numbers are finite"
        elif isinstance(place, int) and abs(place) >= JSON_INTEGER:
            found = "holds an integer of more than 64 bits"
        elif isinstance(place, str) and not place.isascii() and any("\ud800" <= sign <= "\udfff" for sign in place):
            found = "holds a text with half a surrogate pair"
        if most is not None and seen > most:
            found = f"holds more than {most} values"
        if found is not None:
            raise TsAdaptError(f"{what} {found}; it is damaged, restore it, or remove it and make it again")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return value


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """`tensors`, by name, as a safetensors file, atomically; returns the file's sha256.

    The same tensors give the same bytes. See `write_bytes` for the errors.
    """
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    data = safetensors.torch.save(whole, {_SUM: sha256_of_tensors(whole)})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, shapes: Shapes | None = None, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in `path`, on the CPU; with `shapes`, these are among them; with `sha256`, the file has that sum.

    Raises TsAdaptError naming the file if it is missing, truncated, altered, without a tensor asked for, or if it holds
    a value that is not finite.
    """
    data = read_bytes(path, limit=TENSOR_BYTES)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise TsAdaptError(f"{path} is damaged: its sha256 is not the one recorded; remove it and make it again")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TsAdaptError(
            f"{path} is truncated, or no safetensors file ({error}); remove it and make it again"
        ) from error
    recorded = (header.get("__metadata__") or {}).get(_SUM)
    if recorded is not None and recorded != sha256_of_tensors(tensors):
        raise TsAdaptError(f"{path} is damaged: its values are not those that were written; remove it, make it again")
    for name, value in tensors.items():
        if value.dtype in UNUSUAL or value.ndim > MOST_DIMENSIONS:
            kind = f"{value.dtype} with {value.ndim} dimensions"
            raise TsAdaptError(f"{name!r} in {path} is of {kind}, which is not read; remove it, make it again")
        if not is_finite(value):
            raise TsAdaptError(f"{name!r} in {path} holds a NaN or infinite value; remove it and make it again")
    check_shapes(tensors, shapes or {}, path)
    return tensors


def check_shapes(tensors: Mapping[str, Tensor], shapes: Shapes, path: Path) -> None:
    """TsAdaptError, naming the file `path` that `tensors` are from, unless they have these `shapes`."""
    for name, shape in shapes.items():
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


def is_finite(value: Tensor) -> bool:
    """Whether every value of the tensor is finite, whatever its type."""
    if value.is_floating_point() and value.element_size() == 1:  # float8, for which isfinite is not there
        value = value.float()
    return bool(torch.isfinite(value).all())


def sha256_of_file(path: Path) -> str:
    """The sha256 of the file's content, in hexadecimal."""
    with explained(path, "read"), open(path, "rb") as file:
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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path, verb: str) -> Iterator[None]:
    """Turns an OSError in the block, about a `path` to be written or read, into a TsAdaptError that says what to do."""
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
