"""The journal of a deterministic search: what it has computed so far, so that it goes on where it was killed.

    record k = (question_k, answer_k)     two lists of numbers: the place asked about, and what was computed there

A search whose next question follows from the answers so far asks the same questions when it is started again. It is
then given the kept answers until they end, and computes from there on: the result is that of an unbroken run, number
for number, and the state of the optimiser need not be kept. The first question that differs drops the records behind.

The file is a cache of a search that is under way: atomic, begun anew where it is damaged or of another search. It has a
sum of its records, whose numbers are in hexadecimal, infinite ones among them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ts_adapt.interfaces import TsAdaptError
from ts_adapt.storage.files import read_json, sha256_of_json, write_bytes

Record = tuple[list[float], list[float]]


class Journal:
    """The records in `path` of the search that `key` names; without a path nothing is kept.

    `key` stands for everything that an answer depends on beside its question.
    """

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self.path, self.key = path, key
        self._records = [] if path is None else _kept(path, key)
        self._next = 0

    def recall(self, question: Sequence[float], compute: Callable[[], Sequence[float]]) -> list[float]:
        """The kept answer, if this question comes next in the journal; else `compute()`, which is then kept.

        Raises TsAdaptError if the journal cannot be written.
        """
        asked = [float(number) for number in question]
        if self._next == len(self._records) or self._records[self._next][0] != asked:
            del self._records[self._next :]
            self._records.append((asked, [float(number) for number in compute()]))
            if self.path is not None:
                records = [[[number.hex() for number in numbers] for numbers in record] for record in self._records]
                kept = {"key": self.key, "sha256": sha256_of_json(records), "records": records}
                write_bytes(self.path, json.dumps(kept).encode(), durable=False)
        self._next += 1
        return self._records[self._next - 1][1]

    def remove(self) -> None:
        """Remove the file: the search has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _kept(path: Path, key: str) -> list[Record]:
    try:
        value = read_json(path, {"key": str, "sha256": str, "records": list})
        records = [(_numbers(question), _numbers(answer)) for question, answer in value["records"]]
    except (TsAdaptError, TypeError, ValueError, OverflowError):
        return []
    return records if (value["key"], value["sha256"]) == (key, sha256_of_json(value["records"])) else []


def _numbers(texts: list[str]) -> list[float]:
    numbers = [float.fromhex(text) for text in texts]
    if any(math.isnan(number) for number in numbers):
        raise ValueError("there is a NaN among the numbers")
    return numbers
