"""The loop: file n of a seed is always the same for a reader, so that a failure is known by its name and two numbers.

A child process reads the files, under a limit of memory; its parent watches which file it is at. A child that dies or
stays too long has failed at that file, and another goes on behind it.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TextIO

from fuzzing.mutations import mutate
from fuzzing.readers import Files, Reader
from ts_adapt.errors import TsAdaptError

SECONDS, WAIT = 10.0, 120.0
"""For one file: of the processor, and of the clock, for one that waits."""
MEMORY = 2**30
"""Bytes of address space for one file, beside what the process has."""
CHUNK = 2000
"""Files that one child reads."""
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass
class Tally:
    """How often each reader accepted and refused; why it failed, by the number of the file."""

    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)


def mutated(readers: Mapping[str, Reader], seed: int, number: int) -> tuple[str, Files]:
    """One of `readers` and the files of this seed and number; which files a reader has then does not hang on others."""
    random = Random(f"{seed}:{number}")
    (name,) = random.choices(list(readers), [reader.weight for reader in readers.values()])
    reader = readers[name]
    files = dict(random.choice(list(reader.sets.values())))
    for path in random.sample(sorted(files), random.choice((1, 1, 1, 2)) if len(files) > 1 else 1):
        others = [other[path] for other in reader.sets.values() if path in other]
        files[path] = mutate(path, files[path], random, others)
    if reader.reseal is not None and random.random() < 0.7:
        files = reader.reseal(files)
    return name, files


def laid_out(files: Files, folder: Path) -> Path:
    """`files` in the `folder`."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def attempt(reader: Reader, files: Files) -> str:
    """What the reader did, accepted or refused; raises whatever else it raises."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        try:
            reader.read(laid_out(files, Path(folder)))
        except TsAdaptError as error:
            str(error).encode()
            return "refused"
        return "accepted"


def fuzz(readers: Mapping[str, Reader], seed: int, files: int, out: Path | None, say: Callable[[str], None]) -> Tally:
    """Read `files` mutated files; failures are written under `out`."""
    tally, start = Tally(), 0
    while start < files:
        start = _child(readers, seed, range(start, min(start + CHUNK, files)), tally)
        say(f"{start} files, {len(tally.failures)} failures")
    for number, reason in sorted(tally.failures.items()):
        name, damaged = mutated(readers, seed, number)
        say(f"--- {name}, seed {seed}, file {number}: {reason}")
        say(f"    again: python -m fuzzing --seed {seed} --reader {name} --only {number}")
        if out is not None:
            folder = out / f"{name}-{seed}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            laid_out(damaged, folder)
            about = {"reader": name, "seed": seed, "file": number, "reason": reason}
            (folder / "failure.json").write_text(json.dumps(about, indent=2))
    return tally


def _child(readers: Mapping[str, Reader], seed: int, numbers: range, tally: Tally) -> int:
    """Read the files of these numbers in a child process; the number behind the last one that it came to."""
    shared = mmap.mmap(-1, 8)
    shared[:] = struct.pack("<q", numbers.start)
    with tempfile.TemporaryFile("w+") as report:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _read_all(readers, seed, numbers, shared, report)
                code = 0
            finally:
                os._exit(code)
        status = _watched(child, shared)
        report.seek(0)
        for line in report:
            verdict, name, number, reason = json.loads(line)
            if verdict == "failed":
                tally.failures[number] = reason
            else:
                getattr(tally, verdict)[name] += 1
    if status == 0:
        return numbers.stop
    (number,) = struct.unpack("<q", shared[:])
    limits: dict[int, str] = {
        signal.SIGPROF: f"longer than {SECONDS:g} seconds",
        signal.SIGKILL: f"waited longer than {WAIT:g} seconds",
    }
    ended = f"the process ended with the status {status}"
    reason = limits.get(os.WTERMSIG(status), ended) if os.WIFSIGNALED(status) else ended
    tally.failures[number] = reason
    return int(number) + 1


def _read_all(readers: Mapping[str, Reader], seed: int, numbers: range, shared: mmap.mmap, report: TextIO) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        shared[:] = struct.pack("<q", number)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        name, files = mutated(readers, seed, number)
        try:
            line = [attempt(readers[name], files), name, number, ""]
        except BaseException as error:
            line = ["failed", name, number, _where(error)]
        print(json.dumps(line), file=report, flush=True)


def _where(error: BaseException) -> str:
    """The error and the last places of the package that it passed."""
    text = " ".join(str(error).split())[:300]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)][-4:]
    return f"{type(error).__name__}: {text} ({' > '.join(places)})"


def _watched(child: int, shared: mmap.mmap) -> int:
    """The exit status of `child`, which is killed if it waits at one file for too long."""
    at, since = shared[:], time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.02)
        if shared[:] != at:
            at, since = shared[:], time.monotonic()
        elif time.monotonic() - since > WAIT:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
