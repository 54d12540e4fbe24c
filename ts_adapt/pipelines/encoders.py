"""Text and image encoders of a pipeline, run once for each prompt and not at every gradient step.

Within `called(encoders, Encoded().by)` a call of an encoder is looked up row by row, by the very numbers that it is
given: token ids, masks, pixels. Rows that are new are run together, without gradient. The oldest are forgotten beyond
`LIMIT` bytes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.pipelines.networks import changed, rows_of, tensors_in

LIMIT = 2**30
"""Bytes of all that is kept, on the devices where it was made."""
Row = tuple[Any, int]
"""What an encoder answered to one row, and its size in bytes."""


class Encoded:
    """What encoders have answered so far; `by` calls them (`networks.called`)."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.size = limit, 0
        self.rows: OrderedDict[tuple[int, str], Row] = OrderedDict()

    def by(self, encoder: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The answer of `encoder`, of which only the rows that are new are computed."""
        batch = rows_of(arguments)
        given = [value for value in arguments.values() if isinstance(value, Tensor)]
        if any(value.shape[:1] != (batch,) for value in given):
            return self._whole(encoder, forward, arguments)
        keys = [(id(encoder), _hash(arguments, row)) for row in range(batch)]
        missing = list({key: row for row, key in enumerate(keys) if key not in self.rows}.values())
        found = {key: self.rows[key][0] for key in keys if key in self.rows}
        if missing:
            rows = missing if len(missing) > 1 else missing * 2  # of one row a number for all could not be told
            answer = _quietly(forward, arguments if rows == list(range(batch)) else _picked(arguments, rows))
            tensors = tensors_in(answer)
            if not tensors or any(value.shape[:1] != (len(rows),) for value in tensors):
                return self._whole(encoder, forward, arguments)
            for place, row in enumerate(missing):
                found[keys[row]] = changed(answer, partial(_row, place))
                self._keep(keys[row], found[keys[row]])
        for key in keys:
            if key in self.rows:
                self.rows.move_to_end(key)
        return _joined([found[key] for key in keys])

    def _whole(self, encoder: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The answer to all rows together, where they cannot be told apart."""
        key = (id(encoder), _hash(arguments))
        if key not in self.rows:
            self._keep(key, _quietly(forward, arguments))
        return changed(self.rows[key][0], Tensor.clone)

    def _keep(self, key: tuple[int, str], answer: Any) -> None:
        size = sum(value.nbytes for value in tensors_in(answer))
        self.rows[key] = answer, size
        self.size += size
        while self.size > self.limit and len(self.rows) > 1:
            self.size -= self.rows.popitem(last=False)[1][1]


def _row(place: int, value: Tensor) -> Tensor:
    return value[place : place + 1].clone()


def _hash(arguments: dict[str, Any], row: int | None = None) -> str:
    """Of what is given for one row, or for all."""
    digest = hashlib.sha256()
    for name, value in sorted(arguments.items()):
        if isinstance(value, Tensor):
            part = value if row is None else value[row]
            digest.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode())
            digest.update(part.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {changed(value, _without_numbers)!r} ".encode())
            for part in tensors_in(value):
                digest.update(part.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without_numbers(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)}"


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


def _joined(answers: list[Any]) -> Any:
    """The answers to single rows as one to all of them."""
    first = answers[0]
    if isinstance(first, Tensor):
        return torch.cat(answers)
    if isinstance(first, dict):
        return type(first)(**{key: _joined([answer[key] for answer in answers]) for key in first})
    if isinstance(first, list | tuple):
        return type(first)(_joined(list(parts)) for parts in zip(*answers, strict=True))
    return first
