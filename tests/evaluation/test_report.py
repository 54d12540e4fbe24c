"""Tables and page of a comparison: what is shown, with how many digits, what is bold, what a distance is called."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ts_adapt.denoisers.analytic import example_mixture
from ts_adapt.evaluation.comparison import Results
from ts_adapt.evaluation.records import COLUMNS, Difference, Row
from ts_adapt.evaluation.report import Panel, write_report
from ts_adapt.evaluation.tables import (
    ACROSS,
    BRIEF,
    DIGITS,
    USUAL,
    Table,
    as_markdown,
    as_text,
    brief,
    columns_of,
    cost_tables,
    group_tables,
    once,
    overviews,
    written,
)
from ts_adapt.plots import plot_images, plot_quality

PLAIN = Row("m", "unipc-3", 5, "karras", "fixed", 40, 0.30, 0.20, 0.10, 0.09, 0.11, 0.001, 0, 0.08, 0.4)
ROWS = [
    PLAIN,
    replace(PLAIN, schedule="gits", kind="optimized", fid_data=0.25, distance=0.12, wins=0.3),
    replace(PLAIN, schedule="static", kind="static", distance=0.09, distance_median=0.07, wins=None),
    replace(PLAIN, schedule="recursive", kind="recursive", distance=0.095, wins=0.6),
    replace(PLAIN, schedule="oracle", kind="oracle", fid_data=0.1, distance=0.01, distance_median=0.01, wins=1.0),
]
APART = [Difference("unipc-3", 5, 40, "static", "karras", -0.01, -0.1, -0.2, -0.05, -0.125, 0.6)]
FILLED = {
    "bits": 8.5, "weight_bytes": 1_500_000, "flops": 2.5e6, "peak_memory": 3_500_000, "kid": -0.0025,
    "inception_score": 7.5, "sfid": 12.5, "precision": 0.75, "recall": 0.5, "clip_score": 0.25,
}  # fmt: skip


def results(features: str = "zoo", rows: list[Row] = ROWS) -> Results:
    comparison = {"model": "m", "teacher": "t", "distance": "l2", "features": features}
    facts: dict[str, Any] = {"comparison": comparison, "teacher": {"40": 0.1}, "floor": {"40": 0.05}}
    return Results(rows, APART, facts)


def written_to(folder: Path, found: Results, panels: list[Panel] | None = None, **options: Any) -> str:
    noise_schedule, notes = example_mixture().noise_schedule, ["What is compared.", "Scores."]
    return write_report(folder, found, panels or [], noise_schedule, title="<name>", notes=notes, **options).read_text()


def table_of(rows: list[Row], chosen: list[str] | None = None) -> Table:
    (table,) = group_tables(rows, "zoo", chosen).values()
    return table


@given(st.lists(st.floats(-1e9, 1e9).filter(lambda x: x == 0 or abs(x) > 1e-12), min_size=1, max_size=8))
def test_every_number_keeps_the_digits_that_it_needs(values: list[float]) -> None:
    found = [float(text) for text in written(values)]
    assert all(abs(a - b) <= 0.0501 * abs(b) for a, b in zip(found, values, strict=True))


def test_a_column_has_the_decimals_of_its_least_number() -> None:
    assert written([0.128, 0.00667, 0.0]) == ["0.12800", "0.00667", "0"]
    assert written([310.52, 3.174]) == ["310.52", "3.17"]
    assert written([0.5, 1.2e-7]) == ["0.50000", "1.2e-07"]
    assert len(written([1.2345e-4])[0].lstrip("0.")) == DIGITS


def test_the_best_of_a_column_is_bold_and_never_the_oracles() -> None:
    lines = as_markdown(table_of(ROWS, ["fid_data", "distance", "distance_median", "wins"])).splitlines()
    assert lines[4:] == [
        "| karras | fixed | 0.300 | 0.1000 | 0.0800 | 40 % |",
        "| gits | optimized | **0.250** | 0.1200 | 0.0800 | 30 % |",
        "| static | static | 0.300 | **0.0900** | **0.0700** | – |",
        "| recursive | recursive | 0.300 | 0.0950 | 0.0800 | **60 %** |",
        "| oracle | oracle | 0.100 | 0.0100 | 0.0100 | 100 % |",
    ]


def test_every_column_of_the_results_can_be_shown_where_it_is_filled() -> None:
    assert list(columns_of("zoo")) == COLUMNS
    everything = [replace(row, **FILLED) for row in ROWS]
    shown, left = table_of(everything, COLUMNS), table_of(ROWS, COLUMNS)
    heads = {name: column.head for name, column in columns_of("zoo").items()}
    assert {column.head for column in shown.columns} == set(heads.values())
    assert {column.head for column in left.columns} == {heads[name] for name in COLUMNS if name not in FILLED}
    of_first = dict(zip((column.head for column in shown.columns), shown.rows[0], strict=True))
    found = {name: float(of_first[heads[name]].text) for name in FILLED}
    scales = {name: columns_of("zoo")[name].scale for name in FILLED}
    assert found == pytest.approx({name: scales[name] * value for name, value in FILLED.items()})
    usual = [column.head for column in table_of(everything).columns]
    assert usual == [heads[name] for name in ("schedule", "kind", *USUAL)]


def test_text_is_aligned_and_says_what_markdown_says() -> None:
    table = table_of(ROWS)
    title, *lines = as_text(table).splitlines()
    assert title == table.title and len({len(line) for line in lines}) == 1
    of_markdown = [line.replace("*", "").strip("| ").split(" | ") for line in as_markdown(table).splitlines()[4:]]
    assert [line.split("  ") for line in lines[-5:]] != of_markdown
    assert [[part.strip() for part in line.split("  ") if part.strip()] for line in lines[-5:]] == of_markdown


def test_overviews_put_the_counts_of_evaluations_side_by_side() -> None:
    more = [replace(row, nfe=3, distance=2 * row.distance) for row in ROWS if row.kind != "oracle"]
    (overview,) = overviews([*ROWS, *more], "zoo")
    assert overview.spans == [("", 1), ("NFE 3", len(BRIEF)), ("NFE 5", len(BRIEF))]
    distances = {row[0].text: (row[1], row[1 + len(BRIEF)]) for row in overview.rows}
    assert distances["oracle"][0].text == "–" and distances["oracle"][1].text == "0.0100"
    assert [name for name, (first, _) in distances.items() if first.best] == ["static"]
    many = [replace(PLAIN, nfe=nfe) for nfe in range(1, ACROSS + 2)]
    assert [table.spans[-1][0] for table in overviews(many, "zoo")] == [f"NFE {ACROSS}", f"NFE {ACROSS + 1}"]


def test_in_short_the_best_fixed_grid_stands_for_all_and_the_oracle_for_none() -> None:
    other = replace(PLAIN, schedule="linear", distance=0.11)
    few = [replace(row, samples=8) for row in (PLAIN, other, *ROWS[2:])]
    (table,) = brief([*ROWS, other, *few], "zoo")
    assert table.title.startswith("unipc-3, 40 test samples")
    assert [(row[0].text, row[1].text) for row in table.rows] == [
        ("best of 2 fixed grids (karras)", "0.1000"), ("best optimised grid (gits)", "0.1200"), ("static", "0.0900"),
        ("recursive", "0.0950"),
    ]  # fmt: skip
    assert list(brief([PLAIN, other], "zoo")) == []


def test_what_was_measured_on_fewer_samples_too_is_shown_once(tmp_path: Path) -> None:
    """All schedules are scored on the oracle's few samples as well; shown are the most, and of the oracle its few."""
    few = [replace(row, samples=8) for row in ROWS]
    rows = [*ROWS[:-1], *few]
    shown = once(rows)
    assert [row.schedule for row in shown] == ["karras", "gits", "static", "recursive", "oracle (8 samples)"]
    assert {row.samples for row in shown} == {40} and shown[:-1] == ROWS[:-1]
    assert shown[-1].distance == ROWS[-1].distance and shown[-1].fid_data is shown[-1].recall is None
    found = Results(rows, [*APART, replace(APART[0], samples=8)], results().facts)
    page = written_to(tmp_path, found)
    section = page.split("<h2>unipc-3, NFE 5")[1]
    assert section.count(">karras</td>") == 1 and section.count("static \N{EN DASH} karras") == 1
    assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == len(rows)


