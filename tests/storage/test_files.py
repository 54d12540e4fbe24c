"""files: whole or absent, checked when read, one sentence when something is wrong."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage import files

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2])}


def one_sentence(error: pytest.ExceptionInfo[TsAdaptError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_what_is_written_is_read_and_folders_are_made(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "a" / "b" / "c.bin", b"abc")
    files.write_json(tmp_path / "v.json", {"ü": [1, 2.5, None]})
    checksum = files.write_tensors(tmp_path / "t.safetensors", TENSORS)
    assert files.read_bytes(tmp_path / "a" / "b" / "c.bin") == b"abc"
    assert files.read_json(tmp_path / "v.json", {"ü": list}) == {"ü": [1, 2.5, None]}
    read = files.read_tensors(tmp_path / "t.safetensors", {"b": (2, None)}, sha256=checksum)
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert checksum == files.sha256_of_file(tmp_path / "t.safetensors")
    assert checksum == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "t.safetensors", "v.json"]


def test_tensors_that_are_views_are_written_as_they_look(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "t.safetensors", {"x": TENSORS["b"].t(), "y": TENSORS["b"][:, 1]})
    read = files.read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(read["x"], TENSORS["b"].t()) and torch.equal(read["y"], TENSORS["b"][:, 1])


def test_sums_depend_on_content_only() -> None:
    assert files.sha256_of_json({"a": 1, "b": 2}) == files.sha256_of_json({"b": 2, "a": 1})
    same = files.sha256_of_tensors(dict(reversed(TENSORS.items())))
    assert files.sha256_of_tensors(TENSORS) == same
    for other in ({**TENSORS, "a": torch.tensor([1, 3])}, {**TENSORS, "a": torch.tensor([1, 2], dtype=torch.int32)},
                  {**TENSORS, "b": TENSORS["b"].reshape(3, 2)}, {"c": TENSORS["a"], "b": TENSORS["b"]}):  # fmt: skip
        assert files.sha256_of_tensors(other) != same
    assert files.sha256_of_tensors({"x": torch.ones(2, dtype=torch.bfloat16), "y": torch.tensor(1.0)})


def test_a_real_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, full = tmp_path / "t.safetensors", tmp_path / ".full.tmp"
    files.write_tensors(target, TENSORS)
    before = target.read_bytes()
    full.symlink_to("/dev/full")
    monkeypatch.setattr(files, "_temporary", lambda path: full)
    with pytest.raises(TsAdaptError, match="disk is full") as error:
        files.write_tensors(target, {"a": torch.zeros(100_000)})
    assert str(target) in one_sentence(error)
    assert target.read_bytes() == before and not full.is_symlink() and Path("/dev/full").exists()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "cannot be written"),
        (errno.EACCES, "permissions"),
        (errno.EDQUOT, "full"),
        (errno.EIO, "could not"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_errors_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str, call: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TsAdaptError, match=said) as error:
        files.write_json(tmp_path / "v.json", 1)
    one_sentence(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TsAdaptError, match="permissions"):
        files.write_json(tmp_path / "v.json", 1)


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(TsAdaptError, match="could not be written"):
        files.write_json(tmp_path / "plain" / "v.json", 1)


@pytest.mark.parametrize("read", [files.read_json, files.read_tensors, files.read_bytes, files.sha256_of_file])
def test_missing(tmp_path: Path, read) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TsAdaptError, match="there is no file"):
        read(tmp_path / "absent")


def test_json_that_is_damaged_or_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    for content in (b'{"a": 1', b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(TsAdaptError, match="damaged"):
            files.read_json(path)
    path.write_text('{"a": 1, "flag": true}')
    assert files.read_json(path, {"a": (int, str), "flag": bool})
    for schema, said in (({"b": int}, "no 'b'"), ({"a": str}, "expected str"), ({"flag": int}, "is a bool")):
        with pytest.raises(TsAdaptError, match=said):
            files.read_json(path, schema)
    path.write_text("[]")
    with pytest.raises(TsAdaptError, match="expected an object"):
        files.read_json(path, {"a": int})


def test_tensors_that_are_damaged_or_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    checksum = files.write_tensors(path, TENSORS)
    for shapes, said in (({"c": (1,)}, "no tensor 'c'"), ({"a": (3,)}, "has shape"), ({"b": (2,)}, "has shape")):
        with pytest.raises(TsAdaptError, match=said):
            files.read_tensors(path, shapes)
    whole = path.read_bytes()
    for size in (0, 3, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TsAdaptError, match="truncated"):
            files.read_tensors(path)
    path.write_bytes(whole)
    assert files.read_tensors(path, sha256=checksum)


def test_no_bit_of_a_tensor_changes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    files.write_tensors(path, TENSORS)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 4, 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                read = files.read_tensors(path)
            except TsAdaptError as error:
                assert str(path) in str(error)
            else:
                assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in read)


def test_tensors_that_carry_no_sum_are_read_and_a_recorded_one_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    assert torch.equal(files.read_tensors(path)["a"], TENSORS["a"])
    with pytest.raises(TsAdaptError, match="its sha256 is not the one recorded"):
        files.read_tensors(path, sha256="0" * 64)
