"""The network without some blocks as a student: beside the full one, learned for, told apart by what it is without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from small_job import Job, real_images
from ts_adapt.assembly import StudentOptions, build_quantizer
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.comparison import Results
from ts_adapt.jobs.cheaper_network import Impossible, cheaper_network, folder_of, key_of
from ts_adapt.jobs.runs import planned
from ts_adapt.jobs.session import Session
from ts_adapt.pruning import Round, candidates, removed, save
from ts_adapt.quantizers.quantization import is_quantized

CONFIG = """
name: small
solvers: [ddim]
nfe: [3]
derivative: exact
static_samples: 4
teacher: {nfe: 4, train_samples: 8, test_samples: 4}
static: {iterations: 2, starts: 1, evaluations: 8, corrections: []}
calibration: {noises: 2, nfe: 3, count: 4}
evaluate: {samples: 4, grids: [linear], reference: REAL}
"""
LESS, OTHER = (0, 3), (1, 5)
"""Which of the blocks that can go are left out."""


def write(path: Path, network: Any, gone: tuple[int, ...]) -> Path:
    names = candidates(network)
    save(path, network, [Round(names[place], "", 0.0, 1.0) for place in gone], {})
    return path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The teacher's samples, a static grid for the full network and one for that without LESS, and a comparison."""
    folder: Path = tmp_path_factory.mktemp("pruned")
    made = Job.begun(folder, CONFIG.replace("REAL", str(real_images(folder / "real", 8))))
    plan = str(write(folder / "less.json", made.session().denoiser.network, LESS))
    made.do(("teach",), ("search",), ("search", "--student.pruned", plan), ("evaluate", *product(made)))
    return made


def plan_of(job: Job) -> str:
    return str(job.folder / "less.json")


def product(job: Job) -> list[str]:
    return ["--pruned", f"none,{plan_of(job)}", "--cachers", "none,deepcache-2"]


def rows(job: Job) -> dict[tuple[str, str, str], dict[str, str]]:
    return {(row["pruned"], row["cacher"], row["schedule"]): row for row in job.rows()}


def network_of(session: Session) -> Any:
    return session.denoiser.network


def said(session: Session) -> torch.Tensor:
    x = torch.linspace(-1, 1, 28 * 28).reshape(1, 1, 28, 28)
    with torch.no_grad():
        found: torch.Tensor = network_of(session)(x, timestep=torch.tensor([300.0])).sample
    return found


def test_it_stands_beside_the_full_network_with_a_schedule_of_its_own(job: Job) -> None:
    found = rows(job)
    assert set(found) == {
        (pruned, cacher, name)
        for pruned in ("none", "less") for cacher in ("none", "deepcache-2") for name in ("linear", "static")
    } | {("less", "none", "static@less")}  # fmt: skip
    for (pruned, cacher, name), row in found.items():
        full = found["none", cacher, name.removesuffix("@less")]
        assert (float(row["flops"]) < float(full["flops"])) == (pruned == "less")
        assert (int(row["weight_bytes"]) < int(full["weight_bytes"])) == (pruned == "less")
        assert (row["distance"] == full["distance"]) == (pruned == "none")
    pairs = {(d["schedule"], d["against"]) for d in job.results["differences"] if d["pruned"] == "less"}
    assert ("static@less", "static") in pairs
    kept = json.loads((job.data / "students/less/static/ddim-nfe3.json").read_text())
    assert kept["made_with"]["student"] == {
        "pruned": [candidates(network_of(job.session()))[place] for place in LESS], "cacher": "none",
        "quantizer": "none",
    }  # fmt: skip
    page = (job.logs / "report.html").read_text()
    assert "ddim, less, NFE 3" in page and "static@less" in page


