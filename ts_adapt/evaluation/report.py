"""What an evaluation leaves behind: results.csv and .json with every number, and for readers results.md, plots and a
self-contained HTML page (`page.html.jinja`)."""

from __future__ import annotations

import base64
import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from torch import Tensor

from ts_adapt.evaluation.comparison import Results
from ts_adapt.evaluation.conclusions import conclusions, verdict_tables
from ts_adapt.evaluation.records import COLUMNS, Row
from ts_adapt.evaluation.tables import (
    LEGEND,
    as_markdown,
    brief,
    cost_tables,
    difference_table,
    frechet_name,
    group_tables,
    groups,
    once,
    overviews,
    plain,
)
from ts_adapt.evaluation.worth import worth_tables
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.plots import plot_images, plot_intervals, plot_quality, plot_schedules
from ts_adapt.storage.files import write_bytes, write_json
from ts_adapt.storage.layout import PLOTS, REPORT, RESULTS, RESULTS_TABLE, RESULTS_TEXT, stem

Key = tuple[str, int]
"""A sampler and an NFE."""
Columns = Sequence[str] | None
OVERVIEW = "overview"
"""The figure that comes first."""


@dataclass(frozen=True)
class Panel:
    """What is drawn for one sampler and NFE: times and pictures by schedule name (the teacher's pictures included)."""

    sampler: str
    nfe: int
    times: Mapping[str, Tensor]
    pictures: Mapping[str, Tensor]


@dataclass(frozen=True)
class Picture:
    """A figure of the page: a PNG's bytes and its caption.

    name  of its file, without the suffix
    key   what it is of; None: of several
    wide  over the page's whole width
    """

    name: str
    caption: str
    png: bytes
    key: Key | None = None
    wide: bool = False


def write_report(
    folder: Path, results: Results, panels: Sequence[Panel], noise_schedule: NoiseSchedule, *, title: str,
    notes: Sequence[str] = (), columns: Columns = None,
) -> Path:  # fmt: skip
    """Write everything under `folder`; returns the path of the HTML page.

    notes    sentences on the comparison, the first on what is compared
    columns  that the tables of a sampler and NFE show, by their names in results.csv; None: the usual ones

    Groups of `results` without a panel keep the pictures that an earlier report left in `folder`.
    """
    rows = results.rows
    found = results.as_json()
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found["rows"])
    write_bytes(folder / RESULTS_TABLE, text.getvalue().encode())
    write_json(folder / RESULTS, found)
    write_bytes(folder / RESULTS_TEXT, _markdown(results, title, notes, columns).encode())
    pictures = [*_of_rows(once(plain(rows)), results.features), *_of_panels(rows, panels, noise_schedule)]
    for picture in pictures:
        write_bytes(folder / PLOTS / f"{picture.name}.png", picture.png)
    pictures += _kept(folder / PLOTS, rows, {picture.name for picture in pictures})
    write_bytes(folder / REPORT, page(results, pictures, title, notes, columns).encode())
    return folder / REPORT


def _markdown(results: Results, title: str, notes: Sequence[str], columns: Columns) -> str:
    rows, features = plain(results.rows), results.features
    parts = [f"# {title}", "\n".join(notes)]
    short = [as_markdown(table) for table in brief(rows, features)]
    worth = [as_markdown(table) for table in worth_tables(rows, features)]
    parts += ["## In short", *short, *worth] if short or worth else []
    for conclusion in conclusions(results):
        lines = "\n".join(f"- {line}" for line in conclusion.lines)
        parts += [f"## {conclusion.heading}, paired distance to the teacher", lines]
    shown = once(rows)
    tables = [*overviews(shown, features), *group_tables(shown, features, columns).values()]
    tables += cost_tables(once(results.rows), features, columns)
    parts += ["## Tables", *map(as_markdown, tables), f"Bold: the best of a column, the oracle left out. {LEGEND}"]
    return "\n\n".join(parts) + "\n"


