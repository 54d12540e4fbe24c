"""Cachers and quantizers in the comparison: the whole product, what is skipped, kept, and left as it was."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_job import Job, real_images
from ts_adapt.assembly import FULL, StudentOptions, build_quantizer
from ts_adapt.config import Config
from ts_adapt.denoisers.network import step_aware_parts
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.records import COLUMNS, fingerprint
from ts_adapt.jobs.cheaper_network import Impossible, cheaper_network, folder_of
from ts_adapt.jobs.evaluate import evaluate, score_runs
from ts_adapt.jobs.runs import generate, planned
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.teach import teach
from ts_adapt.quantizers.methods import tdq, time_groups
from ts_adapt.quantizers.quantization import is_quantized, size_of
from ts_adapt.storage.files import read_tensors
from ts_adapt.storage.folders import making

CACHERS, QUANTIZERS = ["none", "deepcache-2"], ["none", "hqq4", "minmax-w8a8"]
CONFIG = """
name: small
solvers: [ddim]
nfe: [3]
teacher: {nfe: 4, test_samples: 8}
calibration: {noises: 2, nfe: 3, count: 4}
evaluate: {samples: 8, grids: [karras, linear], reference: REAL}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An experiment with the teacher's samples and some real images."""
    folder: Path = tmp_path_factory.mktemp("suite")
    job = Job.begun(folder, CONFIG.replace("REAL", str(real_images(folder / "real", 12))))
    assert job.run("teach", "--split", "test") == 0
    return job


def session_in(root: Job, logs: Path, **options: Any) -> Session:
    """The experiment of `root`, with results under `logs`."""
    return Session(replace(root.session("--log_root", str(logs)).config, **options), progress=False)


