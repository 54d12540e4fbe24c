"""The journal of a deterministic search: what it has computed so far, so that it goes on where it was killed.

    record k = (question_k, answer_k)     two lists of numbers: the place asked about, and what was computed there

A search whose next question follows from the answers so far asks the same questions when it is started again. It is
then given the kept answers until they end, and computes from there on: the result is that of an unbroken run, number
for number, and the state of the optimiser need not be kept. The first question that differs drops the records behind.

The file is a cache of a search that is under way: a line for the key, and one for each record, added when it is made.
Numbers are in hexadecimal, infinite ones among them; each line has the sum of its record, and those from the first that
is damaged on are dropped. A journal of another search is begun anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.files import append_bytes, check_schema, parse_json, read_bytes, sha256_of_json, write_bytes

Record = tuple[list[float], list[float]]


class Journal:
    """The records in `path` of the search that `key` names; without a path nothing is kept.

    `key` stands for everything that an answer depends on beside its question.
    """

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self.path, self.key = path, key
        self._records, self._whole = ([], False) if path is None else _kept(path, key)
        self._next = 0

    def recall(self, question: Sequence[float], compute: Callable[[], Sequence[float]]) -> list[float]:
        """The kept answer, if this question comes next in the journal; else `compute()`, which is then kept.

        Raises TsAdaptError if the journal cannot be written.
        """
        asked = [float(number) for number in question]
        if self._next == len(self._records) or self._records[self._next][0] != asked:
            self._whole &= self._next == len(self._records)
            del self._records[self._next :]
            self._records.append((asked, [float(number) for number in compute()]))
            if self.path is not None and self._whole:
                append_bytes(self.path, _line(self._records[-1]))
            elif self.path is not None:
                lines = [json.dumps({"key": self.key}).encode() + b"\n", *map(_line, self._records)]
                write_bytes(self.path, b"".join(lines), durable=False)
                self._whole = True
        self._next += 1
        return self._records[self._next - 1][1]

    def remove(self) -> None:
        """Remove the file: the search has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _line(record: Record) -> bytes:
    numbers = [[number.hex() for number in part] for part in record]
    return json.dumps({"record": numbers, "sha256": sha256_of_json(numbers)}).encode() + b"\n"


def _kept(path: Path, key: str) -> tuple[list[Record], bool]:
    """The records of a file whose first line has the `key`, and whether the file holds these and nothing else."""
    records: list[Record] = []
    try:
        first, *lines = read_bytes(path).splitlines(keepends=True)
        if parse_json(first, path) != {"key": key}:
            return [], False
        for line in lines:
            value = parse_json(line, path)
            check_schema(value, {"record": list, "sha256": str}, path)
            if value["sha256"] != sha256_of_json(value["record"]) or not line.endswith(b"\n"):
                return records, False
            question, answer = map(_numbers, value["record"])
            records.append((question, answer))
    except (TsAdaptError, TypeError, ValueError, OverflowError):
        return records, False
    return records, True


def _numbers(texts: list[str]) -> list[float]:
    numbers = [float.fromhex(text) for text in texts]
    if any(math.isnan(number) for number in numbers):
        raise ValueError("there is a NaN among the numbers")
    return numbers
