"""python scripts/licences.py INTERPRETER: the licences of all distributions in its environment, as Markdown."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

OWN = {"ts_adapt", "ts-adapt", "pip"}
HEAD = """# Licences of the dependencies

Everything that an installation of the wheel brings along, with the versions of `constraints.txt`, as these
distributions state it. Made by `make licences` on {day}; [supply.md](supply.md) has what the package itself ships.

| distribution | version | licence |
| --- | --- | --- |
"""


def main(interpreter: str) -> None:
    tool = str(Path(sys.executable).with_name("pip-licenses"))
    command = [tool, "--python", interpreter, "--format", "json", "--from", "mixed", "--with-system"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [one for one in found if one["Name"] not in OWN]
    unknown = [one["Name"] for one in rows if one["License"] == "UNKNOWN"]
    if unknown:
        print(f"licences: none is stated by {', '.join(unknown)}; look it up by hand", file=sys.stderr)
    sys.stdout.write(HEAD.format(day=date.today().isoformat()))
    for one in sorted(rows, key=lambda one: one["Name"].lower()):
        version, licence = one["Version"].partition("+")[0], " ".join(one["License"].split())
        sys.stdout.write(f"| {one['Name']} | {version} | {licence} |\n")


if __name__ == "__main__":
    main(sys.argv[1])
