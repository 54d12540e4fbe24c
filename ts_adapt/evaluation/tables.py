"""The tables of a comparison: one model for the terminal, Markdown and the page.

    Column  what is shown of each row, and how
    Table   columns filled from rows; a column in which no row has a value is left out

A column has as many decimals as its least number needs for DIGITS significant digits, unless the greatest then had
more than MOST; a number that these decimals leave fewer than two digits of has DIGITS of its own. Bold is the best of a
column among all but the oracle, which was searched on the test samples themselves.

A group is one sampler (solver and student), one NFE and one number of samples: scores compare within it only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

from ts_adapt.assembly import AXES, FULL, NONE
from ts_adapt.evaluation.comparison import Compared
from ts_adapt.evaluation.records import ORACLE, Row
from ts_adapt.schedules.name import OF_STUDENT

DIGITS, MOST, FINEST, GREAT = 3, 5, 6, 1e7
NOTHING = "–"
USUAL = (
    "distance", "distance_low", "distance_high", "distance_median", "wins", "fid_data", "fid_teacher",
    "kid", "inception_score", "sfid", "precision", "recall", "clip_score", "seconds_per_image",
)  # fmt: skip
"""The columns that are shown unless others are asked for."""
OF_SETS = ("fid_data", "fid_teacher", "kid", "inception_score", "sfid", "precision", "recall")
"""Those that compare at equal numbers of samples only."""
BRIEF, ACROSS = ("distance", "wins", "fid_data"), 4
"""Those of each NFE where several are side by side, and how many are at most."""
COSTS = (*AXES, "schedule", "bits", "weight_bytes", "flops", "peak_memory", "seconds_per_image")
WORTH = ("distance", "distance_median", "wins", "fid_data", "fid_teacher", "precision", "recall")
"""Those of cheaper networks: what they cost, and, unless others are asked for, what they are worth."""
LEGEND = (
    "Distance: of a sample to the teacher's from the same noise, its mean with a 95 % interval, and its median.\n"
    "Wins: the share of samples on which a schedule is nearer to the teacher than the static grid, ties by half.\n"
    "A row that names a number of samples, as the oracle's, is of these alone: compare it by paired differences only."
)
Group = tuple[str, int, int]


@dataclass(frozen=True)
class Column:
    """What a table shows of each row.

    head   its name, with a line break where it may be broken
    value  of a row: a number, a text, or None for what does not apply
    best   of several numbers; None where none is better than another
    scale  that numbers are multiplied by
    form   how they are written; None: with the decimals that they need
    text   whether it is a column of texts
    tone   of a row, in which its cell is coloured: better, worse, or any other text for none
    over   what it has in common with the columns beside it
    """

    head: str
    value: Callable[[Any], Any]
    best: Callable[[list[float]], float] | None = None
    scale: float = 1.0
    form: str | None = None
    text: bool = False
    tone: Callable[[Any], str] = lambda row: ""
    over: str = ""


@dataclass(frozen=True)
class Cell:
    """What is printed, whether it is the best of its column, and its tone."""

    text: str
    best: bool = False
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """`columns`, and the cells of each row; `kinds` of schedules, by row, where rows are of any."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    kinds: list[str]

    @property
    def spans(self) -> list[tuple[str, int]]:
        """What neighbouring columns have in common, and how many they are; none where nothing is."""
        found = [(over, len(list(part))) for over, part in groupby(column.over for column in self.columns)]
        return found if any(over for over, _ in found) else []


def frechet_name(features: str) -> str:
    """What the Frechet distance in these features is called: FID for Inception's alone."""
    return "FID" if features == "inception" else f"Frechet distance ({features} features)"


