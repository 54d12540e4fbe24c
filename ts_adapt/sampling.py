"""`integrate`: the package's only sampling loop.

    node_0 = policy.init(x_T)
    repeat   x0      = denoiser(x_t, node)
             node'   = policy.next(x_t, x0, node)
             x_s     = solver.update(x_t, x0, node, node')      until the end of the grid

Times are `()` or `(B,)`: grids of their own for every sample cost no loop over samples. With `checkpoint=True` the
denoiser's activations are recomputed in the backward pass, so that memory does not grow with the number of steps;
the recomputation is not counted as an evaluation.

A denoiser inside a pipeline has a loop of its own (`Denoiser.loop`), which is then run in place of this one: what
happens around a step, `_Course`, is the same in both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from ts_adapt.denoisers.time_embedding import TimeEmbedding, time_embedding
from ts_adapt.errors import TsAdaptError, TsAdaptWarning, Unguided
from ts_adapt.grids.space import no_embedding
from ts_adapt.interfaces import (
    EMBEDDING,
    GUIDANCE,
    HISTORY,
    RESIDUAL,
    START,
    ByRows,
    Condition,
    Denoiser,
    Field,
    Node,
    NoiseSchedule,
    Solver,
    StepAware,
    StepPolicy,
    TimeGrid,
)
from ts_adapt.numerics import check_finite, each_tensor
from ts_adapt.policies import FollowGrid, as_policy
from ts_adapt.solvers.absorbing import absorbing
from ts_adapt.solvers.coefficients import check_end
from ts_adapt.solvers.history import Past, weighted

ENOUGH = 1000
"""Numbers of which the standard deviation is looked at."""


@dataclass(frozen=True)
class Solution:
    """x       the state at the end of the grid, `(B, ...)`
    times   the times met, `(N+1,)` or `(B, N+1)`
    states  `(B, N+1, ...)` and x0 `(B, N, ...)`: the whole trajectory, where it was asked for
    """

    x: Tensor
    times: Tensor
    states: Tensor | None = None
    x0: Tensor | None = None


Callback = Callable[[Node, Tensor, Tensor], None]


def integrate(
    denoiser: Denoiser,
    solver: Solver,
    schedule: StepPolicy | TimeGrid | Tensor,
    x_T: Tensor,
    *,
    condition: Condition | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    step_aware: Sequence[StepAware] = (),
    callback: Callback | None = None,
    keep_trajectory: bool = False,
    checkpoint: bool = False,
    check: bool = True,
) -> Solution:
    """Solve the probability-flow ODE from the noise `x_T` `(B, ...)` along `schedule`.

    condition   of the samples, for the denoiser and for the policy, which is told the denoiser's guidance scale too
    step_noise  step index -> standard normal noise `(B, ...)`, for solvers that need it (`noise_for` makes one)
    step_aware  cachers, told the step before each evaluation, beside those that are attached to the denoiser's network
    callback    called with (node, x_t, x0) after each evaluation, of a single sample where the denoiser takes but one
    checkpoint  recompute the denoiser in the backward pass
    check       refuse a NaN or infinity in the denoiser's output, naming the step

    Raises TsAdaptError for bad grids, an end that the solver cannot step to, non-finite outputs, missing noise, a name
    in the place of a solver or a schedule, and a cache under checkpointing. With `check`, warns of noise of another
    scale than that of the first time.
    """
    for what, given in (("solver", solver), ("grid", schedule)):
        if isinstance(given, str):
            more = ", steps=5" if what == "grid" else ""
            raise TsAdaptError(
                f"{given!r} is the name of a {what}; give what it stands for, "
                f"build_{what}({given!r}, denoiser.noise_schedule{more})"
            )
    policy = as_policy(schedule, denoiser.noise_schedule)
    if isinstance(policy, FollowGrid):
        check_end(solver, policy.grid.times[..., -1])
    condition = dict(condition or {})
    if solver.needs_noise and step_noise is None:
        raise TsAdaptError(f"{type(solver).__name__} is stochastic: pass step_noise=noise_for(seed, index, x_T)")
    parts = (*denoiser.step_aware, *step_aware)
    if checkpoint and parts:
        raise TsAdaptError("a stateful cache cannot be used under gradient checkpointing; switch one of them off")
    if denoiser.alone and len(x_T) > 1:
        return _one_by_one(
            denoiser, solver, policy, x_T, condition, step_noise, step_aware=step_aware, callback=callback,
            keep_trajectory=keep_trajectory, checkpoint=checkpoint, check=check,
        )  # fmt: skip
    solver = absorbing(solver, denoiser.network, denoiser.prediction)
    course = _Course(x_T, step_noise if solver.needs_noise else None, callback, keep_trajectory, check)
    if denoiser.loop is not None and solver.evaluations_per_step == 1:
        if step_aware:
            raise TsAdaptError("this denoiser's own loop tells the step to what is attached to its network; attach it")
        denoiser.loop(solver, policy, x_T, condition, course.advance, checkpoint=checkpoint)
        return course.solution()

    def evaluate(x_t: Tensor, at: Node) -> Tensor:
        return _evaluate(denoiser, x_t, at, condition, checkpoint)

    scale = denoiser.guidance_scale
    node, state = policy.init(x_T, condition if scale is None else {"guidance_scale": scale, **condition})
    if check:
        _look_at(x_T, node.t, denoiser.noise_schedule)
    memory, x = solver.init(x_T), x_T
    with told(parts, node.steps, x_T.shape[0]):
        while node.index < node.steps:
            for part in parts:
                part.at(node.index)
            x0 = evaluate(x, node)
            x, node, state, memory = course.advance(policy, solver, x, x0, node, state, memory, evaluate=evaluate)
    return course.solution()


def condition_rows(condition: Condition, rows: slice | Tensor) -> dict[str, Any]:
    """The condition of some samples: every tensor in it, nested ones included, has a row for each, or is `()`."""
    picked: dict[str, Any] = each_tensor(condition, lambda value: value[rows] if value.ndim else value)
    return picked


def _one_by_one(
    denoiser: Denoiser, solver: Solver, policy: StepPolicy, x_T: Tensor, condition: Condition,
    step_noise: Callable[[int], Tensor] | None, **options: Any,
) -> Solution:  # fmt: skip
    """The solves of single samples, put together; the noise of a step is drawn once for all of them."""
    drawn = None if step_noise is None else cache(step_noise)

    def one(row: slice) -> Solution:
        own = policy.rows(row) if isinstance(policy, ByRows) else policy
        noise = None if drawn is None else lambda step: drawn(step)[row]
        given = condition_rows(condition, row)
        return integrate(denoiser, solver, own, x_T[row], condition=given, step_noise=noise, **options)

    solutions = [one(slice(i, i + 1)) for i in range(len(x_T))]
    x, times, states, x0 = zip(*((s.x, s.times, s.states, s.x0) for s in solutions), strict=True)
    shared = times[0].ndim == 1 and all(torch.equal(each, times[0]) for each in times)
    met = times[0] if shared else torch.cat([each.expand(1, -1) for each in times])
    return Solution(torch.cat(x), met, *(None if each[0] is None else torch.cat(each) for each in (states, x0)))


def _look_at(x_T: Tensor, t: Tensor, noise_schedule: NoiseSchedule) -> None:
    """Warn where the spread of the noise is not that of states at t, whatever data there is in them."""
    if x_T.numel() < ENOUGH:
        return
    spread, first = float(x_T.detach().float().std()), t.detach().mean()
    sigma, alpha = float(noise_schedule.sigma(first)), float(noise_schedule.alpha(first))
    if not sigma / 2 <= spread <= 2 * sigma + 20 * alpha:
        warnings.warn(
            f"x_T has a standard deviation of {spread:.3g}, states at t = {float(first):.4g} one of about {sigma:.3g}; "
            "multiply standard normal noise by denoiser.noise_schedule.noise_scale",
            TsAdaptWarning,
            stacklevel=3,
        )


class _Course:
    """A solve under way: what is checked, told and kept around its steps, whoever's loop takes them."""

    def __init__(
        self,
        x_T: Tensor,
        step_noise: Callable[[int], Tensor] | None,
        callback: Callback | None,
        keep: bool,
        check: bool,
    ) -> None:
        self.x, self.step_noise, self.callback, self.keep, self.check = x_T, step_noise, callback, keep, check
        self.times: list[Tensor] = []
        self.states: list[Tensor] = []
        self.x0: list[Tensor] = []

    def advance(
        self,
        policy: StepPolicy,
        solver: Solver,
        x_t: Tensor,
        x0: Tensor,
        node: Node,
        state: Any,
        memory: Any,
        noise: Tensor | None = None,
        evaluate: Callable[[Tensor, Node], Tensor] | None = None,
    ) -> tuple[Tensor, Node, Any, Any]:
        """`advance`, with the noise of the solve where it has some."""
        if self.check:
            check_finite(x0, node.index, "the denoiser's output")
        if self.callback is not None:
            self.callback(node, x_t, x0)
        if not self.times:
            self.times.append(node.t)
        if self.step_noise is not None:
            noise = self.step_noise(node.index)
        self.x, node, state, memory = advance(policy, solver, x_t, x0, node, state, memory, noise, evaluate)
        self.times.append(node.t)
        if self.keep:
            self.states.append(x_t)
            self.x0.append(x0)
        return self.x, node, state, memory

    def solution(self) -> Solution:
        own = any(t.ndim for t in self.times)
        times = torch.stack([t.expand(len(self.x)) if own else t for t in self.times], -1)
        if not self.keep:
            return Solution(self.x, times)
        return Solution(self.x, times, torch.stack([*self.states, self.x], 1), torch.stack(self.x0, 1))


