"""What is said of a comparison: verdicts by the paired interval, wins, and sentences that name what they rest on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ts_adapt.evaluation.comparison import Results, differences, score, share_of_wins
from ts_adapt.evaluation.conclusions import OTHER_MODE, conclusions, verdict_tables
from ts_adapt.evaluation.metrics import FeatureStatistics
from ts_adapt.evaluation.records import Entry, Run, RunCost
from ts_adapt.interfaces import TimeGrid


def measured(distances: dict[str, Tensor], kinds: dict[str, str], features_of: str = "zoo") -> Results:
    """Rows and differences as an evaluation makes them, of schedules with these distances."""
    most = max(map(len, distances.values()))
    features = torch.randn(most, 3, generator=torch.Generator().manual_seed(0))
    pictures, cost = torch.zeros(1, 1, 2, 2, dtype=torch.uint8), RunCost(None, None, 1.0, 1)
    runs = {
        name: Run(features[: len(d)], d, 0.001, pictures, torch.zeros(len(d), 6), cost) for name, d in distances.items()
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
    return Results(rows, apart, {"comparison": {"features": features_of}})


KINDS = {
    "karras": "fixed", "linear": "fixed", "linear+native": "fixed", "gits": "optimized", "static": "static",
    "static+shift": "static", "one-shot": "one-shot", "recursive": "recursive", "oracle": "oracle",
}  # fmt: skip


@pytest.fixture(scope="module")
def example() -> Results:
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


def test_everything_but_fixed_grids_is_compared_with_the_best_fixed_grid_and_with_static(example: Results) -> None:
    found = {(d.schedule, d.against, d.samples) for d in example.differences}
    names = [name for name, kind in KINDS.items() if kind != "fixed"]
    assert found == {
        (name, against, samples)
        for name in names
        for against in ("linear", "static")
        for samples in (200, 50)
        if name != against and not (name == "oracle" and samples == 200)
    } | {(name, "static+shift", samples) for name in ("one-shot", "recursive") for samples in (200, 50)}


def test_verdicts_are_those_of_the_interval(example: Results) -> None:
    pairs = example.compared()
    verdicts = {p.row.schedule: p.verdict for p in pairs if p.other.schedule == "static" and p.row.samples == 200}
    assert verdicts == {"gits": "worse", "static+shift": "better", "one-shot": "worse", "recursive": "no different"}
    for p in pairs:
        d = p.difference
        assert p.verdict == ("better" if d.relative_high < 0 else "worse" if d.relative_low > 0 else "no different")


def test_medians_and_wins_are_those_of_each_pair(example: Results) -> None:
    found = {(d.schedule, d.against): d for d in example.differences if d.samples == 200}
    medians = {r.schedule: r.distance_median for r in example.rows if r.samples == 200}
    assert found["static", "linear"].wins == 1 and found["one-shot", "static"].wins == pytest.approx(0.8)
    for (name, against), d in found.items():
        assert d.relative_median == pytest.approx(medians[name] / medians[against] - 1)
        if against == "static":
            assert d.wins == next(r.wins for r in example.rows if (r.schedule, r.samples) == (name, 200))


def test_sentences_hold_mean_median_and_wins(example: Results) -> None:
    (found,) = conclusions(example)
    assert found.heading == "unipc-3, NFE 5"
    lines = "\n".join(found.lines)
    assert "static is better than the best fixed grid, linear: mean -20.0 % (95 % interval " in lines
    assert "median -20.0 %, nearer on 100 % of 200 samples" in lines
    assert "one-shot is worse than static, by the mean alone: mean +" in lines and "nearer on 80 % of 200" in lines
    assert "oracle is better than static: mean -50.0 % (" in lines
    assert "recursive is worse than static+shift: mean +" in lines
    assert "of 50 samples; times alone, searched on these very samples." in lines
    assert OTHER_MODE in found.lines


def test_verdicts_side_by_side_bracket_what_is_no_different(example: Results) -> None:
    (table,) = verdict_tables(conclusions(example))
    found = {row[0].text: row[1] for row in table.rows}
    assert found["static – best fixed grid"].text == "-20.0 %" and found["static – best fixed grid"].tone == "better"
    assert found["static+shift – static"].text == "-25.0 %" and found["oracle – static"].text == "-50.0 %"
    assert found["one-shot – static+shift"].tone == "worse" and found["one-shot – static+shift"].text[0] == "+"
    assert found["recursive – static"].text[0] == "(" and found["recursive – static"].tone == "no different"


def test_a_few_lost_samples_are_only_spoken_of_where_they_are(example: Results) -> None:
    kept = [d for d in example.differences if d.schedule != "one-shot"]
    (found,) = conclusions(replace(example, differences=kept))
    assert OTHER_MODE not in found.lines


def test_without_a_static_grid_all_else_is_set_against_the_best_fixed_one() -> None:
    hard = 1 + torch.rand(50, generator=torch.Generator().manual_seed(1))
    results = measured({"karras": hard, "gits": 0.9 * hard}, KINDS, "inception")
    assert all(row.wins is None for row in results.rows)
    (found,) = conclusions(results)
    assert found.lines[0].startswith("gits is better than the best fixed grid, karras: mean -10.0 % (")
    assert found.lines[-1].startswith("FID to the data: ")


def test_fixed_grids_alone_say_nothing() -> None:
    results = measured({"karras": torch.rand(9), "linear": torch.rand(9)}, KINDS)
    assert results.differences == [] and conclusions(results) == []
