"""Labels: the oracle grids of a teacher's samples, kept for training and for evaluation.

A folder with `labels.json` (what was searched: teacher hash, solver, nfe, distance, options, the static grid) and one
`part-XXXXX.safetensors` for each batch: index, times, distance, static_distance, start. A part is the unit of work:
a search that was killed goes on with the first part that is missing, and labels of another teacher are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.files import read_json, read_tensors, write_json, write_tensors
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.search.per_sample import LabelBatch

FORMAT, VERSION = "ts_adapt-labels", 1
_KEYS = ("index", "times", "distance", "static_distance", "start")


class LabelStore:
    """The labels under `folder`; `spec` says what they are labels of."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder, self.spec = folder, spec

    @classmethod
    def create(cls, folder: Path, spec: dict[str, Any]) -> LabelStore:
        """Open `folder` for writing; TsAdaptError if it holds labels of something else."""
        store = cls(folder, {"format": FORMAT, "version": VERSION, **spec})
        if (folder / "labels.json").exists():
            kept = read_json(folder / "labels.json")
            differing = [key for key in store.spec if kept.get(key) != store.spec[key]]
            if differing:
                key = differing[0]
                raise TsAdaptError(
                    f"{folder} holds labels made with another {key} ({_short(kept.get(key))}, "
                    f"now {_short(store.spec[key])}); "
                    "remove the folder or write to another one"
                )
        else:
            write_json(folder / "labels.json", store.spec)
        return store

    @classmethod
    def open(cls, folder: Path, teacher_hash: str | None = None) -> LabelStore:
        """Open existing labels; TsAdaptError if there are none, or if they belong to another teacher."""
        if not (folder / "labels.json").exists():
            raise TsAdaptError(f"there are no labels in {folder}; make them with `ts-adapt search --method per-sample`")
        spec = read_json(folder / "labels.json")
        if not isinstance(spec, dict) or spec.get("format") != FORMAT or spec.get("version") != VERSION:
            raise TsAdaptError(f"{folder / 'labels.json'} is not of the format {FORMAT!r}, version {VERSION}")
        if teacher_hash is not None and spec.get("teacher") != teacher_hash:
            raise TsAdaptError(
                f"the labels in {folder} belong to the teacher {_short(spec.get('teacher'))}, "
                f"not to {_short(teacher_hash)}; "
                "search them again for this teacher"
            )
        return cls(folder, spec)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.safetensors"

    def has(self, part: int) -> bool:
        return self.path(part).exists()

    def write(self, part: int, labels: LabelBatch) -> None:
        write_tensors(self.path(part), {key: getattr(labels, key).contiguous().cpu() for key in _KEYS})

    def load(self) -> LabelBatch:
        """All finished labels, in the order of their parts."""
        paths = sorted(self.folder.glob("part-*.safetensors"))
        if not paths:
            raise TsAdaptError(f"the search in {self.folder} has not finished a part yet; run it again")
        parts = [read_tensors(path) for path in paths]
        for path, part in zip(paths, parts, strict=True):
            if not set(_KEYS) <= set(part) or not bool(torch.isfinite(part["times"]).all()):
                raise TsAdaptError(f"{path} is no valid part of labels; remove it and search again")

        def joined(key: str) -> Tensor:
            return torch.cat([part[key] for part in parts])

        return LabelBatch(**{key: joined(key) for key in _KEYS})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
