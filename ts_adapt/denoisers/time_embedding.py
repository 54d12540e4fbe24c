"""Where a network embeds the time, found by what its modules are given, and what is added to it there.

    e = sinusoids(tau)      the module that is given times `(n,)` and nothing else, and returns `(n, C)`: `Timesteps` of
                            diffusers, the Fourier features of EDM, the embedders of DiT
    v = mlp(e)              the module that is given e, as it is, and nothing else, and returns `(n, D)`
    v + d                   goes on to all layers; e + d where nothing is given e alone

Each is the outermost such module; where blocks have embedders of their own, as in DiT, d is added to all of them. d is
a correction of a grid, `(D,)` or one for each sample; rows of a batch are copies of the samples, in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.execution import uncompiled
from ts_adapt.interfaces import TsAdaptError


@dataclass(frozen=True)
class TimeEmbedding:
    """Of a network: the `modules` that answer with v, all of the same `width` D."""

    modules: tuple[nn.Module, ...]
    width: int

    @contextmanager
    def adding(self, value: Tensor) -> Iterator[None]:
        """Within the block, `value` is added to v in the calls of this thread; errors as those of `Offset`."""
        offset = Offset(self)
        before = added_now()
        _of_thread.added = (*before, (self, value))
        try:
            offset.give(value)
            yield
            offset.check_met()
        finally:
            _of_thread.added = before
            offset.remove()


_of_thread = threading.local()


def added_now() -> tuple[tuple[TimeEmbedding, Tensor], ...]:
    """What blocks of `adding` add now, in this thread: for a call that is made again, in a backward pass."""
    found: tuple[tuple[TimeEmbedding, Tensor], ...] = getattr(_of_thread, "added", ())
    return found


@dataclass
class Given:
    """What is added, `(D,)` or `(B, D)`, and whether a module was met that it was added to."""

    value: Tensor
    met: bool = False


class Offset:
    """What adds to v in an `embedding`, for each thread what it has given, until it is removed."""

    def __init__(self, embedding: TimeEmbedding) -> None:
        self.width = embedding.width
        self._given: dict[int, Given] = {}
        self._handles = [module.register_forward_hook(self._add) for module in embedding.modules]

    @property
    def given(self) -> Given | None:
        """What is added in the calls of this thread."""
        return self._given.get(threading.get_ident())

    def give(self, value: Tensor | None) -> None:
        """From now on add `value` in the calls of this thread; TsAdaptError for another width."""
        if value is not None and value.shape[-1] != self.width:
            raise TsAdaptError(
                f"the schedule adds {value.shape[-1]} numbers to the network's embedding of the time, which has "
                f"{self.width}; take one that was learned for this network"
            )
        self._set(None if value is None else Given(value))

    @contextmanager
    def giving(self, given: Given | None) -> Iterator[None]:
        """Within the block add what was `given` before."""
        now = self.given
        self._set(given)
        try:
            yield
        finally:
            self._set(now)

    def check_met(self) -> None:
        """TsAdaptError if this thread gives something and no module was met that it was added to."""
        if self.given is not None and not self.given.met:
            raise TsAdaptError(
                "the schedule adds to the network's embedding of the time, which was not met in its call: the network "
                "is another than the one that was looked at; attach the schedule anew"
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _set(self, given: Given | None) -> None:
        self._given.pop(threading.get_ident(), None)
        if given is not None:
            self._given[threading.get_ident()] = given

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if (given := self.given) is None:
            return None
        given.met = True
        return out + _rows(given.value, len(out)).to(out)


def _rows(value: Tensor, rows: int) -> Tensor:
    """`value` `(D,)` or `(B, D)` for `rows` embedded times."""
    if value.ndim == 1 or len(value) == rows:
        return value
    if rows % len(value):
        raise TsAdaptError(f"the schedule adds to the embedding of {len(value)} samples' times, and there are {rows}")
    return value.repeat(rows // len(value), 1)


_found: WeakKeyDictionary[nn.Module, TimeEmbedding | None] = WeakKeyDictionary()


def time_embedding(network: nn.Module, call: Callable[[], Any]) -> TimeEmbedding | None:
    """That of `network`, found in one `call` of it when it is first asked for; None: nothing embeds times in it.

    In the call nothing is compiled: hooks would be left in the graph.
    """
    if network not in _found:
        with torch.no_grad(), uncompiled(), given_times([network]) as found:
            call()
        _found[network] = found.embedding
    return _found[network]


@dataclass
class Embedded:
    """Met in a block of `given_times`.

    times   the modules that embed times, and the first that each was given
    behind  the modules that were given an embedding alone, and the widths of their answers
    """

    times: dict[nn.Module, float] = field(default_factory=dict)
    behind: dict[nn.Module, int] = field(default_factory=dict)
    answers: dict[nn.Module, Tensor] = field(default_factory=dict)

    @property
    def embedding(self) -> TimeEmbedding | None:
        widths = self.behind or {module: answer.shape[-1] for module, answer in self.answers.items()}
        if not widths:
            return None
        width = next(iter(widths.values()))
        return TimeEmbedding(tuple(module for module, each in widths.items() if each == width), width)


@contextmanager
def given_times(networks: Sequence[nn.Module]) -> Iterator[Embedded]:
    """What embeds the time in calls of `networks` within the block: the outermost modules, as the head has it."""
    met = Embedded()

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not isinstance(out, Tensor) or out.ndim != 2 or not _alone(args, kwargs) or len(out) != len(args[0]):
            return
        first = args[0]
        if first.ndim == 1:
            _forget_inside(module, met.times, met.answers)
            if module not in met.times:  # it may embed other numbers too, afterwards
                met.times[module], met.answers[module] = float(first.flatten()[0]), out
        elif any(_same(first, answer) for answer in met.answers.values()):
            _forget_inside(module, met.behind)
            met.behind.setdefault(module, out.shape[-1])

    handles = [
        module.register_forward_hook(after, with_kwargs=True)
        for network in networks
        for module in network.modules()
        if module is not network
    ]
    try:
        yield met
    finally:
        for handle in handles:
            handle.remove()


def _forget_inside(module: nn.Module, *found: dict[nn.Module, Any]) -> None:
    """Of what was `found`, leave out what is inside `module`: it was called before."""
    for inside in module.modules():
        if inside is not module:
            for each in found:
                each.pop(inside, None)


def _alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module is given real numbers `(n,)` or `(n, C)` first, and no other tensor."""
    first, *others = [*args, *kwargs.values()] or [None]
    if not args or not isinstance(first, Tensor) or any(isinstance(other, Tensor | dict) for other in others):
        return False
    return first.ndim in (1, 2) and len(first) > 0 and first.is_floating_point()


def _same(given: Tensor, answer: Tensor) -> bool:
    """Whether `given` is `answer`, in whatever precision."""
    return given.shape == answer.shape and torch.equal(given, answer.to(given))
