"""What `make fresh` says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

import fresh

PIP, OTHER = "pip\t'pip install torch'\tpypi.org\n", "refused\t'ts-adapt demo'\thuggingface.co\n"


@pytest.mark.parametrize(
    ("tries", "failed", "well"), [(PIP, [], True), (PIP, ["demo"], False), (PIP + OTHER, [], False)]
)
def test_all_went_well_only_where_nothing_failed_and_pip_alone_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tries: str, failed: list[str], well: bool
) -> None:
    (tmp_path / "tries").write_text(tries)
    assert fresh.report(tmp_path, "", failed) is well
    assert ("all went well" in capsys.readouterr().out) is well


def test_files_are_told_with_their_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tries").touch()
    (tmp_path / "home" / ".cache").mkdir(parents=True)
    (tmp_path / "home" / ".cache" / "kept").write_bytes(bytes(1500))
    (tmp_path / "b-2-py3-none-any.whl").write_bytes(bytes(2_500_000))
    log = (
        "2026-01-01T00:00:00,000   Downloading a-1-py3-none-any.whl (61 kB)\n"
        f"2026-01-01T00:00:00,000 Processing {tmp_path}/b-2-py3-none-any.whl (from x)\n"
    )
    assert fresh.report(tmp_path, log, [])
    told = capsys.readouterr().out
    for line in ("a-1-py3-none-any.whl (61 kB)", "b-2-py3-none-any.whl (2.5 MB)", ".cache/kept (1.5 kB)"):
        assert line in told
