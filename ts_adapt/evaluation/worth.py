"""What a schedule saves: how many evaluations the best fixed grid needs to be as good.

    D(N')  =  D of the schedule          D(N)  the least of the fixed grids with at most N evaluations

for the mean distance to the teacher and for the Frechet distance to the data; between the numbers of evaluations that
were measured log D is taken as linear in log N. What lies outside of them is given as a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from ts_adapt.evaluation.records import ORACLE, Row
from ts_adapt.evaluation.tables import Column, Table, across, columns_of
from ts_adapt.schedules.name import parse

MEASURES = ("distance", "fid_data")


@dataclass(frozen=True)
class Worth:
    """N' of a schedule with `nfe` evaluations, as it is written, by measure; None where that was not measured."""

    schedule: str
    kind: str
    nfe: int
    evaluations: Mapping[str, str | None]


def evaluations_of(value: float, fixed: Mapping[int, float]) -> tuple[float, float]:
    """The bounds of N' with D(N') = `value`, equal where it is known; `fixed` maps N to the least D there.

    (0, N) where the value is not reached even by the fewest evaluations measured, (N, inf) where by none.
    """
    counts = sorted(fixed)
    least = dict(zip(counts, accumulate((fixed[n] for n in counts), min), strict=True))
    reached = [n for n in counts if least[n] <= value]
    if not reached:
        return float(counts[-1]), math.inf
    after = reached[0]
    if after == counts[0]:
        return (0.0, float(after)) if value > least[after] else (float(after), float(after))
    before = counts[counts.index(after) - 1]
    if min(least[after], value) <= 0:
        return float(before), float(after)
    place = math.log(least[before] / value) / math.log(least[before] / least[after])
    found = before * (after / before) ** place
    return found, found


def worth_tables(rows: Sequence[Row], features: str) -> Iterator[Table]:
    """For each sampler, over the most samples: schedules down, NFE across. None where fixed grids have but one NFE."""
    heads = {name: column.head for name, column in columns_of(features).items()}
    for sampler in dict.fromkeys(r.sampler for r in rows):
        own = [r for r in rows if r.sampler == sampler]
        own = [r for r in own if r.samples == max(r.samples for r in own)]
        fixed = [r for r in own if r.kind == "fixed" and not parse(r.schedule).native]
        if len({r.nfe for r in fixed}) < 2:
            continue
        found: dict[str, dict[int, Worth]] = {}
        for row in own:
            if row.kind not in ("fixed", ORACLE):
                kept = {measure: _written(row, fixed, measure) for measure in MEASURES}
                found.setdefault(row.schedule, {})[row.nfe] = Worth(row.schedule, row.kind, row.nfe, kept)
        measures = [Column(heads[name], partial(_by, name)) for name in MEASURES]
        title = f"{sampler}, worth in evaluations along the best fixed grid"
        if found:
            yield from across(title, Column("schedule", lambda w: w.schedule, text=True), measures, [*found.values()])


def _by(measure: str, worth: Worth) -> str | None:
    return worth.evaluations[measure]


def _written(row: Row, fixed: Sequence[Row], measure: str) -> str | None:
    value, known = getattr(row, measure), [(r.nfe, getattr(r, measure)) for r in fixed]
    if value is None or any(other is None for _, other in known):
        return None
    low, high = evaluations_of(value, {n: min(d for m, d in known if m == n) for n, _ in known})
    if low == high:
        return f"{low:.1f}"
    return f"> {low:.0f}" if math.isinf(high) else f"< {high:.0f}" if not low else f"{low:.0f} to {high:.0f}"
