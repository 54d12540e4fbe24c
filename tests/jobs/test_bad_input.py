"""Bad input of every kind: one sentence, exit code 2, and nothing that was finished or not yet begun is spoiled."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from ts_adapt.cli import main
from ts_adapt.config import LIMITS, Config
from ts_adapt.files import read_tensors, sha256_of_json, write_tensors
from ts_adapt.interfaces import TsAdaptError

SMALL = """
name: small
model: {name: gaussian-mixture}
solvers: [unipc-2]
nfe: [3]
distance: l2
static_samples: 8
label_samples: 20
oracle_samples: 10
label_batch: 10
teacher: {nfe: 12, train_samples: 40, test_samples: 20, shard_size: 16, batch_size: 16}
static: {iterations: 2}
per_sample: {iterations: 2, random_starts: 0}
train: {epochs: 2, end_to_end_epochs: 1, width: 4, hidden: 16}
evaluate: {samples: 20, features: pixels, batch_size: 16, grids: [karras, linear]}
"""
LABEL = ("search", "--method", "per-sample")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole job has run once."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "small.yml").write_text(SMALL)
    for step in (["teach"], ["search"], LABEL, [*LABEL, "--split", "test"], ["train"], ["evaluate"]):
        assert run(folder, *step) == 0, step
    return folder


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished job, free to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "job"))


def run(folder: Path, command: str, *flags: str) -> int:
    roots = [] if "--log_root" in flags else ["--log_root", str(folder / "logs")]
    roots += ["--data_root", str(folder / "train_data")]
    return main([command, "--config", str(folder / "small.yml"), "--quiet", *flags, *roots])


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a refused command."""
    capsys.readouterr()
    assert run(folder, *arguments) == 2
    return sentence(capsys)


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    message = capsys.readouterr().err.strip()
    assert message.startswith("ts-adapt: ")
    assert "Traceback" not in message and "\n" not in message
    return message


def labels(folder: Path, split: str = "train") -> Path:
    return folder / f"train_data/small/labels/{split}/unipc-2-nfe3"


def static(folder: Path) -> Path:
    return folder / "train_data/small/static/unipc-2-nfe3.json"


def predictor(folder: Path) -> Path:
    return folder / "train_data/small/predictors/one-shot/unipc-2-nfe3"


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_option(option: str, value: object) -> Config:
    config = Config()
    *groups, name = option.split(".")
    place = config
    for group in groups:
        place = getattr(place, group)
    setattr(place, name, [value] if option == "nfe" else value)
    return config


def test_the_default_options_are_valid() -> None:
    Config().validate()


@pytest.mark.parametrize("option", LIMITS)
def test_every_number_is_bounded(option: str) -> None:
    low, high = LIMITS[option]
    for value in (low - 1, float("nan"), None, *([] if high == float("inf") else [high * 2 + 1])):
        with pytest.raises(TsAdaptError, match=f"option {option} is {value}; give "):
            with_option(option, value).validate()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "../../esc"),
        ("name", ".."),
        ("name", ""),
        ("name", "a/b"),
        ("name", "/abs"),
        ("name", None),
        ("solvers", []),
        ("solvers", ["ddim", "ddim"]),
        ("teacher", None),
        ("train.width", 12),
        ("train.width", 5),
    ],
)
def test_names_lists_and_groups_are_checked(option: str, value: object) -> None:
    with pytest.raises(TsAdaptError, match=f"option {option} "):
        with_option(option, value).validate()


def test_an_empty_or_repeating_nfe_is_refused() -> None:
    for values in ([], [3, 3]):
        with pytest.raises(TsAdaptError, match="option nfe "):
            Config(nfe=values).validate()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["search", "--nfe", "[4]", "--static.batch_size", "0"], "static.batch_size is 0; give at least 1"),
        (["sample", "--label", "cat"], "label"),
        (["sample", "--label", "3"], "has no classes"),
        (["sample", "--steps", "0"], "at least 1"),
        (["sample", "--steps", "-1"], "at least 1"),
        (["sample", "--solver", "foo"], "unknown solver"),
        (["sample", "--count", "100000000000000000000"], "at most"),
        (["sample", "--seed", "-1"], "seed is -1"),
        (["sample", "--nfe", "[]"], "option nfe is []"),
        (["evaluate", "--solvers", "[]"], "option solvers is []"),
        (["evaluate", "--evaluate.samples", "5"], "below the 10 samples of the oracle"),
        (["search", "--nfe", "[100000]"], "at most 10000"),
        (["search", "--method", "per-sample", "--split", "foo"], "known: train, test"),
        (["search", "--guidance", "2"], "leave guidance at 1"),
        (["search", "--model.prediction", "foo"], "leave it out"),
        (["sample", "--out", "/proc/x"], "/proc/x"),
        (["sample", "--out", "/dev/full"], "/dev/full"),
        (["search", "--nfe", "[4]", "--log_root", "/proc/x"], "/proc/x"),
        ([*LABEL, "--per_sample.lr", "0.2"], "another options.lr (0.1, now 0.2)"),
    ],
)
def test_bad_options_are_one_sentence(finished: Path, capsys, arguments, expected) -> None:
    assert expected in refused(finished, capsys, *arguments)


