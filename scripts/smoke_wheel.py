"""python scripts/smoke_wheel.py: does the installed wheel work, away from the checkout?

Run by the interpreter of an environment that has the wheel and what it brings along, and nothing else.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = {"ts-adapt", "pip"}
PACKED = {"tests/conftest.py", "configs/fashion.yml", "constraints.txt", "Makefile", "docs/supply.md", "LICENSE"}
"""What is looked for in the source archive."""
COMMANDS = (
    ("--version",),
    ("--help",),
    ("sample", "--help"),
    ("sample", "--schedule", "karras", "--steps", "3", "--count", "2", "--out", "images", "--quiet"),
    ("export", "karras", "--steps", "3", "--format", "sigmas", "--out", "sigmas.txt"),
)


def main() -> None:
    place = Path(str(files("ts_adapt")))
    check(place.is_relative_to(sys.prefix), f"ts_adapt is imported from {place}, not from {sys.prefix}")
    check((place / "py.typed").is_file(), "py.typed is missing")
    for path in (ROOT / "ts_adapt").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            name = path.relative_to(ROOT / "ts_adapt")
            check((place / name).is_file(), f"{name} is not in the wheel")
    pinned = {canonical(name) for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)}
    there = {canonical(found.metadata["Name"]) for found in distributions()}
    check(there - OWN <= pinned, f"constraints.txt has no {', '.join(sorted(there - OWN - pinned))}")
    (archive,) = (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    check(names >= PACKED, f"{archive.name} has no {', '.join(sorted(PACKED - names))}")
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            program = Path(sys.executable).with_name("ts-adapt")
            subprocess.run([program, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        images = list((Path(folder) / "images").rglob("*.png"))
        check(len(images) >= 2, f"sample wrote {len(images)} images")
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "check"], check=True)
    print(f"{archive.name} and its wheel: {len(there)} distributions, {len(images)} images written, all well")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"smoke_wheel: {otherwise}")


if __name__ == "__main__":
    main()
