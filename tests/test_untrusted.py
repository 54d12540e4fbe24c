"""Files are anybody's: nothing in them is run, names in them stay in their folder, pages show them as text."""

from __future__ import annotations

import ast
import json
import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ts_adapt
from fuzzing import corpus
from fuzzing.runner import laid_out
from ts_adapt.cli import main
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.comparison import Results
from ts_adapt.evaluation.records import Difference, Row
from ts_adapt.evaluation.report import Panel, write_report
from ts_adapt.jobs.export_scheduler import export_scheduler
from ts_adapt.predictors.store import load_predictor
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.search.labels import LabelStore
from ts_adapt.storage import files
from ts_adapt.teacher.store import TeacherStore
from ts_adapt.zoo.features import load_features

PACKAGE = Path(ts_adapt.__file__).parent
ROOT = PACKAGE.parent
MODULES = [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
RUN_CODE = {
    "eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load",
    "os.system",
}  # fmt: skip
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&{{7*7}}"


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def runs(code: str) -> Iterator[str]:
    """What of `code` reads a pickle or runs a text, itself or by torch, numpy, yaml and diffusers."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {name.split(".")[0] for name in [str(getattr(node, "module", "")), *(a.name for a in node.names)]}
            yield from names & PICKLES
    for name, call in calls(tree):
        given = {str(word.arg): ast.unparse(word.value) for word in call.keywords}
        if (
            name in RUN_CODE
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
            or given.keys() & {"trust_remote_code", "shell"}
        ):
            yield f"{name} in line {call.lineno}"


def test_no_file_is_run() -> None:
    assert not {str(path.relative_to(ROOT)): found for path in MODULES if (found := list(runs(path.read_text())))}


@pytest.mark.parametrize(
    ("code", "found"),
    [("torch.load('x')", True), ("torch.load('x', weights_only=True)", False), ("import pickle", True),
     ("eval('1')", True), ("np.load('x', allow_pickle=True)", True), ("yaml.safe_load('x')", False),
     ("run('ls', shell=True)", True)],
)  # fmt: skip
def test_the_walk_sees_what_it_is_for(code: str, found: bool) -> None:
    assert bool(list(runs(code))) == found


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)

    def __init__(self, place: Path) -> None:
        self.place = place


def test_a_pickle_in_the_place_of_any_file_is_not_run(tmp_path: Path) -> None:
    place = tmp_path / "was_run"
    bomb = pickle.dumps(Payload(place))
    mixture = corpus.VP
    reads = {
        "predictor": (corpus.predictors()["one-shot"], lambda folder: load_predictor(folder, mixture)),
        "labels": (corpus.labels()["plain"], lambda folder: LabelStore.open(folder).load()),
        "teacher": (corpus.teachers()["plain"], lambda folder: TeacherStore.open(folder).load([0, 5])),
        "scheduler": (corpus.schedulers()["predictor"], LearnedScheduler.from_pretrained),
    }
    for name, (valid, read) in reads.items():
        for damaged in valid:
            folder = laid_out({**valid, damaged: bomb}, tmp_path / name / damaged.replace("/", "_"))
            with pytest.raises(TsAdaptError):
                read(folder)
    (tmp_path / "f.safetensors").write_bytes(bomb)
    with pytest.raises(TsAdaptError):
        load_features(tmp_path / "f.safetensors")
    assert not place.exists()


NAMES = ["../x", "../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "..\\x", "C:\\x"]


@pytest.mark.parametrize("name", NAMES)
def test_an_experiments_name_is_one_folder(tmp_path: Path, name: str) -> None:
    config = Config(name=name, data_root=str(tmp_path / "data"), log_root=str(tmp_path / "logs"))
    with pytest.raises(TsAdaptError, match="name"):
        config.validate()


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "shard-00000.safetensors/../../x", "a\0"])
def test_a_manifest_names_shards_only(tmp_path: Path, name: str) -> None:
    """Neither another file nor one outside of the folder is read, though its checksum be right."""
    valid = corpus.teachers()["plain"]
    manifest = json.loads(valid["manifest.json"])
    manifest["shards"][name] = manifest["shards"].pop("shard-00000.safetensors")
    folder = laid_out({**valid, "manifest.json": json.dumps(manifest).encode()}, tmp_path / "store")
    (tmp_path / "x.safetensors").write_bytes(valid["shard-00000.safetensors"])
    with pytest.raises(TsAdaptError, match="no shard"):
        TeacherStore.open(folder)


@pytest.mark.parametrize("solver", ["../../x", "/tmp/x"])
def test_names_in_a_schedule_do_not_choose_where_it_is_written(tmp_path: Path, solver: str, capsys: Any) -> None:
    content = json.loads(corpus.schedules()["plain"]["s.json"])
    path = tmp_path / "in" / "s.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**content, "solver": solver, "source": solver, "model": solver}))
    before = {found for found in tmp_path.rglob("*")}
    assert main(["export", str(path), "--format", "a1111", "--out", str(tmp_path / "in" / "o.py")]) in (0, 2)
    assert {found for found in tmp_path.rglob("*")} - before <= {tmp_path / "in" / "o.py"}


def test_a_link_in_a_schedules_folder_is_not_followed_when_it_is_replaced(tmp_path: Path) -> None:
    """Writing replaces the link itself, never what it points to."""
    outside = tmp_path / "outside.json"
    outside.write_text("precious")
    link = tmp_path / "folder" / "v.json"
    link.parent.mkdir()
    link.symlink_to(outside)
    files.write_json(link, {"a": 1})
    assert outside.read_text() == "precious" and not link.is_symlink()
    (tmp_path / "folder" / "foreign").symlink_to(tmp_path)
    with pytest.raises(TsAdaptError, match="is of no schedule"):
        export_scheduler(Config(), "karras", out=str(tmp_path / "folder"))
    assert outside.read_text() == "precious"


def page(tmp_path: Path, *, title: str, notes: list[str], **changes: Any) -> str:
    row = replace(Row("m", "unipc-3", 5, "karras", "fixed", 40, 0.3, 0.2, 0.1, 0.09, 0.11, 0.001, 0, 0.08), **changes)
    static = replace(row, schedule=f"static{row.schedule}", kind="static")
    apart = [
        Difference(row.solver, 5, 40, static.schedule, row.schedule, -0.01, -0.1, -0.2, -0.05, -0.1, 0.8, row.cacher)
    ]
    comparison = {"model": "m", "teacher": "t", "distance": HOSTILE, "features": HOSTILE}
    results = Results([row, static], apart, {"comparison": comparison, "teacher": {"40": 0.1}, "floor": {}})
    times, pictures = torch.tensor([1.0, 0.5, 0.1]), torch.zeros(1, 1, 4, 4)
    panel = Panel(row.sampler, 5, {row.schedule: times}, {row.schedule: pictures})
    return write_report(tmp_path, results, [panel], corpus.VP, title=title, notes=notes).read_text()


def test_the_page_shows_hostile_names_as_text(tmp_path: Path) -> None:
    hostile = HOSTILE.replace("/", "|")  # what a file name may hold
    html = page(
        tmp_path, title=HOSTILE, notes=[HOSTILE, HOSTILE], model=HOSTILE, schedule=hostile, kind=HOSTILE,
        cacher=hostile,
    )  # fmt: skip
    assert "<script" not in html and "<img src=x" not in html and "&lt;script" in html and "{{7*7}}" in html
    assert all(tag in ("data:image/png;base64",) for tag in _sources(html))


def _sources(html: str) -> set[str]:
    return {piece.split(",")[0] for piece in html.split('src="')[1:]}


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "[[-1e999]]", '{"a": [NaN]}'])
def test_json_without_finite_numbers_is_refused(text: str) -> None:
    with pytest.raises(TsAdaptError, match="finite"):
        files.parse_json(text.encode(), "the file")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 65 + "]" * 65, "nested deeper"), ("[" * 10**6, "no JSON|nested"), ("9" * 30, "64 bits"),
        ("9" * 5000, "no JSON"), ('"\\ud800"', "surrogate"), ('{"\\udfff": 1}', "surrogate"),
        ('{"a": 1, "a": 2}', "'a' twice"),
    ],
)  # fmt: skip
def test_json_that_nobody_writes_is_refused(text: str, said: str) -> None:
    with pytest.raises(TsAdaptError, match=said):
        files.parse_json(text.encode(), "the file")


def test_json_that_somebody_writes_is_read() -> None:
    for value in (["[" * 100, "é猫😀", 2**64 - 1, -1e308, 5e-324, None, True], {"a": {"b": [[]]}}):
        assert files.parse_json(json.dumps(value).encode(), "the file") == value
        assert files.parse_json(json.dumps(value, ensure_ascii=False).encode(), "the file") == value


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_tensors_that_are_not_finite_are_refused(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    files.write_tensors(tmp_path / "t.safetensors", {"x": torch.tensor([1.0, bad]).to(dtype)})
    with pytest.raises(TsAdaptError, match=r"'x' in .* NaN or infinite"):
        files.read_tensors(tmp_path / "t.safetensors")
    files.write_tensors(tmp_path / "t.safetensors", {"x": torch.tensor([1.0, 2.0]).to(dtype)})
    assert files.read_tensors(tmp_path / "t.safetensors")["x"].dtype == dtype


@pytest.mark.parametrize("value", [torch.ones(1, dtype=torch.complex64), torch.ones([1] * 17)], ids=["type", "shape"])
def test_tensors_that_nobody_writes_are_refused(tmp_path: Path, value: torch.Tensor) -> None:
    files.write_tensors(tmp_path / "t.safetensors", {"x": value})
    with pytest.raises(TsAdaptError, match="which is not read"):
        files.read_tensors(tmp_path / "t.safetensors")


def test_what_is_written_has_null_for_infinite(tmp_path: Path) -> None:
    files.write_json(tmp_path / "v.json", {"a": [float("inf"), 1.0], "b": float("nan")})
    assert files.read_json(tmp_path / "v.json") == {"a": [None, 1.0], "b": None}


def test_a_file_beyond_its_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert files.read_bytes(tmp_path / "a", limit=100) == b"x" * 100
    for path in (tmp_path / "a", Path("/dev/zero")):
        with pytest.raises(TsAdaptError, match="more than 99 bytes"):
            files.read_bytes(path, limit=99)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"x" * 100_000,))
    thread.start()
    assert files.read_bytes(tmp_path / "pipe", limit=10**6) == b"x" * 100_000
    thread.join()


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    "text", [BOMB + "name: *a29\n", "nfe: &n [*n]\n", "name: !!python/object/apply:os.mkdir [x]\n", "nfe: [.nan]\n"]
)
def test_yaml_that_multiplies_or_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(text)
    assert main(["teach", "--config", "c.yml"]) == 2
    assert len(capsys.readouterr().err) < 1000 and os.listdir() == ["c.yml"]
