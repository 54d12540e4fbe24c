"""Files that lost their end or had a bit flipped: named, or made again the same, and the others stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_job import LABEL, Job


def spoil(path: Path, harm: str) -> None:
    data = bytearray(path.read_bytes())
    if harm == "flipped":
        data[-len(data) // 5] ^= 16
    path.write_bytes({"truncated": data[:-7], "empty": b"", "flipped": data}[harm])


DAMAGED = [
    ("teacher/train/shard-00001.safetensors", [("search", "--nfe", "[4]")], [("teach",)]),
    ("labels/train/unipc-2-nfe3/part-00001.safetensors", [("train", "--redo", "--train.lr", "1e-3")], [LABEL]),
    ("predictors/recursive/unipc-2-nfe3/model.safetensors", [("train",), ("evaluate",)], [("train", "--redo")]),
    ("../../logs/small/runs/unipc-2-nfe3-static.safetensors", [], [("evaluate",)]),
    ("../../logs/small/runs/teacher.safetensors", [], [("evaluate",)]),
]


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
@pytest.mark.parametrize(("name", "refused", "repairs"), DAMAGED, ids=[Path(name).name for name, _, _ in DAMAGED])
def test_a_damaged_file_is_named_or_made_again_and_the_others_stay(
    spoiled: Job,
    whole: Job,
    capsys,
    name: str,
    refused: list[tuple[str, ...]],
    repairs: list[tuple[str, ...]],
    harm: str,
) -> None:
    path = spoiled.data / name
    spoil(path, harm)
    before = {other: other.stat().st_mtime_ns for other in path.parent.glob("*.safetensors") if other != path}
    for command in refused:
        assert path.parent.name in spoiled.refused(capsys, *command)
    for command in repairs:
        assert spoiled.run(*command) == 0
    assert spoiled.content() == whole.content()
    if "predictors" not in name:
        assert {other: other.stat().st_mtime_ns for other in before} == before


@pytest.mark.parametrize("harm", ["truncated", "empty"])
def test_a_damaged_schedule_is_named_and_made_anew(spoiled: Job, whole: Job, capsys, harm: str) -> None:
    spoil(spoiled.static, harm)
    for command in (("search",), ("evaluate",)):
        assert spoiled.static.name in spoiled.refused(capsys, *command)
    assert spoiled.run("search", "--redo") == 0
    assert spoiled.content() == whole.content()
