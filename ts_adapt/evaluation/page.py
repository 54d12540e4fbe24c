"""The HTML page of a comparison: self-contained, what it says first, then the overview, then the details.

in short -> overview of all NFEs -> how to read it -> for each solver and NFE: tables, paired differences, pictures
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

from ts_adapt.evaluation.benchmark import Difference, Row
from ts_adapt.evaluation.conclusions import Conclusion, compare
from ts_adapt.evaluation.products import NAMES, columns, plain, products
from ts_adapt.evaluation.tables import best, cell, frechet_name, groups, overviews, rows_of, short_name

PAGE = """{% macro data(row, column, best, first=False) %}
<td class="{{ 'from' if first }} {{ 'best' if row and row[column] is not none and row[column] == best.get(column) }}">
{{- cell(row, column) if row }}</td>{% endmacro %}
{% macro tint(kind) %}{{ kind if kind in ('fixed', 'optimized', 'oracle') else 'learned' }}{% endmacro %}
{% macro figure(f) %}<figure class="{{ 'wide' if f.wide }}"><figcaption>{{ f.caption }}</figcaption>
<img alt="{{ f.caption }}" src="data:image/png;base64,{{ f.png | base64 }}"></figure>{% endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
 :root { --ink: #1c2430; --soft: #5d6778; --line: #dfe3ea; --learned: #eaf2fb; --optimized: #fdf5e3; --oracle: #f1f1f3 }
 body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: var(--ink);
        max-width: 70rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem }
 h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem }
 h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line) }
 h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
 p, li { max-width: 52rem } .soft, figcaption { color: var(--soft) } .lead { margin: 0 0 1.2rem; color: var(--soft) }
 .short { background: #f6f8fb; border-left: 4px solid #1f77b4; padding: .8rem 1.2rem; margin: 0 }
 .short p { margin: .35rem 0 } .short ul { margin: .2rem 0; padding-left: 1.1rem }
 .beside { display: flex; flex-wrap: wrap; gap: 0 3rem }
 .scroll { overflow-x: auto; margin: .5rem 0 1.2rem }
 table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap }
 th, td { padding: .28rem .75rem; text-align: right; border-bottom: 1px solid var(--line) }
 thead th { font-weight: 600; border-bottom: 2px solid #a9b2c0; vertical-align: bottom }
 thead tr.over th { border-bottom: 1px solid #a9b2c0; text-align: center }
 .name { text-align: left } td.best { font-weight: 700 } .from { border-left: 1px solid var(--line) }
 .learned { background: var(--learned) } .optimized { background: var(--optimized) }
 .oracle { background: var(--oracle) }
 td.better { color: #17703a } td.worse { color: #b3261e }
 span.key { padding: .1rem .5rem; border-radius: 3px; border: 1px solid var(--line) }
 .figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(27rem, 1fr)); gap: 1rem 1.5rem }
 figure { margin: 0 } figure.wide { grid-column: 1 / -1 } img { max-width: 100%; display: block }
 figcaption { font-size: 13px; margin-bottom: .2rem }
</style></head><body>
<h1>{{ title }}</h1>
<p class="lead">{{ notes[0] if notes }}</p>
<div class="short">{% for c in conclusions %}
{% if conclusions | length > 1 %}<p><b>{{ c.heading }}.</b> {{ c.short | tied }}</p>
{% else %}<p><b>{{ c.heading }}, paired distance to the teacher</b></p>
<ul>{% for line in c.lines %}<li>{{ line | tied }}</li>{% endfor %}</ul>{% endif %}
{% endfor %}{% if not differences %}
<p>Nothing that was learned or optimised is in this comparison yet.</p>{% endif %}</div>
<h2>Overview</h2>
<div class="beside">{% for o in overviews %}
<div class="scroll"><h3>{{ o.sampler }}, {{ o.samples }} test samples</h3>
<table><thead><tr class="over"><th></th><th></th>
{% for n in o.nfe %}<th class="from" colspan="3">NFE {{ n }}</th>{% endfor %}</tr>
<tr><th class="name">schedule</th><th class="name">kind</th>
{% for n in o.nfe %}<th class="from">{{ short }}</th><th>distance</th><th>wins</th>{% endfor %}</tr></thead>
{% for name, of_nfe in o.schedules.items() %}{% set kind = (of_nfe.values() | first).kind %}
<tr class="{{ tint(kind) }}"><td class="name">{{ name }}</td><td class="name soft">{{ kind }}</td>
{% for n in o.nfe %}{% for column in ('fid_data', 'distance', 'wins') %}
{{ data(of_nfe.get(n), column, o.best[n], loop.first) }}{% endfor %}{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}</div>
<div class="figures">{% for f in figures.get(none, []) %}{{ figure(f) }}{% endfor %}</div>
{% if products %}<h2>Cachers and quantizers</h2>{% endif %}
{% for p in products %}<h3>{{ p.title }}</h3>
<div class="scroll"><table><thead><tr>
{% set found = columns(p) %}{% for head in found %}<th class="{{ 'name' if head in names }}">{{ head }}</th>
{% endfor %}</tr></thead>
{% for row in p.rows %}<tr>{% for head, of in found.items() %}
<td class="{{ 'name' if head in names }}">{{ of(row) }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
<h2>How to read it</h2>
<p>Rows: plain, a fixed grid; <span class="key optimized">optimized</span>, a grid for all samples found by another
criterion or by a search without gradients, or given as a file; <span class="key learned">static</span>, one grid for
all samples learned from the teacher (with <i>+shift</i>, <i>+scale</i>, <i>+coefficients</i> behind it, corrections
learned along with it); <span class="key learned">one-shot</span> and <span class="key learned">recursive</span>, a grid
for every sample, predicted from its noise or while sampling; <span class="key oracle">oracle</span>, a grid for every
sample searched against its own teacher image: no schedule to use, but how far times alone can go.
<b>Bold</b> is the best of a column, the oracle left out.</p>
<ul>
<li><b>Distance</b>: the distance ({{ distance }}) between a sample and the teacher's from the same noise; its mean with
a 95 % bootstrap interval, and its median. Where a few samples end in another mode, the mean follows them and the median
does not.</li>
<li><b>Wins</b>: the share of samples on which a schedule is nearer to the teacher than the static grid; ties count
half.</li>
<li><b>{{ frechet }}</b>, to the data and to the teacher's images.
{%- if frechet != "FID" %} It is computed as FID is, but not in Inception's features: no FID of a paper compares with
it.{% endif %} It depends on the number of samples and compares at equal numbers only.
{% for line in notes[1:] %}{{ line }} {% endfor %}</li>
<li><b>ms / image</b>: the median over batches of solving and decoding. It varies with the machine's load; fixed and
static grids of one solver and NFE cost the same, and differ by that alone.</li>
<li><b>Paired differences</b> are of mean distances on the same samples, the share is that of the second's. An interval
below zero is
<span class="better">better</span>, above zero worse, else no different.</li>
</ul>
{% for section in sections %}
<h2>{{ section.title }}</h2>
<div class="figures">{% for f in figures.get(section.key, []) %}{{ figure(f) }}{% endfor %}</div>
{% for part in section.parts %}
<h3>{{ part.samples }} test samples</h3>
<div class="scroll"><table><thead><tr><th class="name">schedule</th><th class="name">kind</th>
<th>{{ short }}<br>to data</th><th>{{ short }}<br>to teacher</th><th>distance,<br>mean</th><th>95 % interval</th>
<th>distance,<br>median</th><th>wins against<br>static</th><th>ms / image</th></tr></thead>
{% for row in part.rows %}<tr class="{{ tint(row.kind) }}">
<td class="name">{{ row.schedule }}</td><td class="name soft">{{ row.kind }}</td>
{% for column in ('fid_data', 'fid_teacher', 'distance') %}{{ data(row, column, part.best) }}{% endfor %}
<td>{{ '%.4f'|format(row.distance_low) }} to {{ '%.4f'|format(row.distance_high) }}</td>
{% for column in ('distance_median', 'wins') %}{{ data(row, column, part.best) }}{% endfor %}
<td>{{ '%.2f'|format(1000 * row.seconds_per_image) }}</td></tr>
{% endfor %}</table></div>
{% if part.pairs %}<div class="scroll"><table><thead><tr><th class="name">paired difference of distances</th>
<th>mean</th><th>share</th><th>95 % interval</th><th class="name">verdict</th></tr></thead>
{% for pair in part.pairs %}{% set d = pair.difference %}<tr><td class="name">{{ d.schedule }} – {{ d.against }}</td>
<td>{{ '%+.4f'|format(d.difference) }}</td><td>{{ pair.percent }}</td><td>{{ pair.interval }}</td>
<td class="name {{ pair.verdict }}">{{ pair.verdict }}</td></tr>
{% endfor %}</table></div>{% endif %}
{% endfor %}
{% endfor %}
</body></html>
"""


@dataclass(frozen=True)
class Picture:
    """A figure of the page: a PNG's bytes and its caption.

    name   of its file, without the suffix
    group  the (sampler, NFE) that it is of; None: of several
    wide   over the page's whole width
    """

    name: str
    caption: str
    png: bytes
    group: tuple[str, int] | None = None
    wide: bool = False


def render(
    rows: Sequence[Row], differences: Sequence[Difference], conclusions: Sequence[Conclusion],
    pictures: Sequence[Picture], *, title: str, notes: Sequence[str], distance: str, features: str,
) -> str:  # fmt: skip
    """The page as HTML. `notes` are sentences on the comparison, the first on what is compared."""
    figures: dict[tuple[str, int] | None, list[Picture]] = {}
    for picture in pictures:
        figures.setdefault(picture.group, []).append(picture)
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["tied"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    page: str = environment.from_string(PAGE).render(
        title=title, notes=notes, differences=differences, conclusions=conclusions, figures=figures,
        overviews=list(overviews(plain(rows))), sections=_sections(rows, differences), cell=cell, distance=distance,
        frechet=frechet_name(features), short=short_name(features), products=products(rows), names=NAMES,
        columns=lambda product: columns(product, features),
    )  # fmt: skip
    return page.lstrip()


def _sections(rows: Sequence[Row], differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """One for each sampler and NFE, with a part for each number of samples; with a cacher or quantizer those alone that
    more is to be said of than what the tables of these say."""
    told = {r.sampler for r in plain(rows)} | {d.sampler for d in differences}
    sections: dict[tuple[str, int], list[dict[str, Any]]] = {}
    pairs = compare(rows, differences)
    for sampler, nfe, samples in (group for group in groups(rows) if group[0] in told):
        group = rows_of(rows, (sampler, nfe, samples))
        part = {"samples": samples, "rows": group, "best": best(group), "pairs": [p for p in pairs if p.row in group]}
        sections.setdefault((sampler, nfe), []).append(part)
    return [{"key": key, "title": f"{key[0]}, NFE {key[1]}", "parts": parts} for key, parts in sections.items()]