def columns_of(features: str) -> dict[str, Column]:
    """How each column of results.csv is shown."""
    frechet, kernel = ("FID", "KID") if features == "inception" else ("Frechet", "kernel\ndistance")
    return {
        "model": Column("model", lambda r: r.model, text=True),
        "solver": Column("solver", lambda r: r.solver, text=True),
        "nfe": Column("NFE", lambda r: r.nfe, form="{:.0f}"),
        "schedule": Column("schedule", lambda r: r.schedule, text=True),
        "kind": Column("kind", lambda r: r.kind, text=True),
        "samples": Column("samples", lambda r: r.samples, form="{:.0f}"),
        "fid_data": Column(f"{frechet}\nto data", lambda r: r.fid_data, min),
        "fid_teacher": Column(f"{frechet}\nto teacher", lambda r: r.fid_teacher, min),
        "distance": Column("distance", lambda r: r.distance, min),
        "distance_low": Column("95 %\nfrom", lambda r: r.distance_low),
        "distance_high": Column("95 %\nto", lambda r: r.distance_high),
        "seconds_per_image": Column("ms /\nimage", lambda r: r.seconds_per_image, scale=1e3),
        "seed": Column("seed", lambda r: r.seed, form="{:.0f}"),
        "distance_median": Column("median", lambda r: r.distance_median, min),
        "wins": Column("wins", lambda r: r.wins, max, 100, "{:.0f} %"),
        "pruned": Column("pruned", lambda r: r.pruned, text=True),
        "cacher": Column("cacher", lambda r: r.cacher, text=True),
        "quantizer": Column("quantizer", lambda r: r.quantizer, text=True),
        "bits": Column("bits", lambda r: r.bits),
        "weight_bytes": Column("weights\nMB", lambda r: r.weight_bytes, scale=1e-6),
        "flops": Column("MFLOP /\nimage", lambda r: r.flops, scale=1e-6),
        "peak_memory": Column("memory\nMB", lambda r: r.peak_memory, scale=1e-6),
        "kid": Column(kernel, lambda r: r.kid, min),
        "inception_score": Column("IS", lambda r: r.inception_score, max),
        "sfid": Column("sFID", lambda r: r.sfid, min),
        "precision": Column("precision", lambda r: r.precision, max, form="{:.3f}"),
        "recall": Column("recall", lambda r: r.recall, max, form="{:.3f}"),
        "clip_score": Column("CLIP", lambda r: r.clip_score, max),
    }


