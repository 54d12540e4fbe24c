"""What an evaluation leaves behind: results.csv, results.json, plots, and one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure
from torch import Tensor

from ts_adapt.assembly import has_shared_ends
from ts_adapt.evaluation.benchmark import Difference, Row, as_records
from ts_adapt.files import read_json, write_bytes, write_json
from ts_adapt.interfaces import NoiseSchedule, TsAdaptError
from ts_adapt.plots import plot_images, plot_quality, plot_schedules

COLUMNS = [field.name for field in fields(Row)]
LEARNED = ("static", "one-shot", "recursive", "oracle")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
 h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
 table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
 th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e3e3 }
 th { border-bottom: 2px solid #999 } td.name, th.name { text-align: left }
 tr.learned td { background: #f1f7fd } tr.best td { font-weight: 600 }
 img { max-width: 100%; margin: .5rem 0 } .note { color: #555 }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{% for line in notes %}<p class="note">{{ line }}</p>{% endfor %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
<table><tr><th class="name">schedule</th><th class="name">kind</th><th>samples</th><th>FID to data</th>
<th>FID to teacher</th><th>distance</th><th>95 % interval</th><th>ms / image</th></tr>
{% for row in section.rows %}<tr class="{{ 'learned' if row.kind in learned }} {{ 'best' if row.best }}">
<td class="name">{{ row.schedule }}</td><td class="name">{{ row.kind }}</td><td>{{ row.samples }}</td>
<td>{{ '%.4f'|format(row.fid_data) }}</td><td>{{ '%.4f'|format(row.fid_teacher) }}</td>
<td>{{ '%.5f'|format(row.distance) }}</td>
<td>{{ '%.5f'|format(row.distance_low) }} to {{ '%.5f'|format(row.distance_high) }}</td>
<td>{{ '%.2f'|format(1000 * row.seconds_per_image) }}</td></tr>
{% endfor %}</table>
{% if section.differences %}<table><tr><th class="name">paired difference of distances</th><th>mean</th>
<th>95 % interval</th><th>share</th></tr>
{% for d in section.differences %}<tr><td class="name">{{ d.schedule }} - {{ d.against }}</td>
<td>{{ '%+.5f'|format(d.difference) }}</td><td>{{ '%+.5f'|format(d.low) }} to {{ '%+.5f'|format(d.high) }}</td>
<td>{{ '%+.1f %%'|format(d.percent) }}</td></tr>
{% endfor %}</table>{% endif %}
{% endfor %}
<h2>Plots</h2>
{% for figure in figures %}<figure><figcaption>{{ figure.caption }}</figcaption>
<img alt="{{ figure.caption }}" src="data:image/png;base64,{{ figure.data }}"></figure>{% endfor %}
</body></html>
"""


@dataclass(frozen=True)
class Panel:
    """What is drawn for one solver and NFE: times and pictures by schedule name (the teacher's pictures included)."""

    solver: str
    nfe: int
    times: Mapping[str, Tensor]
    pictures: Mapping[str, Tensor]


@dataclass(frozen=True)
class Results:
    """Everything that was measured: rows, paired differences, and facts about the comparison as a whole.

    `facts["comparison"]` says what all of it has in common; groups (solver, NFE) of equal comparisons add up.
    """

    rows: Sequence[Row]
    differences: Sequence[Difference]
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Results | None:
        """What an earlier evaluation left in `folder`; None if there is none that can be read."""
        try:
            kept = read_json(folder / "results.json")
            rows, apart = [Row(**row) for row in kept["rows"]], [Difference(**d) for d in kept["differences"]]
            return cls(rows, apart, dict(kept["facts"]))
        except (TsAdaptError, KeyError, TypeError, ValueError):
            return None

    def joined(self, earlier: Results | None) -> Results:
        """These results, and of the `earlier` ones of the same comparison those groups that are not among them."""
        if earlier is None or earlier.facts.get("comparison") != self.facts["comparison"]:
            return self
        mine = {(r.solver, r.nfe) for r in self.rows}
        rows = [*self.rows, *(r for r in earlier.rows if (r.solver, r.nfe) not in mine)]
        apart = [*self.differences, *(d for d in earlier.differences if (d.solver, d.nfe) not in mine)]
        counts = {key: {**earlier.facts[key], **self.facts[key]} for key in ("teacher", "floor")}
        return Results(rows, apart, {**self.facts, **counts})