@pytest.mark.parametrize("storage", ["foo", "sqlite:////nope/a/b.db", "mysql://x/y", "junk"])
def test_a_storage_that_cannot_be_used_is_named(job: Path, capsys, storage: str) -> None:
    static(job).unlink()
    flags = ["--blackbox.storage", storage]
    if storage == "junk":
        flags = []
        (job / "train_data/small/blackbox").mkdir()
        (job / "train_data/small/blackbox/optuna.db").write_bytes(b"junk" * 500)
    assert "cannot be used" in refused(job, capsys, "search", "--method", "blackbox", *flags)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe\x00\x01", "is no YAML text"),
        (b"", "is empty"),
        (b"- a", "holds a list"),
        (b"name: null", "option name is None"),
        (b"teacher: 5", "teacher"),
        (b"teacher: null", "teacher"),
        (b"a: [", "is no YAML text"),
        (b"[" * 20_000, "nested too deeply"),
    ],
)
def test_bad_config_files_say_what_to_do(tmp_path: Path, capsys, content: bytes, expected: str) -> None:
    (tmp_path / "bad.yml").write_bytes(content)
    assert main(["teach", "--config", str(tmp_path / "bad.yml"), "--data_root", str(tmp_path / "data")]) == 2
    assert expected in sentence(capsys)
    assert not (tmp_path / "data").exists()


def test_a_refused_command_leaves_nothing_behind(job: Path, capsys) -> None:
    refused(job, capsys, "teach", "--name", "new", "--teacher.batch_size", "0")
    assert not (job / "train_data/new").exists()
    shutil.rmtree(labels(job))
    refused(job, capsys, *LABEL, "--label_batch", "-1")
    refused(job, capsys, *LABEL, "--label_samples", "0")
    assert not labels(job).exists()


def test_a_failure_before_anything_is_finished_does_not_bind_the_options(job: Path, monkeypatch) -> None:
    shutil.rmtree(labels(job))

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("ts_adapt.jobs.learning.search_per_sample", fail)
        patch.setattr("ts_adapt.jobs.learning.generate", lambda *_, **__: fail())
        assert run(job, *LABEL, "--label_batch", "20") == 2
        assert run(job, "teach", "--name", "new", "--teacher.batch_size", "8") == 2
    assert run(job, *LABEL) == 0
    assert run(job, "teach", "--name", "new") == 0


def test_more_labels_are_searched_and_fewer_are_used(job: Path, capsys) -> None:
    assert run(job, *LABEL, "--label_samples", "25") == 0
    assert "over 25 samples" in capsys.readouterr().out
    assert run(job, *LABEL, "--label_samples", "30") == 0
    assert "over 30 samples" in capsys.readouterr().out
    assert run(job, *LABEL, "--label_samples", "12") == 0
    assert "over 12 samples" in capsys.readouterr().out
    shutil.rmtree(predictor(job))
    assert "30 of 40" in refused(job, capsys, "train", "--label_samples", "40")


def reverse_times(tensors: dict[str, torch.Tensor]) -> None:
    tensors["times"] = tensors["times"].flip(1)


def shorten_distance(tensors: dict[str, torch.Tensor]) -> None:
    tensors["distance"] = tensors["distance"][:-1]


def drop_a_time(tensors: dict[str, torch.Tensor]) -> None:
    tensors["times"] = tensors["times"][:, [0, 1, 3]]


def spoil_a_distance(tensors: dict[str, torch.Tensor]) -> None:
    tensors["distance"][0] = torch.nan


def move_far_away(tensors: dict[str, torch.Tensor]) -> None:
    tensors["index"] = tensors["index"] + 10**9


@pytest.mark.parametrize("damage", [reverse_times, shorten_distance, drop_a_time, spoil_a_distance, move_far_away])
def test_damaged_labels_are_refused_and_searched_anew(job: Path, capsys, damage) -> None:
    shutil.rmtree(predictor(job))
    part = labels(job) / "part-00001.safetensors"
    whole, tensors = part.read_bytes(), read_tensors(part)
    damage(tensors)
    write_tensors(part, tensors)
    assert str(labels(job)) in refused(job, capsys, "train")
    if damage is not drop_a_time:
        assert run(job, *LABEL) == 0
        assert part.read_bytes() == whole


def test_missing_copied_and_foreign_parts_are_refused(job: Path, capsys) -> None:
    shutil.rmtree(predictor(job))
    first, second = labels(job) / "part-00000.safetensors", labels(job) / "part-00001.safetensors"
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert "labelled already" in refused(job, capsys, "train")
    second.write_bytes(kept)
    whole = first.read_bytes()
    first.unlink()
    assert "part-00000.safetensors is missing" in refused(job, capsys, "train")
    first.write_bytes((labels(job, "test") / first.name).read_bytes())
    assert "50000" in refused(job, capsys, "train")
    first.write_bytes(whole)
    assert run(job, "train") == 0


