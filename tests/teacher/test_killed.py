"""A run killed by SIGKILL, at random moments and around every write, and started again: the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# One process imports torch and forks (one thread, so forking is safe); its children generate and are killed.
SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ts_adapt.denoisers.analytic import GaussianDenoiser
from ts_adapt.noise import ContinuousVP
from ts_adapt.solvers import DDIM
from ts_adapt.teacher.generate import generate, teacher_config
from ts_adapt.teacher.store import TeacherStore

noise, folder = ContinuousVP(), Path(sys.argv[1])
times = torch.linspace(1, 1e-3, 21, dtype=torch.float64)

def run(name, samples):
    denoiser = GaussianDenoiser(noise, 0.3, 0.25, (1, 8, 8))
    settings = {"model": "g", "seed": 1, "first": 0, "shape": (1, 8, 8), "shard_size": 4, "batch_size": 3}
    config = teacher_config(denoiser, "ddim", times, **settings)
    store = TeacherStore.create(folder / name, config)
    generate(denoiser, DDIM(noise), times, store, samples=samples, batch_size=3, progress=False)

def die_at(call):
    count = [0]
    def counted(function):
        def wrapper(*args, **kwargs):
            for _ in range(2):  # before and after the call
                if count[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
                out = None if _ else function(*args, **kwargs)
            return out
        return wrapper
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)

def fork(name, samples, call=None):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if call is not None:
                die_at(call)
            run(name, samples)
            code = 0
        finally:
            os._exit(code)
    return child

def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

random.seed(int(sys.argv[2]))
run("small", 6)  # in this process: what is imported late, the children need not import again
start = time.monotonic()
run("whole", 120)
duration = time.monotonic() - start
kills = 0
while True:
    child = fork("random", 120)
    time.sleep(random.uniform(0, 0.05 * duration))
    if kills < 15:
        os.kill(child, signal.SIGKILL)
    code = code_of(child)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    kills += 1

calls = 0
while (code := code_of(fork(f"call-{calls}", 6, calls))) != 0:
    assert code == -signal.SIGKILL, code
    assert code_of(fork(f"call-{calls}", 6)) == 0
    calls += 1
print(json.dumps({"kills": kills, "calls": calls}))
"""


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


def test_killed_at_any_moment_and_resumed_the_files_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "0"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    assert counted["kills"] >= 5 and counted["calls"] >= 15
    assert len(content(tmp_path / "whole")) == 31
    assert content(tmp_path / "random") == content(tmp_path / "whole")
    for call in range(counted["calls"] + 1):
        assert content(tmp_path / f"call-{call}") == content(tmp_path / "small"), call
