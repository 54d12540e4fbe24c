"""Text and image encoders of a pipeline, run once for each prompt and not at every gradient step.

Within `called(encoders, Encoded().by)` a call of an encoder is looked up row by row, by the very numbers that it is
given: token ids, masks, pixels. Rows that are new are run together, without gradient. The oldest are forgotten beyond
`LIMIT` bytes.

An answer may hold the states of every layer, of which a pipeline reads one. What is read shows in its first call: each
tensor is handed out as a `Promise`, which is kept at the first use; behind the call `settle` forgets the others. One
that is read for the first time later is made by running the encoder again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ts_adapt.numerics import each_tensor, tensors_in
from ts_adapt.pipelines.networks import rows_of

LIMIT = 2**30
"""Bytes of all that is kept, on the devices where it was made."""
Key = tuple[int, str]
"""An encoder, and what it was given."""
Kind = tuple[int, int]
"""An encoder, and how many tensors its answer holds."""


class Answer:
    """Of what an encoder answered to one row, or to all (None), the tensors at `places`, or all (None).

    tensors  by their place among all of them, of which there are `count`
    """

    def __init__(self, answer: Any, row: int | None, places: Set[int] | None) -> None:
        found = tensors_in(answer)
        self.count, self._form = len(found), each_tensor(answer, lambda value: value.new_empty(0))
        self.tensors = {
            place: value if row is None else value[row : row + 1].clone()
            for place, value in enumerate(found) if places is None or place in places
        }  # fmt: skip

    @property
    def size(self) -> int:
        return sum(value.nbytes for value in self.tensors.values())

    def with_tensors(self, tensor: Callable[[int], Tensor]) -> Any:
        """The answer, with `tensor(place)` at each place."""
        places = iter(range(self.count))
        return each_tensor(self._form, lambda _: tensor(next(places)))


class Promise(Tensor):
    """A tensor that is made when it is first used, by `make`; whatever is asked of it, that tensor is asked."""

    make: Callable[[], Tensor]

    @staticmethod
    def of(make: Callable[[], Tensor]) -> Promise:
        found: Promise = torch.empty(0).as_subclass(Promise)
        found.make = make
        return found

    @property
    def made(self) -> Tensor:
        if "_made" not in vars(self):
            self._made = self.make()
        return self._made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Promise, lambda promise: promise.made, (args, kwargs or {}))
        return func(*args, **kwargs)


class Encoded:
    """What encoders have answered so far; `by` calls them (`networks.called`), `settle` ends a call of the pipeline.

    read   of answers of a kind the places of the tensors that were used
    known  the same, as it was when the last call of the pipeline had ended: no others are kept
    whole  encoders of whose answers the rows cannot be told apart
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.size = limit, 0
        self.rows: OrderedDict[Key, Answer] = OrderedDict()
        self.read: dict[Kind, set[int]] = {}
        self.known: dict[Kind, frozenset[int]] = {}
        self.whole: set[int] = set()

    def by(self, encoder: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The answer of `encoder`, of which only the rows that are new are computed."""
        arguments = tree_map_only(Promise, lambda promise: promise.made, arguments)
        batch = rows_of(arguments)
        given = [value for value in arguments.values() if isinstance(value, Tensor)]
        if id(encoder) in self.whole or any(value.shape[:1] != (batch,) for value in given):
            return self._whole(encoder, forward, arguments)
        keys = [(id(encoder), _hash(arguments, row)) for row in range(batch)]
        missing = list({key: row for row, key in enumerate(keys) if not self._has(key)}.values())
        found = {key: self.rows[key] for key in keys if self._has(key)}
        if missing:
            rows = missing if len(missing) > 1 else missing * 2  # of one row a number for all could not be told
            answer = _quietly(forward, arguments if rows == list(range(batch)) else _picked(arguments, rows))
            tensors = tensors_in(answer)
            if not tensors or any(value.shape[:1] != (len(rows),) for value in tensors):
                self.whole.add(id(encoder))
                return self._whole(encoder, forward, arguments)
            for place, row in enumerate(missing):
                found[keys[row]] = self._keep(keys[row], answer, place)
        for key in keys:
            if key in self.rows:
                self.rows.move_to_end(key)
        return self._handed_out(encoder, [found[key] for key in keys], lambda: _quietly(forward, arguments))

    def settle(self) -> None:
        """Forget the tensors that no call of the pipeline has read."""
        self.known = {kind: frozenset(places) for kind, places in self.read.items()}
        for (encoder, _), answer in self.rows.items():
            known = self.known[encoder, answer.count]
            answer.tensors = {place: value for place, value in answer.tensors.items() if place in known}
        self.size = sum(answer.size for answer in self.rows.values())

    def _whole(self, encoder: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The answer to all rows together, where they cannot be told apart."""
        key = (id(encoder), _hash(arguments))
        answer = self.rows[key] if self._has(key) else self._keep(key, _quietly(forward, arguments), None)
        return self._handed_out(encoder, [answer], lambda: _quietly(forward, arguments))

    def _has(self, key: Key) -> bool:
        """Whether all that is read of an answer is kept."""
        answer = self.rows.get(key)
        return answer is not None and self.known.get((key[0], answer.count), frozenset()) <= answer.tensors.keys()

    def _keep(self, key: Key, answer: Any, row: int | None) -> Answer:
        kept = Answer(answer, row, self.known.get((key[0], len(tensors_in(answer)))))
        self.size += kept.size - (self.rows[key].size if key in self.rows else 0)
        self.rows[key] = kept
        while self.size > self.limit and len(self.rows) > 1:
            self.size -= self.rows.popitem(last=False)[1].size
        return kept

    def _handed_out(self, encoder: nn.Module, answers: list[Answer], again: Callable[[], Any]) -> Any:
        """The answers to single rows as one to all of them; `again` runs the encoder for them."""
        first, kept = answers[0], [answer.tensors for answer in answers]
        kind = id(encoder), first.count
        read, known = self.read.setdefault(kind, set()), self.known.get(kind, frozenset())

        def joined(place: int) -> Tensor:
            read.add(place)
            if any(place not in tensors for tensors in kept):
                return tensors_in(again())[place]
            return torch.cat([tensors[place] for tensors in kept]) if len(kept) > 1 else kept[0][place].clone()

        return first.with_tensors(lambda place: joined(place) if place in known else Promise.of(partial(joined, place)))


def _hash(arguments: dict[str, Any], row: int | None = None) -> str:
    """Of what is given for one row, or for all."""
    digest = hashlib.sha256()
    for name, value in sorted(arguments.items()):
        own = value[row] if isinstance(value, Tensor) and row is not None else value
        kinds = each_tensor(own, lambda part: f"{part.dtype} {tuple(part.shape)}")
        digest.update(f"{name} {kinds!r} ".encode())
        for part in tensors_in(own):
            digest.update(part.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _picked(arguments: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _quietly(forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        return _plain(forward(**arguments))


def _plain(answer: Any) -> Any:
    """`answer` without what is neither numbers nor holds them: caches of keys and values."""
    if isinstance(answer, dict):
        return type(answer)(**{key: _plain(value) for key, value in answer.items()})
    if isinstance(answer, list | tuple):
        return type(answer)(_plain(value) for value in answer)
    return answer if isinstance(answer, Tensor | int | float | str) else None