@pytest.mark.parametrize("content", ["[]", "null"])
def test_labels_json_of_another_kind_is_refused(job: Path, capsys, content: str) -> None:
    (labels(job) / "labels.json").write_text(content)
    assert "labels.json" in refused(job, capsys, *LABEL)


def test_schedules_of_another_solver_nfe_or_length_are_refused(job: Path, capsys) -> None:
    path = static(job)
    whole, times = path.read_text(), json.loads(path.read_text())["times"]
    assert "leave --solver and --steps out" in refused(job, capsys, "sample", "--schedule", str(path), "--steps", "4")
    assert "for unipc-2" in refused(job, capsys, "sample", "--schedule", str(path), "--solver", "heun")
    for change in (
        {"times": [times[0], *times[2:]]},
        {"nfe": 4},
        {"solver": "ddim"},
        {"times": [10**400, *times[1:]]},
        {"times": [times, times]},
    ):
        path.write_text(whole)
        edit(path, **change)
        for command in ("evaluate", "search"):
            assert path.name in refused(job, capsys, command)
    path.write_text(whole.replace('"nfe": 3', '"nfe": 1e999'))
    assert path.name in refused(job, capsys, "evaluate")
    path.unlink()
    path.mkdir()
    assert path.name in refused(job, capsys, "search")


def test_predictors_that_are_damaged_or_of_another_nfe_are_refused(job: Path, capsys) -> None:
    folder = predictor(job)
    config = folder / "config.json"
    whole = config.read_text()
    network = json.loads(whole)["network"]
    for change in (
        {"network": {**network, "width": 0}},
        {"network": {**network, "width": 400_000_000}},
        {"network": {**network, "classes": 10**9}},
        {"network": {**network, "shape": [3, 2, 2]}},
        {"kind": []},
        {"kind": "recursive"},
        {"nfe": 4},
    ):
        config.write_text(whole)
        edit(config, **change)
        for command in ("train", "evaluate"):
            assert str(folder) in refused(job, capsys, command)
    config.write_text("{")
    assert str(folder) in refused(job, capsys, "train")


def test_damaged_manifests_are_refused(job: Path, capsys) -> None:
    path = job / "train_data/small/teacher/train/manifest.json"
    manifest = json.loads(path.read_text())
    config = {**manifest["config"], "shard_size": 0}
    shards = {name: {**shard, "samples": 10**23} for name, shard in manifest["shards"].items()}
    for content in (
        "[" * 100_000,
        json.dumps({**manifest, "config": config, "hash": sha256_of_json(config)}),
        json.dumps({**manifest, "shards": shards}),
    ):
        path.write_text(content)
        assert "manifest.json" in refused(job, capsys, "search", "--nfe", "[4]")


@pytest.mark.parametrize("key", ["fingerprint", "distance", "pictures"])
def test_a_damaged_run_is_measured_anew(job: Path, key: str) -> None:
    path = job / "logs/small/runs/unipc-2-nfe3-static.safetensors"
    whole = read_tensors(path)
    damaged = {**whole, "pictures": torch.zeros(3)} if key == "pictures" else {k: whole[k] for k in whole if k != key}
    write_tensors(path, damaged)
    assert run(job, "evaluate") == 0
    assert torch.equal(read_tensors(path)[key], whole[key])


def test_files_that_are_no_images_are_named(job: Path, capsys) -> None:
    images = job / "images"
    images.mkdir()
    (images / "a.png").write_text("no image")
    assert "a.png is no image" in refused(job, capsys, "evaluate", "--images", str(images))
    (images / "a.png").unlink()
    (images / "a.png").mkdir()
    assert "a.png is no image" in refused(job, capsys, "evaluate", "--images", str(images))
    (images / "a.png").rmdir()
    Image.new("L", (5, 7)).save(images / "a.png")
    Image.new("L", (5, 7)).save(images / "b.png")
    assert "another size" in refused(job, capsys, "evaluate", "--images", str(images))
    Image.new("L", (6, 7)).save(images / "c.png")
    assert "several sizes" in refused(job, capsys, "evaluate", "--images", str(images))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "/a/b"), "/a/b: No space left"),
        (MemoryError(), "the memory does not suffice"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "the memory does not suffice"),
        (RecursionError(), "nested too deeply"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(finished: Path, capsys, monkeypatch, error, expected) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ts_adapt.jobs.learning.teach", fail)
    assert expected in refused(finished, capsys, "teach")


def test_a_fault_of_the_program_is_not_hidden(finished: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("ts_adapt.jobs.learning.teach", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        run(finished, "teach")


def test_an_interrupt_during_the_imports_is_one_sentence(finished: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("ts_adapt.cli.build_parser", lambda: signal.raise_signal(signal.SIGINT))
    assert run(finished, "teach") == 130
    assert "goes on from here" in sentence(capsys)
