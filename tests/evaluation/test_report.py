"""Tables and page of a comparison: what is bold, what a Frechet distance is called, and what older files still give."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ts_adapt.denoisers.analytic import example_mixture
from ts_adapt.evaluation.benchmark import Difference, Row
from ts_adapt.evaluation.report import COLUMNS, Panel, Results, write_report
from ts_adapt.evaluation.tables import best, brief, markdown, overviews, table

PLAIN = Row("m", "unipc-3", 5, "karras", "fixed", 40, 0.30, 0.20, 0.10, 0.09, 0.11, 0.001, 0, 0.08, 0.4)
ROWS = [
    PLAIN,
    replace(PLAIN, schedule="gits", kind="optimized", fid_data=0.25, distance=0.12, wins=0.3),
    replace(PLAIN, schedule="static", kind="static", distance=0.09, distance_median=0.07, wins=None),
    replace(PLAIN, schedule="recursive", kind="recursive", distance=0.095, wins=0.6),
    replace(PLAIN, schedule="oracle", kind="oracle", fid_data=0.1, distance=0.01, distance_median=0.01, wins=1.0),
]
APART = [Difference("unipc-3", 5, 40, "static", "karras", -0.01, -0.1, -0.2, -0.05)]


def results(features: str = "zoo", rows: list[Row] = ROWS) -> Results:
    comparison = {"model": "m", "teacher": "t", "distance": "l2", "features": features}
    facts: dict[str, Any] = {"comparison": comparison, "teacher": {"40": 0.1}, "floor": {"40": 0.05}}
    return Results(rows, APART, facts)


def written(folder: Path, found: Results, panels: list[Panel] | None = None) -> str:
    noise = example_mixture().noise
    path = write_report(folder, found, panels or [], noise, title="<name>", notes=["What is compared.", "Scores."])
    return path.read_text()


def test_the_best_of_a_column_is_not_the_oracles() -> None:
    assert best(ROWS) == {
        "fid_data": 0.25, "fid_teacher": 0.20, "distance": 0.09, "distance_median": 0.07, "wins": 0.6,
    }  # fmt: skip
    assert best([replace(PLAIN, distance_median=None, wins=None)]).keys() == {"fid_data", "fid_teacher", "distance"}


def test_markdown_has_the_best_in_bold_and_dashes_where_nothing_is_known() -> None:
    lines = markdown(ROWS, "zoo").splitlines()
    assert "| gits | **0.250** / 0.1200 |" in lines
    assert "| static | 0.300 / **0.0900** |" in lines
    assert "| static | **0.0700** / – |" in lines
    assert "| recursive | 0.0800 / **60 %** |" in lines
    assert "| oracle | 0.0100 / 100 % |" in lines


def test_overviews_put_the_counts_of_evaluations_side_by_side() -> None:
    more = [replace(row, nfe=3, distance=2 * row.distance) for row in ROWS if row.kind != "oracle"]
    (overview,) = overviews([*ROWS, *more])
    assert overview.nfe == [3, 5]
    assert list(overview.schedules["oracle"]) == [5]
    assert overview.best[3]["distance"] == 0.18


def test_in_short_the_best_fixed_grid_stands_for_all_and_the_oracle_for_none() -> None:
    other = replace(PLAIN, schedule="linear", distance=0.11)
    few = [replace(row, samples=8) for row in (PLAIN, other, *ROWS[2:])]
    lines = brief([*ROWS, other, *few], "zoo").splitlines()
    assert [line.split(" |")[0] for line in lines[4:]] == [
        "| best of 2 fixed grids", "| best optimised grid", "| static", "| recursive",
    ]  # fmt: skip
    assert lines[4].endswith("0.1000 / 0.300 (karras) |")
    assert lines[0].startswith("unipc-3, 40 test samples")
    assert brief([PLAIN, other], "zoo") == ""


@pytest.mark.parametrize("features", ["zoo", "pixels", "inception"])
def test_only_inceptions_frechet_distance_is_called_fid(tmp_path: Path, features: str) -> None:
    page = written(tmp_path, results(features))
    texts = [page.replace("computed as FID is", "").replace("no FID of", ""), table(ROWS, features)]
    texts.append((tmp_path / "results.md").read_text())
    for text in texts:
        assert ("FID" in text) == (features == "inception")
        assert ("Frechet" in text) == (features != "inception")
    if features != "inception":
        assert f"Frechet distance ({features} features)" in page and "no FID of" in " ".join(page.split())


def test_the_page_begins_with_what_was_found_then_the_overview_then_how_to_read_it(tmp_path: Path) -> None:
    page = written(tmp_path, results())
    places = [page.index(text) for text in (
        "What is compared.", "static is better than the best fixed grid, karras", "<h2>Overview", "<h2>How to read it",
        "<b>ms / image</b>: the median over batches", "<h2>unipc-3, NFE 5", "95 % interval</th>",
    )]  # fmt: skip
    assert places == sorted(places)
    assert "&lt;name&gt;" in page and "<name>" not in page
    tinted = {name: page.count(f'<tr class="{name}">') for name in ("fixed", "optimized", "learned", "oracle")}
    assert tinted == {"fixed": 2, "optimized": 2, "learned": 4, "oracle": 2}


def test_of_several_solvers_the_page_says_a_sentence_each(tmp_path: Path) -> None:
    rows = [*ROWS, *(replace(row, solver="ddim") for row in ROWS)]
    page = written(tmp_path, results(rows=rows))
    assert "<b>unipc-3, NFE 5.</b> static is better than" in page and "<b>ddim, NFE 5.</b>" in page


def test_without_anything_learned_the_page_says_so(tmp_path: Path) -> None:
    page = written(tmp_path, replace(results(rows=[PLAIN]), differences=[]))
    assert "Nothing that was learned or optimised is in this comparison yet." in page


def test_columns_were_only_added_at_the_end(tmp_path: Path) -> None:
    written(tmp_path, results())
    with open(tmp_path / "results.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == COLUMNS and COLUMNS[12:15] == ["seed", "distance_median", "wins"]
    assert [row["wins"] for row in table] == ["0.4", "0.3", "", "0.6", "1.0"]


def test_rows_of_an_earlier_version_are_read_and_joined(tmp_path: Path) -> None:
    written(tmp_path, results())
    kept = json.loads((tmp_path / "results.json").read_text())
    for row in kept["rows"]:
        del row["distance_median"], row["wins"]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    earlier = Results.read(tmp_path)
    assert earlier is not None and all(row.wins is None and row.distance_median is None for row in earlier.rows)
    more = [replace(row, nfe=7) for row in ROWS]
    apart = [replace(d, nfe=7) for d in APART]
    joined = replace(results(rows=more), differences=apart).joined(earlier)
    page = written(tmp_path, joined)
    assert "unipc-3, NFE 5" in page and "unipc-3, NFE 7" in page and "–" in page
    assert Results.read(tmp_path) == joined


@pytest.mark.parametrize("spoil", ["rows", "differences"])
def test_results_that_do_not_hold_together_are_as_none(tmp_path: Path, spoil: str) -> None:
    written(tmp_path, results())
    kept = json.loads((tmp_path / "results.json").read_text())
    kept[spoil][0]["schedule"] = {"rows": "other", "differences": "unknown"}[spoil]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    assert Results.read(tmp_path) is None


def test_pictures_of_an_earlier_evaluation_stay_on_the_page(tmp_path: Path) -> None:
    pictures = {"static": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}
    panel = Panel("unipc-3", 5, {"static": torch.linspace(1.0, 1e-3, 6).double()}, pictures)
    first, second = written(tmp_path, results(), [panel]), written(tmp_path, results())
    names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert names == {"images-unipc-3-nfe5", "schedules-unipc-3-nfe5", "intervals-unipc-3-nfe5-40"}
    assert first.count("data:image/png;base64,") == second.count("data:image/png;base64,") == 3
