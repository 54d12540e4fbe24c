"""What one-shot and recursive predictors have in common: one network, and the static grids that it corrects.

A predictor serves the numbers of steps N that it is given static grids for, one or several. Its network is asked at
places: once for each N (one-shot), or at every step i of each, and before the first (recursive, i = N). Places are
numbered with N rising, then i:

    place(N, i) = i + sum of the places of all smaller N

It serves the numbers of steps between them too, and OUTSIDE more at either end. There the static grid is that which
`parametric.between` makes of those that were learned, and what the network says of it is mixed as the corrections of
grids are there (`grids.between`), by a share k_N:

    f_N,i = k_N ((1 - w) f_n,j(n) + w f_m,j(m))

Numbers are mixed, not weights: each place is asked as it has learned to be. Two N may come to the same end by opposite
corrections, whose mean leads elsewhere: k_N in [0, 1] is the share of them that the validation samples of a training
find best, HALF where nobody has asked them, and 1 of what was learned, where f is its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError, TsAdaptWarning
from ts_adapt.grids.between import fitted, mixed, shares
from ts_adapt.grids.corrections import PICTURES
from ts_adapt.grids.parametric import between
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import RESIDUAL, START, Condition, NoiseSchedule, StepPolicy, TimeGrid
from ts_adapt.numerics import scale, shorten_gradient
from ts_adapt.predictors.changes import Change, Moved
from ts_adapt.predictors.encoder import Encoder

Static = Tensor | TimeGrid
OUTSIDE = 1
"""How many steps fewer than the least learned, and more than the most, a predictor of several N serves."""
HALF = 0.5
"""k of an N that was not learned, where no training has found one."""


def served(learned: Sequence[int]) -> range:
    """The numbers of steps that a predictor serves which was `learned` for these."""
    if len(learned) < 2:
        return range(learned[0], learned[0] + 1) if learned else range(0)
    low, high = min(learned), max(learned)
    return range(max(low - OUTSIDE, min(low, 2)), high + OUTSIDE + 1)


class Predictor(nn.Module):
    """Corrects the grid `static`, or several of them with each another N, for samples of `shape` `(C, H, W)`.

    static         times `(N+1,)`, or a grid that has some of the corrections too: an untrained predictor *is* that grid
    corrections    some of shift, scale, coefficients, history, guidance, embedding, learned beside the times; and of
                   start and, of recursive ones, residual (`changes`)
    order          the solver's, for the number of coefficients
    embedding      the width of the network's embedding of the time, where that is among the corrections
    width, hidden  of the network (`encoder`)
    classes, text, scales  what it sees of a condition (`encoder`)
    kept           k_N by N, as text, of some N that are not learned

    Raises TsAdaptError for two grids of the same N, and for none, ValueError for what `kept` may not hold.
    """

    kind: ClassVar[str]
    pictures: ClassVar[int]
    """How many pictures of C channels the network is shown at once."""
    every_step: ClassVar[bool]
    """Whether the network is asked at every step and before the first, or once."""

    def __init__(
        self, noise_schedule: NoiseSchedule, static: Static | Sequence[Static], shape: Sequence[int], *,
        corrections: Sequence[str] = (), order: int = 1, width: int = 24, hidden: int = 128, classes: int = 0,
        text: int = 0, kept: Mapping[str, float] | None = None, scales: Sequence[float] | None = None,
        embedding: int = 0,
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
            hidden=hidden, classes=classes, text=text, kept={}, **({"scales": list(scales)} if scales else {}),
            **({"embedding": embedding} if embedding else {}),
        )  # fmt: skip
        for number, share in dict(kept or {}).items():
            self.keep(int(number), share)
        self.register_buffer("static_times", torch.cat([grid.times for grid in grids]))
        self.static_times: Tensor
        largest = self.space(self.learned[-1])
        self.encoder = Encoder(
            self.pictures * shape[0], largest.size // (largest.steps if self.every_step else 1),
            places=self.places(self.learned[-1]).stop, width=width, hidden=hidden, size=(shape[1], shape[2]),
            classes=classes, text=text, scales=scales,
        )  # fmt: skip
        self.start: Change | None = None
        if START.name in corrections:
            self.start = Change(self.pictures * shape[0], shape[0], hidden, len(self.learned))
        self.residual: Change | None = None
        if RESIDUAL.name in corrections:
            if not self.every_step:
                raise TsAdaptError(
                    f"residual changes what the model predicts at every step, and a {self.kind} predictor is asked "
                    "once; train a recursive one, or take start"
                )
            self.residual = Change(self.pictures * shape[0], shape[0], hidden, sum(self.learned))
        for steps in self.learned:
            self.forget(steps)

    def _check(self, steps: int) -> None:
        if steps not in (serves := served(self.learned)):
            known = ", ".join(map(str, self.learned))
            some = f", which serves {serves[0]} to {serves[-1]}" if len(serves) > 1 else ""
            raise TsAdaptError(f"this predictor was learned for {known} steps{some}, not for {steps}; give one of them")

    def space(self, steps: int) -> GridSpace:
        """Where the network's numbers of a solve of `steps` steps belong."""
        of_grids = [name for name in self.options["corrections"] if name not in PICTURES]
        return GridSpace(self.noise_schedule, steps, of_grids, self.options["order"], self.options.get("embedding", 0))

    def static(self, steps: int) -> Tensor:
        """The static grid of `steps` steps, `(N+1,)`; TsAdaptError where they are not served."""
        self._check(steps)
        grids = dict(zip(self.learned, self.static_times.split([each + 1 for each in self.learned]), strict=True))
        return grids[steps] if steps in grids else between(grids, self.noise_schedule, steps)

    def keep(self, steps: int, share: float) -> None:
        """Let k be `share`, in [0, 1], in solves of `steps` steps, which were not learned."""
        if not 0 <= share <= 1:
            raise ValueError(f"the share of corrections at {steps} steps is {share}; it is from 0 to 1")
        self.options["kept"][str(steps)] = share

    @property
    def without_k(self) -> list[int]:
        """The numbers of steps that are served, not learned, and of which k has not been chosen."""
        kept = self.options["kept"]
        return [steps for steps in served(self.learned) if steps not in self.learned and str(steps) not in kept]

    def near(self, steps: int) -> list[tuple[int, float]]:
        """The one or two learned numbers of steps that one of `steps` is made of, with their shares, of sum k."""
        k = 1.0 if steps in self.learned else self.options["kept"].get(str(steps), HALF)
        return [(other, k * share) for other, share in shares(self.learned, steps)]

    def fitted(self, numbers: Tensor, others: int, steps: int) -> Tensor:
        """The `numbers` `(..., P)` of one step of a solve of `others` steps, as those of one of `steps`."""
        if others == steps:
            return numbers
        widths = self.space(others).widths
        parts = numbers[..., : sum(widths)].split(widths, -1)
        return torch.cat([fitted(*pair) for pair in zip(parts, self.space(steps).widths, strict=True)], -1)

    def places(self, steps: int) -> slice:
        """The places of a solve of `steps` steps, which were learned."""
        counts = {other: self.asked(other) for other in self.learned}
        begin = sum(count for other, count in counts.items() if other < steps)
        return slice(begin, begin + counts[steps])

    def residual_places(self, steps: int) -> slice:
        """Those of the residual, which has one for each step and none before the first: i + sum of all smaller N."""
        begin = sum(other for other in self.learned if other < steps)
        return slice(begin, begin + steps)

    @classmethod
    def asked(cls, steps: int) -> int:
        """How often the network is asked in a solve of `steps` steps."""
        return steps + 1 if cls.every_step else 1

    def forget(self, steps: int) -> None:
        """Be the grid that is corrected itself in solves of `steps` steps, as before training."""
        self.encoder.forget(self.places(steps), self.shared(self.begun[steps]))
        if self.start is not None:
            self.start.weight.data[self.learned.index(steps)] = 0
        if self.residual is not None:
            self.residual.weight.data[self.residual_places(steps)] = 0

    def shared(self, grid: TimeGrid) -> Tensor:
        """The network's numbers `(places, P)` of the corrections of `grid`, at the times of the static one."""
        raise NotImplementedError

    def standardise(self, steps: int, states: Tensor, x0: Tensor) -> None:
        """Measure the inputs on solves along the static grid: states and x0 `(n, N+1, ...)`, `(n, N, ...)`."""
        raise NotImplementedError

    def first_picture(self, x_T: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """What the network sees at the first step `(B, pictures C, H, W)`: of x_T and x0 there, at t `()` or `(B,)`."""
        raise NotImplementedError

    def policy(self, steps: int | None = None, first: int = 0) -> StepPolicy:
        """The policy of solves of `steps` steps (None: the only number learned), from node `first` of the grid on.

        Raises TsAdaptError for a number that is not served, and for none where several were learned.
        """
        raise NotImplementedError

    def _complete(self, policy: StepPolicy, steps: int) -> StepPolicy:
        """`policy`, with the learned start where there is one; of steps that were not learned this is said."""
        if steps not in self.learned:
            known = " and ".join(str(others) for others, _ in self.near(steps))
            said = f"the {self.kind} predictor was not trained for {steps} steps: this is interpolated from {known}"
            warnings.warn(said, TsAdaptWarning, stacklevel=3)
        return policy if self.start is None else Moved(policy, partial(self._change, self.start, steps))

    def _change(self, start: Change, steps: int, x_T: Tensor, x0: Tensor, t: Tensor, condition: Condition) -> Tensor:
        def of(others: int) -> Tensor:
            place = self.places(others).start
            seen = self.encoder.seen(self.first_picture(x_T, x0, t), place)
            found: Tensor = start(seen, self.encoder.features(seen, place, condition), self.learned.index(others))
            return found

        found = mixed((share, of(others)) for others, share in self.near(steps))
        return scale(self.noise_schedule.sigma(t), shorten_gradient(found))

    def _steps(self, steps: int | None) -> int:
        if steps is None and len(self.learned) > 1:
            known = ", ".join(map(str, self.learned))
            raise TsAdaptError(f"this predictor was learned for {known} steps; say which")
        taken = self.learned[0] if steps is None else steps
        self._check(taken)
        return taken