def written(values: Sequence[float]) -> list[str]:
    """The numbers of a column as texts; see the module's head."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    least, greatest = (math.floor(math.log10(size)) for size in (min(sizes, default=1), max(sizes, default=1)))
    decimals = max(0, min(DIGITS - 1 - least, MOST - 1 - greatest, FINEST))
    low = 10.0 ** (1 - decimals)
    return [f"{value:.{decimals}f}" if low <= abs(value) < GREAT else f"{value:.{DIGITS}g}" for value in values]


def percent(share: float) -> str:
    """A difference as a share."""
    return f"{100 * share:+.1f} %"


def make_table(title: str, columns: Sequence[Column], rows: Sequence[Any], kinds: Sequence[str] | None = None) -> Table:
    """`columns` filled from `rows`, which are schedules of these `kinds`; None: they say it themselves, if they are."""
    kinds = [getattr(row, "kind", "") for row in rows] if kinds is None else list(kinds)
    filled = [column for column in columns if any(column.value(row) is not None for row in rows)]
    cells = [_cells(column, rows, kinds) for column in filled]
    return Table(title, filled, [list(row) for row in zip(*cells, strict=True)], kinds)


def _cells(column: Column, rows: Sequence[Any], kinds: Sequence[str]) -> Iterator[Cell]:
    values = [column.value(row) for row in rows]
    numbers = [column.scale * value for value in values if isinstance(value, int | float)]
    texts = iter(written(numbers) if column.form is None else map(column.form.format, numbers))
    rivals = [value for value, kind in zip(values, kinds, strict=True) if value is not None and kind != ORACLE]
    best = column.best(rivals) if column.best and rivals else None
    for value, row, kind in zip(values, rows, kinds, strict=True):
        text = NOTHING if value is None else value if isinstance(value, str) else next(texts)
        yield Cell(text, value is not None and value == best and kind != ORACLE, column.tone(row))


def across(title: str, first: Column, measures: Sequence[Column], rows: Sequence[Mapping[int, Any]]) -> Iterator[Table]:
    """Tables with NFE across: `first`, then the `measures` of each; `rows` map an NFE to what is measured there."""

    def at(column: Column, nfe: int) -> Column:
        def of(use: Callable[[Any], Any], nothing: Any) -> Callable[[Any], Any]:
            return lambda row: use(row[nfe]) if nfe in row else nothing

        return replace(column, value=of(column.value, None), tone=of(column.tone, ""), over=f"NFE {nfe}")

    examples = [next(iter(row.values())) for row in rows]
    kinds = [getattr(example, "kind", "") for example in examples]
    name = replace(first, value=lambda row: first.value(next(iter(row.values()))))
    nfes = sorted({nfe for row in rows for nfe in row})
    for start in range(0, len(nfes), ACROSS):
        shown = [at(column, nfe) for nfe in nfes[start : start + ACROSS] for column in measures]
        yield make_table(title, [name, *shown], rows, kinds)


def as_text(table: Table) -> str:
    """For the terminal: aligned, heads in as many lines as they need."""
    heads = [f"{column.over}\n{column.head}".strip().split("\n") for column in table.columns]
    high = max(map(len, heads))
    lines = [list(line) for line in zip(*([""] * (high - len(head)) + head for head in heads), strict=True)]
    lines += [[cell.text for cell in row] for row in table.rows]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            text.ljust(width) if column.text else text.rjust(width)
            for text, width, column in zip(line, wide, table.columns, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *aligned[:high], "-" * (sum(wide) + 2 * len(wide) - 2), *aligned[high:]])


def as_markdown(table: Table) -> str:
    """For a README, the best of each column in bold."""
    heads = [" ".join(f"{column.over} {column.head}".split()) for column in table.columns]
    lines = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in table.rows]
    rule = "".join("|---" if column.text else "|--:" for column in table.columns) + "|"
    head, *body = (f"| {' | '.join(line)} |" for line in (heads, *lines))
    return "\n".join([table.title, "", head, rule, *body])


def groups(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """(sampler, NFE, samples), the most samples first -> the rows of that group."""
    found: dict[Group, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r.sampler, r.nfe, -r.samples)):
        found.setdefault((row.sampler, row.nfe, row.samples), []).append(row)
    return found


def plain(rows: Sequence[Row]) -> list[Row]:
    """The rows of the full network; where there are none, those of the first row's."""
    students = [r.parts for r in rows]
    student = FULL.parts if FULL.parts in students else next(iter(students), None)
    return [r for r, own in zip(rows, students, strict=True) if own == student]


def once(rows: Sequence[Row]) -> list[Row]:
    """Every schedule on the most samples that it was measured on. What is on fewer than others of its sampler and NFE,
    as the oracle is, says so in its name, and has no scores of sets, which depend on how many samples there are."""
    own, most = dict[tuple[str, int, str], int](), dict[tuple[str, int], int]()
    for row in sorted(rows, key=lambda r: r.samples):
        own[row.sampler, row.nfe, row.schedule] = most[row.sampler, row.nfe] = row.samples
    found, none = [], dict.fromkeys(OF_SETS, cast(Any, None))
    for row in rows:
        if row.samples < own[row.sampler, row.nfe, row.schedule]:
            continue
        whole = most[row.sampler, row.nfe]
        name = f"{row.schedule} ({row.samples} samples)"
        found.append(row if row.samples == whole else replace(row, schedule=name, samples=whole, **none))
    return found


def group_tables(rows: Sequence[Row], features: str, chosen: Sequence[str] | None = None) -> dict[Group, Table]:
    """The rows of each group, with the `chosen` columns."""
    columns = columns_of(features)
    shown = [columns[name] for name in dict.fromkeys(("schedule", "kind", *(USUAL if chosen is None else chosen)))]
    return {
        (sampler, nfe, samples): make_table(f"{sampler}, NFE {nfe}, {samples} test samples", shown, part)
        for (sampler, nfe, samples), part in groups(rows).items()
    }


