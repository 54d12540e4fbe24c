"""What learning takes, counted before it begins: solves, or evaluations of the network, of one sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Seconds of an evaluation of one sample without a gradient, and with one; of each result, those beside these."""

    plain: float
    gradient: float
    result: float = 0.0


@dataclass(frozen=True)
class Work:
    """`plain` ones, and those through which a `gradient` passes; `results`, of which each takes something by itself."""

    plain: float = 0
    gradient: float = 0
    results: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.plain + other.plain, self.gradient + other.gradient, self.results + other.results)

    def times(self, count: float) -> Work:
        return Work(self.plain * count, self.gradient * count, self.results * count)

    @property
    def count(self) -> int:
        return round(self.plain + self.gradient)

    def seconds(self, pace: Pace) -> float:
        """How long it takes."""
        return self.plain * pace.plain + self.gradient * pace.gradient + self.results * pace.result
