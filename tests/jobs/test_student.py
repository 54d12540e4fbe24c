"""Schedules for a cached or quantized student: searched on it, kept apart, set against those of the full network."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from small_job import Job, real_images
from ts_adapt.assembly import StudentOptions
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.comparison import Results, differences
from ts_adapt.evaluation.conclusions import conclusions, verdict_tables
from ts_adapt.evaluation.records import Entry, Row, Run, RunCost
from ts_adapt.interfaces import TimeGrid
from ts_adapt.jobs.evaluate import evaluate
from ts_adapt.jobs.runs import planned
from ts_adapt.jobs.sample import sample_to_folder
from ts_adapt.jobs.search import search
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.train import train
from ts_adapt.quantizers.quantization import is_quantized
from ts_adapt.schedules.name import OF_STUDENT

CONFIG = """
name: small
solvers: [ddim]
nfe: [3]
derivative: exact
static_samples: 4
teacher: {nfe: 4, train_samples: 10, test_samples: 6}
static: {iterations: 2, starts: 1, evaluations: 16, corrections: []}
blackbox: {trials: 2}
train: {epochs: 1, samples: 10}
calibration: {noises: 2, nfe: 3, count: 4}
evaluate: {samples: 6, grids: [linear], reference: REAL}
"""


def session_in(root: Job, cacher: str = "none", quantizer: str = "none", **options: Any) -> Session:
    """The experiment of `root`, learning for a student."""
    student = StudentOptions(cacher=cacher, quantizer=quantizer)
    return Session(replace(root.session().config, student=student, **options), progress=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An experiment with the teacher's samples, some real images, and the full network's static grid."""
    folder: Path = tmp_path_factory.mktemp("student")
    job = Job.begun(folder, CONFIG.replace("REAL", str(real_images(folder / "real", 8))))
    assert job.run("teach") == job.run("search") == 0
    return job


@pytest.fixture(scope="module")
def learned(root: Job) -> Session:
    """With a static grid for the quantized network."""
    session = session_in(root, quantizer="minmax-w4a4")
    search(session, "static")
    return session


def said(session: Session) -> Any:
    x = torch.linspace(-1, 1, 28 * 28).reshape(1, 1, 28, 28)
    with torch.no_grad():
        return session.denoiser(x, torch.tensor(300.0, dtype=torch.float64))


def test_what_is_learned_is_kept_apart_and_says_for_whom(root: Job, learned: Session) -> None:
    full, own = session_in(root).static("ddim", 3), learned.static("ddim", 3)
    assert (root.data / "static" / "ddim-nfe3.json").exists()
    assert (root.data / "students" / "minmax-w4a4" / "static" / "ddim-nfe3.json").exists()
    assert own.about["made_with"]["student"] == {"cacher": "none", "quantizer": "minmax-w4a4"}
    assert "student" not in full.about["made_with"] and not torch.equal(own.grid.times, full.grid.times)
    assert own.about["measured"]["best_fixed_distance"] != full.about["measured"]["best_fixed_distance"]
    assert not is_quantized(learned.denoiser.network)  # type: ignore[attr-defined]
    assert torch.equal(said(learned), said(session_in(root)))


def test_the_search_begins_at_the_full_networks_grid_too(root: Job, learned: Session) -> None:
    """So that on its validation samples what is learned for the student is never worse there."""
    from ts_adapt.jobs.cheaper_network import cheaper_network

    batch = learned.teacher("train", 8)[1].rows(slice(4, 8))
    objective = learned.objective(learned.solver("ddim"))
    with cheaper_network(learned, learned.config.student):
        own, full = (
            float(objective.measure(of.static("ddim", 3).grid, batch).mean()) for of in (learned, session_in(root))
        )
    assert own <= full


