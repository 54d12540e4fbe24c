"""A denoiser around another one: whatever it does not change is the other's."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from ts_adapt.interfaces import Condition, Denoiser, NoiseSchedule, StepAware


def _inner(name: str) -> Any:
    """The attribute `name` of the denoiser inside, read and written there."""
    return property(lambda self: getattr(self.denoiser, name), lambda self, value: setattr(self.denoiser, name, value))


class Wrapped(Denoiser):
    """Around `denoiser`; a subclass gives the call."""

    evaluations: int = _inner("evaluations")
    noise_schedule: NoiseSchedule = _inner("noise_schedule")
    shape: tuple[int, ...] = _inner("shape")

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.denoiser!r})"

    def __getattr__(self, name: str) -> Any:
        """What only some denoisers have is the denoiser's too."""
        if name == "denoiser":
            raise AttributeError(name)
        return getattr(self.denoiser, name)

    def timestep(self, time: Tensor, x: Tensor) -> Tensor:
        return self.denoiser.timestep(time, x)

    @property
    def step_aware(self) -> tuple[StepAware, ...]:
        return self.denoiser.step_aware

    def shown(self, x: Tensor, condition: Condition) -> tuple[Tensor, Condition]:
        return self.denoiser.shown(x, condition)

    def decode(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return self.denoiser.decode(x, condition)

    def to(self, *where: Any, **given: Any) -> Self:
        """Move the denoiser inside; returns the one around it."""
        self.denoiser.to(*where, **given)
        return self

    def draw(self, count: int, seed: int) -> Tensor | None:
        return self.denoiser.draw(count, seed)


for _name in Denoiser.__annotations__:  # those with a default too
    setattr(Wrapped, _name, _inner(_name))
