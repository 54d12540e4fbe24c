"""Shards of processes that leave receipts: entered in the manifest by the first one, whoever was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ts_adapt import distributed
from ts_adapt.denoisers.analytic import GaussianDenoiser
from ts_adapt.noise import ContinuousVP
from ts_adapt.solvers import DDIM
from ts_adapt.teacher.generate import generate, teacher_config
from ts_adapt.teacher.store import TeacherStore

TIMES = torch.linspace(1, 1e-3, 5, dtype=torch.float64)


def store_in(folder: Path, samples: int = 0) -> TeacherStore:
    """Shards of 2 samples, of which `samples` are generated."""
    noise = ContinuousVP()
    denoiser = GaussianDenoiser(noise, 0.3, 0.25, (1, 4, 4))
    config = teacher_config(
        denoiser, "ddim", TIMES, model="g", seed=1, first=0, shape=(1, 4, 4), shard_size=2, batch_size=2
    )
    store = TeacherStore.create(folder, config)
    if samples:
        generate(denoiser, DDIM(noise), TIMES, store, samples=samples, batch_size=2, progress=False)
    return store


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