def write_report(
    folder: Path, results: Results, panels: Sequence[Panel], noise: NoiseSchedule, *, title: str,
    notes: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write everything under `folder`; returns the path of the HTML page.

    Groups of `results` without a panel keep the pictures that an earlier report left in `folder`.
    """
    rows = results.rows
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_records(rows))
    write_bytes(folder / "results.csv", text.getvalue().encode())
    write_bytes(folder / "results.md", markdown(rows).encode())
    apart = as_records(results.differences)
    write_json(folder / "results.json", {"facts": dict(results.facts), "rows": as_records(rows), "differences": apart})
    drawn = {name: (caption, _png(figure)) for name, caption, figure in _figures(rows, panels, noise)}
    for name, (_, png) in drawn.items():
        write_bytes(folder / "plots" / f"{name}.png", png)
    for solver, nfe in dict.fromkeys((r.solver, r.nfe) for r in rows):
        for name, caption in _panel_names(solver, nfe):
            if name not in drawn and (folder / "plots" / f"{name}.png").is_file():
                drawn[name] = caption, (folder / "plots" / f"{name}.png").read_bytes()
    figures = [{"caption": caption, "data": base64.b64encode(png).decode()} for caption, png in drawn.values()]
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        title=title, summary=headline(rows), notes=notes, sections=_sections(results), figures=figures, learned=LEARNED
    )
    write_bytes(folder / "report.html", html.encode())
    return folder / "report.html"


def headline(rows: Sequence[Row]) -> str:
    """What the learned schedules take off the best fixed grid, by distance and by FID, at the counts they share."""
    parts = []
    for solver, nfe, samples in _groups(rows):
        group = [r for r in rows if (r.solver, r.nfe, r.samples) == (solver, nfe, samples)]
        fixed = [r for r in group if r.kind == "fixed" and has_shared_ends(r.schedule)]
        learned = [r for r in group if r.kind in LEARNED and r.kind != "oracle"]
        if fixed and learned:
            texts = []
            for column, label, digits in (("distance", "distance", 4), ("fid_data", "FID", 3)):
                a, b = (min(part, key=lambda r: getattr(r, column)) for part in (fixed, learned))
                before, after = getattr(a, column), getattr(b, column)
                change = f" ({100 * (after / before - 1):+.1f} %)" if before > 0 else ""
                texts.append(f"{label} {before:.{digits}f} ({a.schedule}) to {after:.{digits}f} ({b.schedule}){change}")
            parts.append(f"{solver}, NFE {nfe}, {samples} samples: {', '.join(texts)}")
    return "Best fixed grid to best learned schedule. " + "; ".join(parts) + "." if parts else "No comparison yet."


def table(rows: Sequence[Row]) -> str:
    """The rows as an aligned text table, the best fixed and every learned schedule of each group, for the terminal."""
    lines = [
        f"{'solver':<12}{'NFE':>4} {'schedule':<14}{'kind':<11}"
        f"{'samples':>8}{'FID data':>10}{'FID teacher':>12}{'distance':>11}"
    ]
    for solver, nfe, samples in _groups(rows):
        group = [r for r in rows if (r.solver, r.nfe, r.samples) == (solver, nfe, samples)]
        lines.append("-" * len(lines[0]))
        lines += [
            f"{r.solver:<12}{r.nfe:>4} {r.schedule:<14}{r.kind:<11}{r.samples:>8}"
            f"{r.fid_data:>10.4f}{r.fid_teacher:>12.4f}{r.distance:>11.5f}"
            for r in group
        ]
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """Tables for a README: schedules down, NFE across, in each cell the Frechet distance to the data and the paired
    distance to the teacher; the lowest of each column among the non-oracles in bold."""
    parts = []
    for solver, samples in dict.fromkeys((r.solver, r.samples) for r in rows):
        part = [r for r in rows if (r.solver, r.samples) == (solver, samples)]
        nfes = sorted({r.nfe for r in part})
        cells = {(r.schedule, r.nfe): r for r in part}
        least = {
            (n, column): min(getattr(r, column) for r in part if r.nfe == n and r.kind != "oracle")
            for n in nfes
            for column in ("fid_data", "distance")
        }
        lines = [f"{solver}, {samples} test samples: Frechet distance to the data / paired distance to the teacher", ""]
        lines.append("| schedule | " + " | ".join(f"NFE {n}" for n in nfes) + " |")
        lines.append("|---" * (len(nfes) + 1) + "|")
        for name in dict.fromkeys(r.schedule for r in part):
            texts = []
            for n in nfes:
                row = cells.get((name, n))
                values = []
                for column in ("fid_data", "distance") if row else ():
                    value = getattr(row, column)
                    text = f"{value:.3f}" if column == "fid_data" else f"{value:.4f}"
                    values.append(f"**{text}**" if value == least[n, column] else text)
                texts.append(" / ".join(values))
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _groups(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    return sorted({(r.solver, r.nfe, r.samples) for r in rows}, key=lambda g: (g[0], g[1], -g[2]))


def _sections(results: Results) -> list[dict[str, Any]]:
    sections = []
    for solver, nfe, samples in _groups(results.rows):
        group = [r for r in results.rows if (r.solver, r.nfe, r.samples) == (solver, nfe, samples)]
        distance = {r.schedule: r.distance for r in group}
        least = min(distance.values())
        records = [{**record, "best": record["distance"] == least} for record in as_records(group)]
        apart = [
            {**record, "percent": 100 * record["difference"] / (distance[record["against"]] or 1)}
            for record in as_records(results.differences)
            if (record["solver"], record["nfe"], record["samples"]) == (solver, nfe, samples)
        ]
        title = f"{solver}, NFE {nfe}, {samples} samples"
        sections.append({"title": title, "rows": records, "differences": apart})
    return sections


def _panel_names(solver: str, nfe: int) -> list[tuple[str, str]]:
    """(file stem, caption) of the two pictures of a panel."""
    where, key = f"{solver}, NFE {nfe}", f"{solver}-nfe{nfe}"
    return [(f"schedules-{key}", f"Schedules, {where}"), (f"images-{key}", f"The same noises, {where}")]


def _figures(rows: Sequence[Row], panels: Sequence[Panel], noise: NoiseSchedule) -> list[tuple[str, str, Figure]]:
    figures = []
    for solver in sorted({r.solver for r in rows}):
        for samples in sorted({r.samples for r in rows if r.solver == solver}, reverse=True):
            part = [r for r in rows if r.solver == solver and r.samples == samples]
            if len({r.nfe for r in part}) < 2:
                continue
            for column, label in (("fid_data", "FID to the data"), ("distance", "paired distance to the teacher")):
                curves = {}
                for name in dict.fromkeys(r.schedule for r in part):
                    line = sorted((r for r in part if r.schedule == name), key=lambda r: r.nfe)
                    curves[name] = (line[0].kind, [r.nfe for r in line], [getattr(r, column) for r in line])
                caption = f"{label} against NFE, {solver}, {samples} samples"
                figures.append((f"{column}-{solver}-{samples}", caption, plot_quality(curves, label, caption)))
    for panel in panels:
        where = f"{panel.solver}, NFE {panel.nfe}"
        pictures = {name: x.float() / 127.5 - 1 for name, x in panel.pictures.items()}
        drawn = plot_schedules(panel.times, noise, where), plot_images(pictures, where)
        names = _panel_names(panel.solver, panel.nfe)
        figures += [(name, caption, figure) for (name, caption), figure in zip(names, drawn, strict=True)]
    return figures


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    return buffer.getvalue()
