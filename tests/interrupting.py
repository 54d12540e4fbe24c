"""Calls that are interrupted, as by Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any


def interrupted(call: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`call` that is interrupted in place of being called for the `at`-th time; before and after, it is as it was."""
    numbers = count(1)

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(numbers) == at:
            raise KeyboardInterrupt
        return call(*arguments, **options)

    return counted
