"""The house: three lists of dependencies that agree, a console script, imports that work in a fresh process."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import ts_adapt

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "requirements.yml").read_text())


def parsed(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    by_name = {canonicalize_name(requirement.name): requirement for requirement in found}
    assert len(by_name) == len(found), "a dependency is listed twice"
    return by_name


def pins() -> dict[str, Version]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()  # type: ignore[union-attr]
            assert canonicalize_name(name) not in pinned, f"{name} is pinned twice"
            pinned[canonicalize_name(name)] = Version(version)
    return pinned


DEPENDENCIES = parsed(PROJECT["dependencies"])
EXTRAS = {extra: parsed(lines) for extra, lines in PROJECT["optional-dependencies"].items()}


def test_requirements_yml_lists_the_same_dependencies() -> None:
    conda = [entry for entry in CONDA["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    assert pip[-1] == "-e ." and "pip" in conda
    assert CONDA["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in conda
    listed = parsed(pip[:-1])
    wanted = DEPENDENCIES | EXTRAS["dev"]
    assert listed.keys() == wanted.keys()
    for name, requirement in wanted.items():
        assert listed[name].specifier == requirement.specifier, name
        assert listed[name].extras == requirement.extras, name


@pytest.mark.parametrize("group", ["dependencies", *EXTRAS])
def test_every_dependency_is_pinned_to_a_version_that_it_allows(group: str) -> None:
    pinned = pins()
    for name, requirement in (DEPENDENCIES if group == "dependencies" else EXTRAS[group]).items():
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is not {requirement.specifier}"


OF_CUDA = ("nvidia-", "cuda-", "triton")
"""What torch's build for CUDA brings along, in the versions that it pins by itself."""


def closure(wanted: dict[str, Requirement]) -> set[str]:
    """The names of everything installed that these requirements bring along."""
    pending = [(name, frozenset(requirement.extras)) for name, requirement in wanted.items()]
    found: dict[str, frozenset[str]] = {}
    while pending:
        name, extras = pending.pop()
        if extras <= found.get(name, frozenset()) and name in found:
            continue
        found[name] = found.get(name, frozenset()) | extras
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if name == "torch" and requirement.name.startswith(OF_CUDA):
                continue
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
                pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return set(found)


def test_everything_that_comes_along_is_pinned() -> None:
    """Of the dependencies and the extra dev, which are installed wherever the tests run."""
    lacking = closure(DEPENDENCIES | EXTRAS["dev"]) - pins().keys()
    assert not lacking, f"constraints.txt has no {', '.join(sorted(lacking))}; see docs/supply.md"


def test_torch_and_torchvision_are_pinned_as_a_pair() -> None:
    assert (pins()["torch"], pins()["torchvision"]) == (Version("2.13.0"), Version("0.28.0"))


def test_scipy_stays_below_the_version_that_clean_fid_does_not_work_with() -> None:
    from cleanfid.fid import frechet_distance
    from numpy import eye, zeros

    assert not DEPENDENCIES["scipy"].specifier.contains("1.18.0")
    assert frechet_distance(zeros(3), eye(3), zeros(3), 4 * eye(3)) == pytest.approx(3.0)


def test_what_the_package_imports_is_declared() -> None:
    known = {"PIL": "pillow", "cleanfid": "clean-fid", "open_clip": "open-clip-torch", "yaml": "pyyaml"}
    declared = DEPENDENCIES.keys() | EXTRAS["text"].keys() | EXTRAS["quant"].keys()
    for path in [*(ROOT / "ts_adapt").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        local = {"ts_adapt"} | {module.stem for module in path.parent.glob("*.py")}
        local |= {package.parent.name for package in (ROOT / "tests").glob("*/__init__.py")}
        for name in re.findall(r"^\s*(?:import|from) ([A-Za-z]\w*)[\w.]*(?: import | as |$)", path.read_text(), re.M):
            if name not in sys.stdlib_module_names and name not in local:
                assert canonicalize_name(known.get(name, name)) in declared, f"{path} imports {name}"


def test_the_python_here_is_one_that_is_supported() -> None:
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:3])))


def test_the_console_script_leads_to_a_function() -> None:
    module, function = PROJECT["scripts"]["ts-adapt"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_data_of_the_package_are_in_the_patterns_of_the_wheel() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ts_adapt"]
    package = Path(ts_adapt.__file__).parent
    packed = {path for pattern in table for path in package.glob(pattern) if path.is_file()}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert package / "py.typed" in data
    assert data <= packed, f"not packed: {sorted(data - packed)}"


def in_a_fresh_process(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def test_torchvision_diffusers_and_clean_fid_import_after_ts_adapt() -> None:
    done = in_a_fresh_process(
        "import ts_adapt, torchvision, diffusers, cleanfid.fid\n"
        "from diffusers import DDPMPipeline, UNet2DModel\n"
        "from torchvision.utils import make_grid\n"
    )
    assert done.returncode == 0, done.stderr
