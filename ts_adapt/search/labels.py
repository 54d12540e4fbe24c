"""Labels: the oracle grids of a teacher's samples, kept for training and for evaluation.

A folder with `labels.json` (what was searched: teacher hash, solver, nfe, distance, options, the grid at the start) and
one `part-XXXXX.safetensors` for each batch: index, times, distance, static_distance, start, and of the corrections
(model_times, ...) those that were searched. A part is the unit of work: a search that was killed
goes on with the first part that is missing, and labels of another teacher are refused.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.corrections import field_names, grid_of
from ts_adapt.interfaces import TimeGrid
from ts_adapt.numerics import validate_grid
from ts_adapt.remedies import command
from ts_adapt.search.per_sample import LabelBatch
from ts_adapt.storage.files import differing, read_json, read_tensors, shortened, write_json, write_tensors
from ts_adapt.storage.layout import LABEL_FOLDER, LABEL_PARTS, LABELS, label_file

SEARCHING = partial(command, "search", "--method", "per-sample")
"""What makes labels."""
NAMES = {"batch": "label_batch", "options": "per_sample", "static": "static grid"}
"""What the entries of a spec are called among the options of an experiment, where by another name."""
_KEYS = ("index", "distance", "static_distance", "start")


class LabelStore:
    """The labels under `folder`; `spec` says what they are labels of."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder, self.spec = folder, spec

    @classmethod
    def create(cls, folder: Path, spec: dict[str, Any]) -> LabelStore:
        """Open `folder` for writing; TsAdaptError if it holds labels of something else (a finished part of them)."""
        store = cls(folder, {**LABEL_FOLDER.head, **spec})
        kept = read_json(folder / LABELS) if (folder / LABELS).exists() else {}
        if not isinstance(kept, dict):
            raise TsAdaptError(f"{folder / LABELS} holds no labels' spec; remove {folder} and search again")
        if kept:
            cls(folder, kept).compare(store.spec)
        if differing(_named(kept), _named(store.spec)):
            write_json(folder / LABELS, store.spec)
        return store

    @classmethod
    def open(cls, folder: Path, teacher_hash: str | None = None) -> LabelStore:
        """Open existing labels; TsAdaptError if there are none, or if they belong to another teacher."""
        if not (folder / LABELS).exists():
            raise TsAdaptError(f"there are no labels in {folder}; make them with {SEARCHING()}")
        spec = read_json(folder / LABELS)
        LABEL_FOLDER.check(spec, folder / LABELS, "remove it, search again")
        if teacher_hash is not None and spec.get("teacher") != teacher_hash:
            raise TsAdaptError(
                f"the labels in {folder} belong to the teacher {shortened(spec.get('teacher'))}, "
                f"not to {shortened(teacher_hash)}; "
                "search them again for this teacher"
            )
        return cls(folder, spec)

    def compare(self, spec: dict[str, Any]) -> None:
        """TsAdaptError if there are labels here, and an entry of `spec` is another than theirs."""
        others = differing(_named(self.spec), _named(spec))
        if others and any(self.folder.glob(LABEL_PARTS)):
            raise TsAdaptError(
                f"{self.folder} holds labels made with another {', '.join(others)}; set it back, or replace them with "
                "--redo"
            )

    def path(self, part: int) -> Path:
        return self.folder / label_file(part)

    def has(self, part: int, index: Tensor) -> bool:
        """Whether the part is there, valid, and begins with the samples `index` `(n,)`; else it is to be searched."""
        if not self.path(part).exists():
            return False
        try:
            kept = self._read(self.path(part))["index"]
        except TsAdaptError:
            return False
        return torch.equal(kept[: len(index)], index.cpu())

    def write(self, part: int, labels: LabelBatch) -> None:
        tensors = {key: getattr(labels, key) for key in _KEYS} | {"times": labels.grid.times} | labels.grid.corrections
        write_tensors(self.path(part), {key: value.contiguous().cpu() for key, value in tensors.items()})

    def load(self) -> LabelBatch:
        """All finished labels, in the order of their parts; TsAdaptError for a part that is missing or damaged."""
        paths = sorted(self.folder.glob(LABEL_PARTS))
        if not paths:
            raise TsAdaptError(f"the search in {self.folder} has not finished a part yet; run it again")
        missing = next((self.path(i) for i in range(len(paths)) if self.path(i) not in paths), None)
        if missing is not None:
            raise TsAdaptError(f"{missing} is missing among the labels; run {SEARCHING()} again")
        parts = [self._read(path) for path in paths]
        seen: set[int] = set()
        for path, part in zip(paths, parts, strict=True):
            index = part["index"].tolist()
            if _kind(part) != _kind(parts[0]):
                raise TsAdaptError(
                    f"{path} has grids of {_kind(part)}, {paths[0]} of {_kind(parts[0])}; "
                    "remove the one that does not belong here and search again"
                )
            if len(seen | set(index)) < len(seen) + len(index):
                raise TsAdaptError(f"{path} labels a sample that is labelled already; remove it and search again")
            seen |= set(index)

        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return LabelBatch(grid=grid_of(joined), **{key: joined[key] for key in _KEYS})

    @staticmethod
    def _read(path: Path) -> dict[str, Tensor]:
        part = read_tensors(path, {"times": (None, None), **{key: (None,) for key in _KEYS}})
        part = {key: value for key, value in part.items() if key in (*_KEYS, "times", *field_names())}
        lengths = {len(value) for value in part.values()}
        if len(lengths) > 1 or not lengths - {0} or part["index"].is_floating_point():
            raise TsAdaptError(f"{path} is no valid part of labels (its lengths differ); remove it and search again")
        if not bool(torch.isfinite(part["distance"]).all()):
            raise TsAdaptError(f"{path} holds distances that are not finite; remove it and search again")
        try:
            validate_grid(grid_of(part))
        except TsAdaptError as error:
            raise TsAdaptError(f"{path}: {error}; remove it and search again") from error
        return part


def start_entries(name: str, grid: TimeGrid) -> dict[str, Any]:
    """What a spec says of the shared `grid` that the search starts from, in the workspace under `name`."""
    numbers = {key: value.tolist() for key, value in grid.corrections.items()}
    return {"static": grid.times.tolist(), **({"start": {"name": name, **numbers}} if name != "static" else {})}


def _kind(part: dict[str, Tensor]) -> str:
    """What grids a part has, in words."""
    return ", ".join([f"{part['times'].shape[1]} times", *grid_of(part).corrections])


def _named(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec` by the names of options, without the width of a derivative that is exact."""
    named = {NAMES.get(key, key): value for key, value in spec.items()}
    way = named.get("derivative")
    return {**named, "derivative": way[:1]} if isinstance(way, list) and way[:1] == ["exact"] else named
