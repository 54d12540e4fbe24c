"""python -m fuzzing.guided READER [--runs N] [--seconds N] [--seed S] [--out FOLDER]; with atheris, where it installs

Mutations that libFuzzer chooses by the lines of the package that they reach. The first two bytes of an input choose the
variant of the valid files and the one of them that the other bytes stand for. What is a failure, see `fuzzing`: it ends
the run, and the input that fails is kept under FOLDER.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ts_adapt"]):
    from fuzzing.readers import Reader, all_readers
    from fuzzing.runner import attempt


def files_of(reader: Reader, data: bytes) -> dict[str, bytes]:
    """The files that an input stands for."""
    variants = list(reader.sets.values())
    files = dict(variants[data[0] % len(variants)])
    files[sorted(files)[data[1] % len(files)]] = data[2:]
    return files if reader.reseal is None else reader.reseal(files)


def seeds(reader: Reader) -> list[bytes]:
    """The inputs that stand for valid files."""
    return [
        bytes([variant, place]) + files[name]
        for variant, files in enumerate(reader.sets.values())
        for place, name in enumerate(sorted(files))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzzing.guided", description=__doc__)
    readers = all_readers()
    parser.add_argument("reader", choices=readers)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=300, help="after which it ends all the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("logs/fuzz"), help="folder for an input that fails")
    given = parser.parse_args()
    reader = readers[given.reader]

    def one(data: bytes) -> None:
        if len(data) > 1:
            attempt(reader, files_of(reader, data))

    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for place, data in enumerate(seeds(reader)):
            (Path(folder) / str(place)).write_bytes(data)
        # libFuzzer takes a seed of 0 for none
        limits = [
            f"-runs={given.runs}",
            f"-seed={given.seed + 1}",
            f"-max_total_time={given.seconds}",
            "-timeout=20",
            "-max_len=100000",
        ]
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={given.out}/{given.reader}-", folder], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
