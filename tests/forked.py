"""Several processes of one program, without a launcher's own seconds: it has imported everything, and forks them."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from threading import RLock

from tqdm import tqdm

tqdm.set_lock(RLock())  # one for each process: who is killed never gives back one that all share
tqdm.monitor_interval = 0  # no thread beside the one that forks


def fork(count: int, part: Callable[[int], int | None]) -> list[int]:
    """The numbers of `count` processes that know of each other; of one that no launcher started, where it is 1.

    Each does the `part` of its rank and ends with the code that this returns, 0 for None; with 1 if it raises.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            if count > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ |= {key: str(value) for key, value in names.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = part(rank) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def codes(children: Sequence[int]) -> list[int]:
    """What the processes of `fork` ended with, once they have; the negative signal of one that was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
