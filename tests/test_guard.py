"""The guard of the tests is on, here and in processes that tests start."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import guard

PUBLIC = ("192.0.2.1", "2001:db8::1", "www.example.org")
"""Addresses and a name that belong to nobody (RFC 5737, 3849 and 2606)."""
REACHES = f"""
import os, pathlib, socket
for host in {PUBLIC}:
    try:
        socket.create_connection((host, 443), timeout=1)
    except OSError as error:
        print(error)
print(pathlib.Path.home(), os.environ["XDG_DATA_DIRS"])
"""


@pytest.mark.parametrize("host", PUBLIC)
def test_the_network_is_refused(host: str, tries: Callable[[], list[str]]) -> None:
    with pytest.raises(OSError, match="no network here"):
        socket.create_connection((host, 443), timeout=1)
    (line,) = tries()
    assert line.startswith("refused\t") and line.endswith(f"\t{host}")


def test_datagrams_are_refused(tries: Callable[[], list[str]]) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, pytest.raises(OSError, match="no network here"):
        datagrams.sendto(b"", ("192.0.2.1", 53))
    assert len(tries()) == 1


def test_this_machine_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=10).close()
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 107 characters
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("here")
        server.listen()
        client.connect("here")


def test_the_home_is_an_empty_folder_and_nothing_leads_elsewhere() -> None:
    assert Path.home() != Path(pwd.getpwuid(os.getuid()).pw_dir)
    began = Path(os.environ[guard.TRIES]).parent.stat().st_mtime
    assert all(path.stat().st_ctime >= began for path in Path.home().rglob("*"))
    assert not [name for name in os.environ if name.startswith(guard.ELSEWHERE) and name != "XDG_DATA_DIRS"]
    assert list(Path(os.environ["XDG_DATA_DIRS"]).iterdir()) == []


def test_processes_of_a_test_are_guarded_too(tries: Callable[[], list[str]]) -> None:
    done = subprocess.run([sys.executable, "-c", REACHES], capture_output=True, text=True, check=True)
    *refusals, places = done.stdout.splitlines()
    assert len(refusals) == len(PUBLIC) and all("no network here" in line for line in refusals)
    assert places == f"{Path.home()} {os.environ['XDG_DATA_DIRS']}"
    assert [line.rpartition("\t")[2] for line in tries()] == list(PUBLIC)
