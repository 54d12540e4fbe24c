"""A PostgreSQL server of the test's own: data and socket in a temporary folder, no network."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INSTALL = "install Debian's package: apt-get install postgresql"


def program(name: str) -> str:
    """The path of one of the server's programs; AssertionError where it is not installed."""
    found = shutil.which(name) or next((str(path) for path in Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
    assert found is not None, f"{name} of PostgreSQL is neither on the PATH nor in /usr/lib/postgresql/*/bin; {INSTALL}"
    return found


def other_user() -> pwd.struct_passwd | None:
    """Whom the server runs as: it refuses root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    return known.get("postgres") or known["nobody"]


@contextmanager
def server() -> Iterator[str]:
    """The storage URL of a server that runs as long as the block does."""
    initdb, pg_ctl, user = program("initdb"), program("pg_ctl"), other_user()
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))  # a socket's path has at most 107 characters
    own = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)

    def run(*command: str) -> None:
        log = folder / "commands.log"
        with open(log, "a") as output:
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=120, check=False,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}, **own,
            )  # fmt: skip
        assert done.returncode == 0, f"{command[0]} failed: {log.read_text()}"

    data = str(folder / "data")
    try:
        run(initdb, "--pgdata", data, "--username", "tester", "--auth", "trust", "--encoding", "UTF8", "--no-sync")
        settings = f"-k {folder} -c listen_addresses= -c fsync=off"
        run(pg_ctl, "--pgdata", data, "--log", str(folder / "server.log"), "--options", settings, "--wait", "start")
        try:
            yield f"postgresql+psycopg://tester@/postgres?host={folder}"
        finally:
            run(pg_ctl, "--pgdata", data, "--mode", "immediate", "--wait", "stop")
    finally:
        shutil.rmtree(folder)