@contextmanager
def told(parts: Sequence[StepAware], steps: int, batch: int) -> Iterator[None]:
    """A run of `parts`, which ends however the block does."""
    try:
        for part in parts:
            part.begin(steps, batch)
        yield
    finally:
        for part in parts:
            part.end()


def advance(
    policy: StepPolicy,
    solver: Solver,
    x_t: Tensor,
    x0: Tensor,
    node: Node,
    state: Any,
    memory: Any,
    noise: Tensor | None = None,
    evaluate: Callable[[Tensor, Node], Tensor] | None = None,
) -> tuple[Tensor, Node, Any, Any]:
    """What follows an evaluation x0 at `node`: where to go, then there. Returns x_s, its node, and both memories.

    state     the policy's
    memory    the solver's; from the first weights of history on, with what was met since (`solvers.history`)
    evaluate  (x, node) -> x0, for solvers with more than one evaluation a step

    A residual is the solver's and its memories' alone: the policy sees what the network has said itself.
    """
    next_node, state = policy.next(x_t, x0, node, state)
    if START in next_node.held:
        x_t = _moved(x_t, next_node, START)
    if RESIDUAL in next_node.held:
        x0 = _moved(x0, next_node, RESIDUAL)
        evaluate = None if evaluate is None else partial(_changed, evaluate)
    remembers = isinstance(memory, Past) or HISTORY in next_node.held
    past = memory if isinstance(memory, Past) else Past(memory)
    if solver.evaluations_per_step == 1:
        x_s, memory = solver.update(x_t, x0, node, next_node, past.memory, noise)
    else:
        x_s, memory = solver.step(evaluate, x_t, x0, node, next_node, past.memory)  # type: ignore[attr-defined]
    if HISTORY in next_node.held:
        x_s = weighted(x_s, x_t, x0, past.x0, node, next_node, solver.noise_schedule)
    if remembers:
        memory = Past(memory, (x0, *past.x0))
    return x_s, next_node, state, memory