def test_one_figure_of_all_samplers_and_schedules_comes_first(tmp_path: Path) -> None:
    rows = [replace(row, solver=solver, nfe=nfe) for solver in ("unipc-3", "ddim") for nfe in (3, 5) for row in ROWS]
    page = written_to(tmp_path, replace(results(rows=rows), differences=[]))
    assert page.index("Quality against evaluations") < page.index('<div class="short">') < page.index("<h2>Overview")
    assert page.count("Quality against evaluations") == 2  # a caption, and its picture's
    figure = plot_quality([("ddim", "distance", {"a": ("fixed", [3, 5], [2.0, 1.0])})] * 3)
    assert [len(axes.lines) for axes in figure.axes if axes.get_visible()] == [1, 1, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]


def test_cachers_and_quantizers_stand_beside_one_another() -> None:
    static = ROWS[2]
    rows = [static, replace(static, quantizer="hqq4", bits=4.5)]
    (table,) = cost_tables(rows, "zoo")
    assert [column.head for column in table.columns][:3] == ["cacher", "quantizer", "bits"]
    (table,) = cost_tables([*rows, replace(rows[1], schedule="static@hqq4")], "zoo")
    assert [row[2].text for row in table.rows] == ["static", "static", "static@hqq4"]
    assert list(cost_tables(ROWS, "zoo")) == []


@pytest.mark.parametrize("features", ["zoo", "pixels", "inception"])
def test_only_inceptions_frechet_distance_is_called_fid(tmp_path: Path, features: str) -> None:
    page = written_to(tmp_path, results(features))
    texts = [re.sub(r"computed as FID is|no FID of|data:image/png;base64,[^\"]*", "", page)]
    texts += [*map(as_text, group_tables(ROWS, features).values()), (tmp_path / "results.md").read_text()]
    for text in texts:
        assert ("FID" in text) == (features == "inception")
        assert ("Frechet" in text) == (features != "inception")
    if features != "inception":
        assert f"Frechet distance ({features} features)" in page and "no FID of" in " ".join(page.split())


