"""Cachers and quantizers beside one another: of each solver, NFE, schedule and number of samples a table of them all,
with the schedules that were learned for one of them (`static@hqq4`) beside what the schedule of the full network gives.

Where there is one cacher and quantizer alone there is no such table. Where there are several, the tables and pictures
of schedules are of `plain` rows: without either, or else of the first pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ts_adapt.assembly import NONE
from ts_adapt.evaluation.benchmark import Row
from ts_adapt.evaluation.tables import NOTHING, cell, short_name
from ts_adapt.schedules.name import OF_STUDENT

Cell = Callable[[Row], str]


@dataclass(frozen=True)
class Product:
    """The rows, of several cachers or quantizers, that have all else in common."""

    title: str
    rows: list[Row]


def plain(rows: Sequence[Row]) -> list[Row]:
    """The rows without cacher and quantizer; where there are none, those of the first row's."""
    pairs = [(r.cacher, r.quantizer) for r in rows]
    pair = (NONE, NONE) if (NONE, NONE) in pairs else next(iter(pairs), None)
    return [r for r, own in zip(rows, pairs, strict=True) if own == pair]


def products(rows: Sequence[Row]) -> list[Product]:
    """One for each solver, NFE, schedule and number of samples with several cachers or quantizers, in rows' order."""
    found: dict[tuple[str, int, str, int], list[Row]] = {}
    for row in rows:
        name = row.schedule.partition(OF_STUDENT)[0]
        found.setdefault((row.solver, row.nfe, name, row.samples), []).append(row)
    return [
        Product(f"{solver}, NFE {nfe}, {schedule}, {samples} samples", part)
        for (solver, nfe, schedule, samples), part in found.items()
        if len({(row.cacher, row.quantizer) for row in part}) > 1
    ]


NAMES = ("cacher", "quantizer", "schedule")
"""Columns that are no numbers."""


def columns(product: Product, features: str) -> dict[str, Cell]:
    """Head of a column -> what stands in it; the `NAMES` come first, the schedule where there are several."""
    short, several = short_name(features), len({row.schedule for row in product.rows}) > 1
    schedule: dict[str, Cell] = {"schedule": lambda r: r.schedule} if several else {}
    return {
        "cacher": lambda r: r.cacher,
        "quantizer": lambda r: r.quantizer,
        **schedule,
        "bits": lambda r: _number(r.bits, "{:.2f}"),
        "weights MB": lambda r: _number(r.weight_bytes, "{:.2f}", 1e-6),
        "MFLOP/image": lambda r: _number(r.flops, "{:.1f}", 1e-6),
        "memory MB": lambda r: _number(r.peak_memory, "{:.2f}", 1e-6),
        "ms/image": lambda r: _number(r.seconds_per_image, "{:.2f}", 1e3),
        f"{short} data": lambda r: cell(r, "fid_data"),
        f"{short} teacher": lambda r: cell(r, "fid_teacher"),
        "distance": lambda r: cell(r, "distance"),
        "precision": lambda r: _number(r.precision, "{:.3f}"),
        "recall": lambda r: _number(r.recall, "{:.3f}"),
    }


def text(product: Product, features: str) -> str:
    """The table for the terminal."""
    lines = _cells(product, features)
    wide = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    left = [head in NAMES for head in lines[0]]
    aligned = [
        "  ".join(x.ljust(w) if name else x.rjust(w) for x, w, name in zip(line, wide, left, strict=True))
        for line in lines
    ]
    return "\n".join([product.title, aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def markdown(product: Product, features: str) -> str:
    """The table for a README."""
    head, *lines = [f"| {' | '.join(line)} |" for line in _cells(product, features)]
    return "\n".join([product.title, "", head, "|---" * (head.count("|") - 1) + "|", *lines])


def _cells(product: Product, features: str) -> list[list[str]]:
    found = columns(product, features)
    return [list(found), *([of(row) for of in found.values()] for row in product.rows)]


def _number(value: float | None, form: str, times: float = 1.0) -> str:
    return NOTHING if value is None else form.format(times * value)