def overviews(rows: Sequence[Row], features: str) -> Iterator[Table]:
    """For each sampler and number of samples: schedules down, NFE across."""
    columns = columns_of(features)
    for sampler, samples in dict.fromkeys((r.sampler, r.samples) for r in rows):
        schedules: dict[str, dict[int, Row]] = {}
        for row in rows:
            if (row.sampler, row.samples) == (sampler, samples):
                schedules.setdefault(row.schedule, {})[row.nfe] = row
        measures = [columns[name] for name in BRIEF]
        yield from across(f"{sampler}, {samples} test samples", columns["schedule"], measures, [*schedules.values()])


def brief(rows: Sequence[Row], features: str) -> Iterator[Table]:
    """The comparison in short, for each sampler: the best fixed grid by mean distance, the best optimised one, and
    every other schedule that is no bound, over the most samples. None where no two fixed grids or nothing else is."""
    for sampler in dict.fromkeys(r.sampler for r in rows):
        of_sampler = [r for r in rows if r.sampler == sampler]
        most = [r for r in of_sampler if r.samples == max(r.samples for r in of_sampler)]
        fixed = {r.schedule for r in most if r.kind == "fixed"}
        if len(fixed) < 2 or all(r.kind == "fixed" for r in most):
            continue
        shown = []
        for kind, title in (("fixed", f"best of {len(fixed)} fixed grids"), ("optimized", "best optimised grid")):
            nfes = sorted({r.nfe for r in most if r.kind == kind})
            best = [min((r for r in most if (r.kind, r.nfe) == (kind, n)), key=lambda r: r.distance) for n in nfes]
            names = ", ".join(dict.fromkeys(r.schedule for r in best))
            shown += [replace(r, schedule=f"{title} ({names})") for r in best]
        yield from overviews([*shown, *(r for r in most if r.kind not in ("fixed", "optimized", ORACLE))], features)


def cost_tables(rows: Sequence[Row], features: str, chosen: Sequence[str] | None = None) -> Iterator[Table]:
    """For each solver, NFE, schedule and number of samples with several students a table of them all, with what was
    learned for one of them (`static@hqq4`) beside what the full network's gives."""
    columns, found = columns_of(features), dict[tuple[str, int, str, int], list[Row]]()
    for row in rows:
        found.setdefault((row.solver, row.nfe, row.schedule.partition(OF_STUDENT)[0], row.samples), []).append(row)
    for (solver, nfe, schedule, samples), part in found.items():
        if len({row.parts for row in part}) > 1:
            names = dict.fromkeys((*COSTS, *(WORTH if chosen is None else chosen)))
            alike = {"schedule"} if len({row.schedule for row in part}) == 1 else set[str]()
            alike |= {"pruned"} if all(row.pruned == NONE for row in part) else set()
            shown = [columns[name] for name in names if name not in alike]
            yield make_table(f"{solver}, NFE {nfe}, {schedule}, {samples} test samples", shown, part)


def difference_table(pairs: Sequence[Compared]) -> Table:
    """Paired differences of distances as shares, with their verdicts."""
    columns = [
        Column("paired difference", lambda p: f"{p.difference.schedule} – {p.difference.against}", text=True),
        Column("mean", lambda p: percent(p.difference.relative)),
        Column("95 %\nfrom", lambda p: percent(p.difference.relative_low)),
        Column("95 %\nto", lambda p: percent(p.difference.relative_high)),
        Column("median", lambda p: percent(p.difference.relative_median)),
        Column("wins", lambda p: f"{100 * p.difference.wins:.0f} %"),
        Column("verdict", lambda p: p.verdict, text=True, tone=lambda p: p.verdict),
    ]
    return make_table("", columns, pairs)
