"""Sets of images scored by every measure there is, each with an interval, and two of them compared.

    theta      a measure of all n images
    theta_r    of m = n // 2 of them, drawn without replacement, r = 1 .. R
    delta_r    (theta_r - mean theta_r) sqrt(m / (n - m))
    interval   theta + the quantiles of delta_r

Given all n images, theta_r varies as theta does between sets of n (Shao and Wu 1989): the bootstrap for measures that
copies would falsify, as a sample drawn twice has its nearest neighbour at distance 0. What else half as many change is
the same for all r and goes with the mean. Real images are taken as they are. Two sets are drawn from independently.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ts_adapt.evaluation.metrics import FeatureStatistics, frechet
from ts_adapt.evaluation.quality import Reference, quality_of
from ts_adapt.evaluation.tables import Column, Table, columns_of, make_table
from ts_adapt.storage.files import write_bytes, write_json
from ts_adapt.storage.layout import FOLDERS, FOLDERS_TABLE

MEASURES = ("fid_data", "kid", "sfid", "inception_score", "precision", "recall", "clip_score")
"""By the names of their columns in results.csv."""
LEVEL = 0.95
FEWEST = 4
"""Images that an interval needs."""
HALVES, WIDE, HALVES_OF_WIDE = 200, 1024, 50
"""How many halves by default, and of wide features, whose Frechet distances take most of the time."""


@dataclass(frozen=True)
class Scores:
    """What a set of images, or a difference of two, is measured at.

    values  by measure
    spread  delta_r `(R,)` by measure; none where there is no interval
    """

    name: str
    samples: int
    values: Mapping[str, float]
    spread: Mapping[str, np.ndarray]

    def end(self, measure: str, level: float) -> float | None:
        """The end of an interval at this quantile."""
        if measure not in self.spread:
            return None
        return self.values[measure] + float(np.quantile(self.spread[measure], level))

    def minus(self, other: Scores) -> Scores:
        """The difference of two sets of as many images, in the measures of both."""
        values = {name: self.values[name] - other.values[name] for name in self.values if name in other.values}
        spread = {
            name: self.spread[name] - other.spread[name] for name in values if name in self.spread.keys() & other.spread
        }
        return Scores(f"{self.name} - {other.name}", self.samples, values, spread)


def halves_of(features: Tensor) -> int:
    """How many halves of images with these `features` `(n, D)` are scored by default."""
    return HALVES_OF_WIDE if features.shape[1] > WIDE else HALVES


def scored(
    name: str, looks: Mapping[str, Tensor], reference: Reference | None, resamples: int, seed: int = 0,
    bar: Iterable[int] | None = None,
) -> Scores:  # fmt: skip
    """The measures of images whose `looks` are `features` `(n, D)` and what else is known of them (`quality_of`).

    resamples  R; 0: no intervals
    bar        range(R), as a progress bar shows it
    """
    count = len(looks["features"])
    values = _measures(looks, reference)
    half, generator = count // 2, np.random.default_rng(seed)
    found = []
    for _ in (range(resamples) if bar is None else bar) if count >= FEWEST else ():
        rows = torch.from_numpy(np.sort(generator.permutation(count)[:half]))
        found.append(_measures({name: value[rows] for name, value in looks.items()}, reference))
    scale = np.sqrt(half / (count - half))
    spread = {}
    for measure in values if found else ():
        drawn = np.array([one.get(measure, np.nan) for one in found])
        if np.isfinite(drawn).all():
            spread[measure] = (drawn - drawn.mean()) * scale
    return Scores(name, count, values, spread)


def _measures(looks: Mapping[str, Tensor], reference: Reference | None) -> dict[str, float]:
    found: dict[str, float | None] = asdict(quality_of(looks, len(looks["features"]), reference))
    if reference is not None:
        found["fid_data"] = frechet(FeatureStatistics.of(looks["features"]), reference.statistics)
    return {name: value for name in MEASURES if (value := found.get(name)) is not None}


def scores_table(title: str, found: Sequence[Scores], features: str) -> Table:
    """Sets down, measures with their intervals across."""
    shown = [Column("images", lambda s: s.name, text=True), Column("count", lambda s: s.samples, form="{:.0f}")]
    columns = columns_of(features)
    for measure in MEASURES:
        form = columns[measure].form
        shown.append(Column(columns[measure].head, partial(_value, measure), form=form))
        shown += [
            Column(f"95 %\n{word}", partial(_end, measure, level), form=form)
            for word, level in (("from", (1 - LEVEL) / 2), ("to", (1 + LEVEL) / 2))
        ]
    return make_table(title, shown, found)


def _value(measure: str, scores: Scores) -> float | None:
    return scores.values.get(measure)


def _end(measure: str, level: float, scores: Scores) -> float | None:
    return scores.end(measure, level)


def write_scores(folder: Path, found: Sequence[Scores], facts: Mapping[str, Any]) -> Path:
    """images.json, with `facts`, and images.csv under `folder`; returns the path of the latter."""
    rows = []
    for scores in found:
        row: dict[str, Any] = {"images": scores.name, "count": scores.samples}
        for name in MEASURES:
            ends = (scores.end(name, (1 - LEVEL) / 2), scores.end(name, (1 + LEVEL) / 2))
            row |= {name: scores.values.get(name), f"{name}_low": ends[0], f"{name}_high": ends[1]}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(folder / FOLDERS_TABLE, text.getvalue().encode())
    write_json(folder / FOLDERS, {"facts": dict(facts), "rows": rows})
    return folder / FOLDERS_TABLE
