"""What is said of a comparison: verdicts by the paired interval, wins, and sentences that name what they rest on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ts_adapt.evaluation.benchmark import Difference, Entry, Row, differences, score, share_of_wins
from ts_adapt.evaluation.conclusions import OTHER_MODE, compare, conclusions
from ts_adapt.evaluation.metrics import FeatureStatistics
from ts_adapt.evaluation.runs import Run
from ts_adapt.interfaces import TimeGrid


def measured(distances: dict[str, Tensor], kinds: dict[str, str]) -> tuple[list[Row], list[Difference]]:
    """Rows and differences as an evaluation makes them, of schedules with these distances."""
    most = max(map(len, distances.values()))
    features = torch.randn(most, 3, generator=torch.Generator().manual_seed(0))
    runs = {
        name: Run(features[: len(d)], d, 0.001, torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(len(d), 6))
        for name, d in distances.items()
    }
    grid = TimeGrid(torch.linspace(1, 0.1, 6))
    entries = [Entry("unipc-3", 5, name, kinds[name], grid, "", len(d)) for name, d in distances.items()]
    pairs = [(entry, runs[entry.schedule]) for entry in entries]
    rows, apart = [], []
    for count in sorted({len(d) for d in distances.values()}, reverse=True):
        static = runs.get("static")
        rows += [
            score(e, r, count, FeatureStatistics.of(features), features, "m", 0, None if r is static else static)
            for e, r in pairs
            if e.samples >= count
        ]
        apart += differences(pairs, count)
    return rows, apart


KINDS = {
    "karras": "fixed", "linear": "fixed", "linear+native": "fixed", "gits": "optimized", "static": "static",
    "static+shift": "static", "one-shot": "one-shot", "recursive": "recursive", "oracle": "oracle",
}  # fmt: skip


@pytest.fixture(scope="module")
def example() -> tuple[list[Row], list[Difference]]:
    """Static 20 % below the best fixed grid; a predictor that is nearer on most samples and lost on a few."""
    draw = torch.Generator().manual_seed(0)
    hard = 1 + torch.rand(200, generator=draw)
    static = 0.8 * hard
    jumping = 0.9 * static
    jumping[:40] *= 3
    distances = {
        "karras": 1.5 * hard,
        "linear": hard,
        "linear+native": 0.1 * hard,
        "gits": 1.1 * static,
        "static": static,
        "static+shift": 0.75 * static,
        "one-shot": jumping,
        "recursive": static * (1 + 0.2 * torch.randn(200, generator=draw)),
        "oracle": 0.5 * static[:50],
    }
    return measured(distances, KINDS)


positive = st.lists(st.floats(0, 10, width=32), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.data(), positive)
def test_wins_of_one_are_losses_of_the_other_and_ties_are_half(data: st.DataObject, values: list[float]) -> None:
    other = data.draw(st.lists(st.sampled_from(values), min_size=len(values), max_size=len(values)))
    a, b = torch.tensor(values), torch.tensor(other)
    assert share_of_wins(a, b) + share_of_wins(b, a) == pytest.approx(1)
    assert share_of_wins(a, a) == 0.5


def test_everything_but_fixed_grids_is_compared_with_the_best_fixed_grid_and_with_static(example: Any) -> None:
    _, apart = example
    found = {(d.schedule, d.against, d.samples) for d in apart}
    names = [name for name, kind in KINDS.items() if kind != "fixed"]
    assert found == {
        (name, against, samples)
        for name in names
        for against in ("linear", "static")
        for samples in (200, 50)
        if name != against and not (name == "oracle" and samples == 200)
    } | {(name, "static+shift", samples) for name in ("one-shot", "recursive") for samples in (200, 50)}


def test_verdicts_are_those_of_the_interval(example: Any) -> None:
    pairs = compare(*example)
    verdicts = {p.row.schedule: p.verdict for p in pairs if p.other.schedule == "static" and p.row.samples == 200}
    assert verdicts == {"gits": "worse", "static+shift": "better", "one-shot": "worse", "recursive": "no different"}
    for p in pairs:
        d = p.difference
        assert p.verdict == ("better" if d.relative_high < 0 else "worse" if d.relative_low > 0 else "no different")


def test_wins_are_known_where_either_is_static(example: Any) -> None:
    wins = {(p.row.schedule, p.other.schedule): p.wins for p in compare(*example) if p.row.samples == 200}
    assert wins["static", "linear"] == 1 and wins["one-shot", "static"] == pytest.approx(0.8)
    assert wins["one-shot", "linear"] is None


def test_sentences_hold_the_percentages_of_the_means(example: Any) -> None:
    rows, apart = example
    (found,) = conclusions(rows, apart, "zoo")
    assert found.heading == "unipc-3, NFE 5"
    assert found.short.startswith(
        "static is better than the best fixed grid, linear (-20.0 %). Against static, better: "
    )
    assert "static+shift (-25.0 %), oracle (-50.0 %); no different: recursive (" in found.short
    lines = "\n".join(found.lines)
    assert "static is better than the best fixed grid, linear: -20.0 % (95 % interval " in lines
    assert "nearer on 100 % of 200 samples" in lines
    assert "one-shot is worse than static: +" in lines and "nearer on 80 % of 200 samples" in lines
    assert "oracle is better than static: -50.0 % (" in lines
    assert "recursive is worse than static+shift: +" in lines
    assert "Against static+shift, worse: one-shot (+" in found.short
    assert "of 50 samples; times alone, searched on these very samples." in lines
    assert OTHER_MODE in found.lines


def test_a_few_lost_samples_are_only_spoken_of_where_they_are(example: Any) -> None:
    rows, apart = example
    kept = [d for d in apart if d.schedule != "one-shot"]
    (found,) = conclusions(rows, kept, "zoo")
    assert OTHER_MODE not in found.lines


def test_without_a_static_grid_all_else_is_set_against_the_best_fixed_one() -> None:
    hard = 1 + torch.rand(50, generator=torch.Generator().manual_seed(1))
    rows, apart = measured({"karras": hard, "gits": 0.9 * hard}, KINDS)
    assert all(row.wins is None for row in rows)
    (found,) = conclusions(rows, apart, "inception")
    assert found.short == "gits is better than the best fixed grid, karras (-10.0 %)."
    assert found.lines[-1].startswith("FID to the data: ")


def test_fixed_grids_alone_say_nothing() -> None:
    rows, apart = measured({"karras": torch.rand(9), "linear": torch.rand(9)}, KINDS)
    (found,) = conclusions(rows, apart, "zoo")
    assert apart == [] and found.lines == [] and found.short == ""
