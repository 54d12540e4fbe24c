"""Where results are to be kept is known to be possible before any work, of all commands alike."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from small_job import Job, sentence
from ts_adapt.cli import main
from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.files import check_place


@pytest.mark.parametrize("command", ["learn", "teach", "search", "train", "quantize", "evaluate", "prune", "sample"])
@pytest.mark.parametrize("root", ["data_root", "log_root"])
def test_a_file_for_a_folder_is_noticed_before_any_work(tmp_path: Path, capsys, command: str, root: str) -> None:
    job = Job.begun(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for place in ("file", "file/deeper", "link"):
        if (command, root) in (("evaluate", "data_root"), ("sample", "data_root")):  # which they read
            continue
        said = job.refused(capsys, command, f"--{root}", str(tmp_path / place))
        assert "has to be in a folder, and" in said and str(tmp_path / place.partition("/")[0]) in said
    assert (tmp_path / "file").read_text() == "mine"
    assert not job.data.exists() and not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("words", "out", "said"),
    [
        (("sample", "--schedule", "karras"), "file", "has to be a folder"),
        (("sample", "--schedule", "karras"), "file/a", "in a folder, and"),
        (("export", "karras", "--format", "sigmas"), "folder", "is a folder; name a file to write"),
        (("export", "karras", "--format", "sigmas"), "file/a", "in a folder, and"),
        (("export", "karras", "--format", "sigmas"), "pipe", "is a device or a pipe"),
        (("export", "static", "--format", "diffusers"), "file", "has to be a folder"),
        (("import", "LIST", "--format", "sigmas"), "folder", "is a folder; name a file to write"),
        (("prune", "--model.name", "fashion-ddpm"), "folder", "is a folder; name a file to write"),
    ],
)
def test_an_out_that_cannot_be_written_is_noticed_before_any_work(
    tmp_path: Path, capsys, monkeypatch, words: tuple[str, ...], out: str, said: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("ts_adapt.jobs.experiment.build_denoiser", lambda *_: pytest.fail("the model was loaded"))
    assert main([*words, "--out", str(tmp_path / out), "--quiet"]) == 2
    assert said in sentence(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path)
    for place, folder in (("b/c/d", True), ("", True), ("link/e", True), ("a.json", False), ("b/c.json", False)):
        check_place(tmp_path / place, folder=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link"]
    with pytest.raises(TsAdaptError, match="/proc/x could not be written"):
        check_place(Path("/proc/x"), folder=True)
    for folder in (True, False):
        with pytest.raises(TsAdaptError, match=r"could not be written \(File name too long"):
            check_place(tmp_path / ("a" * 300), folder=folder)
