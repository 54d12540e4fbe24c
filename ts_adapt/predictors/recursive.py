"""Recursive schedules: a network maps the state at t_i to the step from there, while sampling (ALD3's delta, widened).

With u in [0, 1] the position of a time in log-SNR between the ends of the grid, L the length between them and
f = f(x_t, x0, x0 - x0 of the step before, i, N):

    times         r_i = sigmoid(logit(r_static,i) + f_t)      u_{i+1} = u_i + r_i (1 - u_i)       u_N = 1
    shift         the model time of t_{i+1} is at u_{i+1} + f_d / L
    scale         the output scale at t_{i+1} is 1 + b tanh(f_o / b); the factor on the guidance likewise
    coefficients  c_k = f_k, in the step from t_i to t_{i+1}; the weights of a history likewise
    residual      x0 + d in the step from t_i to t_{i+1}, d a picture of the same features (`changes`)

A step takes a share r of the rest that is left. All but the times are learned where asked for; the last step ends at
t_N whatever f_t, and has coefficients and weights only. The scale and the guidance at t_0 are those of
f(x_T, 0, 0, N, N): the prompt is known before the network has been asked. f is zero before training: an untrained
predictor *is* the static grid.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ts_adapt.grids.between import among, mixed
from ts_adapt.grids.corrections import Correction
from ts_adapt.grids.parametric import positions, times_at
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import MODEL_TIMES, RESIDUAL, Condition, Field, Node, NoiseSchedule, StepPolicy, TimeGrid
from ts_adapt.numerics import scale, shorten_gradient
from ts_adapt.policies import check_first, check_next
from ts_adapt.predictors.predictor import Predictor

MIN_SHARE = 1e-4
"""Of the rest that is left: the least that a step takes, and the least that it leaves."""


def shares_of_rest(times: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """r_i = (u_{i+1} - u_i) / (1 - u_i) of grids `(..., N+1)`, for the N-1 steps that are free: `(..., N-1)`."""
    u = positions(times, noise_schedule)
    r = (u[..., 1:-1] - u[..., :-2]) / (1 - u[..., :-2])
    return r.clamp(MIN_SHARE, 1 - MIN_SHARE)


class Recursive(Predictor):
    """Predicts each next step as a correction to that of a static grid; see `Predictor`."""

    kind = "recursive"
    pictures = 3
    every_step = True

    def shared(self, grid: TimeGrid) -> Tensor:
        space = self.space(grid.steps)
        numbers = torch.zeros(self.asked(grid.steps), self.encoder.bias.shape[1], dtype=torch.float64)
        for place in range(len(numbers)):
            node, begin = grid.node((place + 1) % len(numbers)), 1
            for each, width in zip(space.learned, space.widths[1:], strict=True):
                if each.field in node.held:
                    found = each.numbers_at(node.held[each.field], node.t, self.noise_schedule)
                    numbers[place, begin : begin + width] = found / each.unit
                begin += width
        return numbers

    def standardise(self, steps: int, states: Tensor, x0: Tensor) -> None:
        times, places = self.static(steps), self.places(steps)
        before = self.picture(states[:, 0], torch.zeros_like(x0[:, 0]), None, times[0])
        self.encoder.standardise(places.start + steps, before)
        for i in range(steps):
            picture = self.picture(states[:, i], x0[:, i], x0[:, i - 1] if i else None, times[i])
            self.encoder.standardise(places.start + i, picture)

    def picture(self, x_t: Tensor, x0: Tensor, before: Tensor | None, t: Tensor) -> Tensor:
        """What the network sees `(B, 3 C, H, W)`; `before` is the x0 of the step before, None at the first."""
        norm = (self.noise_schedule.alpha(t).square() + self.noise_schedule.sigma(t).square()).rsqrt()
        return torch.cat([scale(norm, x_t), x0, torch.zeros_like(x0) if before is None else x0 - before], 1)

    def first_picture(self, x_T: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return self.picture(x_T, x0, None, t)

    def numbers_and_change(
        self, picture: Tensor, steps: int, step: int, condition: Condition
    ) -> tuple[Tensor, Tensor | None]:
        """The network's numbers f `(B, P)` at step i of N, float64, and the change of x0 there, d `(B, C, H, W)`.

        At i = N the numbers are those before the first step. d is None there, and of a predictor without a residual.
        """
        numbers, changes = [], []
        for others, share in self.near(steps):
            for within, part in among(step, steps, others):
                place = self.places(others).start + within
                seen = self.encoder.seen(picture, place)
                features = self.encoder.features(seen, place, condition)
                numbers.append((share * part, self.fitted(self.encoder.answer(features, place), others, steps)))
                if self.residual is not None and step < steps:
                    row = self.residual_places(others).start + within
                    changes.append((share * part, self.residual(seen, features, row)))
        change = shorten_gradient(mixed(changes)) if changes else None
        return shorten_gradient(mixed(numbers).double()), change

    def share_of_rest(self, numbers: Tensor, steps: int, step: int) -> Tensor:
        """r_i `(B,)` of the network's numbers `(B, P)` at step i < N - 1 of N, between MIN_SHARE and 1 - MIN_SHARE."""
        static = torch.logit(shares_of_rest(self.static(steps), self.noise_schedule))[step]
        return torch.sigmoid(static + numbers[:, 0]).clamp(MIN_SHARE, 1 - MIN_SHARE)

    def begin(self, x_T: Tensor, condition: Condition, steps: int) -> Node:
        """The first node, at the time of the static grid, with its corrections."""
        start, space = Node(0, steps, self.static(steps)[0]), self.space(steps)
        learned = [each for each in space.learned if not each.field.ends and each.field != MODEL_TIMES]
        if not learned:
            return start
        picture = self.picture(x_T, torch.zeros_like(x_T), None, start.t.to(x_T.device).expand(len(x_T)))
        numbers, _ = self.numbers_and_change(picture, steps, steps, condition)
        first = Node.of(0, steps, start.t, self._held(numbers, space, numbers.new_zeros(len(x_T)), learned))
        check_first(first)
        return first

    def forward(self, x_t: Tensor, x0: Tensor, before: Tensor | None, node: Node, condition: Condition) -> Node:
        """The node after `node`, of the states and of the x0 there `(B, C, H, W)`; the last is the grid's end, exactly.

        before  x0 of the step before; None at the first, and at that with which a solve begins inside
        """
        steps, after, batch = node.steps, node.index + 1, x_t.shape[0]
        space = self.space(steps)
        picture = self.picture(x_t, x0, before, node.t.to(x_t.device).expand(batch))
        numbers, change = self.numbers_and_change(picture, steps, node.index, condition)
        if after == steps:
            u, t = numbers.new_ones(batch), self.static(steps)[-1].expand(batch)
        else:
            u = positions(node.t, self.noise_schedule).to(numbers.device)
            u = u + self.share_of_rest(numbers, steps, node.index) * (1 - u)
            t = times_at(u, self.noise_schedule)
        learned = [each for each in space.learned if each.field.ends or after < steps]
        held = self._held(numbers, space, u, learned)
        return Node.of(after, steps, t, held if change is None else {**held, RESIDUAL: change})

    def _held(
        self, numbers: Tensor, space: GridSpace, u: Tensor, learned: Collection[Correction]
    ) -> dict[Field, Tensor]:
        """Those corrections of a node at the position `u` `(B,)` that are `learned` there, of the network's numbers."""
        parts = numbers[:, : sum(space.widths)].split(space.widths, 1)[1:]
        return {
            each.field: each.at(each.unit * part, u, self.noise_schedule)
            for each, part in zip(space.learned, parts, strict=True)
            if each in learned
        }

    def policy(self, steps: int | None = None, first: int = 0) -> StepPolicy:
        """The step policy that asks this network at every step, from node `first` of the static grid on."""
        steps = self._steps(steps)
        return self._complete(AtEveryStep(self, steps, first), steps)


@dataclass(frozen=True)
class AtEveryStep:
    """Asks `predictor` for the step from every node. Its state: the condition, and the x0 of the step before."""

    predictor: Recursive
    steps: int
    first: int = 0

    @property
    def nominal(self) -> Tensor:
        """The static grid."""
        return self.predictor.static(self.steps)

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        if self.first:
            return Node(self.first, self.steps, self.predictor.static(self.steps)[self.first]), (condition, None)
        return self.predictor.begin(x_T, condition, self.steps), (condition, None)

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        condition, before = state
        found = self.predictor(x_t, x0, before, node, condition)
        check_next(node, found)
        return found, (condition, x0)
