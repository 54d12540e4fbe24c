"""What an evaluation leaves behind: results.csv, .json and .md, plots, and one self-contained HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from matplotlib.figure import Figure
from torch import Tensor

from ts_adapt.evaluation.benchmark import Difference, Row, as_records, stem
from ts_adapt.evaluation.conclusions import Conclusion, compare, conclusions
from ts_adapt.evaluation.page import Picture, render
from ts_adapt.evaluation.products import markdown as side_by_side
from ts_adapt.evaluation.products import plain, products
from ts_adapt.evaluation.tables import ON_WINS, brief, frechet_name, groups, markdown, rows_of
from ts_adapt.files import check_schema, read_json, write_bytes, write_json
from ts_adapt.interfaces import NoiseSchedule, TsAdaptError
from ts_adapt.plots import plot_images, plot_intervals, plot_quality, plot_schedules

Kept = TypeVar("Kept", Row, Difference)
COLUMNS = [field.name for field in fields(Row)]


@dataclass(frozen=True)
class Panel:
    """What is drawn for one sampler and NFE: times and pictures by schedule name (the teacher's pictures included)."""

    sampler: str
    nfe: int
    times: Mapping[str, Tensor]
    pictures: Mapping[str, Tensor]


@dataclass(frozen=True)
class Results:
    """Everything that was measured: rows, paired differences, and facts about the comparison as a whole.

    `facts["comparison"]` says what all of it has in common; groups (sampler, NFE) of equal comparisons add up.
    """

    rows: Sequence[Row]
    differences: Sequence[Difference]
    facts: Mapping[str, Any]

    @property
    def features(self) -> str:
        """The extractor of the Frechet distances."""
        return str(self.facts["comparison"]["features"])

    def conclusions(self) -> list[Conclusion]:
        """What the comparison says, for each sampler and NFE of which it says anything."""
        found = conclusions(self.rows, self.differences, self.features)
        return [conclusion for conclusion in found if conclusion.lines]

    @classmethod
    def read(cls, folder: Path) -> Results | None:
        """What an earlier evaluation left in `folder`; None if there is none that can be read."""
        try:
            kept = read_json(folder / "results.json", {"facts": dict, "rows": list, "differences": list})
            rows, apart = [_read(Row, row) for row in kept["rows"]], [_read(Difference, d) for d in kept["differences"]]
            compare(rows, apart)
            _check_facts(kept["facts"], folder / "results.json")
            return cls(rows, apart, kept["facts"])
        except (TsAdaptError, KeyError, TypeError):
            return None

    def joined(self, earlier: Results | None) -> Results:
        """These results, and of the `earlier` ones of the same comparison those groups that are not among them."""
        if earlier is None or earlier.facts.get("comparison") != self.facts["comparison"]:
            return self
        mine = {(r.sampler, r.nfe) for r in self.rows}
        rows = [*self.rows, *(r for r in earlier.rows if (r.sampler, r.nfe) not in mine)]
        apart = [*self.differences, *(d for d in earlier.differences if (d.sampler, d.nfe) not in mine)]
        counts = {key: {**earlier.facts[key], **self.facts[key]} for key in ("teacher", "floor")}
        there = {key for r in rows for key in ((r.cacher, r.quantizer, ""), (r.cacher, r.quantizer, r.file))}
        refused = [*self.facts.get("skipped", []), *earlier.facts.get("skipped", [])]
        reasons = {(one["cacher"], one["quantizer"], one.get("run", "")): one for one in reversed(refused)}
        left = [one for key, one in reasons.items() if key not in there]
        return Results(rows, apart, {**self.facts, **counts, "skipped": left})


def _read(kind: type[Kept], record: Any) -> Kept:
    """The row or difference in `record`; TypeError unless every value has its type."""
    made = kind(**record)
    for name, hint in get_type_hints(kind).items():
        value = getattr(made, name)
        accepted = hint | int if isinstance(0.0, hint) else hint
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise TypeError(f"{name} is a {type(value).__name__}")
    return made


def _check_facts(facts: dict[str, Any], path: Path) -> None:
    """TsAdaptError or TypeError unless everything that `Results.joined` takes over has its type."""
    check_schema(facts, {"comparison": dict, "teacher": dict, "floor": dict}, path)
    check_schema(facts["comparison"], {"features": str, "distance": str}, path)
    for counts in (facts["teacher"], facts["floor"]):
        check_schema(counts, dict.fromkeys(counts, (int, float)), path)
    for one in facts.get("skipped", []):
        check_schema({"run": "", **one}, dict.fromkeys(("cacher", "quantizer", "run", "reason"), str), path)


def write_report(
    folder: Path, results: Results, panels: Sequence[Panel], noise: NoiseSchedule, *, title: str,
    notes: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write everything under `folder`; returns the path of the HTML page.

    Groups of `results` without a panel keep the pictures that an earlier report left in `folder`.
    """
    rows, features = results.rows, results.features
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_records(rows))
    write_bytes(folder / "results.csv", text.getvalue().encode())
    found = results.conclusions()
    tables = [markdown(plain(rows), features).rstrip()]
    tables += [side_by_side(product, features) for product in products(rows)]
    write_bytes(folder / "results.md", _markdown(title, notes, brief(plain(rows), features), found, tables).encode())
    apart = as_records(results.differences)
    write_json(folder / "results.json", {"facts": dict(results.facts), "rows": as_records(rows), "differences": apart})
    pictures = [*_of_rows(plain(rows), features), *_of_panels(rows, panels, noise)]
    for picture in pictures:
        write_bytes(folder / "plots" / f"{picture.name}.png", picture.png)
    pictures += _kept(folder / "plots", rows, {picture.name for picture in pictures})
    html = render(
        rows, results.differences, found, pictures, title=title, notes=notes,
        distance=results.facts["comparison"]["distance"], features=features,
    )  # fmt: skip
    write_bytes(folder / "report.html", html.encode())
    return folder / "report.html"


def _markdown(title: str, notes: Sequence[str], short: str, found: Sequence[Conclusion], tables: Sequence[str]) -> str:
    lines = [f"# {title}", "", *notes, "", *(["## In short", "", short, ""] if short else [])]
    for conclusion in found:
        lines += [
            f"## {conclusion.heading}, paired distance to the teacher",
            "",
            *(f"- {line}" for line in conclusion.lines),
            "",
        ]
    return "\n".join(
        [
            *lines,
            "## Tables",
            "",
            "\n\n".join(tables),
            "",
            f"Bold: the best of a column, the oracle left out; {ON_WINS}.",
            "",
        ]
    )


def _of_rows(rows: Sequence[Row], features: str) -> Iterator[Picture]:
    """What can be drawn of the numbers alone: quality against NFE where there are several, distances with intervals."""
    several = [key for key in dict.fromkeys((r.sampler, r.samples) for r in rows) if _count_nfe(rows, key) > 1]
    for sampler, samples in several:
        part = [r for r in rows if (r.sampler, r.samples) == (sampler, samples)]
        to_data = f"{frechet_name(features)} to the data"
        for column, label in (("distance", "paired distance to the teacher"), ("fid_data", to_data)):
            curves = {}
            for name in dict.fromkeys(r.schedule for r in part):
                line = sorted((r for r in part if r.schedule == name), key=lambda r: r.nfe)
                curves[name] = (line[0].kind, [r.nfe for r in line], [getattr(r, column) for r in line])
            caption = f"{label[0].upper()}{label[1:]} against NFE, {sampler}, {samples} samples"
            yield Picture(f"{column}-{stem(sampler)}-{samples}", caption, _png(plot_quality(curves, label)))
    for sampler, nfe, samples in groups(rows):
        found = {
            r.schedule: (r.kind, r.distance, r.distance_low, r.distance_high, r.distance_median)
            for r in rows_of(rows, (sampler, nfe, samples))
        }
        caption = f"Mean distance to the teacher with 95 % intervals, and median; {samples} samples"
        drawn = _png(plot_intervals(found, "paired distance to the teacher"))
        yield Picture(f"intervals-{stem(sampler)}-nfe{nfe}-{samples}", caption, drawn, (sampler, nfe))


def _count_nfe(rows: Sequence[Row], key: tuple[str, int]) -> int:
    return len({r.nfe for r in rows if (r.sampler, r.samples) == key})


def _panel_names(sampler: str, nfe: int) -> list[tuple[str, str]]:
    """(file stem, caption) of the two pictures of a panel."""
    where, key = f"{sampler}, NFE {nfe}", f"{stem(sampler)}-nfe{nfe}"
    return [(f"schedules-{key}", f"Schedules, {where}"), (f"images-{key}", f"The same noises, {where}")]


def _of_panels(rows: Sequence[Row], panels: Sequence[Panel], noise: NoiseSchedule) -> Iterator[Picture]:
    kinds = {r.schedule: r.kind for r in rows}
    for panel in panels:
        pictures = {name: x.float() / 127.5 - 1 for name, x in panel.pictures.items()}
        drawn = plot_schedules(panel.times, noise, kinds=kinds), plot_images(pictures)
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
