"""What cachers have in common: they are put on a network, told the step, and taken off again.

    network = cacher.attach(network)        the very module, changed in place; with `NetworkDenoiser` that is all
    begin(steps, batch)                     a run of `steps` steps for `batch` samples begins: nothing is kept
    at(index)                               the calls of the network that follow belong to step `index`
    end()                                   the run is over; the network is itself until the next one
    network = cacher.remove(network)        the network as it was

A solver with two evaluations a step (Heun) stays at one index for both. Who runs the loop tells the step:
`sampling.integrate` and, in pipelines, `schedulers.attach` or `loops`; the step is never guessed from a timestep.
Outside a run the network is called as if nothing were attached, with a warning until there was a first one.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ts_adapt.denoisers.execution import execution_of
from ts_adapt.denoisers.network import add_step_aware, remove_step_aware, step_aware_parts
from ts_adapt.errors import TsAdaptError, TsAdaptWarning

NETWORKS = ("UNet2DModel", "UNet2DConditionModel")


Action = Callable[..., Any]
"""What a module does instead of its forward: (forward, *args, **kwargs) -> what the module returns."""


class Cacher(ABC):
    """A cacher for one network at a time.

    network  what it is attached to, or None
    steps, batch, index  of the run; index is None outside of one
    runs     how many have begun
    once_a_step  whether it takes the calls of a step for one
    """

    kind: ClassVar[str]
    once_a_step: ClassVar[bool] = True

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self.steps = self.batch = 0
        self.index: int | None = None
        self.runs = 0
        self._hooked: list[nn.Module] = []

    @abstractmethod
    def actions(self, network: nn.Module) -> list[tuple[nn.Module, Action]]:
        """What the modules of `network` do from now on; TsAdaptError if it lacks what is needed."""

    @abstractmethod
    def forget(self) -> None:
        """Drop all that is kept."""

    def refuse(self, network: nn.Module) -> None:
        """TsAdaptError for a kind of network that this is not for; in general, all but UNets."""
        if not any(ancestor.__name__ in NETWORKS for ancestor in type(network).__mro__):
            raise TsAdaptError(
                f"{self.kind} works on diffusers' {' and '.join(NETWORKS)}; got {type(network).__name__} "
                "(compile or wrap a network after attaching)"
            )

    def attach(self, network: nn.Module) -> nn.Module:
        """Put the cacher on `network`, and return it.

        Raises TsAdaptError if the cacher is in use, if one of its kind is attached, under gradient checkpointing, and
        for a network that it is not for, that is compiled or has not the blocks it needs. Whatever is raised, an
        interrupt too, leaves the network as it was.
        """
        if self.network is not None:
            raise TsAdaptError(f"this {self.kind} is attached to a network already; remove it there, or build another")
        self.refuse(network)
        if execution_of(network).compile is not None:
            raise TsAdaptError(
                f"{self.kind} changes from step to step what is run of the network, and this {type(network).__name__} "
                "is compiled as one piece; leave model.compile out, or the cacher"
            )
        if any(isinstance(part, type(self)) for part in step_aware_parts(network)):
            raise TsAdaptError(f"a {self.kind} is attached to this network already; remove that one first")
        self._refuse_checkpointing(network)
        from ts_adapt.cachers.hooks import install

        try:
            for module, action in self.actions(network):
                self._hooked.append(module)
                install(module, self.kind, action)
            self.network = network
            add_step_aware(network, self)
            self.end()
        except BaseException:
            self._take_off(network)
            raise
        return network

    def remove(self, network: nn.Module) -> nn.Module:
        """Take the cacher off `network`, and return it as it was before; TsAdaptError if it is not attached there."""
        if self.network is None or self.network is not network:
            raise TsAdaptError(f"this {self.kind} is not attached to that network; there is nothing to remove")
        self._take_off(network)
        return network

    def _take_off(self, network: nn.Module) -> None:
        """Undo as much as has been done of `attach`."""
        from ts_adapt.cachers.hooks import uninstall

        for module in self._hooked:
            uninstall(module, self.kind)
        if self in step_aware_parts(network):
            remove_step_aware(network, self)
        self.end()
        self.network, self._hooked = None, []

    def begin(self, steps: int, batch: int) -> None:
        self.end()
        if self.network is not None:
            self._refuse_checkpointing(self.network)
        self.steps, self.batch, self.runs = steps, batch, self.runs + 1

    def at(self, index: int | None) -> None:
        self.index = index

    def outside(self) -> bool:
        """Whether a call of the network is outside of a run."""
        if not self.runs:
            warnings.warn(
                f"{self.kind} is told no step, so that nothing is cached; sample by `integrate`, or give the pipeline "
                "in place of its network: `with cachers.attached(pipe, ...)`",
                TsAdaptWarning,
                stacklevel=2,
            )
        return self.index is None

    def end(self) -> None:
        self.index = None
        self.forget()

    def for_rows(self, kept: Tensor, rows: int, *, mean: bool = False) -> Tensor:
        """`kept` for `rows` rows: as it is, or of a guided batch the conditional half, which comes second, or the mean
        of both halves; TsAdaptError for any other number."""
        if kept.shape[0] == rows:
            return kept
        if kept.shape[0] != 2 * rows:
            raise TsAdaptError(
                f"{self.kind} has kept {kept.shape[0]} rows and the network is called with {rows} in the same run; "
                "tell it of a new batch with begin(steps, batch)"
            )
        return (kept[:rows] + kept[rows:]) / 2 if mean else kept[rows:]

    def _refuse_checkpointing(self, network: nn.Module) -> None:
        if network.is_gradient_checkpointing:
            raise TsAdaptError(
                f"{self.kind} keeps features from step to step and cannot be used under gradient checkpointing, which "
                "computes them twice; call network.disable_gradient_checkpointing() first"
            )


def whole(name: str, value: Any, least: int) -> int:
    """`value` if it is a whole number of at least `least`; else a TsAdaptError that calls it `name`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TsAdaptError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return value
