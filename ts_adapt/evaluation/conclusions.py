"""What a comparison says, in plain sentences computed from its paired differences.

    better         the whole 95 % interval of mean d(schedule) / mean d(other) - 1 lies below zero
    worse          it lies above zero
    no different   it holds zero

with d the distance to the teacher from the same noise. Percentages are this share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ts_adapt.evaluation.benchmark import STATIC, Difference, Row
from ts_adapt.evaluation.tables import frechet_name
from ts_adapt.schedules.name import OF_STUDENT, parse

ORACLE = "oracle"
"""The kind of grids that were searched for each sample, and the name of those whose times alone were."""
VERDICTS = {"better": "better than", "no different": "no different from", "worse": "worse than"}
CLASSES = ("fixed", STATIC, "corrected", "full")
OTHER_MODE = "Where mean and wins disagree, a few samples that end in another mode of the data decide the mean."


@dataclass(frozen=True)
class Compared:
    """A paired difference with the rows of the schedule, `row`, and of the one it is compared with, `other`."""

    difference: Difference
    row: Row
    other: Row

    @property
    def verdict(self) -> str:
        """better, no different or worse."""
        if self.difference.relative_high < 0:
            return "better"
        return "worse" if self.difference.relative_low > 0 else "no different"

    @property
    def wins(self) -> float | None:
        """The share of the samples on which the schedule is nearer to the teacher; known where either is static."""
        if self.other.schedule == STATIC:
            return self.row.wins
        return None if self.row.schedule != STATIC or self.other.wins is None else 1 - self.other.wins

    @property
    def surprising(self) -> bool:
        """Whether the mean says one thing and most samples another."""
        return self.wins is not None and {"better": self.wins < 0.5, "worse": self.wins > 0.5}.get(self.verdict, False)

    @property
    def percent(self) -> str:
        """The difference as a share of the other's mean distance."""
        return _percent(self.difference.relative)

    @property
    def interval(self) -> str:
        """Its 95 % interval."""
        return f"{_percent(self.difference.relative_low)} to {_percent(self.difference.relative_high)}"

    def brief(self) -> str:
        return f"({self.percent})"

    def sentence(self, article: str = "") -> str:
        """The verdict with its interval and the samples that were won; `article` goes before the other's name."""
        d, samples = self.difference, f"{self.difference.samples} samples"
        won = samples if self.wins is None else f"nearer on {100 * self.wins:.0f} % of {samples}"
        alone = "times alone, " if d.schedule.partition(OF_STUDENT)[0] == ORACLE else ""
        searched = f"; {alone}searched on these very samples" if self.row.kind == ORACLE else ""
        return (
            f"{d.schedule} is {VERDICTS[self.verdict]} {article}{d.against}: {self.percent} "
            f"(95 % interval {self.interval}), {won}{searched}."
        )


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def compare(rows: Sequence[Row], differences: Sequence[Difference]) -> list[Compared]:
    """The differences with the rows that they are of."""
    named = {(r.sampler, r.nfe, r.samples, r.schedule): r for r in rows}
    return [
        Compared(d, *(named[d.sampler, d.nfe, d.samples, name] for name in (d.schedule, d.against)))
        for d in differences
    ]


@dataclass(frozen=True)
class Conclusion:
    """What is found for one sampler and NFE.

    heading  the sampler and the NFE
    short    all verdicts in two or three sentences, without intervals
    lines    a sentence for each verdict
    """

    heading: str
    short: str
    lines: list[str]


def conclusions(rows: Sequence[Row], differences: Sequence[Difference], features: str) -> list[Conclusion]:
    """For each sampler and NFE: static against the best fixed grid, all else that was learned or optimised against
    static, predictors against the best static grid with corrections too, what was learned for a cheaper network against
    its like of the teacher's own, each on as many samples as both were measured on, and who is nearest to the data."""
    keys = dict.fromkeys((r.sampler, r.nfe) for r in rows)
    pairs = compare(rows, differences)
    return [
        _conclusion([r for r in rows if (r.sampler, r.nfe) == key], [p for p in pairs if _key(p) == key], features)
        for key in keys
    ]


def _key(pair: Compared) -> tuple[str, int]:
    return pair.row.sampler, pair.row.nfe


def _class(pair: Compared) -> str:
    """Which of `CLASSES` the schedule is that another is compared with."""
    name, _, student = pair.other.schedule.partition(OF_STUDENT)
    if pair.row.schedule.partition(OF_STUDENT)[2] != student and pair.other.kind != "fixed":
        return "full"
    return pair.other.kind if pair.other.kind == "fixed" or name == STATIC else "corrected"


def _conclusion(rows: Sequence[Row], pairs: Sequence[Compared], features: str) -> Conclusion:
    ordered = sorted(pairs, key=lambda p: p.row.samples)
    most = {(p.row.schedule, _class(p)): p for p in ordered}
    fixed, static, corrected, full = ([p for (_, of), p in most.items() if of == kind] for kind in CLASSES)
    fixed = [p for p in fixed if p.row.schedule.partition(OF_STUDENT)[0] == STATIC] or fixed
    lines = [*(p.sentence("the best fixed grid, ") for p in fixed), *(p.sentence() for p in static + corrected + full)]
    if any(p.surprising for p in fixed + static):
        lines.append(OTHER_MODE)
    short = [
        f"{p.row.schedule} is {VERDICTS[p.verdict]} the best fixed grid, {p.other.schedule} {p.brief()}." for p in fixed
    ]
    others = dict.fromkeys(p.other.schedule for p in static + corrected)
    for part in ([p for p in static + corrected if p.other.schedule == other] for other in others):
        found = {word: [f"{p.row.schedule} {p.brief()}" for p in part if p.verdict == word] for word in VERDICTS}
        verdicts = [f"{word}: {', '.join(names)}" for word, names in found.items() if names]
        short.append(f"Against {part[0].other.schedule}, {'; '.join(verdicts)}.")
    short += [f"{p.row.schedule} is {VERDICTS[p.verdict]} {p.other.schedule} {p.brief()}." for p in full]
    heading = f"{rows[0].sampler}, NFE {rows[0].nfe}"
    return Conclusion(heading, " ".join(short), [*lines, *_nearest_to_the_data(rows, features)])


def _nearest_to_the_data(rows: Sequence[Row], features: str) -> list[str]:
    most = max(r.samples for r in rows)
    fixed = [r for r in rows if r.samples == most and r.kind == "fixed" and not parse(r.schedule).native]
    other = [r for r in rows if r.samples == most and r.kind not in ("fixed", "oracle")]
    if not fixed or not other:
        return []
    a, b = (min(part, key=lambda r: r.fid_data) for part in (fixed, other))
    return [
        f"{frechet_name(features)} to the data: {a.fid_data:.3f} along the best fixed grid, {a.schedule}; "
        f"{b.fid_data:.3f} along the best learned or optimised one, {b.schedule}."
    ]
