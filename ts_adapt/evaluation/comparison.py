"""Scores of the runs, paired differences between them, and everything that was measured as `results.json` keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, get_type_hints

from torch import Tensor

from ts_adapt.assembly import AXES, by_axis
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.metrics import FeatureStatistics, bootstrap_interval, frechet, ratio, ratio_interval
from ts_adapt.evaluation.quality import Quality
from ts_adapt.evaluation.records import STATIC, Difference, Entry, Row, Run, parts_in, with_parts
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.schedules.name import OF_STUDENT, parse
from ts_adapt.storage.files import check_schema, read_json
from ts_adapt.storage.layout import RESULTS

Kept = TypeVar("Kept", Row, Difference)


def share_of_wins(distance: Tensor, other: Tensor) -> float:
    """The share of the samples on which `distance` `(n,)` is below `other` `(n,)`; a tie counts half."""
    return float(((distance < other).double() + 0.5 * (distance == other).double()).mean())


def score(
    entry: Entry,
    run: Run,
    samples: int,
    data: FeatureStatistics | None,
    teacher_features: Tensor,
    model: str,
    seed: int,
    static: Run | None = None,
    quality: Quality | None = None,
) -> Row:
    """The table's row of `entry` on its first `samples` test samples.

    data    of real images; None: there are none
    static  what the static grid gave on the same samples
    """
    features, distance = run.features[:samples], run.distance[:samples]
    low, high = bootstrap_interval(distance)
    student = FeatureStatistics.of(features)
    return Row(
        model=model,
        solver=entry.solver,
        nfe=entry.nfe,
        schedule=entry.schedule,
        kind=entry.kind,
        samples=len(distance),
        fid_data=None if data is None else frechet(student, data),
        fid_teacher=frechet(student, FeatureStatistics.of(teacher_features[:samples])),
        distance=float(distance.double().mean()),
        distance_low=low,
        distance_high=high,
        seconds_per_image=run.seconds_per_image,
        seed=seed,
        distance_median=_median(distance),
        wins=None if static is None else share_of_wins(distance, static.distance[:samples]),
        **by_axis(entry.parts),
        **asdict(run.cost),
        **({} if quality is None else asdict(quality)),
    )


def differences(runs: Sequence[tuple[Entry, Run]], samples: int) -> list[Difference]:
    """What is not fixed against the best fixed grid between the shared ends, and against the static grid; predictors
    also against the best static grid with corrections, as they may predict corrections themselves. What was learned for
    a cheaper network (`OF_STUDENT`) is set against what else was, and against its like of the teacher's own network.

    `runs` are those of one sampler and NFE; schedules measured on fewer than `samples` samples are left out.
    """
    means = {e.schedule: float(run.distance[:samples].mean()) for e, run in runs if e.samples >= samples}
    here = {e.schedule: (e, run.distance[:samples]) for e, run in runs if e.samples >= samples}
    fixed = [name for name, (e, _) in here.items() if e.kind == "fixed" and not parse(name).native]
    pairs = []
    for name, kind in ((name, e.kind) for name, (e, _) in here.items() if e.kind != "fixed"):
        full, at, student = name.partition(OF_STUDENT)
        static = STATIC + at + student
        shared = [other for other, (e, _) in here.items() if e.kind == STATIC and other != static]
        corrected = [other for other in shared if other.partition(OF_STUDENT)[2] == student]
        if fixed:
            pairs.append((name, min(fixed, key=lambda grid: means[grid])))
        if name != static and static in here:
            pairs.append((name, static))
        if kind in PREDICTORS and corrected:
            pairs.append((name, min(corrected, key=lambda grid: means[grid])))
        if at and full in here:
            pairs.append((name, full))
    found = []
    for name, against in pairs:
        (entry, distance), (_, other) = here[name], here[against]
        found.append(
            Difference(
                entry.solver, entry.nfe, samples, name, against, means[name] - means[against],
                ratio(distance, other), *ratio_interval(distance, other),
                ratio([_median(distance)], [_median(other)]), share_of_wins(distance, other),
                **by_axis(entry.parts),
            )
        )  # fmt: skip
    return found


def _median(distance: Tensor) -> float:
    return float(median(distance.double().tolist()))


@dataclass(frozen=True)
class Compared:
    """A paired difference with the rows of the schedule, `row`, and of the one it is compared with, `other`.

    better         the whole 95 % interval of mean d(schedule) / mean d(other) - 1 lies below zero
    worse          it lies above zero
    no different   it holds zero

    with d the distance to the teacher from the same noise.
    """

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
    def surprising(self) -> bool:
        """Whether the mean says one thing and most samples another."""
        wins = self.difference.wins
        return {"better": wins < 0.5, "worse": wins > 0.5}.get(self.verdict, False)


@dataclass(frozen=True)
class Results:
    """Everything that was measured: rows, paired differences, and facts about the comparison as a whole.

    `facts["comparison"]` says what all of it has in common; groups (sampler, NFE) of equal comparisons add up;
    `facts["pruned"]` what networks that are called by a file are without, as a hash.
    """

    rows: Sequence[Row]
    differences: Sequence[Difference]
    facts: Mapping[str, Any]

    @property
    def features(self) -> str:
        """The extractor of the Frechet distances."""
        return str(self.facts["comparison"]["features"])

    def compared(self) -> list[Compared]:
        """The differences with the rows that they are of; KeyError for one that is of none."""
        named = {(r.sampler, r.nfe, r.samples, r.schedule): r for r in self.rows}
        return [
            Compared(d, *(named[d.sampler, d.nfe, d.samples, name] for name in (d.schedule, d.against)))
            for d in self.differences
        ]

    @classmethod
    def read(cls, folder: Path) -> Results | None:
        """What an earlier evaluation left in `folder`; None if there is none that can be read."""
        try:
            kept = read_json(folder / RESULTS, {"facts": dict, "rows": list, "differences": list})
            _check_facts(kept["facts"], folder / RESULTS)
            rows, apart = [_read(Row, row) for row in kept["rows"]], [_read(Difference, d) for d in kept["differences"]]
            found = cls(rows, apart, kept["facts"])
            found.compared()
        except (TsAdaptError, KeyError, TypeError):
            return None
        return found

    def joined(self, earlier: Results | None) -> Results:
        """These results, and of the `earlier` ones of the same comparison those groups that are not among them, but for
        what was without other blocks under the same name; NFE rises, whichever came first."""
        if earlier is None or earlier.facts.get("comparison") != self.facts["comparison"]:
            return self
        mine = {(r.sampler, r.nfe) for r in self.rows}
        then, now = (of.facts.get("pruned", {}) for of in (earlier, self))
        stale = {name for name, plan in then.items() if now.get(name, plan) != plan}

        def stays(record: Row | Difference) -> bool:
            return (record.sampler, record.nfe) not in mine and record.pruned not in stale

        rows = [*self.rows, *filter(stays, earlier.rows)]
        rows.sort(key=lambda row: row.nfe)
        apart = [*self.differences, *filter(stays, earlier.differences)]
        counts = {key: {**earlier.facts[key], **self.facts[key]} for key in ("teacher", "floor")}
        there = {(r.parts, file) for r in rows for file in ("", r.file)}
        refused = [*self.facts.get("skipped", []), *earlier.facts.get("skipped", [])]
        reasons = {(parts_in(one), one["run"]): one for one in reversed(refused)}
        left = [one for key, one in reasons.items() if key not in there]
        return Results(rows, apart, {**self.facts, **counts, "skipped": left, "pruned": {**then, **now}})

    def as_json(self) -> dict[str, Any]:
        """What `read` reads."""
        rows, apart = ([asdict(record) for record in part] for part in (self.rows, self.differences))
        return {"facts": dict(self.facts), "rows": rows, "differences": apart}


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
    pruned = facts.get("pruned", {})
    check_schema(pruned, dict.fromkeys(pruned, str), path)
    for one in facts.get("skipped", []):
        check_schema(with_parts(one), dict.fromkeys((*AXES, "run", "reason"), str), path)