def page(
    results: Results, pictures: Sequence[Picture], title: str, notes: Sequence[str], columns: Columns = None
) -> str:
    """The page as HTML."""
    rows, features = results.rows, results.features
    figures = defaultdict[Key | None, list[Picture]](list)
    for picture in pictures:
        figures[picture.key].append(picture)
    place = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=place, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["tied"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    found = conclusions(results)
    return environment.get_template("page.html.jinja").render(
        title=title, notes=notes, conclusions=found, verdicts=list(verdict_tables(found)), figures=figures,
        worth=list(worth_tables(plain(rows), features)),
        overviews=list(overviews(once(plain(rows)), features)),
        costs=list(cost_tables(once(rows), features, columns)),
        sections=_sections(results, columns), distance=results.facts["comparison"]["distance"],
        frechet=frechet_name(features),
    )  # fmt: skip


def _sections(results: Results, columns: Columns) -> list[dict[str, Any]]:
    """One for each sampler and NFE, the rows and their differences, each on the most samples; of cheaper
    networks those alone that more is to be said of than what the tables of these say."""
    by_count = sorted(results.compared(), key=lambda pair: pair.row.samples)
    most = {(p.row.sampler, p.row.nfe, p.row.schedule, p.other.schedule): p for p in by_count}
    rows, pairs = once(results.rows), [pair for pair in results.compared() if pair in most.values()]
    told = {r.sampler for r in plain(rows)} | {pair.row.sampler for pair in pairs}
    sections: dict[Key, dict[str, Any]] = {}
    told_rows = [r for r in rows if r.sampler in told]
    for (sampler, nfe, _), table in group_tables(told_rows, results.features, columns).items():
        new = {"key": (sampler, nfe), "title": f"{sampler}, NFE {nfe}", "tables": []}
        own = [pair for pair in pairs if (pair.row.sampler, pair.row.nfe) == (sampler, nfe)]
        tables = sections.setdefault((sampler, nfe), new)["tables"]
        tables += [table, difference_table(own)] if own else [table]
    return list(sections.values())


def _of_rows(rows: Sequence[Row], features: str) -> Iterator[Picture]:
    """What can be drawn of the numbers alone: first one figure of quality against NFE, of all schedules of the samplers
    that have several; then distances with intervals."""
    panels = []
    for sampler in dict.fromkeys(r.sampler for r in rows):
        part = [r for r in rows if r.sampler == sampler]
        if len({r.nfe for r in part}) < 2:
            continue
        for column, label in (
            ("distance", "paired distance to the teacher"), ("fid_data", f"{frechet_name(features)} to the data"),
        ):  # fmt: skip
            curves = {}
            for name in dict.fromkeys(r.schedule for r in part):
                line = sorted((r for r in part if r.schedule == name), key=lambda r: r.nfe)
                points = [(r.nfe, getattr(r, column)) for r in line if getattr(r, column) is not None]
                if points:
                    curves[name] = (line[0].kind, [nfe for nfe, _ in points], [value for _, value in points])
            panels += [(sampler, label, curves)] if curves else []
    if panels:
        caption = "Quality against evaluations, all schedules: lower is better"
        yield Picture(OVERVIEW, caption, _png(plot_quality(panels)), wide=True)
    for (sampler, nfe, samples), group in groups(rows).items():
        found = {r.schedule: (r.kind, r.distance, r.distance_low, r.distance_high, r.distance_median) for r in group}
        caption = f"Mean distance to the teacher with 95 % intervals, and median; {samples} samples"
        drawn = _png(plot_intervals(found, "paired distance to the teacher"))
        yield Picture(f"intervals-{stem(sampler)}-nfe{nfe}-{samples}", caption, drawn, (sampler, nfe))


def _panel_names(sampler: str, nfe: int) -> list[tuple[str, str]]:
    """(file stem, caption) of the two pictures of a panel."""
    where, key = f"{sampler}, NFE {nfe}", f"{stem(sampler)}-nfe{nfe}"
    return [(f"schedules-{key}", f"Schedules, {where}"), (f"images-{key}", f"The same noises, {where}")]


def _of_panels(rows: Sequence[Row], panels: Sequence[Panel], noise_schedule: NoiseSchedule) -> Iterator[Picture]:
    kinds = {r.schedule: r.kind for r in rows}
    for panel in panels:
        pictures = {name: x.float() / 127.5 - 1 for name, x in panel.pictures.items()}
        drawn = plot_schedules(panel.times, noise_schedule, kinds=kinds), plot_images(pictures)
        for (name, caption), figure in zip(_panel_names(panel.sampler, panel.nfe), drawn, strict=True):
            yield Picture(name, caption, _png(figure), (panel.sampler, panel.nfe), wide=name.startswith("images"))


def _kept(folder: Path, rows: Sequence[Row], drawn: set[str]) -> Iterator[Picture]:
    """The pictures of panels that an earlier report left in `folder` and this one has not `drawn`."""
    for key in dict.fromkeys((r.sampler, r.nfe) for r in rows):
        for name, caption in _panel_names(*key):
            path = folder / f"{name}.png"
            if name not in drawn and path.is_file():
                yield Picture(name, caption, path.read_bytes(), key, wide=name.startswith("images"))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    return buffer.getvalue()
