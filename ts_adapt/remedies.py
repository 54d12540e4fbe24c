"""What a message tells the user to run: a command, said for the experiment that is at work."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_at_work: ContextVar[Sequence[tuple[str, str]]] = ContextVar("the experiment at work", default=())


@contextmanager
def experiment(options: Sequence[tuple[str, str]]) -> Iterator[None]:
    """While the block runs, commands are for the experiment that these options (`--config`, its file, ...) name."""
    token = _at_work.set(options)
    try:
        yield
    finally:
        _at_work.reset(token)


def command(name: str, *flags: object) -> str:
    """The command with these flags, and with the options of the experiment that the flags do not give."""
    given = [str(flag) for flag in flags]
    own = [word for option, value in _at_work.get() if option not in given for word in (option, value)]
    return f"`ts-adapt {shlex.join([name, *own, *given])}`"