@torch.no_grad()
def is_guided(denoiser: Denoiser, x_T: Tensor, condition: dict[str, Any]) -> bool:
    """Whether the guidance of a step can be changed; a pipeline that guides by itself makes one step to show it.

    x_T  `(1, ...)`, with its condition; errors as those of that step, for whatever reason
    """
    if not denoiser.guides or denoiser.loop is None:
        return denoiser.guides
    t = torch.tensor(denoiser.noise_schedule.t_max, dtype=torch.float64)
    try:
        denoiser(x_T, t, guidance_factor=torch.ones_like(t), **condition)
    except Unguided:
        return False
    return True


def embedding_of(denoiser: Denoiser, x_T: Tensor, condition: Condition) -> TimeEmbedding | None:
    """Where the denoiser's network embeds the time, which one sample shows when it is first asked; None: nowhere.

    x_T  `(B, ...)`, with its condition
    """
    network, one = denoiser.network, slice(0, 1)
    if network is None:
        return None
    t = torch.tensor(denoiser.noise_schedule.t_max, dtype=torch.float64)
    counted = denoiser.evaluations
    try:
        return time_embedding(network, lambda: denoiser(x_T[one], t, **condition_rows(condition, one)))
    finally:
        denoiser.evaluations = counted


def _changed(evaluate: Callable[[Tensor, Node], Tensor], x: Tensor, node: Node) -> Tensor:
    """The evaluation at the end of a step, with the residual of that step."""
    return _moved(evaluate(x, node), node, RESIDUAL)


