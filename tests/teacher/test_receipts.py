"""Shards of processes that leave receipts: entered in the manifest by the first one, whoever was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_teacher import make
from ts_adapt import distributed
from ts_adapt.teacher.store import TeacherStore


def store_in(folder: Path, samples: int = 0) -> TeacherStore:
    """Shards of 2 samples, of which `samples` are generated."""
    return make(folder, samples, keep=samples > 0, shard_size=2, batch_size=2)


def test_a_shard_with_a_receipt_is_finished_and_one_without_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store_in(tmp_path / "whole", 6)
    other = store_in(tmp_path / "other", 2)
    with monkeypatch.context() as second:
        second.setattr(distributed, "rank", lambda: 1)
        for shard in (1, 2):
            data = whole.load(whole.range_of(shard, 6))
            other.write(shard, {key: data[key] for key in ("index", "target")})
    (tmp_path / "other/shard-00002.json").write_text('{"samples": 2')
    again = TeacherStore.open(tmp_path / "other")
    assert again.indices == [0, 1], "the second process writes no manifest"
    with again.writing():
        assert again.indices == [0, 1, 2, 3]
        assert not again.finished(2, 6), "a damaged receipt is as none"
    assert not list((tmp_path / "other").glob("shard-*.json"))
    store_in(tmp_path / "other", 6)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()
    assert TeacherStore.open(tmp_path / "other").manifest == TeacherStore.open(tmp_path / "whole").manifest
