"""Several processes at one job, as accelerate or torchrun start them on one machine, or on many that share a folder.

    unit of work   a shard of a teacher, a part of labels, a part of a run, the schedule of one solver and NFE
    shares         of P processes the r-th makes the units r, r + P, r + 2 P, ... of those that are missing

What a unit holds is a function of the config, whoever makes it: its batches begin with it, and the number of threads is
that of the config (`join`). So results do not depend on P, and a job that was killed goes on with any other P. Each
process writes the files of its units; the first one (rank 0) makes folders, holds locks, prints, and writes what is
there once. Processes meet where all have to be through, with small values in hand.

A training is one unit that all work at (data-parallel): they hold the same weights, each computes the gradient of its
share of a batch, and takes the step along the sum of all gradients.

Without a launcher there is one process, and all that is done here is to set the threads that were asked for.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from ts_adapt.errors import TsAdaptError, one_line

T = TypeVar("T")
LAUNCHED_THREADS = 1
"""CPU threads of each process of a launcher, where the config says nothing."""
PATIENCE = timedelta(days=14)
"""So long one process waits for the others, whose units may take hours; one that died, the launcher notices at once."""
GRACE = 10.0
"""Seconds in which a launcher ends the other processes, once one has failed."""
VISIBLE = 60.0
"""Seconds until a shared folder shows what another machine wrote there, at most."""


class Told(TsAdaptError):
    """The error of another process, or one that others were told of: the first process prints it, and it alone."""


def launched() -> bool:
    """Whether a launcher started this process."""
    return "LOCAL_RANK" in os.environ and "RANK" in os.environ


def join(device: str, threads: int = 0) -> None:
    """Meet the other processes of the launcher, if there are any; each takes a GPU of its own for `cuda`.

    threads  of the CPU in each process. 0: as the environment says; in a process of a launcher LAUNCHED_THREADS

    Raises TsAdaptError where all would take the same GPU, and where the processes do not find one another.
    """
    if launched():
        threads = threads or LAUNCHED_THREADS
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if threads:
        torch.set_num_threads(threads)
    if not launched() or int(os.environ.get("WORLD_SIZE", 1)) == 1 or distributed.is_initialized():
        return
    if torch.device(device).index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise TsAdaptError(f"model.device is {device} in every process; give cuda, and each takes a GPU of its own")
    from accelerate import PartialState

    try:
        PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise TsAdaptError(
            f"the launcher's processes do not find one another ({one_line(error)}); start them anew"
        ) from error


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own_share(units: Sequence[T]) -> list[T]:
    """This process's share of `units`, which all processes give alike."""
    return list(units[rank() :: world()])


def label(text: str) -> str:
    """What a progress bar is called, which counts one process's share."""
    return text if world() == 1 else f"{text}, process {rank() + 1} of {world()}"


def gathered(value: Any = None) -> list[Any]:
    """Wait until every process is here, and return the values that they brought, in their order."""
    if world() == 1:
        return [value]
    values = [None] * world()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Behind the block all processes have been through it, each with work of its own; or else all raise.

    A process in which it fails waits for the others, so that what they were at is finished and kept. What they print
    the first one prints. Raises Told in place of a TsAdaptError, but in the first process its own.
    """
    if world() == 1:
        yield
        return
    error, out, err = None, io.StringIO(), io.StringIO()
    try:
        with ExitStack() as stack:
            if rank() > 0:
                stack.enter_context(redirect_stdout(out))
                stack.enter_context(redirect_stderr(err))
            yield
    except Exception as raised:
        error = raised
    brought = gathered((_said(error), out.getvalue(), err.getvalue()))
    if rank() == 0:
        _print_of_others(brought)
    if error is not None and (rank() == 0 or not isinstance(error, TsAdaptError)):
        raise error
    said = next((sentence for sentence, _, _ in brought if sentence), None)
    if said is not None:
        raise Told(said) from error


def first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, which alone calls it; the others wait for it."""
    made: T | None = None
    with together():
        if rank() == 0:
            made = make()
    shared: T = gathered(made)[0]
    return shared


@contextmanager
def held(lock: AbstractContextManager[T]) -> Iterator[T]:
    """The first process holds `lock` for all of them, while the block runs; all are told what it says."""
    with ExitStack() as stack:
        yield first(lambda: stack.enter_context(lock))


@contextmanager
def quiet() -> Iterator[None]:
    """Only the first process prints, while the block runs."""
    with ExitStack() as stack:
        if rank() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def is_told_here(error: BaseException) -> bool:
    """Whether this process is to print `error`, which ends it: the first one that meets it does, by its rank.

    Processes that all fail alike do so within moments, and the launcher ends the rest; so the others wait for that.
    """
    if not launched() or os.environ["RANK"] == "0":
        return True
    if isinstance(error, Told | KeyboardInterrupt):
        return False
    try:
        time.sleep(GRACE)
    except KeyboardInterrupt:
        return False
    return True


def await_files(paths: Sequence[Path]) -> None:
    """Wait until `paths`, which other processes have written, are to be seen here; a shared folder may lag behind."""
    end = time.monotonic() + (VISIBLE if world() > 1 else 0.0)
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(0.2)


def share(rows: Tensor) -> Tensor:
    """The part of `rows` that is this process's; it may be empty."""
    return rows.tensor_split(world())[rank()]


def total_of(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all processes, which are of one shape."""
    if world() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by the sum of all processes' gradients; one that is missing is zero."""
    learned = [p for p in parameters if p.requires_grad]
    for p in learned:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if world() > 1:
        own = torch.cat([p.grad.flatten() for p in learned if p.grad is not None])
        for p, total in zip(learned, total_of(own).split([p.numel() for p in learned]), strict=True):
            p.grad = total.view_as(p)


def by_rows(compute: Callable[[Tensor], Tensor], rows: int, device: torch.device) -> Tensor:
    """`compute` of the indices 0 .. rows - 1, `(rows, ...)` float64, each process computing its share of them."""
    own = share(torch.arange(rows))
    made = compute(own) if len(own) else torch.empty(0)
    whole = torch.zeros(rows, *gathered(made.shape[1:])[0], dtype=torch.float64, device=device)
    if len(own):
        whole[own] = made.to(whole)
    return total_of(whole)


def agree(tensors: Iterable[Tensor]) -> None:
    """Give `tensors` the values that they have in the first process."""
    if world() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), 0)


def _said(error: Exception | None) -> str | None:
    if error is None or isinstance(error, TsAdaptError):
        return None if error is None else str(error)
    return f"process {rank() + 1} of {world()} ended with {type(error).__name__}: {one_line(error)}"


def _print_of_others(brought: Sequence[tuple[str | None, str, str]]) -> None:
    for _, out, err in brought:
        print(out, end="")
        print(err, end="", file=sys.stderr)
