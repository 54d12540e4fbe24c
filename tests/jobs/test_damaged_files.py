"""Files that are damaged, missing, copied or of others: one sentence that names them, or they are made anew."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from small_job import LABEL, Job, edit

from ts_adapt.files import read_tensors, sha256_of_json, write_tensors


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
def test_damaged_labels_are_refused_and_searched_anew(job: Job, capsys, damage) -> None:
    shutil.rmtree(job.predictor)
    part = job.labels() / "part-00001.safetensors"
    whole, tensors = part.read_bytes(), read_tensors(part)
    damage(tensors)
    write_tensors(part, tensors)
    assert str(job.labels()) in job.refused(capsys, "train")
    if damage is not drop_a_time:
        assert job.run(*LABEL) == 0
        assert part.read_bytes() == whole


def test_missing_copied_and_foreign_parts_are_refused(job: Job, capsys) -> None:
    shutil.rmtree(job.predictor)
    first, second = job.labels() / "part-00000.safetensors", job.labels() / "part-00001.safetensors"
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert "labelled already" in job.refused(capsys, "train")
    second.write_bytes(kept)
    whole = first.read_bytes()
    first.unlink()
    assert "part-00000.safetensors is missing" in job.refused(capsys, "train")
    first.write_bytes((job.labels("test") / first.name).read_bytes())
    assert "50000" in job.refused(capsys, "train")
    first.write_bytes(whole)
    assert job.run("train") == 0


@pytest.mark.parametrize("content", ["[]", "null"])
def test_labels_json_of_another_kind_is_refused(job: Job, capsys, content: str) -> None:
    (job.labels() / "labels.json").write_text(content)
    assert "labels.json" in job.refused(capsys, *LABEL)


def test_schedules_of_another_solver_nfe_or_length_are_refused(job: Job, capsys) -> None:
    path = job.static
    whole, times = path.read_text(), json.loads(path.read_text())["times"]
    assert "leave --solver and --steps out" in job.refused(capsys, "sample", "--schedule", str(path), "--steps", "4")
    assert "for unipc-2" in job.refused(capsys, "sample", "--schedule", str(path), "--solver", "heun")
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
            assert path.name in job.refused(capsys, command)
    path.write_text(whole.replace('"nfe": 3', '"nfe": 1e999'))
    assert path.name in job.refused(capsys, "evaluate")
    path.unlink()
    path.mkdir()
    assert path.name in job.refused(capsys, "search")


def test_predictors_that_are_damaged_or_of_another_nfe_are_refused(job: Job, capsys) -> None:
    folder = job.predictor
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
            assert str(folder) in job.refused(capsys, command)
    config.write_text("{")
    assert str(folder) in job.refused(capsys, "train")


def test_damaged_manifests_are_refused(job: Job, capsys) -> None:
    path = job.folder / "train_data/small/teacher/train/manifest.json"
    manifest = json.loads(path.read_text())
    config = {**manifest["config"], "shard_size": 0}
    shards = {name: {**shard, "samples": 10**23} for name, shard in manifest["shards"].items()}
    for content in (
        "[" * 100_000,
        json.dumps({**manifest, "config": config, "hash": sha256_of_json(config)}),
        json.dumps({**manifest, "shards": shards}),
    ):
        path.write_text(content)
        assert "manifest.json" in job.refused(capsys, "search", "--nfe", "[4]")


@pytest.mark.parametrize("key", ["fingerprint", "distance", "pictures"])
def test_a_damaged_run_is_measured_anew(job: Job, key: str) -> None:
    path = job.folder / "logs/small/runs/unipc-2-nfe3-static.safetensors"
    whole = read_tensors(path)
    damaged = {**whole, "pictures": torch.zeros(3)} if key == "pictures" else {k: whole[k] for k in whole if k != key}
    write_tensors(path, damaged)
    assert job.run("evaluate") == 0
    assert torch.equal(read_tensors(path)[key], whole[key])


def test_files_that_are_no_images_are_named(job: Job, capsys) -> None:
    images = job.folder / "images"
    images.mkdir()
    (images / "a.png").write_text("no image")
    assert "a.png is no image" in job.refused(capsys, "evaluate", "--images", str(images))
    (images / "a.png").unlink()
    (images / "a.png").mkdir()
    assert "a.png is no image" in job.refused(capsys, "evaluate", "--images", str(images))
    (images / "a.png").rmdir()
    Image.new("L", (5, 7)).save(images / "a.png")
    expected = f"{images / 'a.png'} is of (1, 7, 5), the model's samples are of (1, 4, 4); resize the images"
    assert expected in job.refused(capsys, "evaluate", "--images", str(images))
