"""The house: imports point downwards only and in no circle, diffusers stays behind its doors, modules can be read."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ts_adapt"
ORDER = [
    {"__init__", "__main__"},
    {"cli"},
    {"commands"},
    {"parsing"},
    {"jobs"},
    {"config"},
    {"evaluation"},
    {"pipelines"},
    {"schedulers"},
    {"schedules"},
    {"predictors"},
    {"search"},
    {"teacher"},
    {"assembly"},
    {"cachers", "quantizers", "pruning"},
    {"plots"},
    {"distances", "dual_encoders"},
    {"sampling"},
    {"policies"},
    {"grids"},
    {"solvers"},
    {"denoisers"},
    {"zoo"},
    {"noise"},
    {"parameterization", "pictures", "prompts"},
    {"storage"},
    {"numerics", "distributed", "options", "remedies"},
    {"interfaces", "errors"},
    {"_compat", "_version"},
]
IN_QUANTIZERS = [{"methods", "storage", "report"}, {"training"}, {"quantization"}, {"calibration"}, {"layers"}]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MAY_IMPORT_DIFFUSERS = {"denoisers", "schedulers", "cachers", "quantizers"}
LONGEST = 500
NAMES_FILES = {"storage", "zoo", "denoisers", "commands"}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def nodes(tree: ast.AST, *, running: bool) -> list[ast.AST]:
    """Everything in `tree`; of what is `running` alone, nothing that is under `if TYPE_CHECKING`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if not (running and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            found += [node, *nodes(node, running=running)]
    return found


@cache
def imports(module: Path, *, running: bool = False) -> set[tuple[str, ...]]:
    """The dotted names that `module` imports, wherever in it, relative ones resolved."""
    here, found = ("ts_adapt", *module.parts[:-1]), set()
    for node in nodes(ast.parse((PACKAGE / module).read_text()), running=running):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
    return found


def rooms_imported(module: Path) -> set[str]:
    """The rooms that `module` uses; a name that is no module comes from the package's own `__init__`."""
    ours = [name[1] for name in imports(module) if name[0] == "ts_adapt" and len(name) > 1]
    exists = {room_of(other) for other in MODULES} | set(LEVEL)
    bare = {"__init__"} if ("ts_adapt",) in imports(module) else set()
    return {name if name in exists else "__init__" for name in ours} | bare


def graph(modules: list[Path]) -> dict[str, set[str]]:
    """The dotted name of each module -> those of the modules that it imports when it runs, in functions too."""
    named = {".".join(("ts_adapt", *path.with_suffix("").parts)).removesuffix(".__init__"): path for path in modules}
    found: dict[str, set[str]] = {}
    for module, path in named.items():
        prefixes = ([".".join(name[:end]) for end in range(len(name), 0, -1)] for name in imports(path, running=True))
        nearest = {next((prefix for prefix in dotted if prefix in named), module) for dotted in prefixes}
        found[module] = nearest - {module}
    return found


def test_imports_run_in_no_circle() -> None:
    edges = graph(MODULES)
    assert sum(map(len, edges.values())) > len(MODULES)
    TopologicalSorter(edges).prepare()


def test_within_quantizers_imports_point_downwards_too() -> None:
    level = {name: place for place, names in enumerate(IN_QUANTIZERS) for name in names}
    for module in MODULES:
        own = module.parts[1].removesuffix(".py") if room_of(module) == "quantizers" else "__init__"
        if own != "__init__":
            used = {name[2] for name in imports(module) if name[:2] == ("ts_adapt", "quantizers")} - {own}
            assert all(level[name] > level[own] for name in used), f"{module} imports {sorted(used)}"


def test_a_circle_is_seen_through_functions_but_not_through_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("def f():\n    from ts_adapt.b import x\n")
    (tmp_path / "b.py").write_text("if TYPE_CHECKING:\n    from ts_adapt.a import f\n")
    (tmp_path / "c.py").write_text("from ts_adapt import d\n")
    (tmp_path / "d.py").write_text("def f():\n    from ts_adapt.c import x\n")
    TopologicalSorter(graph([Path("a.py"), Path("b.py")])).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter(graph([Path("c.py"), Path("d.py")])).prepare()


def test_imports_point_downwards_only() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms <= LEVEL.keys(), f"{sorted(rooms - LEVEL.keys())} are in no room of the plan"
    wrong = [
        f"{module} imports {used}"
        for module in MODULES
        for used in sorted(rooms_imported(module) - {room_of(module)})
        if LEVEL.get(used, -1) <= LEVEL[room_of(module)]
    ]
    assert not wrong, "above or beside it"


def test_only_the_rooms_that_may_import_diffusers() -> None:
    users = {room_of(module) for module in MODULES if "diffusers" in {name[0] for name in imports(module)}}
    assert users <= MAY_IMPORT_DIFFUSERS


def test_modules_can_be_read_in_one_go() -> None:
    assert not [str(module) for module in MODULES if len((PACKAGE / module).read_text().splitlines()) > LONGEST]


def test_files_of_experiments_are_named_in_the_layout_alone() -> None:
    named = re.compile(r"[\w.*{}-]*\.(json|safetensors|journal|lock|db|yml|csv|html)")
    lines = (ast.parse((PACKAGE / module).read_text()) for module in MODULES if room_of(module) not in NAMES_FILES)
    texts = [node.value for tree in lines for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    found = [text for text in texts if isinstance(text, str) and named.fullmatch(text)]
    assert len(texts) > 1000 and set(found) <= {".json"}  # the ending of a schedule file, that users name


def test_interfaces_import_torch_only() -> None:
    assert {name[0] for name in imports(Path("interfaces.py"))} - set(sys.stdlib_module_names) == {"torch"}


def test_the_walk_sees_relative_and_nested_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "solvers").mkdir()
    (tmp_path / "solvers" / "a.py").write_text("from . import b\ndef f():\n    from ..grids.fixed import make\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert rooms_imported(Path("solvers/a.py")) == {"solvers", "grids"}