@pytest.fixture(scope="module")
def done(root: Job, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The product, evaluated."""
    session = session_in(root, tmp_path_factory.mktemp("logs"), cachers=CACHERS, quantizers=QUANTIZERS)
    before = marks(session)
    evaluate(session)
    assert marks(session) == before
    return session


def network_of(session: Session) -> nn.Module:
    network: nn.Module = session.denoiser.network  # type: ignore[attr-defined]
    return network


def marks(session: Session) -> list[Any]:
    """What would be seen of anything left on the network: its modules, tensors, hooks, attributes and what it says."""
    network = network_of(session)
    x = torch.linspace(-1, 1, 28 * 28).reshape(1, 1, 28, 28)
    with torch.no_grad():
        said: Tensor = network(x, timestep=torch.tensor([300.0])).sample
    modules = [(name, id(module), sorted(vars(module))) for name, module in network.named_modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    tensors = [(name, id(p), float(p.double().sum())) for name, p in network.named_parameters()]
    return [modules, hooks, tensors, step_aware_parts(network), is_quantized(network), said.tolist()]


def table(session: Session) -> list[dict[str, str]]:
    with open(session.workspace.logs / "results.csv") as file:
        return list(csv.DictReader(file))


def facts(session: Session) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((session.workspace.logs / "results.json").read_text())["facts"]
    return found


def test_every_cacher_meets_every_quantizer_on_every_schedule(done: Session) -> None:
    rows = table(done)
    assert list(rows[0]) == COLUMNS and COLUMNS[-13:] == [
        "pruned", "cacher", "quantizer", "bits", "weight_bytes", "flops", "peak_memory", "kid", "inception_score",
        "sfid", "precision", "recall", "clip_score",
    ]  # fmt: skip
    found = {(r["cacher"], r["quantizer"], r["schedule"]): r for r in rows}
    assert len(rows) == len(found) == len(CACHERS) * len(QUANTIZERS) * 2
    for (cacher, quantizer, schedule), row in found.items():
        full = found["none", "none", schedule]
        assert (float(row["flops"]) < 0.8 * float(full["flops"])) == (cacher == "deepcache-2")
        assert (int(row["weight_bytes"]) < 0.4 * int(full["weight_bytes"])) == (quantizer != "none")
        assert (float(row["bits"]) == 32) == (quantizer == "none") and float(row["peak_memory"]) > 0
        assert (row["distance"] == full["distance"]) == ((cacher, quantizer) == ("none", "none"))
        assert row["inception_score"] == row["sfid"] == row["clip_score"] == ""
        assert float(row["kid"]) == float(row["kid"]) and 0 <= float(row["precision"]) <= 1 >= float(row["recall"]) >= 0
    assert facts(done)["skipped"] == []


def test_a_quantizer_that_another_process_is_making_is_made_without_being_kept(root: Job, tmp_path: Path) -> None:
    session = session_in(root, tmp_path / "logs", quantizers=["none", "hqq3"])
    quantizing = build_quantizer("hqq3")
    assert quantizing is not None
    folder = folder_of(session, StudentOptions(quantizer="hqq3"), quantizing)
    with making(folder):
        generate(session)
    assert len(list(session.workspace.runs.glob("ddim-*.safetensors"))) == 4 and not folder.exists()


def test_the_report_puts_them_side_by_side(done: Session) -> None:
    page = (done.workspace.logs / "report.html").read_text()
    assert "Cheaper networks" in page and page.count("ddim, NFE 3, karras, 8 test samples") == 1
    assert "| deepcache-2 | minmax-w8a8 | 8." in (done.workspace.logs / "results.md").read_text()
    assert {path.stem for path in (done.workspace.logs / "plots").iterdir()} == {
        "images-ddim-nfe3", "intervals-ddim-nfe3-8", "schedules-ddim-nfe3"
    }  # fmt: skip


def test_without_either_everything_is_as_it_was(done: Session, root: Job, tmp_path: Path) -> None:
    """Rows, file names and fingerprints, so that run files from before there were cachers stay valid."""
    plain = session_in(root, tmp_path)
    evaluate(plain)
    of_product = [row for row in table(done) if (row["cacher"], row["quantizer"]) == ("none", "none")]
    timed = "seconds_per_image"
    assert [row | {timed: ""} for row in table(plain)] == [row | {timed: ""} for row in of_product]
    base = (plain.teacher("test")[0].hash, "ddim", "features", "zoo")
    for entry in planned(plain)[FULL]:
        assert entry.file == f"ddim-nfe3-{entry.schedule}.safetensors"
        assert entry.fingerprint == fingerprint(*base, entry.policy)
    everything = [entry for entries in planned(done).values() for entry in entries]
    assert len({e.fingerprint for e in everything}) == len({e.file for e in everything}) == len(everything)


def test_nothing_is_computed_twice(done: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.workspace.runs.iterdir()}
    monkeypatch.setattr("ts_adapt.sampling._evaluate", lambda *_: pytest.fail("the network was evaluated again"))
    former = table(done)
    evaluate(done)
    assert table(done) == former
    assert {path: path.stat().st_mtime_ns for path in done.workspace.runs.iterdir()} == before


def test_what_the_network_does_not_take_is_skipped_with_a_reason(
    root: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_in(root, tmp_path, cachers=["none", "deepcache-2-branch99"], quantizers=["none", "hqq4"])
    before = marks(session)
    evaluate(session)
    assert marks(session) == before
    assert {(r["cacher"], r["quantizer"]) for r in table(session)} == {("none", "none"), ("none", "hqq4")}
    refused = facts(session)["skipped"]
    assert [(one["cacher"], one["quantizer"]) for one in refused] == [
        ("deepcache-2-branch99", "none"), ("deepcache-2-branch99", "hqq4"),
    ]  # fmt: skip
    assert all("branch is 99" in one["reason"] for one in refused)
    printed = capsys.readouterr().out
    assert "skipped: deepcache-2-branch99+hqq4: branch is 99" in printed


def test_evaluate_makes_the_teachers_samples_that_are_missing(root: Job, tmp_path: Path) -> None:
    """From nothing, and from less than is wanted; scoring alone makes none."""
    session = session_in(root, tmp_path)
    session.config.data_root = str(tmp_path / "train_data")
    session.config.teacher.test_samples = session.config.evaluate.samples = 4
    with pytest.raises(TsAdaptError, match="ts-adapt teach"):
        score_runs(Session(session.config, progress=False))
    evaluate(Session(session.config, progress=False))
    assert {row["samples"] for row in table(session)} == {"4"}
    session.config.teacher.test_samples = session.config.evaluate.samples = 8
    generate(fresh := Session(session.config, progress=False))
    assert len(fresh.teacher("test")[1]) == 8


def test_a_network_that_is_run_in_another_way_is_measured_anew(root: Job, tmp_path: Path) -> None:
    prints = []
    for option, value in (("compile", None), ("channels_last", True), ("fused_qkv", True), ("compile", "eager")):
        session = session_in(root, tmp_path)
        setattr(session.config.model, option, value)
        prints.append([entry.fingerprint for entry in planned(session)[FULL]])
    assert all(len(set(same)) == len(prints) for same in zip(*prints, strict=True))


def test_a_model_without_a_network_is_compared_without_cachers(tmp_path: Path) -> None:
    config = Config(name="mixture", distance="l2", cachers=["deepcache-2", "none"], quantizers=["none", "hqq4"])
    config.model.name = "gaussian-mixture"
    config.teacher.nfe, config.teacher.test_samples = 8, 20
    config.evaluate = replace(config.evaluate, samples=20, grids=["karras"], features="pixels")
    config.data_root, config.log_root = str(tmp_path / "data"), str(tmp_path / "logs")
    session = Session(config, progress=False)
    teach(session, ("test",))
    (row,), _ = evaluate(session)
    assert (row.cacher, row.quantizer, row.bits, row.weight_bytes) == ("none", "none", None, None)
    assert len(facts(session)["skipped"]) == 3
    config.cachers, config.name = ["deepcache-2"], "nothing"
    with pytest.raises(TsAdaptError, match="has no network to prune, cache"):
        teach(Session(config, progress=False), ("test",))
        evaluate(Session(config, progress=False))


def test_generating_and_scoring_run_apart(
    done: Session, root: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--log_root", str(tmp_path), "--quantizers", "none,hqq4"]

    def said(*more: str, code: int = 0) -> str:
        capsys.readouterr()
        assert root.run("evaluate", *flags, *more) == code
        return capsys.readouterr().err

    assert "nothing of this comparison is in" in said("--score-only", code=2)
    assert "leave both out for both" in said("--score-only", "--generate-only", code=2)
    said("--generate-only", "--cachers", "none")
    assert not (tmp_path / "small/results.csv").exists()
    missing = said("--score-only", "--cachers", "none,deepcache-2")
    assert "4 of 8 runs are missing (ddim, deepcache-2, NFE 3, karras; " in missing and "--generate-only`" in missing
    with open(tmp_path / "small/results.csv") as file:
        scored = list(csv.DictReader(file))
    wanted = [r for r in table(done) if r["cacher"] == "none" and r["quantizer"] in ("none", "hqq4")]
    timed = "seconds_per_image"
    assert [row | {timed: ""} for row in scored] == [row | {timed: ""} for row in wanted]


@pytest.mark.parametrize("quantizer", ["minmax-w8a8", "tdq-w8a8", "tinydm-w8a8"])
def test_a_quantization_is_found_once_and_read_back_the_same(
    root: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizer: str
) -> None:
    for module in (tdq, time_groups):
        monkeypatch.setattr(module, "FIT_STEPS", 3)
    session = session_in(root, tmp_path, quantizers=[quantizer])
    before = marks(session)
    session.config.data_root = str(tmp_path)
    session = Session(session.config, progress=False)
    with cheaper_network(session, StudentOptions(quantizer=quantizer)):
        quantized, size = marks(session)[-1], asdict(size_of(network_of(session)))
    (folder,) = (session.workspace.data / "quantizers").glob("[!.]*")
    assert marks(session)[-1] == before[-1] != quantized
    with monkeypatch.context() as patch:
        patch.setattr("ts_adapt.quantizers.quantization.quantize", lambda *_, **__: pytest.fail("quantized again"))
        with cheaper_network(session, StudentOptions(quantizer=quantizer)):
            assert marks(session)[-1] == quantized and asdict(size_of(network_of(session))) == size
    (folder / "model.safetensors").write_bytes(b"damaged")
    with cheaper_network(session, StudentOptions(quantizer=quantizer)):
        assert marks(session)[-1] == quantized
    session.config.calibration.nfe = 4
    with cheaper_network(session, StudentOptions(quantizer=quantizer)):
        pass
    other = "normal" if quantizer != "tdq-w8a8" else "active"
    with cheaper_network(session, StudentOptions(quantizer=f"{quantizer}@{other}")):
        assert marks(session)[-1] != quantized
    assert len(list((session.workspace.data / "quantizers").glob("[!.]*"))) == 3


def test_the_network_is_itself_again_whatever_happens(root: Job, tmp_path: Path) -> None:
    session = session_in(root, tmp_path)
    before = marks(session)
    with (
        pytest.raises(ZeroDivisionError),
        cheaper_network(session, StudentOptions(cacher="deepcache-2+tgate-2", quantizer="hqq4")),
    ):
        assert is_quantized(network_of(session)) and len(step_aware_parts(network_of(session))) == 2
        raise ZeroDivisionError
    assert marks(session) == before
    with (
        pytest.raises(Impossible, match="branch is 99"),
        cheaper_network(session, StudentOptions(cacher="tgate+deepcache-2-branch99", quantizer="hqq4")),
    ):
        pass
    assert marks(session) == before


def test_generating_leaves_the_teacher_in_full_precision(done: Session, root: Job, tmp_path: Path) -> None:
    quantized = session_in(root, tmp_path, quantizers=["minmax-w4"])
    generate(quantized)
    kept = [read_tensors(session.workspace.runs / "teacher.safetensors") for session in (done, quantized)]
    assert torch.equal(kept[0]["features"], kept[1]["features"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--quantizers", "hqq4@active"], "hqq4 is not calibrated"),
        (["--quantizers", "minmax-w8a8@actve"], "did you mean 'active'"),
        (["--quantizers", "minmax-w8a8", "--calibration.count", "7"], "give more noises or another count"),
        (["--evaluate.clip", "no/such"], "give teacher.prompts"),
    ],
)
def test_bad_names_and_counts_are_one_sentence(
    root: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert expected in root.refused(capsys, "evaluate", "--log_root", str(tmp_path), *flags)
