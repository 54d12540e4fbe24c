"""python scripts/fresh.py [demo] [snippets] [wheel]: what the README promises, each from nothing.

    demo        `make demo` (a dozen minutes on two cores)
    snippets    the Python, configs and commands of README and docs
    wheel       `make dist`: the built wheel, installed into an environment of its own and run away from the checkout

In a fresh clone of HEAD, with an environment, a home folder and a pip cache that are empty at the start, and no data of
the system. pip alone may fetch: the guard of the tests refuses the network to everything else. At the end stands what
was fetched, and what the programs left in the home folder; a try of any program but pip is a failure.
TORCH_INDEX is read from the environment, as the Makefile's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import guard  # noqa: E402

PAGES = ("tests/test_readme.py", "tests/test_docs.py")
STEPS = {
    "demo": [["make", "demo"]],
    "snippets": [["make", "install"], [".venv/bin/python", "-m", "pytest", "-q", *PAGES]],
    "wheel": [["make", "dist"]],
}
FETCHED = re.compile(
    r"^\S+ +(?:Downloading|Processing) ((?!\./)\S+\.(?:whl|tar\.gz|zip))(?: \(([\d.]+ [kMG]?B)\))?(?=\s)", re.M
)
"""In pip's log: a file from an index, with its size, and one from a folder."""


def main() -> None:
    steps = sys.argv[1:] or list(STEPS)
    if not set(steps) <= set(STEPS):
        sys.exit(f"fresh: the steps are {', '.join(STEPS)}, not {' '.join(steps)}")
    with tempfile.TemporaryDirectory(prefix="fresh-") as folder:
        if not run(steps, Path(folder)):
            sys.exit(1)


def run(steps: list[str], folder: Path) -> bool:
    """Do `steps` in `folder`, say what they took and fetched, and whether all went well."""
    clone, log = folder / "clone", folder / "pip.log"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "VENV")}
    environment |= {
        "PIP_CONFIG_FILE": pip_config(), "PIP_LOG": str(log), "PYTHON": sys.executable,
        "PIP_PROGRESS_BAR": "off",  # with a log, pip shows it in spite of --quiet
    }  # fmt: skip
    environment.pop("PIP_CACHE_DIR", None)
    environment.pop("PYTHONPATH", None)
    (folder / "guard").mkdir()
    guard.begin(folder / "guard", environment)
    failed = []
    for step in steps:
        began = time.monotonic()
        for command in STEPS[step]:
            print(f"fresh: {' '.join(command)}", flush=True)
            if subprocess.run(command, cwd=clone, env=environment, check=False).returncode:
                failed.append(step)
                break
        print(f"fresh: {step} took {time.monotonic() - began:.0f} s", flush=True)
    return report(folder / "guard", log.read_text() if log.exists() else "", failed)


def report(folder: Path, log: str, failed: list[str]) -> bool:
    """Say what was fetched, by pip and else, what lies in the home folder, and whether all went well."""
    tries = {tuple(line.split("\t")) for line in (folder / "tries").read_text().splitlines()}
    refused = sorted(found for found in tries if found[0] != "pip")
    hosts = sorted({host for who, _, host in tries if who == "pip"})
    files = {Path(name).name: size or size_of(Path(name)) for name, size in FETCHED.findall(log)}
    print(f"\nfetched by pip, from {', '.join(hosts) or 'folders'}: {len(files)} distributions")
    print(*(f"    {name} ({size})" for name, size in sorted(files.items())), sep="\n")
    print("fetched by anything else:", "tries, refused" if refused else "nothing")
    for _, program, host in refused:
        print(f"    {host} by {program}")
    print("left in the home folder:")
    home = folder / "home"
    for place in sorted({path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}):
        print(f"    {'/'.join(place)} ({size_of(home.joinpath(*place))})")
    faults = [f"{step} failed" for step in failed] + ["the network was reached for, see above"] * bool(refused)
    print("fresh:", "; ".join(faults) or "all went well")
    return not faults


def size_of(place: Path) -> str:
    """Of a file, or of the files in a folder, in words."""
    size = sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def pip_config() -> str:
    """The file of the user's settings of pip: from where packages come is the one thing that is taken over."""
    given = os.environ.get("PIP_CONFIG_FILE")
    places = [Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "pip" / "pip.conf", Path("~/.pip/pip.conf")]
    return given or next((str(place.expanduser()) for place in places if place.expanduser().is_file()), os.devnull)


if __name__ == "__main__":
    main()
