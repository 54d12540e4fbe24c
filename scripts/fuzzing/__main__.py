"""python -m fuzzing [--files N] [--seed S] [--out FOLDER] [--only NUMBER] [--reader NAME]... [--list]

The last line is JSON: {"files": read, "failures": of these}. The exit status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from fuzzing.readers import all_readers
from fuzzing.runner import attempt, fuzz, mutated


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzzing", description=__doc__)
    parser.add_argument("--files", type=int, default=100_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("logs/fuzz"), help="folder for the files that fail")
    parser.add_argument("--reader", action="append", help="only this one; may be given several times")
    parser.add_argument("--list", action="store_true", help="the names of the readers, and nothing else")
    parser.add_argument("--only", type=int, help="read this file of --reader again, here, without limits")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = all_readers()
    if unknown := set(given.reader or ()) - known.keys():
        parser.error(f"there is no reader {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    readers = {name: reader for name, reader in known.items() if not given.reader or name in given.reader}
    if given.list:
        print("\n".join(readers))
        return 0
    if given.only is not None:
        name, files = mutated(readers, given.seed, given.only)
        print(f"{name}: {attempt(readers[name], files)}")
        return 0
    for name, reader in readers.items():  # what is set up by the first file that is read is set up for all children
        if attempt(reader, next(iter(reader.sets.values()))) == "refused":
            raise SystemExit(f"fuzzing: {name} refuses a file that is valid")
    tally = fuzz(readers, given.seed, given.files, given.out, lambda line: print(line, flush=True))
    for name in readers:
        print(f"{name:14} accepted {tally.accepted[name]:7}  refused {tally.refused[name]:7}")
    print(json.dumps({"files": given.files, "failures": len(tally.failures)}))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
