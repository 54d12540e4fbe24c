"""The notebooks run from top to bottom, with the numbers of their first cell made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
SMALL: dict[str, dict[str, Any]] = {
    "first-schedule": {"NFE": 2, "NOISES": 2, "ITERATIONS": 1, "TEACHER_STEPS": 3, "IMAGES": 2},
    "reading-an-evaluation": {"TRAIN": 40, "TEST": 20, "EPOCHS": 1, "ITERATIONS": 2},
}
"""Of each notebook, what its first cell is given in place of its own numbers."""


def cells_of(name: str) -> list[dict[str, Any]]:
    found = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_and_is_kept_without_outputs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    first, *rest = cells_of(name)
    exec("".join(first["source"]), names)
    assert SMALL[name].keys() <= names.keys()
    names |= SMALL[name]
    for cell in rest:
        exec("".join(cell["source"]), names)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in (first, *rest))
    said = capsys.readouterr()
    assert "Error" not in said.err
    if name == "first-schedule":
        assert len(names["images"]) == 2 and names["learned"].nfe == 2
        assert [side.name for side in names["found"].sides][-1] == "learned"
    else:
        assert {"static", "recursive"} <= names["rows"].keys() and "report.html" in said.out
