"""What the tests may reach: the checkout, its environment, and this machine itself; nothing else.

    the network            connections and look-ups of names that lead off this machine raise OSError
    the home folder        HOME is an empty folder, and no variable leads to caches, settings or tokens elsewhere;
                           torch's compiled code, by default in /tmp for all programs of a user, lies there too
    data of the system     XDG_DATA_DIRS is an empty folder

It holds for the process that called `begin` and for every Python process started from it, which imports
`sitecustomize` beside this module. Each try is written down too, so that it is noticed where a library makes up for a
refusal. pip alone may fetch: a run from nothing (`make fresh`) begins with it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

TRIES = "TS_ADAPT_NETWORK_TRIES"
"""The variable that names the file of the tries: a line "refused|pip, program, address" each."""
ELSEWHERE = (
    "XDG_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "DIFFUSERS_", "TORCH_HOME", "TRITON_",
    "MPLCONFIGDIR", "MATPLOTLIBRC", "WANDB_",
)  # fmt: skip
"""How variables begin that lead to caches, settings and tokens outside the home folder, or keep libraries offline."""
HERE = ("", "localhost", "localhost.localdomain", "ip6-localhost")


def begin(folder: Path, environment: MutableMapping[str, str]) -> None:
    """Make `environment` that of a fresh machine, with its home and the file of tries in `folder`, which is empty.

    The variables of a proxy stay for pip, which alone is let through to one.
    """
    for name in [name for name in environment if name.startswith(ELSEWHERE)]:
        del environment[name]
    for name in ("home", "data"):
        (folder / name).mkdir()
    (folder / "tries").touch()
    environment["HOME"], environment["XDG_DATA_DIRS"] = str(folder / "home"), str(folder / "data")
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "home" / ".cache" / "torchinductor")
    environment[TRIES] = str(folder / "tries")
    places = [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(places)


def watch() -> None:
    """Refuse the network to this process from now on."""
    if getattr(socket.socket.connect, "guarded", False):
        return
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, _method(getattr(socket.socket, name)))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        setattr(socket, name, _look_up(getattr(socket, name)))


def tries() -> list[str]:
    """The lines written so far."""
    return Path(os.environ[TRIES]).read_text().splitlines()


def _method(call: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: socket.socket, *given: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and given:
            _check(given[-1][0])
        return call(self, *given)

    method.guarded = True  # type: ignore[attr-defined]
    return method


def _look_up(call: Callable[..., Any]) -> Callable[..., Any]:
    def look_up(host: str | bytes | None, *rest: Any, **named: Any) -> Any:
        _check(host)
        return call(host, *rest, **named)

    return look_up


def _check(host: str | bytes | None) -> None:
    """Raises OSError for a host that is not this machine, but for pip; both are written down."""
    name = (host or "").decode() if isinstance(host or "", bytes) else str(host or "")
    if name in HERE or name == socket.gethostname() or _own(name):
        return
    pip = Path(sys.argv[0]).parent.name == "pip"
    with open(os.environ[TRIES], "a") as file:
        file.write(f"{'pip' if pip else 'refused'}\t{' '.join(sys.orig_argv)[:200]!r}\t{name}\n")
    if not pip:
        raise OSError(errno.ENETUNREACH, f"no network here, and {name} was asked for (tests/guard.py)")


def _own(name: str) -> bool:
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
