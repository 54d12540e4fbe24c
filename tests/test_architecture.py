"""The house: imports point downwards only, diffusers stays behind its doors, modules stay short."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ts_adapt"
ORDER = [
    {"__init__", "__main__"},
    {"cli"},
    {"flags"},
    {"parsing"},
    {"jobs"},
    {"config"},
    {"limits"},
    {"evaluation"},
    {"schedulers"},
    {"predictors"},
    {"search"},
    {"teacher"},
    {"assembly"},
    {"cachers", "quantizers", "pruning"},
    {"schedule_formats"},
    {"schedule_file", "plots"},
    {"distances"},
    {"sampling"},
    {"policies"},
    {"grids"},
    {"solvers"},
    {"denoisers"},
    {"zoo"},
    {"noise"},
    {"parameterization", "prompts"},
    {"folders"},
    {"numerics", "files", "distributed"},
    {"interfaces"},
    {"_compat", "_version"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MAY_IMPORT_DIFFUSERS = {"denoisers", "schedulers", "cachers", "quantizers"}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imports(module: Path) -> Iterator[tuple[str, ...]]:
    """The dotted names that `module` imports, wherever in it, relative ones resolved."""
    here = ("ts_adapt", *module.parts[:-1])
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


def rooms_imported(module: Path) -> set[str]:
    """The rooms that `module` uses; a name that is no module comes from the package's own `__init__`."""
    ours = [name[1] for name in imports(module) if name[0] == "ts_adapt" and len(name) > 1]
    exists = {room_of(other) for other in MODULES} | set(LEVEL)
    bare = {"__init__"} if ("ts_adapt",) in imports(module) else set()
    return {name if name in exists else "__init__" for name in ours} | bare


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_downwards_only(module: Path) -> None:
    room = room_of(module)
    assert room in LEVEL, f"{module} is in no room of the plan"
    wrong = {used for used in rooms_imported(module) if used != room and LEVEL.get(used, -1) <= LEVEL[room]}
    assert not wrong, f"{module} imports {sorted(wrong)}, above or beside it"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_the_rooms_that_may_import_diffusers(module: Path) -> None:
    if room_of(module) not in MAY_IMPORT_DIFFUSERS:
        assert "diffusers" not in {name[0] for name in imports(module)}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules_are_short(module: Path) -> None:
    assert len((PACKAGE / module).read_text().splitlines()) <= 350


def test_interfaces_import_torch_only() -> None:
    assert {name[0] for name in imports(Path("interfaces.py"))} - set(sys.stdlib_module_names) == {"torch"}


def test_the_walk_sees_relative_and_nested_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "solvers").mkdir()
    (tmp_path / "solvers" / "a.py").write_text("from . import b\ndef f():\n    from ..grids.fixed import make\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert rooms_imported(Path("solvers/a.py")) == {"solvers", "grids"}
