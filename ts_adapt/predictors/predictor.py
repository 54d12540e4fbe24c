"""What one-shot and recursive predictors have in common: one network, and the static grids that it corrects.

A predictor serves the numbers of steps N that it is given static grids for, one or several. Its network is asked at
places: once for each N (one-shot), or at every step i of each, and before the first (recursive, i = N). Places are
numbered with N rising, then i:

    place(N, i) = i + sum of the places of all smaller N
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import START, Condition, NoiseSchedule, StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.numerics import scale
from ts_adapt.predictors.encoder import Encoder, shorten_gradient
from ts_adapt.predictors.start import Moved, Start

Static = Tensor | TimeGrid


class Predictor(nn.Module):
    """Corrects the grid `static`, or several of them with each another N, for samples of `shape` `(C, H, W)`.

    static         times `(N+1,)`, or a grid that has some of the corrections too: an untrained predictor *is* that grid
    corrections    some of shift, scale, coefficients, history, guidance, start (`start`), learned beside the times
    order          the solver's, for the number of coefficients
    width, hidden  of the network (`encoder`)
    classes, text  what it sees of a condition (`encoder`)

    Raises TsAdaptError for two grids of the same N, and for none.
    """

    kind: ClassVar[str]
    pictures: ClassVar[int]
    """How many pictures of C channels the network is shown at once."""
    every_step: ClassVar[bool]
    """Whether the network is asked at every step and before the first, or once."""

    def __init__(
        self, noise_schedule: NoiseSchedule, static: Static | Sequence[Static], shape: Sequence[int], *,
        corrections: Sequence[str] = (), order: int = 1, width: int = 24, hidden: int = 128, classes: int = 0,
        text: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        given = [static] if isinstance(static, Tensor | TimeGrid) else list(static)
        grids = [each if isinstance(each, TimeGrid) else TimeGrid(each) for each in given]
        grids = sorted((each.mapped(lambda v, _: v.detach().double()) for each in grids), key=lambda each: each.steps)
        self.learned: tuple[int, ...] = tuple(grid.steps for grid in grids)
        self.begun = dict(zip(self.learned, grids, strict=True))
        """The grids that it corrects, with their corrections, until it is trained; loaded, their times alone."""
        if not grids or len(set(self.learned)) < len(grids):
            raise TsAdaptError(f"a predictor corrects static grids of different N; got N = {list(self.learned)}")
        self.noise_schedule = noise_schedule
        self.options: dict[str, Any] = dict(
            steps=list(self.learned), shape=list(shape), corrections=list(corrections), order=order, width=width,
            hidden=hidden, classes=classes, text=text,
        )  # fmt: skip
        self.register_buffer("static_times", torch.cat([grid.times for grid in grids]))
        self.static_times: Tensor
        of_grids = [name for name in corrections if name != START.name]
        self.spaces = {steps: GridSpace(noise_schedule, steps, of_grids, order) for steps in self.learned}
        largest = self.spaces[self.learned[-1]]
        self.encoder = Encoder(
            self.pictures * shape[0], largest.size // (largest.steps if self.every_step else 1),
            places=self.places(self.learned[-1]).stop, width=width, hidden=hidden, size=(shape[1], shape[2]),
            classes=classes, text=text,
        )  # fmt: skip
        self.start: Start | None = None
        if START.name in corrections:
            self.start = Start(self.pictures * shape[0], shape[0], hidden, len(self.learned))
        for steps in self.learned:
            self.forget(steps)

    def _check(self, steps: int) -> None:
        if steps not in self.learned:
            known = ", ".join(map(str, self.learned))
            raise TsAdaptError(f"this predictor was learned for {known} steps, not for {steps}; give one of them")

    def static(self, steps: int) -> Tensor:
        """The static grid of `steps` steps, `(N+1,)`; TsAdaptError where it was not learned for them."""
        self._check(steps)
        grids: tuple[Tensor, ...] = self.static_times.split([other + 1 for other in self.learned])
        return grids[self.learned.index(steps)]

    def places(self, steps: int) -> slice:
        """The places of a solve of `steps` steps."""
        self._check(steps)
        counts = {other: self.asked(other) for other in self.learned}
        begin = sum(count for other, count in counts.items() if other < steps)
        return slice(begin, begin + counts[steps])

    @classmethod
    def asked(cls, steps: int) -> int:
        """How often the network is asked in a solve of `steps` steps."""
        return steps + 1 if cls.every_step else 1

    def forget(self, steps: int) -> None:
        """Be the grid that is corrected itself in solves of `steps` steps, as before training."""
        self.encoder.forget(self.places(steps), self.shared(self.begun[steps]))
        if self.start is not None:
            self.start.weight.data[self.learned.index(steps)] = 0

    def shared(self, grid: TimeGrid) -> Tensor:
        """The network's numbers `(places, P)` of the corrections of `grid`, at the times of the static one."""
        raise NotImplementedError

    def standardise(self, steps: int, states: Tensor, x0: Tensor) -> None:
        """Measure the inputs on solves along the static grid: states and x0 `(n, N+1, ...)`, `(n, N, ...)`."""
        raise NotImplementedError

    def first_picture(self, x_T: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """What the network sees at the first place."""
        raise NotImplementedError

    def policy(self, steps: int | None = None, first: int = 0) -> StepPolicy:
        """The policy of solves of `steps` steps (None: the only number learned), from node `first` of the grid on."""
        raise NotImplementedError

    def _with_start(self, policy: StepPolicy, steps: int) -> StepPolicy:
        """`policy`, with the learned start where there is one."""
        return policy if self.start is None else Moved(policy, partial(self._change, self.start, steps))

    def _change(self, start: Start, steps: int, x_T: Tensor, x0: Tensor, t: Tensor, condition: Condition) -> Tensor:
        place = self.places(steps).start
        seen = self.encoder.seen(self.first_picture(x_T, x0, t), place)
        found = start(seen, self.encoder.features(seen, place, condition), self.learned.index(steps))
        return scale(self.noise_schedule.sigma(t), shorten_gradient(found.flatten(1)).view_as(found))

    def _steps(self, steps: int | None) -> int:
        if steps is None and len(self.learned) > 1:
            known = ", ".join(map(str, self.learned))
            raise TsAdaptError(f"this predictor was learned for {known} steps; say which")
        taken = self.learned[0] if steps is None else steps
        self._check(taken)
        return taken