def _moved(x: Tensor, node: Node, by: Field) -> Tensor:
    change = node.held[by]
    if change.shape != x.shape:
        raise TsAdaptError(
            f"the schedule has a {by.name} of samples of shape {tuple(change.shape[1:])}, as pictures, and the solve's "
            f"are {tuple(x.shape[1:])}; take one that was learned without {by.name}"
        )
    return x + change.to(x)


def _evaluate(denoiser: Denoiser, x: Tensor, node: Node, condition: dict[str, Any], checkpoint: bool) -> Tensor:
    if GUIDANCE in node.held:
        if not denoiser.guides:
            raise Unguided(
                "the schedule changes the guidance of each step, and nothing guides this denoiser; give one in Guided "
                "(option guidance), or a schedule that was learned without guidance"
            )
        condition = condition | {GUIDANCE.at: node.held[GUIDANCE]}

    offset = node.held.get(EMBEDDING)
    adding: Callable[[], AbstractContextManager[None]] = nullcontext
    if offset is not None and denoiser.loop is not None:
        condition = condition | {EMBEDDING.at: offset}
    elif offset is not None:
        embedding = embedding_of(denoiser, x, condition)
        if embedding is None:
            raise no_embedding()
        adding = partial(embedding.adding, offset)

    def call(x: Tensor, t: Tensor, model_time: Tensor | None, output_scale: Tensor | None) -> Tensor:
        with adding():
            return denoiser(x, t, model_time=model_time, output_scale=output_scale, **condition)

    if not (checkpoint and torch.is_grad_enabled()):
        return call(x, node.t, node.model_time, node.output_scale)
    forward_pass = True

    def counted_once(*args: Any) -> Tensor:
        counted = denoiser.evaluations
        try:
            return call(*args)
        finally:  # the recomputation is left by an exception as soon as the last saved tensor is there
            if not forward_pass:
                denoiser.evaluations = counted

    x0: Tensor = recompute(counted_once, x, node.t, node.model_time, node.output_scale, use_reentrant=False)
    forward_pass = False
    return x0


def initial_noise(seed: int, index: Sequence[int] | Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Standard normal noise `(len(index), *shape)`, float32: sample i depends on (seed, i, stream) only.

    It does not depend on the batch, its order, or the process that draws it.
    """
    rows = [torch.randn(tuple(shape), generator=generator_for(seed, int(i), stream=stream)) for i in index]
    return torch.stack(rows) if rows else torch.empty((0, *shape))


def generator_for(seed: int, index: int, *, stream: int = 0) -> torch.Generator:
    """The generator, on the CPU, of what belongs to the sample `index` alone; a stream for each kind of noise."""
    return torch.Generator().manual_seed(_mix(seed, index, stream))


def noise_scale(noise_schedule: NoiseSchedule) -> float:
    """What standard normal noise is multiplied by to become x_T.

    1 for VP and rectified flow, the largest edm_sigma (to 1e-4) for VE; what diffusers' schedulers call
    `init_noise_sigma`.
    """
    return noise_schedule.noise_scale


def noise_for(seed: int, index: Sequence[int] | Tensor, like: Tensor) -> Callable[[int], Tensor]:
    """`step_noise` for `integrate`: the noise of a stochastic solver, a function of (seed, sample, step) only."""

    def draw(step: int) -> Tensor:
        return initial_noise(seed, index, like.shape[1:], stream=step + 1).to(like)

    return draw


def _mix(seed: int, index: int, stream: int) -> int:
    """A 63-bit seed from three integers (splitmix64), so that neighbouring samples get unrelated generators."""
    z = 0
    for part in (seed, index, stream):
        z = (z + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        z ^= z >> 31
    return z >> 1
