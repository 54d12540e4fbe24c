"""What a comparison says, in plain sentences: verdicts by its paired differences, each with mean, median and wins.

Percentages are shares of the other schedule's distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

from ts_adapt.evaluation.comparison import Compared, Results
from ts_adapt.evaluation.records import ORACLE, STATIC, Row
from ts_adapt.evaluation.tables import Column, Table, across, frechet_name, percent, written
from ts_adapt.schedules.name import OF_STUDENT, parse

VERDICTS = {"better": "better than", "no different": "no different from", "worse": "worse than"}
CLASSES = ("fixed", STATIC, "corrected", "full")
OTHER_MODE = "Where mean and wins disagree, a few samples that end in another mode of the data decide the mean."


@dataclass(frozen=True)
class Conclusion:
    """What is found for one sampler and NFE: its verdicts, and a sentence for each with what else is to be said."""

    sampler: str
    nfe: int
    verdicts: list[Compared]
    lines: list[str]

    @property
    def heading(self) -> str:
        return f"{self.sampler}, NFE {self.nfe}"


def conclusions(results: Results) -> list[Conclusion]:
    """For each sampler and NFE: static against the best fixed grid, all else that was learned or optimised against
    static, predictors against the best static grid with corrections too, what was learned for a cheaper network against
    its like of the teacher's own, each on as many samples as both were measured on, and who is nearest to the data."""
    found, pairs = [], results.compared()
    for sampler, nfe in dict.fromkeys((r.sampler, r.nfe) for r in results.rows):
        verdicts = _verdicts([p for p in pairs if (p.row.sampler, p.row.nfe) == (sampler, nfe)])
        lines = [_sentence(pair) for pair in verdicts]
        if any(pair.surprising for pair in verdicts):
            lines.append(OTHER_MODE)
        rows = [r for r in results.rows if (r.sampler, r.nfe) == (sampler, nfe)]
        lines += _nearest_to_the_data(rows, results.features)
        found.append(Conclusion(sampler, nfe, verdicts, lines))
    return [conclusion for conclusion in found if conclusion.lines]


def verdict_tables(found: Sequence[Conclusion]) -> Iterator[Table]:
    """For each sampler all verdicts, NFE across; the mean is in brackets where its interval holds zero."""
    measures = [
        Column("mean", _bracketed, tone=lambda p: p.verdict),
        Column("median", lambda p: percent(p.difference.relative_median)),
        Column("wins", lambda p: f"{100 * p.difference.wins:.0f} %"),
    ]
    label = Column("paired difference", lambda p: f"{p.row.schedule} – {_other(p)}", text=True)
    for sampler in dict.fromkeys(conclusion.sampler for conclusion in found):
        rows: dict[str, dict[int, Compared]] = {}
        for conclusion in (one for one in found if one.sampler == sampler):
            for pair in conclusion.verdicts:
                rows.setdefault(label.value(pair), {})[conclusion.nfe] = pair
        yield from across(f"{sampler}, paired distance to the teacher", label, measures, [*rows.values()])


def _bracketed(pair: Compared) -> str:
    share = percent(pair.difference.relative)
    return f"({share})" if pair.verdict == "no different" else share


def _class(pair: Compared) -> str:
    """Which of `CLASSES` the schedule is that another is compared with."""
    name, _, student = pair.other.schedule.partition(OF_STUDENT)
    if pair.row.schedule.partition(OF_STUDENT)[2] != student and pair.other.kind != "fixed":
        return "full"
    return pair.other.kind if pair.other.kind == "fixed" or name == STATIC else "corrected"


def _verdicts(pairs: Sequence[Compared]) -> list[Compared]:
    """Those that are spoken of, in the order of `CLASSES`: of each the one on the most samples, and against the best
    fixed grid static alone, where it is."""
    most = {(p.row.schedule, _class(p)): p for p in sorted(pairs, key=lambda p: p.row.samples)}
    of_class = {kind: [p for (_, of), p in most.items() if of == kind] for kind in CLASSES}
    static = [p for p in of_class["fixed"] if p.row.schedule.partition(OF_STUDENT)[0] == STATIC]
    of_class["fixed"] = static or of_class["fixed"]
    return [p for found in of_class.values() for p in found]


def _other(pair: Compared) -> str:
    return "best fixed grid" if pair.other.kind == "fixed" else pair.other.schedule


def _sentence(pair: Compared) -> str:
    """The verdict with what it rests on."""
    d, other = pair.difference, pair.other.schedule
    other = f"the best fixed grid, {other}" if pair.other.kind == "fixed" else other
    alone = "times alone, " if d.schedule.partition(OF_STUDENT)[0] == ORACLE else ""
    searched = f"; {alone}searched on these very samples" if pair.row.kind == ORACLE else ""
    disagree = pair.verdict != "no different" and d.relative * d.relative_median < 0
    by_mean = ", by the mean alone" if disagree else ""
    return (
        f"{d.schedule} is {VERDICTS[pair.verdict]} {other}{by_mean}: mean {percent(d.relative)} (95 % interval "
        f"{percent(d.relative_low)} to {percent(d.relative_high)}), median {percent(d.relative_median)}, nearer on "
        f"{100 * d.wins:.0f} % of {d.samples} samples{searched}."
    )


def _nearest_to_the_data(rows: Sequence[Row], features: str) -> list[str]:
    most = max(r.samples for r in rows)
    scored = [(r.fid_data, r) for r in rows if r.samples == most and r.fid_data is not None]
    fixed = [(value, r) for value, r in scored if r.kind == "fixed" and not parse(r.schedule).native]
    other = [(value, r) for value, r in scored if r.kind not in ("fixed", ORACLE)]
    if not fixed or not other:
        return []
    (first, a), (second, b) = (min(part, key=itemgetter(0)) for part in (fixed, other))
    of_fixed, of_other = written([first, second])
    return [
        f"{frechet_name(features)} to the data: {of_fixed} along the best fixed grid, {a.schedule}; "
        f"{of_other} along the best learned or optimised one, {b.schedule}."
    ]