def test_the_comparison_answers_whether_it_is_better(
    root: Job, learned: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_in(root, cachers=["none"], quantizers=["none", "minmax-w4a4"])
    evaluate(session)
    rows = {(row["quantizer"], row["schedule"]): row for row in root.rows()}
    assert set(rows) == {
        ("none", "linear"), ("none", "static"), ("minmax-w4a4", "linear"), ("minmax-w4a4", "static"),
        ("minmax-w4a4", "static@minmax-w4a4"),
    }  # fmt: skip
    assert rows["minmax-w4a4", "static@minmax-w4a4"]["kind"] == "static"
    found = root.results["differences"]
    pairs = {(d["schedule"], d["against"]) for d in found if d["quantizer"] == "minmax-w4a4"}
    assert pairs == {
        ("static", "linear"), ("static@minmax-w4a4", "linear"), ("static@minmax-w4a4", "static"),
    }  # fmt: skip
    (asked,) = [d for d in found if (d["schedule"], d["against"]) == ("static@minmax-w4a4", "static")]
    own, full = (float(rows["minmax-w4a4", name]["distance"]) for name in ("static@minmax-w4a4", "static"))
    apart = own - full
    assert asked["difference"] == pytest.approx(apart, abs=1e-6)
    assert asked["relative"] == pytest.approx(apart / full, abs=1e-5)
    assert asked["relative_low"] <= asked["relative"] <= asked["relative_high"]
    printed, page = capsys.readouterr().out, (session.workspace.logs / "report.html").read_text()
    products = page.split("<h2>Cheaper networks</h2>")[1].split("<h2>How to read it</h2>")[0]
    assert products.count('<td class="name">static@minmax-w4a4</td>') == 1
    assert "static@minmax-w4a4 is " in printed and "ddim, NFE 3, static, 6 test samples" in printed
    entries = [entry for entries in planned(session).values() for entry in entries]
    assert len({entry.fingerprint for entry in entries}) == len({entry.file for entry in entries}) == len(entries) == 5


def test_each_is_set_against_its_like() -> None:
    """Static, one-shot and corrected schedules of the full network and of the student, on the student."""
    kinds = {"linear": "fixed", "static": "static", "one-shot": "one-shot", "static@hqq4": "static"}
    kinds |= {"static+shift@hqq4": "static", "one-shot@hqq4": "one-shot"}
    runs, rows = [], []
    for place, (name, kind) in enumerate(kinds.items()):
        distance = torch.rand(20, generator=torch.Generator().manual_seed(0)) + 2 - 0.1 * place
        entry = Entry("ddim", 3, name, kind, TimeGrid(torch.zeros(4)), name, 20, quantizer="hqq4")
        nothing = torch.zeros(20, 2)
        runs.append((entry, Run(nothing, distance, 0.0, nothing, nothing, RunCost(None, None, 0.0, 0))))
        mean, wins = float(distance.mean()), None if name == "static" else 0.5 + 0.1 * place
        rows.append(Row("m", "ddim", 3, name, kind, 20, 0, 0, mean, mean, mean, 0, 0, mean, wins, quantizer="hqq4"))
    found = differences(runs, 20)
    assert {(d.schedule, d.against) for d in found if d.against != "linear"} == {
        ("one-shot", "static"), ("static@hqq4", "static"), ("static+shift@hqq4", "static@hqq4"),
        ("one-shot@hqq4", "static@hqq4"), ("one-shot@hqq4", "static+shift@hqq4"), ("one-shot@hqq4", "one-shot"),
    }  # fmt: skip
    assert {d.schedule for d in found if d.against == "linear"} == set(kinds) - {"linear"}
    (conclusion,) = conclusions(Results(rows, found, {"comparison": {"features": "zoo"}}))
    for sentence in ("static@hqq4 is better than static: mean -", "one-shot@hqq4 is better than one-shot: mean -"):
        assert any(line.startswith(sentence) for line in conclusion.lines), sentence
    (verdicts,) = verdict_tables([conclusion])
    assert {"static@hqq4 – static", "static+shift@hqq4 – static@hqq4"} <= {row[0].text for row in verdicts.rows}


def test_images_are_made_by_the_student(root: Job, learned: Session, tmp_path: Path) -> None:
    def picture(session: Session, schedule: str) -> bytes:
        folder = sample_to_folder(session, schedule, None, None, 1, 0, None, str(tmp_path / schedule))
        return (folder / "grid.png").read_bytes()

    assert picture(learned, "linear") != picture(session_in(root), "linear")
    with pytest.raises(TsAdaptError, match="give its name alone, static, with that network"):
        sample_to_folder(session_in(root), "static@minmax-w4a4", None, None, 1, 0, None, str(tmp_path))


def test_a_cached_student_is_searched_by_gradient_but_not_under_checkpointing(root: Job) -> None:
    session = session_in(root, "deepcache-2", "hqq4")
    assert session.config.student.name == "deepcache-2+hqq4"
    search(session, "static")
    assert (session.workspace.data / "students/deepcache-2+hqq4/static/ddim-nfe3.json").exists()
    refused = session_in(root, "deepcache-3", checkpointing=True)
    with pytest.raises(TsAdaptError, match="a stateful cache cannot be used under gradient checkpointing"):
        search(refused, "static")


def test_without_a_gradient_the_search_names_those_that_need_none(root: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ts_adapt.quantizers.layers.affine.round_through", torch.round)
    session = session_in(root, quantizer="minmax-w8a8")
    refusal = r"minmax-w8a8 has none \(passes none\); take --method blackbox, or .* --static\.method forward"
    session.config.static.method = "lbfgs"
    for learn in (search_static, search_labels, train_one_shot):
        with pytest.raises(TsAdaptError, match=refusal):
            learn(session)
    search(session, "blackbox")
    assert session.shared("blackbox", "ddim", 3).about["made_with"]["student"]["quantizer"] == "minmax-w8a8"
    session.config.static.method, session.config.static.evaluations = "forward", 1
    search_static(session)
    assert session.shared_names("ddim", 3) == ["static", "blackbox"]


def search_static(session: Session) -> None:
    search(session, "static")


def search_labels(session: Session) -> None:
    search(session, "per-sample")


def train_one_shot(session: Session) -> None:
    train(session, "one-shot")


@pytest.mark.packages
def test_through_integers_a_descent_is_refused_and_what_takes_no_gradient_is_searched(root: Job) -> None:
    static = root.session().config.static
    descent = session_in(root, quantizer="torchao-int8", static=replace(static, method="adam"))
    with pytest.raises(
        TsAdaptError, match=r"torchao-int8 has none \(torchao computes with integers.*--method blackbox"
    ):
        search(descent, "static")
    session = session_in(root, quantizer="torchao-int8", static=replace(static, evaluations=8))
    for method in ("static", "blackbox"):
        search(session, method)
        assert session.shared(method, "ddim", 3).grid.steps == 3


def test_predictors_are_trained_on_the_student(root: Job, learned: Session) -> None:
    train(learned, "recursive")
    predictor = learned.predictor("recursive", "ddim", 3).predictor
    assert predictor.static_times.tolist() == learned.static("ddim", 3).grid.times.tolist()
    assert not (root.data / "predictors").exists()
    entries = planned(session_in(root, quantizers=["minmax-w4a4"]))[StudentOptions(quantizer="minmax-w4a4")]
    assert [e.schedule for e in entries] == ["linear", "static", "static@minmax-w4a4", "recursive@minmax-w4a4"]


def test_a_student_that_was_calibrated_otherwise_is_another(root: Job, learned: Session) -> None:
    session = session_in(root, quantizer="minmax-w4a4")
    session.config.calibration.count = 5
    with pytest.raises(TsAdaptError, match=r"made with another calibration\.count"):
        search(session, "static")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--student.quantizer", "hqqq4"], "did you mean 'hqq4'"),
        (["--student.cacher", "deepcache-0"], "interval is 0"),
        (["--student.quantizer", "hqq4"], "the student hqq4, which is not evaluated; add hqq4 to quantizers"),
    ],
)
def test_bad_students_are_explained(
    root: Job, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert expected in root.refused(capsys, "evaluate", "--log_root", str(root.folder / "bad"), *flags)


def test_names_of_students_do_not_collide() -> None:
    axes = ("none", "p.json", "p.q.json"), ("none", "deepcache-2", "tgate-2"), ("none", "hqq4", "hqq3")
    names = [StudentOptions(*parts).name for parts in product(*axes)]
    assert len(set(names)) == len(names) and names[0] == "" and not any(OF_STUDENT in name for name in names)
