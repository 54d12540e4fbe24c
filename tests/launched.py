"""Jobs of several processes, without a launcher's own seconds: one process imports everything and forks the others.

python tests/launched.py FOLDER "CASE [NUMBER]..."...      the last line is JSON, what the tests look at
"""

from __future__ import annotations

import ts_adapt  # noqa: F401  isort: skip

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (before the fork)
import torch

from forked import codes, fork
from small_job import LABEL, SMALL, Job
from ts_adapt.errors import TsAdaptError
from ts_adapt.jobs import evaluate, labels, train  # noqa: F401  (before the fork)

STEPS = (
    ("teach", "--save-png"),
    ("search", "--solvers", "[unipc-2, ddim]"),
    LABEL,
    (*LABEL, "--split", "test"),
    ("evaluate", "--generate-only", "--evaluate.batch_size", "2"),
)
"""Teacher of 40 and 20 samples in shards of 16, labels in parts of 10 or 4, runs of 20 samples in parts of 8."""
CONFIG = SMALL.replace("label_batch: 10", "label_batch: 4").replace("shard_size: 16", "shard_size: 8")


def start(
    job: Job, count: int, steps: Sequence[Sequence[str]], prepare: Callable[[int], None] | None = None
) -> list[int]:
    """The numbers of `count` processes that do `steps` together."""

    def part(rank: int) -> int:
        if prepare is not None:
            prepare(rank)
        return next((failed for step in steps if (failed := job.run(*step))), 0)

    return fork(count, part)


def begun(folder: Path, name: str) -> Job:
    (folder / name).mkdir()
    return Job.begun(folder / name, CONFIG)


def counts(folder: Path, *numbers: int) -> dict[str, Any]:
    """The same job by each number of processes."""
    return {str(count): codes(start(begun(folder, str(count)), count, STEPS)) for count in numbers}


def killed(folder: Path, kills: int, at_last: int) -> dict[str, Any]:
    """Two processes, unbroken, and killed at random moments; `at_last` processes then make the rest."""
    random.seed(at_last)
    began = time.monotonic()
    unbroken = codes(start(begun(folder, "unbroken"), 2, STEPS))
    took, done, job = time.monotonic() - began, 0, begun(folder, "killed")
    for _ in range(kills):
        children = start(job, 2, STEPS)
        time.sleep(random.uniform(0.05, 0.6) * took)
        for child in children:
            os.kill(child, signal.SIGKILL)
        done += -signal.SIGKILL in codes(children)
    return {"unbroken": unbroken, "kills": done, "codes": codes(start(job, at_last, STEPS))}


def failing(folder: Path) -> dict[str, Any]:
    """One of two processes fails at the first part of labels that is its own."""
    job = begun(folder, "failing")
    before = codes(start(job, 1, STEPS[:2]))

    def fail(*_: Any) -> None:
        raise TsAdaptError("this part cannot be made; leave it")

    def prepare(rank: int) -> None:
        if rank == 1:
            labels.search_per_sample = fail  # type: ignore[assignment]

    together = codes(start(job, 2, [LABEL], prepare))
    kept = sorted(path.name for path in job.labels().glob("part-*"))
    alike = codes(start(job, 2, [("teach", "--teacher.nfe", "5")]))
    return {"before": before, "together": together, "kept": kept, "alike": alike}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    cases: dict[str, Callable[..., dict[str, Any]]] = {"counts": counts, "killed": killed, "failing": failing}
    said = {}
    for case in sys.argv[2:]:
        name, *numbers = case.split()
        said[name] = cases[name](folder, *map(int, numbers))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
