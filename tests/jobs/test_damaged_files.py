"""Files that are damaged, missing, copied or of others: one sentence that names them, or they are made anew."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from small_job import Job, edit


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


def test_schedules_of_another_solver_nfe_or_length_are_refused(job: Job, capsys) -> None:
    path = job.static
    whole, times = path.read_text(), json.loads(path.read_text())["times"]
    assert "for unipc-2" in job.refused(capsys, "sample", "--schedule", str(path), "--solver", "heun")
    for change in ({"times": [times[0], *times[2:]]}, {"nfe": 4}, {"solver": "ddim"}):
        path.write_text(whole)
        edit(path, **change)
        for command in ("evaluate", "search"):
            assert path.name in job.refused(capsys, command)
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
        {"network": {**network, "shape": [3, 2, 2]}},
        {"kind": []},
        {"kind": "one-shot"},
        {"nfe": 4},
    ):
        config.write_text(whole)
        edit(config, **change)
        for command in ("train", "evaluate"):
            assert str(folder) in job.refused(capsys, command)
    config.write_text("{")
    assert str(folder) in job.refused(capsys, "train")


def test_files_that_are_no_images_are_named(job: Job, capsys) -> None:
    images = job.folder / "images"
    images.mkdir()
    two = [images / "a.png", images / "b.png"]
    for path in two:
        path.write_text("no image")
    assert "a.png cannot be read as an image" in job.refused(capsys, "evaluate", "--images", str(images))
    for path in two:
        path.unlink()
        path.mkdir()
    assert "holds no images" in job.refused(capsys, "evaluate", "--images", str(images))
    for path in two:
        path.rmdir()
        Image.new("L", (5, 7)).save(path)
    expected = f"{images / 'a.png'} is of (1, 7, 5), the model's samples are of (1, 4, 4); resize the images"
    assert expected in job.refused(capsys, "evaluate", "--images", str(images))


@pytest.mark.parametrize("option", ["--images", "--evaluate.reference"])
def test_a_set_of_one_image_is_no_set(job: Job, capsys, option: str) -> None:
    images = job.folder / "images"
    images.mkdir()
    Image.new("L", (4, 4)).save(images / "only.png")
    assert "holds one image, only.png" in job.refused(capsys, "evaluate", option, str(images))