def test_what_was_measured_stays_and_a_file_elsewhere_of_the_same_blocks_is_the_same(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ts_adapt.sampling._evaluate", lambda *_: pytest.fail("the network was evaluated again"))
    former = rows(job)
    job.do(("evaluate", *product(job)))
    assert rows(job) == former
    moved = write(tmp_path / "less.json", network_of(job.session()), LESS[::-1])
    job.do(("evaluate", "--pruned", f"none,{moved}", "--cachers", "none,deepcache-2"))
    assert rows(job) == former


def test_a_changed_file_is_another_network(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = str(write(tmp_path / "less.json", network_of(job.session()), OTHER))
    one, other = (
        {entry.file: entry.fingerprint for entries in planned(session).values() for entry in entries}
        for session in (job.session(*product(job)), job.session("--pruned", f"none,{changed}"))
    )
    assert "ddim-less-nfe3-linear.safetensors" in one
    assert {file for file in other if other[file] == one[file]} == {file for file in other if "less" not in file}
    assert "made with another student.pruned" in job.refused(capsys, "search", "--student.pruned", changed)
    fresh, earlier = (
        Results([], [], {"comparison": {}, "teacher": {}, "floor": {}, "pruned": {"less": plan}}) for plan in "ab"
    )
    kept = Results.read(job.logs)
    assert kept is not None
    kept = Results(kept.rows, kept.differences, {**earlier.facts})
    assert {row.pruned for row in fresh.joined(kept).rows} == {"none"}
    assert {row.pruned for row in earlier.joined(kept).rows} == {"none", "less"}


def test_a_quantizer_of_it_is_another_and_all_comes_off_again(job: Job) -> None:
    session, pruned = job.session(), StudentOptions(plan_of(job), "deepcache-2", "hqq4")
    before, full, quantizing = said(session), StudentOptions(quantizer="hqq4"), build_quantizer("hqq4")
    assert quantizing is not None
    assert folder_of(session, full, quantizing) != folder_of(session, pruned, quantizing)
    assert key_of(session, StudentOptions(cacher="deepcache-2")) == ("deepcache-2", "none", None), "as before"
    gone = [candidates(network_of(session))[place] for place in LESS]
    with pytest.raises(ZeroDivisionError), cheaper_network(session, pruned):
        assert removed(network_of(session)) == gone and is_quantized(network_of(session))
        raise ZeroDivisionError
    assert folder_of(session, pruned, quantizing).exists()
    assert not removed(network_of(session)) and torch.equal(said(session), before)
    made = [*(job.data / "quantizers").glob("hqq3*")]
    job.do(("quantize", "--quantizer", "hqq3", "--student.pruned", plan_of(job)), ("quantize", "--quantizer", "hqq3"))
    assert len([*(job.data / "quantizers").glob("hqq3*")]) == len(made) + 2
    with pytest.raises(Impossible, match=f"not trained yet.*--student.pruned {plan_of(job)}"):
        cheaper_network(session, StudentOptions(plan_of(job), quantizer="tdq-w4a8+qat")).__enter__()
    assert not removed(network_of(session)) and torch.equal(said(session), before)


def test_records_from_before_there_was_such_a_thing_are_read(job: Job) -> None:
    path = job.logs / "results.json"
    kept = json.loads(path.read_text())
    whole = Results.read(job.logs)
    for record in (*kept["rows"], *kept["differences"]):
        del record["pruned"]
    kept["rows"] = kept["rows"][:2]
    kept["differences"] = []
    del kept["facts"]["pruned"]
    kept["facts"]["skipped"] = [{"cacher": "tgate-2", "quantizer": "none", "run": "", "reason": "r"}]
    (job.folder / "old").mkdir()
    (job.folder / "old/results.json").write_text(json.dumps(kept))
    old = Results.read(job.folder / "old")
    assert whole is not None and old is not None and list(old.rows) == list(whole.rows[:2])
    assert [one["reason"] for one in Results([], [], old.facts).joined(old).facts["skipped"]] == ["r"]


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        ("evaluate", ["--pruned", "none,absent.json"], "there is no file absent.json"),
        ("search", ["--student.pruned", "absent.json"], "there is no file absent.json"),
        ("sample", ["--student.pruned", "absent.json", "--schedule", "linear"], "there is no file absent.json"),
        ("search", ["--student.pruned", "small.yml"], "small.yml is damaged, or no JSON file"),
        ("search", ["--student.pruned", "foreign.json"], "and this UNet2DModel has others"),
        ("evaluate", ["--pruned", "none,less.json,other/less.json"], "called as these files are; rename one of them"),
        ("evaluate", ["--pruned", "none,less.json,../FOLDER/less.json"], "would be called ddim-less"),
        ("evaluate", ["--pruned", "none,deepcache-2.json"], "neither none nor the name of a cacher or quantizer"),
        ("evaluate", ["--student.pruned", "less.json"], "which is not evaluated; add less.json to pruned"),
    ],
)
def test_files_that_are_of_no_use_are_one_sentence(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: Any, command: str, flags: list[str], expected: str
) -> None:
    monkeypatch.chdir(job.folder)
    kept = json.loads((job.folder / "less.json").read_text())
    (job.folder / "foreign.json").write_text(json.dumps(kept | {"blocks": kept["blocks"][:-1]}))
    flags = [flag.replace("FOLDER", job.folder.name) for flag in flags]
    assert expected in job.refused(capsys, command, *flags, "--log_root", str(job.folder / "bad"))


def test_the_name_of_a_file_that_stands_for_a_network_is_plain() -> None:
    assert StudentOptions("a/B_1.x-y.json", "deepcache-2").name == "B_1.x-y+deepcache-2"
    for path in ("a b.json", "a,b", "a+b.json", "a@b.json", "-a.json", "../..", "x/none.json", "hqq4+split.json"):
        with pytest.raises(TsAdaptError, match="rename the file"):
            _ = StudentOptions(path).name
