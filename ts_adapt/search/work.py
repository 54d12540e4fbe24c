"""What learning takes, counted before it begins: solves, or evaluations of the network, of one sample."""

from __future__ import annotations

from dataclasses import dataclass

SLOWER = 3.0
"""How much longer an evaluation with a gradient takes, where it is not measured."""


@dataclass(frozen=True)
class Work:
    """`plain` ones, and those through which a `gradient` passes."""

    plain: float = 0
    gradient: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.plain + other.plain, self.gradient + other.gradient)

    def times(self, count: float) -> Work:
        return Work(self.plain * count, self.gradient * count)

    @property
    def count(self) -> int:
        return round(self.plain + self.gradient)

    def seconds(self, each: tuple[float, float] = (1.0, SLOWER)) -> float:
        """How long evaluations take, by the seconds of each kind; by default in plain ones."""
        return self.plain * each[0] + self.gradient * each[1]
