"""The pages hold what they say: Python runs as it stands, configs and commands are understood, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ts_adapt.cli import parse

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
LINKED = [README, ROOT / "CONTRIBUTING.md", *PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def name_of(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page from top to bottom."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        before = names.pop("images", None)
        exec(block, names)
        images = names.get("images")
        if "images =" in block:
            assert isinstance(images, list) and len({image.tobytes() for image in images}) == len(images) > 1
        else:
            names["images"] = before


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_configs_and_commands_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each YAML block is the file that its first line names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in blocks(page, "yaml"):
        named = re.match(r"# ([\w-]+\.yml)\n", block)
        assert named
        (tmp_path / named[1]).write_text(block)
        assert parse(["teach", "--config", named[1]]).config.name == Path(named[1]).stem
    for line in re.findall(r"^    ts-adapt (.*)$", page.read_text(), re.MULTILINE):
        words = shlex.split(line, comments=True)
        assert parse(words).name == words[0]


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", text):
        file, _, heading = target.partition("#")
        assert (page.parent / file).exists() if file else heading in headings, target
