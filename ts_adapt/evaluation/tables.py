"""A comparison as tables: its rows in groups, what is best in a column, text for the terminal, Markdown for a README.

A group is one sampler (solver, cacher, quantizer), one NFE and one number of samples: Frechet distances compare within
it only. The best of a
column is its least number, of `wins` its greatest, among all but the oracle, which was searched on the test samples
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ts_adapt.evaluation.benchmark import Row

Group = tuple[str, int, int]
FORMATS = {
    "fid_data": "{:.3f}", "fid_teacher": "{:.3f}", "distance": "{:.4f}", "distance_median": "{:.4f}",
    "wins": "{:.0f} %",
}  # fmt: skip
"""How the measures are written; all columns that have a best are here."""
NOTHING = "–"
ON_WINS = "wins: the share of samples on which a schedule is nearer to the teacher than the static grid (ties by half)"


def frechet_name(features: str) -> str:
    """What the Frechet distance in these features is called: FID for Inception's alone."""
    return "FID" if features == "inception" else f"Frechet distance ({features} features)"


def short_name(features: str) -> str:
    """The same for the head of a column."""
    return "FID" if features == "inception" else "Frechet"


def groups(rows: Sequence[Row]) -> list[Group]:
    """(sampler, NFE, samples), the most samples first."""
    return sorted({(r.sampler, r.nfe, r.samples) for r in rows}, key=lambda g: (g[0], g[1], -g[2]))


def rows_of(rows: Sequence[Row], group: Group) -> list[Row]:
    """The rows of one group."""
    return [r for r in rows if (r.sampler, r.nfe, r.samples) == group]


def best(rows: Sequence[Row]) -> dict[str, float]:
    """The best value of each column of `FORMATS` that has any, over the rows of one group."""
    found = {}
    for column in FORMATS:
        values = [getattr(r, column) for r in rows if r.kind != "oracle" and getattr(r, column) is not None]
        if values:
            found[column] = max(values) if column == "wins" else min(values)
    return found


def cell(row: Row, column: str) -> str:
    """A measure as text; a dash where there is none."""
    value = getattr(row, column)
    return NOTHING if value is None else FORMATS[column].format(100 * value if column == "wins" else value)


@dataclass(frozen=True)
class Overview:
    """All NFEs of one sampler at one number of samples: the rows by schedule and NFE, and the best of each NFE."""

    sampler: str
    samples: int
    nfe: list[int]
    schedules: dict[str, dict[int, Row]]
    best: dict[int, dict[str, float]]


def overviews(rows: Sequence[Row]) -> Iterator[Overview]:
    """One for each sampler and number of samples, in the order of the rows."""
    for sampler, samples in dict.fromkeys((r.sampler, r.samples) for r in rows):
        part = [r for r in rows if (r.sampler, r.samples) == (sampler, samples)]
        schedules: dict[str, dict[int, Row]] = {}
        for row in part:
            schedules.setdefault(row.schedule, {})[row.nfe] = row
        nfe = sorted({r.nfe for r in part})
        yield Overview(sampler, samples, nfe, schedules, {n: best(rows_of(part, (sampler, n, samples))) for n in nfe})


def table(rows: Sequence[Row], features: str) -> str:
    """The rows as an aligned text table, group by group, for the terminal."""
    short = short_name(features)
    wide = 2 + max((len(r.schedule) for r in rows), default=8)
    head = (
        f"{'schedule':<{wide}}{'kind':<11}{f'{short} data':>13}{f'{short} teacher':>17}"
        f"{'distance':>10}{'median':>9}{'wins':>7}{'ms/image':>10}"
    )
    lines = []
    for sampler, nfe, samples in groups(rows):
        lines += [f"{sampler}, NFE {nfe}, {samples} samples", head, "-" * len(head)]
        for r in rows_of(rows, (sampler, nfe, samples)):
            frechet = f"{cell(r, 'fid_data'):>13}{cell(r, 'fid_teacher'):>17}"
            paired = f"{cell(r, 'distance'):>10}{cell(r, 'distance_median'):>9}{cell(r, 'wins'):>7}"
            lines.append(f"{r.schedule:<{wide}}{r.kind:<11}{frechet}{paired}{1000 * r.seconds_per_image:>10.2f}")
        lines.append("")
    return "\n".join([*lines, "distance, median: paired distance to the teacher, its mean and median", ON_WINS])


def markdown(rows: Sequence[Row], features: str) -> str:
    """Tables for a README: schedules down, NFE across, the best of each column in bold. One of the Frechet distance to
    the data and the paired distance to the teacher, one of the latter's median and of the wins against static."""
    pairs = {
        f"{frechet_name(features)} to the data / paired distance to the teacher": ("fid_data", "distance"),
        "median paired distance to the teacher / wins against static": ("distance_median", "wins"),
    }
    parts = []
    for overview in overviews(rows):
        for title, columns in pairs.items():
            lines = [f"{overview.sampler}, {overview.samples} test samples: {title}", ""]
            lines.append("| schedule | " + " | ".join(f"NFE {n}" for n in overview.nfe) + " |")
            lines.append("|---" * (len(overview.nfe) + 1) + "|")
            for name, of_nfe in overview.schedules.items():
                texts = []
                for n in overview.nfe:
                    values = [_marked(of_nfe[n], column, overview.best[n]) for column in columns if n in of_nfe]
                    texts.append(" / ".join(values))
                lines.append(f"| {name} | " + " | ".join(texts) + " |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def brief(rows: Sequence[Row], features: str) -> str:
    """The comparison in short, for each sampler: the best fixed grid by paired distance, the best optimised one, and
    every other schedule that is no bound, over the most samples. Empty where no two fixed grids or nothing else is."""
    parts = []
    for overview in overviews(rows):
        every = [row for of_nfe in overview.schedules.values() for row in of_nfe.values()]
        most = max(r.samples for r in rows if r.sampler == overview.sampler)
        fixed = len({r.schedule for r in every if r.kind == "fixed"})
        if overview.samples < most or fixed < 2 or all(r.kind == "fixed" for r in every):
            continue
        lines = [
            f"{overview.sampler}, {overview.samples} test samples: paired distance to the teacher / "
            f"{frechet_name(features)} to the data",
            "",
            "| schedule | " + " | ".join(f"NFE {n}" for n in overview.nfe) + " |",
            "|---" * (len(overview.nfe) + 1) + "|",
        ]
        for title, kind in ((f"best of {fixed} fixed grids", "fixed"), ("best optimised grid", "optimized")):
            of_kind = [[r for r in every if r.kind == kind and r.nfe == n] for n in overview.nfe]
            best_of = [min(there, key=lambda r: r.distance) if there else None for there in of_kind]
            if any(best_of):
                lines.append(f"| {title} | " + " | ".join(_both(r, named=True) for r in best_of) + " |")
        for name, of_nfe in overview.schedules.items():
            if next(iter(of_nfe.values())).kind not in ("fixed", "optimized", "oracle"):
                lines.append(f"| {name} | " + " | ".join(_both(of_nfe.get(n)) for n in overview.nfe) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _both(row: Row | None, *, named: bool = False) -> str:
    if row is None:
        return NOTHING
    return f"{cell(row, 'distance')} / {cell(row, 'fid_data')}" + (f" ({row.schedule})" if named else "")


def _marked(row: Row, column: str, least: dict[str, float]) -> str:
    text, value = cell(row, column), getattr(row, column)
    return f"**{text}**" if value is not None and value == least.get(column) else text
