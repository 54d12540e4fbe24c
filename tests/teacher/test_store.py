"""TeacherStore: what is kept, what is refused, what survives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from small_teacher import SHAPE, TIMES, content, gaussian, make
from ts_adapt.errors import TsAdaptError
from ts_adapt.noise import ContinuousVP
from ts_adapt.sampling import initial_noise
from ts_adapt.storage import files
from ts_adapt.teacher.generate import ClassLabels
from ts_adapt.teacher.store import TEST_END, TEST_START, TRAIN_START, TeacherStore, indices_of, place_of


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))


def test_more_samples_go_on_and_fewer_change_nothing(tmp_path: Path) -> None:
    make(tmp_path / "once", 11)
    make(tmp_path / "grown", 6)
    hash_before = make(tmp_path / "grown", 11).hash
    assert content(tmp_path / "grown") == content(tmp_path / "once")
    assert make(tmp_path / "grown", 3).indices == list(range(11))
    assert make(tmp_path / "grown", 11).hash == hash_before


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "empty"])
def test_a_damaged_shard_is_named_the_rest_stays_and_generate_repairs(tmp_path: Path, harm: str) -> None:
    make(tmp_path, 10)
    before, shard = content(tmp_path), tmp_path / "shard-00001.safetensors"
    if harm == "truncate":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif harm == "flip":
        flip_a_bit(shard)
    elif harm == "remove":
        shard.unlink()
    else:
        shard.write_bytes(b"")
    store = TeacherStore.open(tmp_path)
    assert store.verify() == [shard.name] and store.indices == [0, 1, 2, 3, 8, 9]
    with pytest.raises(TsAdaptError, match=r"shard-00001.safetensors .*samples 4 to 7"):
        store.load([0, 5])
    assert store.load([0, 9])["index"].tolist() == [0, 9]
    denoiser = gaussian()
    assert make(tmp_path, 10, denoiser=denoiser).verify() == [] and denoiser.evaluations == 2 * 5
    assert content(tmp_path) == before


def test_damage_is_seen_by_a_store_that_is_open(tmp_path: Path) -> None:
    store = make(tmp_path, 10)
    assert store.verify() == []
    flip_a_bit(tmp_path / "shard-00000.safetensors")
    os.utime(tmp_path / "shard-00000.safetensors", (1, 1))
    assert store.verify() == ["shard-00000.safetensors"]


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("seed", {"seed": 8}), ("times", {"grid": TIMES**2}), ("steps", {"grid": TIMES[1:]}),
        ("weights", {"denoiser": gaussian(mean=0.4)}),
        ("shard_size", {"shard_size": 5}), ("batch_size", {"batch_size": 2}), ("trajectory", {"trajectory": True}),
        ("first", {"first": 1}), ("model", {"model": "other"}), ("dtype", {"dtype": "bfloat16"}),
        ("noise", {"denoiser": gaussian(ContinuousVP(beta_1=19.0))}), ("guidance", {"guidance": 2.0}),
        ("condition", {"condition": ClassLabels(10)}),
    ],
)  # fmt: skip
def test_another_config_is_refused_by_name_and_has_another_hash(
    tmp_path: Path, key: str, changed: dict[str, Any]
) -> None:
    store = make(tmp_path / "a", 4)
    with pytest.raises(TsAdaptError, match=f"made with {key} = .* remove the folder") as error:
        make(tmp_path / "a", 4, **changed)
    assert "\n" not in str(error.value)
    other = make(tmp_path / "b", keep=False, **changed)
    assert other.hash != store.hash
    with pytest.raises(TsAdaptError, match=key):
        TeacherStore.open(tmp_path / "a", other.config)
    assert TeacherStore.open(tmp_path / "a", store.config).indices == [0, 1, 2, 3]


def test_the_last_bit_of_a_time_is_no_other_config(tmp_path: Path) -> None:
    make(tmp_path, 4)
    assert make(tmp_path, 4, grid=TIMES * (1 + 2e-16)).indices == [0, 1, 2, 3]


def test_versions_are_recorded_but_not_hashed(tmp_path: Path) -> None:
    store = make(tmp_path, 4)
    assert store.manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    files.write_json(tmp_path / "manifest.json", manifest)
    assert TeacherStore.open(tmp_path).hash == store.hash


def test_manifests_that_are_missing_damaged_or_altered(tmp_path: Path) -> None:
    config, path = make(tmp_path, 4).config, tmp_path / "manifest.json"
    whole = path.read_text()
    for text, said in (
        (whole[:-30], "damaged"),
        (whole.replace('"seed": 7', '"seed": 8'), "altered"),
        (whole.replace("shard-00000", "../shard-00000"), "no shard"),
        (whole.replace('"version": 1', '"version": 99'), "version 1"),
        (whole.replace('"samples": 4', '"samples": "four"'), "expected int"),
    ):
        path.write_text(text)
        with pytest.raises(TsAdaptError, match=said):
            TeacherStore.open(tmp_path)
    path.unlink()
    with pytest.raises(TsAdaptError, match="no teacher in"):
        TeacherStore.open(tmp_path)
    with pytest.raises(TsAdaptError, match=r"no manifest\.json"):
        TeacherStore.create(tmp_path, config)
    with pytest.raises(TsAdaptError, match="no 'weights'"):
        TeacherStore.create(tmp_path / "new", {k: v for k, v in config.items() if k != "weights"})
    with pytest.raises(TsAdaptError, match="at least 1"):
        TeacherStore.create(tmp_path / "new", config | {"shard_size": 0})
    for scale in (0.0, -1.0, 1e308):
        with pytest.raises(TsAdaptError, match="noise_scale is"):
            TeacherStore.create(tmp_path / "new", config | {"noise_scale": scale})
    for shape in ([1, 4.5], [0, 4], [2**20, 2**20], ["4"]):
        with pytest.raises(TsAdaptError, match=r"shape is .* expected sizes"):
            TeacherStore.create(tmp_path / "new", config | {"shape": shape})


def test_shards_of_several_teachers_are_not_mixed(tmp_path: Path) -> None:
    store = make(tmp_path, 8)
    path = tmp_path / "shard-00001.safetensors"
    checksum = files.write_tensors(path, {**files.read_tensors(path), "class_labels": torch.arange(4)})
    store.manifest["shards"][path.name]["sha256"] = checksum
    assert store.load([0, 1])["index"].tolist() == [0, 1] and store.load([5])["class_labels"].tolist() == [1]
    with pytest.raises(TsAdaptError, match="of several teachers"):
        store.load([0, 5])


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "whole", 10)
    temporary = files._temporary

    def full(path: Path) -> Path:
        if path.name != "shard-00001.safetensors":
            return temporary(path)
        link = path.with_name(".full.tmp")
        link.symlink_to("/dev/full")
        return link

    with monkeypatch.context() as patch:
        patch.setattr(files, "_temporary", full)
        with pytest.raises(TsAdaptError, match="disk is full"):
            make(tmp_path / "short", 10)
    assert TeacherStore.open(tmp_path / "short").indices == [0, 1, 2, 3]
    make(tmp_path / "short", 10)
    assert content(tmp_path / "short") == content(tmp_path / "whole")


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    store = make(tmp_path, 4)
    with store.writing(), pytest.raises(TsAdaptError, match=f"in use by another process .process {os.getpid()}"):
        make(tmp_path, 10)
    assert len(make(tmp_path, 10).indices) == 10


def test_training_never_reaches_the_noises_of_the_test(tmp_path: Path) -> None:
    """However many of either there are."""
    last, behind = range(TEST_START - 2, TEST_START), range(TEST_END, TEST_END + 5)
    store = make(tmp_path / "train", 7, first=TEST_START - 2)
    assert store.indices == [*last, *behind] and store.range_of(0, 7) == [*last, *behind[:2]]
    found = store.load([TEST_END, TEST_START - 1, TEST_END + 4])
    assert found["index"].tolist() == [TEST_END, TEST_START - 1, TEST_END + 4]
    assert torch.equal(found["x_T"], initial_noise(7, found["index"], SHAPE))
    for index in (TEST_START - 4, TEST_START, TEST_START + 5, TEST_END - 1, TEST_END + 5):
        with pytest.raises(TsAdaptError, match=f"sample {index} is not in"):
            store.load([index])
    assert make(tmp_path / "test", 5, first=TEST_START).indices == list(range(TEST_START, TEST_START + 5))
    with pytest.raises(TsAdaptError, match="at most 4 can be had"):
        make(tmp_path / "beyond", 5, first=TEST_END - 4)
    assert indices_of(TRAIN_START, range(TEST_START)) == list(range(TEST_START))


@given(st.integers(0, 300_000), st.integers(0, TEST_END - TEST_START - 1))
def test_no_index_is_of_both_and_places_are_found_again(train: int, test: int) -> None:
    (of_train,), (of_test,) = indices_of(TRAIN_START, [train]), indices_of(TEST_START, [test])
    assert of_train != of_test
    assert place_of(TRAIN_START, of_train) == train and place_of(TEST_START, of_test) == test
    assert place_of(TRAIN_START, of_test) < 0
