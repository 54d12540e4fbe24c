"""How the networks of a pipeline are called within a block: every call of `forward` is made by somebody else.

    with called(networks, by):          by(network, forward, arguments) in place of forward(...)

Hooks on the networks see the call as ever, those before it and those after it. `Recorded` keeps what a network
answered, `silent` answers zeros like that, for a run in which nothing is to be evaluated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ts_adapt.numerics import each_tensor

By = Callable[[nn.Module, Callable[..., Any], dict[str, Any]], Any]
"""(network, its forward, the arguments by name) -> what the call returns."""


@contextmanager
def called(networks: Iterable[nn.Module], by: By) -> Iterator[None]:
    """Within the block calls of `networks` are made by `by`, not compiled."""
    former = [(network, network.__dict__.get("forward"), network._compiled_call_impl) for network in networks]
    for network, _, _ in former:
        network.forward = partial(_called, network, network.forward, by)
        network._compiled_call_impl = None
    try:
        yield
    finally:
        for network, forward, compiled in former:
            if forward is None:
                del network.__dict__["forward"]
            else:
                network.forward = forward
            network._compiled_call_impl = compiled


def _called(network: nn.Module, forward: Callable[..., Any], by: By, *args: Any, **kwargs: Any) -> Any:
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    return by(network, forward, {**dict(zip(names, args, strict=False)), **kwargs})


def rows_of(arguments: dict[str, Any]) -> int:
    """How many rows a call has: those of the first tensor that is given, or of the first of a list of them."""
    for value in arguments.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return len(value)
    return 1


class Recorded:
    """In what form networks answered last; in its place zeros of any number of rows."""

    def __init__(self) -> None:
        self.answers: dict[nn.Module, tuple[int, Any]] = {}

    def listen(self, network: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call the network and keep the form of its answer."""
        answer = forward(**arguments)
        form = each_tensor(answer, lambda value: value.new_zeros(()).expand(value.shape))  # one zero is kept
        self.answers[network] = rows_of(arguments), form
        return answer

    def silent(self, network: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Zeros in the form of the answer that was heard, for the rows of this call; the network is not run."""
        if network not in self.answers:
            return self.listen(network, forward, arguments)
        then, answer = self.answers[network]
        return _with_rows(answer, then, rows_of(arguments))


def _with_rows(answer: Any, then: int, rows: int) -> Any:
    """`answer`, which was to `then` rows, as one to `rows`."""
    if isinstance(answer, list) and len(answer) == then and isinstance(answer[0], Tensor):  # one for each sample
        return [answer[0]] * rows
    if isinstance(answer, tuple):
        return tuple(_with_rows(value, then, rows) for value in answer)
    if isinstance(answer, dict) and type(answer) is not dict:
        return type(answer)(**{key: _with_rows(value, then, rows) for key, value in answer.items()})
    return each_tensor(answer, lambda value: value[:1].expand(rows, *value.shape[1:]).clone())