def test_the_page_begins_with_what_was_found_then_the_overview_then_how_to_read_it(tmp_path: Path) -> None:
    page = written_to(tmp_path, results())
    places = [page.index(text) for text in (
        "What is compared.", "static is better than the best fixed grid, karras", "<h2>Overview", "<h2>How to read it",
        "<b>ms / image</b>: the median over batches", "<h2>unipc-3, NFE 5", 'better">better</td>',
    )]  # fmt: skip
    assert places == sorted(places)
    assert "&lt;name&gt;" in page and "<name>" not in page
    tinted = {name: page.count(f'<tr class="{name}">') for name in ("fixed", "optimized", "learned", "oracle")}
    assert tinted == {"fixed": 2, "optimized": 2, "learned": 4, "oracle": 2}


def test_of_several_solvers_the_page_begins_with_their_verdicts(tmp_path: Path) -> None:
    rows = [*ROWS, *(replace(row, solver="ddim") for row in ROWS)]
    found = replace(results(rows=rows), differences=[*APART, replace(APART[0], solver="ddim")])
    page = written_to(tmp_path, found)
    for solver in ("unipc-3", "ddim"):
        assert page.index(f"<h3>{solver}, paired distance to the teacher</h3>") < page.index("<h2>Overview")
    assert page.split("<h2>Overview")[0].count("static – best fixed grid") == 2


def test_the_columns_that_are_asked_for_are_those_of_the_page_and_of_markdown(tmp_path: Path) -> None:
    rows = [replace(row, **FILLED) for row in ROWS]
    page = written_to(tmp_path, results(rows=rows), columns=["sfid", "distance"])
    section = page.split("<h2>unipc-3, NFE 5")[1].split("</table>")[0]
    assert section.index(">sFID<") < section.index(">distance<") and ">recall<" not in section
    assert "| schedule | kind | sFID | distance |" in (tmp_path / "results.md").read_text()


def test_without_anything_learned_the_page_says_so(tmp_path: Path) -> None:
    page = written_to(tmp_path, replace(results(rows=[PLAIN]), differences=[]))
    assert "Nothing that was learned or optimised is in this comparison yet." in page


def test_the_csv_has_every_column_and_empty_cells_where_nothing_applies(tmp_path: Path) -> None:
    written_to(tmp_path, results())
    with open(tmp_path / "results.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == COLUMNS
    assert [row["wins"] for row in table] == ["0.4", "0.3", "", "0.6", "1.0"]


def test_results_are_read_and_joined(tmp_path: Path) -> None:
    written_to(tmp_path, results())
    earlier = Results.read(tmp_path)
    assert earlier == results()
    more = [replace(row, nfe=7) for row in ROWS]
    joined = replace(results(rows=more), differences=[replace(d, nfe=7) for d in APART]).joined(earlier)
    page = written_to(tmp_path, joined)
    assert "unipc-3, NFE 5" in page and "unipc-3, NFE 7" in page
    assert Results.read(tmp_path) == joined
    fewer = [replace(row, nfe=3) for row in ROWS[-1:]]
    again = replace(results(rows=fewer), differences=[]).joined(joined)
    assert [row.nfe for row in again.rows] == [3] + 5 * [5] + 5 * [7]  # as if all had been compared at once


@pytest.mark.parametrize("spoil", ["rows", "differences"])
def test_results_that_do_not_hold_together_are_as_none(tmp_path: Path, spoil: str) -> None:
    written_to(tmp_path, results())
    kept = json.loads((tmp_path / "results.json").read_text())
    kept[spoil][0]["schedule"] = {"rows": "other", "differences": "unknown"}[spoil]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    assert Results.read(tmp_path) is None


def test_pictures_of_an_earlier_evaluation_stay_on_the_page(tmp_path: Path) -> None:
    pictures = {"static": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}
    panel = Panel("unipc-3", 5, {"static": torch.linspace(1.0, 1e-3, 6).double()}, pictures)
    first, second = written_to(tmp_path, results(), [panel]), written_to(tmp_path, results())
    names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert names == {"images-unipc-3-nfe5", "schedules-unipc-3-nfe5", "intervals-unipc-3-nfe5-40"}
    assert first.count("data:image/png;base64,") == second.count("data:image/png;base64,") == 3


@pytest.mark.parametrize("images", [torch.zeros(8, 1, 28, 28), torch.zeros(2, 3, 8, 16)])
def test_names_of_images_are_whole_however_long(images: torch.Tensor) -> None:
    names = ["karras", "static+shift+scale+coefficients+history+guidance@deepcache-2+hqq4"]
    figure = plot_images(dict.fromkeys(names, images))
    FigureCanvasAgg(figure).draw()
    assert all(axes.yaxis.label.get_window_extent().x0 >= 0 for axes in figure.axes)
