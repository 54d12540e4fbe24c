"""Where a network embeds the time, found by what its modules are given, and what is added to it there.

    e = sinusoids(tau)      the module that is given times `(n,)` and nothing else, and returns `(n, C)`: `Timesteps` of
                            diffusers, the Fourier features of EDM, the embedders of DiT
    v = mlp(e)              the first module that is given e, as it is, and nothing else, and returns `(n, D)`
    v + d                   goes on to all layers; e + d where e is made by layers already, or given to nothing alone

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
from ts_adapt.errors import TsAdaptError


@dataclass(frozen=True)
class TimeEmbedding:
    """Of a network: the `modules` that answer with v, all of the same `width` D, and their `names` in it."""

    modules: tuple[nn.Module, ...]
    width: int
    names: tuple[str, ...]

    def is_of(self, network: nn.Module) -> bool:
        """Whether the modules are still those of `network`."""
        try:
            return all(network.get_submodule(name) is own for name, own in zip(self.names, self.modules, strict=True))
        except AttributeError:
            return False

    @contextmanager
    def adding(self, value: Tensor) -> Iterator[None]:
        """Within the block, `value` is added to v in the calls of this thread; errors as those of `OffsetHook`."""
        hook = OffsetHook(self)
        before = offsets_now()
        _of_thread.offsets = (*before, (self, value))
        try:
            hook.give(value)
            yield
            hook.check_met()
        finally:
            _of_thread.offsets = before
            hook.remove()


_of_thread = threading.local()


def offsets_now() -> tuple[tuple[TimeEmbedding, Tensor], ...]:
    """What blocks of `adding` add now, in this thread: for a call that is made again, in a backward pass."""
    found: tuple[tuple[TimeEmbedding, Tensor], ...] = getattr(_of_thread, "offsets", ())
    return found


@dataclass
class Offset:
    """What is added: `value`, `(D,)` or `(B, D)`, in a call on `rows` rows, where that is known; `met`: it has been."""

    value: Tensor
    rows: int | None = None
    met: bool = False

    def to(self, times: int) -> Tensor:
        """Of each of `times` that are embedded; TsAdaptError where they cannot be those of the samples.

        Of a call on known rows fewer times are those of its first rows, and more are several for each row.
        """
        value = self.value
        if value.ndim == 1 or len(value) == times:
            return value
        if self.rows is not None:
            value = _copied(value, self.rows)
            if times % self.rows == 0:
                return value.repeat_interleave(times // self.rows, 0)
            if times < self.rows:
                return value[:times]
        return _copied(value, times)


class OffsetHook:
    """What adds to v in an `embedding`, for each thread what it has given, until it is removed."""

    def __init__(self, embedding: TimeEmbedding) -> None:
        self.embedding = embedding
        self._offsets: dict[int, Offset] = {}
        self._last: Offset | None = None
        self._handles = [module.register_forward_hook(self._add) for module in embedding.modules]

    @property
    def now(self) -> Offset | None:
        """What is added in the calls of this thread."""
        return self._offsets.get(threading.get_ident())

    def give(self, value: Tensor | None, rows: int | None = None) -> None:
        """From now on add `value` in the calls of this thread, on `rows` rows; TsAdaptError for another width."""
        if value is not None and value.shape[-1] != self.embedding.width:
            raise TsAdaptError(
                f"the schedule adds {value.shape[-1]} numbers to the network's embedding of the time, which has "
                f"{self.embedding.width}; take one that was learned for this network"
            )
        self._set(None if value is None else Offset(value, rows))

    @contextmanager
    def again(self, offset: Offset | None) -> Iterator[None]:
        """Within the block add the `offset` of before."""
        now = self.now
        self._set(offset)
        try:
            yield
        finally:
            self._set(now)

    def check_met(self) -> None:
        """TsAdaptError if this thread gives something and no module was met that it was added to."""
        if self.now is not None and not self.now.met:
            raise TsAdaptError(
                "the schedule adds to the network's embedding of the time, which was not met in its call: the network "
                "was compiled, or changed, since it was looked at; compile it, or put the schedule on it, anew"
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _set(self, offset: Offset | None) -> None:
        self._last = offset
        self._offsets.pop(threading.get_ident(), None)
        if offset is not None:
            self._offsets[threading.get_ident()] = offset

    def _add(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        offset = self._last if torch.compiler.is_compiling() else self.now  # threads are unknown inside of a graph
        if offset is None:
            return None
        offset.met = True
        return out + offset.to(len(out)).to(out)


def _copied(value: Tensor, rows: int) -> Tensor:
    """`value` `(B, D)` for `rows` that are copies of the samples, in turn."""
    if rows % len(value):
        raise TsAdaptError(f"the schedule adds to the embedding of {len(value)} samples' times, and there are {rows}")
    return value.repeat(rows // len(value), 1)


_found: WeakKeyDictionary[nn.Module, TimeEmbedding] = WeakKeyDictionary()


def time_embedding(network: nn.Module, call: Callable[[], Any]) -> TimeEmbedding | None:
    """That of `network`, found in one `call` of it when it is first asked for; None: nothing embeds times in it.

    It is looked for again where the modules have been replaced. In the call nothing is compiled: hooks would be left
    in the graph.
    """
    found = _found.get(network)
    if found is None or not found.is_of(network):
        with torch.no_grad(), uncompiled(), watched([network]) as met:
            call()
        found = met.embedding(network)
        if found is not None:
            _found[network] = found
    return found


@dataclass
class Met:
    """What was met in a block of `watched`.

    times    the modules that embed times, and the first that each was given
    answers  what each of them answered first
    behind   the first module that was given such an answer alone, by the one that made it, and how wide it answered
    """

    times: dict[nn.Module, float] = field(default_factory=dict)
    answers: dict[nn.Module, Tensor] = field(default_factory=dict)
    behind: dict[nn.Module, tuple[nn.Module, int]] = field(default_factory=dict)

    def embedding(self, network: nn.Module) -> TimeEmbedding | None:
        """That of `network`, as the head has it."""
        found: list[tuple[nn.Module, int]] = []
        for module, answer in self.answers.items():
            itself = module, answer.shape[-1]
            found.append(itself if _has_layers(module) else self.behind.get(module, itself))
        if not found:
            return None
        width = found[0][1]
        modules = tuple(module for module, each in found if each == width)
        names = {module: name for name, module in network.named_modules()}
        return TimeEmbedding(modules, width, tuple(names[module] for module in modules))


@contextmanager
def watched(networks: Sequence[nn.Module]) -> Iterator[Met]:
    """What embeds the time in calls of `networks` within the block."""
    met = Met()

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not isinstance(out, Tensor) or out.ndim != 2 or not _alone(args, kwargs) or len(out) != len(args[0]):
            return
        first, inside = args[0], {*module.modules()} - {module}  # those inside were called before
        if first.ndim == 1:
            for found in (met.times, met.answers, met.behind):
                for each in inside & found.keys():
                    del found[each]
            if module not in met.times:  # it may embed other numbers too, afterwards
                met.times[module], met.answers[module] = float(first.flatten()[0]), out
            return
        for maker, answer in met.answers.items():
            same = first.shape == answer.shape and torch.equal(first, answer.to(first))  # in whatever precision
            if same and (maker not in met.behind or met.behind[maker][0] in inside):
                met.behind[maker] = module, out.shape[-1]

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


def _has_layers(module: nn.Module) -> bool:
    """Whether it has modules inside that have weights: an MLP behind its own sinusoids."""
    return any(True for inside in module.children() for _ in inside.parameters())


def _alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module is given real numbers `(n,)` or `(n, C)` first, and no other tensor."""
    first, *others = [*args, *kwargs.values()] or [None]
    if not args or not isinstance(first, Tensor) or any(isinstance(other, Tensor | dict) for other in others):
        return False
    return first.ndim in (1, 2) and len(first) > 0 and first.is_floating_point()
