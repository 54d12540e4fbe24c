"""The Python of docs/ runs as it stands, a page from top to bottom, and the commands are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ts_adapt.cli import build_parser

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        before = names.pop("images", None)
        exec(block, names)
        images = names.get("images")
        if "images =" in block:
            assert isinstance(images, list) and len({image.tobytes() for image in images}) == len(images) > 1
        else:
            names["images"] = before


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    for line in re.findall(r"^    ts-adapt (.*)$", page.read_text(), re.MULTILINE):
        words = shlex.split(line.split("#")[0])
        assert build_parser().parse_args(words).subcommand == words[0]
