"""What a teacher's folder says of itself: manifest.json, and the receipts of shards that it does not list yet.

    manifest.json       format, config, its hash, versions, and samples and sha256 of every finished shard
    shard-00000.json    a receipt: samples and sha256 of one shard

The hash is that of the config, whose floats are rounded to 12 digits. What is read is checked, names of shards too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ts_adapt._version import __version__
from ts_adapt.errors import TsAdaptError
from ts_adapt.remedies import command
from ts_adapt.storage import files
from ts_adapt.storage.layout import MANIFEST, RECEIPTS, SHARD_NAME, TEACHER, shard_of

MAX_NOISE_SCALE = 1e9
"""Largest standard deviation of pure noise."""
MAX_SHARD, MAX_SAMPLE = 1_000_000, 2**31
CONFIG: files.Schema = {
    "model": str,
    "weights": str,
    "solver": str,
    "times": list,
    "seed": int,
    "first": int,
    "shape": list,
    "dtype": str,
    "noise_scale": (float, int),
    "shard_size": int,
    "batch_size": int,
    "trajectory": bool,
}
"""What every config has; further keys (guidance, condition, ...) are hashed and compared all the same."""

_SHARD: files.Schema = {"samples": int, "sha256": str}
_MANIFEST: files.Schema = {
    "format": str, "version": int, "hash": str, "config": dict, "versions": dict, "shards": dict
}  # fmt: skip


def read_receipts(folder: Path, size: int) -> dict[str, Any]:
    """What the receipts in `folder` say of shards of at most `size` samples; one that is damaged is removed."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob(RECEIPTS)):
        name = shard_of(path.name)
        try:
            kept = files.read_json(path)
            _check_shard(name, kept, size, path)
            found[name] = kept
        except TsAdaptError:
            with suppress(OSError):
                path.unlink()
    return found


def new_manifest(config: dict[str, Any]) -> dict[str, Any]:
    """Of a folder without shards; `config` as `plain` gives it."""
    return {
        **TEACHER.head, "hash": files.sha256_of_json(config), "config": config,
        "versions": {"ts_adapt": __version__, "torch": version("torch"), "diffusers": version("diffusers")},
        "shards": {},
    }  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`; TsAdaptError if there is none, or if it is damaged or altered."""
    path = folder / MANIFEST
    if not path.exists():
        raise TsAdaptError(f"there is no teacher in {folder} (no manifest.json); make one with {command('teach')}")
    manifest: dict[str, Any] = files.read_json(path, _MANIFEST)
    TEACHER.check(manifest, path, "generate the teacher again")
    check_config(manifest["config"], f"the config in {path}")
    for name, shard in manifest["shards"].items():
        _check_shard(name, shard, manifest["config"]["shard_size"], path)
    if files.sha256_of_json(manifest["config"]) != manifest["hash"]:
        raise TsAdaptError(f"the config in {path} was altered: it does not have its hash; restore it or generate again")
    return manifest


def check_config(config: Mapping[str, Any], what: str) -> None:
    """TsAdaptError, naming `what`, unless `config` has the keys of `CONFIG` and numbers that samples can be made of."""
    files.check_schema(config, CONFIG, what)
    if not 0 < config["noise_scale"] <= MAX_NOISE_SCALE:
        raise TsAdaptError(
            f"noise_scale is {config['noise_scale']} in {what}; expected above 0, at most {MAX_NOISE_SCALE:g}"
        )
    if not 1 <= config["shard_size"] <= MAX_SHARD:
        raise TsAdaptError(
            f"shard_size is {config['shard_size']} in {what}; at least 1 sample goes into a shard, at most {MAX_SHARD}"
        )
    shape = config["shape"]
    if not all(type(size) is int and size > 0 for size in shape) or math.prod(shape) > MAX_SAMPLE:
        raise TsAdaptError(
            f"shape is {files.shortened(shape)} in {what}; expected sizes of at least 1, {MAX_SAMPLE} numbers a sample"
        )


def _check_shard(name: str, shard: Any, size: int, path: Path) -> None:
    """TsAdaptError, naming `path`, unless it lists a shard of at most `size` samples under such a name."""
    if not SHARD_NAME.fullmatch(name):
        raise TsAdaptError(f"{path} lists {name!r}, which is no shard; restore it, or generate the teacher again")
    files.check_schema(shard, _SHARD, f"{name} in {path}")
    if not 1 <= shard["samples"] <= size:
        raise TsAdaptError(
            f"{path} lists {shard['samples']} samples in {name}, not 1 to {size}; generate the teacher again"
        )


def plain(value: Any) -> Any:
    """`value` as JSON gives it back; numbers to 12 digits, so that the last bit of a computed time does not count."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value
