"""One sampling run seen from the scheduler: `sampling.integrate` turned inside out.

    integrate                                   a pipeline's loop
    node = policy.init(x_T)                     start(x_T)          where the first call of the network shows x_T
    raw  = network(x_t, tau_node)               show(x_t), tell()   the network is called by the pipeline, with c x_t
                                                                    (`denoisers.network.seen`) and tau
    x0   = x0_from_raw(raw, x_t, node)          step(raw, t, x_t)
    advance(policy, solver, x_t, x0, node)      ... -> x_s

tau is the network's timestep, that of model_time, one for each row of its batch. Rows are samples, or copies of
them: [x, x] under classifier-free guidance. How many copies there are is a guess at the first call, where two samples
may have begun from the same noise; the first step knows, as it is given the samples once. States are taken in float32
at least.

A factor f on the guidance is taken from the network's two answers in a step, in one call or in two:

    raw = none + w (condition - none)       ->       none + f (raw - none) = none + f w (condition - none)

for w > 1 there is one such w: of the answers in the other order raw would lie beyond the other end.

The place of a call in the loop follows from its timestep t. A run begins where `set_begin_index` said, else at the
place of the first step's timestep, as in diffusers; from there on the places follow one another.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.network import prediction_of, seen, stacked, x0_from_raw
from ts_adapt.errors import TsAdaptError, TsAdaptWarning, Unguided
from ts_adapt.interfaces import EMBEDDING, GUIDANCE, Advance, Condition, Node, Solver, StepAware, StepPolicy
from ts_adapt.numerics import scale
from ts_adapt.sampling import advance
from ts_adapt.schedulers.plan import Plan
from ts_adapt.schedulers.view import View
from ts_adapt.schedules.file import size_remark
from ts_adapt.solvers.absorbing import absorbing

_numbers = itertools.count()
ROUNDING, ON_LINE = 10, 0.01
"""How far a guided answer may be off the line through the two: roundings of what is added, a share of its length."""


@dataclass(frozen=True)
class Shown:
    """What the first call of the network shows of a run.

    x          `(rows, ...)`: the samples, or several copies of them, one after the other
    condition  what a predictor may look at, by name
    view       from the pipeline's states to `(B, C, H, W)`, for the policy; None: they are that
    by_class   guided by a null class, as DiT is: of two copies the first has the samples' own condition, not the last,
               and the pipeline's states are both copies too
    """

    x: Tensor
    condition: Condition = field(default_factory=dict)
    view: View | None = None
    by_class: bool = False

    def samples(self, copies: int) -> tuple[Tensor, Condition]:
        """The samples `(B, ...)` once, and their own condition."""
        if copies == 1:
            return self.x, self.condition
        rows = self.x.shape[0]
        batch = rows // copies
        own = slice(0, batch) if self.by_class else slice(rows - batch, rows)
        return self.x[:batch], {
            name: value[own] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
            for name, value in self.condition.items()
        }

    def has_copies(self, copies: int) -> bool:
        """Whether the rows can be `copies` times the same samples."""
        if self.x.shape[0] % copies:
            return False
        first, *others = self.x.chunk(copies)
        return all(torch.equal(first, other) for other in others)


class Seen:
    """`policy`, which sees states through `view`: pictures where the pipeline has tokens."""

    def __init__(self, policy: StepPolicy, view: View) -> None:
        self.policy, self.view = policy, view

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        return self.policy.init(self.view(x_T), condition)

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        return self.policy.next(self.view(x_t), self.view(x0), node, state)


class Run:
    """The state of one run along `plan`.

    timesteps                      the nominal times as the loop is given them `(N,)`, float32, in the network's unit
    solver, prediction, clip_x0    as in `NetworkDenoiser` and `integrate`
    begin                          the place of the nominal times where it begins; None: that of the first step
    number, thread                 the later of two runs has the greater number; the thread that began it
    learned_at                     the shape of the samples that the times were found for; None: it does not count
    learned_under                  the guidance scale that the schedule was found under; None: it is not known, or has
                                   been compared
    network                        that is called for the run, where it is known
    noised                         whether samples that begin inside are known to be at the loop's times
    batch                          the number of samples; None: no step has told it yet
    advance                        what follows an evaluation
    step_aware                     parts of the network that were told that the run began, each with the number of it
                                   there; they are told when it is over
    """

    def __init__(
        self, plan: Plan, timesteps: Tensor, solver: Solver, prediction: str, begin: int | None, clip_x0: bool,
        advance: Advance = advance,
    ) -> None:  # fmt: skip
        self.plan, self.timesteps, self.solver, self.prediction = plan, timesteps, solver, prediction
        self.advance = advance
        self.noise_schedule, self.clip_x0 = solver.noise_schedule, clip_x0
        self.number, self.thread = next(_numbers), threading.get_ident()
        self.begin, self._begin_is_known = begin or 0, begin is not None
        self.done = 0
        self.batch: int | None = None
        self.node: Node | None = None
        self.step_aware: list[tuple[StepAware, int]] = []
        self.noised = True
        self.network: nn.Module | None = None
        self.learned_at: Any = None
        self.learned_under: Any = None
        self._nominal: list[float] = timesteps.tolist()
        self._form: tuple[int, ...] = ()
        self._shape: tuple[int, ...] = ()
        self._policy: StepPolicy | None = None
        self._shown: Shown | None = None
        self._copies = self._kept = 1
        self._told: Tensor | None = None
        self._told_at: int | None = None
        self._offset: Tensor | None = None
        self._offset_at: int | None = None
        self._answers: list[Tensor] = []
        self._shown_at: int | None = None
        self._policy_state: Any = None
        self._memory: Any = None

    @property
    def place(self) -> int:
        """The place of the nominal times that comes next."""
        return self.begin + self.done

    @property
    def steps(self) -> int:
        return self.plan.steps - self.begin

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    def told(self) -> list[StepAware]:
        """The parts of the network to which this is the run of now."""
        return [part for part, number in self.step_aware if part.runs == number]

    def end(self) -> None:
        """Tell the parts of the network that the run is over, or was broken off."""
        for part in self.told():
            part.end()

    def find(self, timestep: Any, x: Tensor, divisors: Sequence[int] = (1,)) -> tuple[int, int] | None:
        """The place in the loop that a call with `timestep` is for, and what that was divided by; None: for none.

        An element of `timesteps` is known by where it lies, without waiting for the device. Other timesteps may have
        been rounded twice, to their own precision and that of `x`, or cut to a whole number. By a negative divisor is
        meant that 1 - t / divisor is told; of a timestep for each token the greatest counts, as known ones are told 0.
        """
        places = [self.place] if self._begin_is_known else range(len(self._nominal))
        own = self.timesteps.untyped_storage().data_ptr()
        if isinstance(timestep, Tensor) and timestep.untyped_storage().data_ptr() == own:
            place = int(timestep.storage_offset()) - int(self.timesteps.storage_offset())
            return (place, 1) if place in places else None
        given = torch.as_tensor(timestep).detach()
        given = given.max() if given.ndim > 1 else given.flatten()[0]
        value, whole = float(given), not given.is_floating_point()
        eps = 0.0 if whole else max(torch.finfo(kind).eps for kind in (given.dtype, x.dtype, torch.float32))
        offs = [
            (d < 0 and p != self.place, abs((value if d > 0 else value - 1) * d - self._nominal[p]), p, d)
            for p, d in itertools.product(places, divisors)
        ]
        near = [off for off in offs if off[1] <= (1.0 if whole else 2 * eps * max(abs(self._nominal[off[2]]), -off[3]))]
        return min(near)[2:] if near else None

    def noised_to(self, timesteps: Any, rows: int) -> Tensor | None:
        """The times `(rows,)` of samples with times of their own that begin at `timesteps` of the loop; else None."""
        self.noised, grid = True, self.plan.grid
        if grid is None or not grid.per_sample:
            return None
        found = self.find(torch.as_tensor(timesteps).flatten()[:1], torch.empty(0))
        if found is None:
            return None
        if rows != self.plan.rows:
            raise self._other_batch(rows, self.plan.rows)
        return grid.times[:, found[0]]

    def begin_at(self, place: int) -> None:
        """Let a run of which no step is done begin at `place`."""
        if place != self.place:
            self.begin, self.node, self._shown, self._told = place, None, None, None

    def start(self, shown: Shown, copies: int = 1) -> None:
        """Resolve the first node for what the run begins with, of which the network sees `copies` of each sample."""
        x_T, condition = shown.samples(copies)
        predictor = self.plan.predictor
        if predictor is not None:
            seen, learned = tuple((shown.view or in_full)(x_T).shape[1:]), tuple(predictor.options["shape"])
            if seen != learned:
                raise TsAdaptError(
                    f"the predictor was learned for samples of shape {learned}, the pipeline's are {seen}; give the "
                    "height and width that it was learned for"
                )
            if predictor.static_times.device != x_T.device:
                predictor.to(x_T.device)
        if self.begin and self.plan.own_times and self.plan.grid is None and not self.noised:
            raise TsAdaptError(
                "the run begins inside, on states that its scheduler has not noised (denoising_start), and the times "
                "of each are not known; attach a schedule whose times all images share, or one grid for each image"
            )
        policy = self.plan.policy(self.begin)
        looks = shown.view is not None and self.plan.grid is None
        self._policy = Seen(policy, shown.view) if looks and shown.view else policy
        node, self._policy_state = self._policy.init(in_full(x_T), condition)
        if node.steps - node.index != self.steps:
            raise TsAdaptError(
                f"the step policy takes {node.steps - node.index} steps where {self.steps} were asked for; give "
                "nominal times of as many steps"
            )
        self.node, self._memory = node, self.solver.init(x_T)
        self._shown, self._copies = shown, copies

    def show(self, x: Tensor, timestep: Any = None) -> Tensor:
        """What the network is to be shown of `x` `(rows, ...)`, the states of the step of `timestep`; None: the next.

        Before the network has seen them they are at the times of the grid, of a policy without one at the nominal time.
        """
        if timestep is not None:
            self.arrive(timestep, x)
        self._shown_at, grid = self.place, self.plan.grid
        if self.node is not None:
            t = self.node.t
        else:
            t = self.plan.times[self.place] if grid is None else grid.times[..., self.place]
        return seen(x, _for_rows(t, len(x)).to(x.device), self.noise_schedule)[0]

    def unshown(self, x: Tensor) -> Tensor:
        """The states of which the network is shown `x` at the beginning, where all are at the nominal time."""
        if self.noise_schedule.data_std is None:
            return x
        one = seen(torch.ones((), dtype=torch.float64), self.plan.times[self.place], self.noise_schedule)[0]
        return x / float(one)

    def tell(self, rows: int) -> Tensor:
        """tau `(rows,)`, float32: what the network is to be told now about the rows of its batch."""
        if self.node is None:
            raise TsAdaptError("the run has not started: no starting noise was seen")
        time = self.node.t if self.node.model_time is None else self.node.model_time
        told = _for_rows(self.noise_schedule.timestep(time).to(torch.float32), rows)
        if self._told is None:
            self._told = told
        self._told_at = self.place
        return told

    def offset(self, rows: int) -> Tensor | None:
        """What is to be added now to the network's embedding of the time, `(D,)` or `(rows, D)`; None: nothing."""
        found = None if self.node is None else self.node.held.get(EMBEDDING)
        self._offset_at = self.place
        if found is not None and found.ndim > 1:
            found = _for_rows(found, rows)
            self._offset = found if self._offset is None else self._offset
        return found

    def hear(self, answer: Any) -> None:
        """Keep what the network has answered in a call of this step, where the guidance is changed."""
        if self.node is not None and GUIDANCE in self.node.held:
            self._answers.append(stacked(prediction_of(answer)))

    def arrive(self, timestep: Any, x: Tensor) -> None:
        """Take `timestep` for that of the next step, on `x`; TsAdaptError if it is another."""
        if self.finished:
            raise TsAdaptError(f"all {self.steps} steps are done; call set_timesteps() before the next run")
        try:
            found = self.find(timestep, x)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise TsAdaptError(f"step() takes one of the timesteps; got {type(timestep).__name__} ({error})") from error
        if found is None:
            raise TsAdaptError(
                f"the timestep {float(torch.as_tensor(timestep).flatten()[0]):g} is not the next of the run, which is "
                f"{self._nominal[self.place]:g} at place {self.place} of {self.plan.steps}; hand step() the timesteps "
                "in their order, and call set_timesteps() for a new run"
            )
        if found[0] and not self._begin_is_known and not self.plan.inside:
            raise cannot_begin_inside()
        self.begin_at(found[0])

    def step(self, raw: Tensor, timestep: Any, x_t: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_s and x0 `(rows, ...)` from what the network said.

        A pipeline that keeps both halves of classifier-free guidance gives the samples twice, and gets them twice.
        """
        self.arrive(timestep, x_t)
        if self.plan.told and self._told_at is None:
            raise TsAdaptError(
                "this schedule has other times than the loop's timesteps, factors on the guidance or offsets of the "
                "embedding, and the network was not told them: use ts_adapt.attach(pipe, schedule), or "
                "scheduler.network_timesteps(sample) in a loop of your own"
            )
        if self._told_at not in (None, self.place):
            raise TsAdaptError(
                f"the network was told the time of place {self._told_at} of the run and the step is that of place "
                f"{self.place}: call scheduler.network_timesteps(sample, timestep=t) with the t of the step"
            )
        if self.noise_schedule.data_std is not None and self._shown_at != self.place:
            raise TsAdaptError(
                "EDM's networks are shown states in the unit of their variance and this one was not: call "
                "scheduler.scale_model_input(sample, t) before it, or take a pipeline that does"
            )
        _check_answer(raw, x_t)
        if x_t.shape != self._shape:
            self._meet(x_t)
        node, policy, copies = self.node, self._policy, self._kept
        assert node is not None and policy is not None
        x = in_full(x_t)
        if copies > 1:
            x, raw = x[: self.batch], raw[: self.batch]
        if noise is not None:
            noise = noise[: self.batch].to(x)
        if EMBEDDING in node.held and self._offset_at != self.place:
            raise TsAdaptError(
                "this schedule adds to the network's embedding of the time, which a loop of your own does not: use "
                "ts_adapt.attach(pipe, schedule), or take a schedule that was learned without embedding"
            )
        if GUIDANCE in node.held:
            raw = self._guided(in_full(raw), node.held[GUIDANCE])
        x0 = x0_from_raw(raw, x, node.t, self.noise_schedule, self.prediction, node.output_scale)
        x0 = x0.clamp(-1, 1) if self.clip_x0 else x0
        solver = absorbing(self.solver, self.network, self.prediction)
        x_s, self.node, self._policy_state, self._memory = self.advance(
            policy, solver, x, x0, node, self._policy_state, self._memory, noise
        )
        self.done, self._begin_is_known, self._told_at, self._offset_at = self.done + 1, True, None, None
        if self.finished:
            self.end()
        if copies > 1:
            x_s, x0 = (torch.cat([value] * copies) for value in (x_s, x0))
        return x_s.to(x_t.dtype), x0.to(x_t.dtype)

    def _guided(self, raw: Tensor, factor: Tensor) -> Tensor:
        """`raw` `(rows, ...)` with `factor` `()` or `(rows,)` times its guidance; see the module's head.

        Rows are samples, or twice the same ones. Unguided where what the network has said is not as there.
        """
        answers, self._answers = self._answers, []
        heard = torch.cat(answers) if len({answer.shape[1:] for answer in answers}) == 1 else raw[:0]
        first, second = in_full(heard[:, : raw.shape[1]]).tensor_split(2)
        once, copies = raw[: len(first)], len(raw) // max(1, len(first))
        w: float | None = None
        with torch.no_grad():
            if first.shape == second.shape == once.shape and torch.equal(torch.cat([once] * copies), raw):
                w = _weight(first, second, once, max(torch.finfo(answer.dtype).eps for answer in answers))
        if w is None:
            raise Unguided(
                "the schedule changes the guidance of each step, which takes a pipeline guided by two answers of its "
                "network, none + w (condition - none), and attached; raise its guidance_scale above 1, leave out "
                "guidance_rescale and what else changes the two, or take a schedule without guidance among its "
                "corrections"
            )
        none = first if w > 0.5 else second
        return torch.cat([none + scale(factor, once - none)] * copies)

    def _meet(self, x_t: Tensor) -> None:
        """Take states of the shape of `x_t`; TsAdaptError unless they are the samples of this run."""
        rows, form = x_t.shape[0], x_t.shape[1:]
        if self.batch is None:
            self.batch, self._form = self._settle(x_t), form
            if isinstance(self.learned_at, list) and tuple(self.learned_at) != tuple(form):
                warnings.warn(size_remark(self.learned_at, form), TsAdaptWarning, stacklevel=4)
        if form != self._form:
            raise TsAdaptError(
                f"the run began with samples of shape {tuple(self._form)} and step {self.done} has {tuple(form)}; call "
                "set_timesteps() for a new run"
            )
        if rows not in (self.batch, self._copies * self.batch):
            raise self._other_batch(rows)
        self._shape, self._kept = x_t.shape, rows // self.batch

    def _settle(self, x_t: Tensor) -> int:
        """The number of samples, known from the first step's `x_t`; the run starts anew where it was guessed wrong."""
        rows = x_t.shape[0]
        if self.node is None:
            self.start(Shown(x_t))
        shown, self._shown = self._shown, None
        if shown is None or not self.plan.own_times:
            return rows
        seen = shown.x.shape[0]
        copies = seen // rows if seen > rows else 2 if shown.by_class else 1
        alike = self.plan.grid is not None or shown.has_copies(copies)
        if not alike or seen not in (rows, copies * rows):
            raise self._other_batch(rows, seen)
        if copies != self._copies:
            told, offset, offset_at = self._told, self._offset, self._offset_at
            self.start(shown, copies)
            self._shown, self._offset = None, None
            now = self.offset(seen)
            self._offset_at = offset_at
            alike = offset is None or (now is not None and torch.equal(now, offset))
            if told is not None and not (alike and torch.equal(self.tell(seen), told)):
                raise TsAdaptError(
                    "how many samples the network was called for could not be told from their noise; attach the "
                    "schedule to this very pipeline, and give each sample its own noise"
                )
        return seen // copies

    def _other_batch(self, rows: int, began: int | None = None) -> TsAdaptError:
        return TsAdaptError(
            f"the run began with {began or self.batch} samples and step {self.done} has {rows}; keep the batch, or "
            "call set_timesteps() for a new one"
        )


def cannot_begin_inside() -> TsAdaptError:
    return TsAdaptError(
        "this schedule is found from the pure noise at the start and cannot begin inside, as img2img does; use a "
        "static or a recursive one, or strength=1"
    )


def _for_rows(values: Tensor, rows: int) -> Tensor:
    """`values` `()` or `(B, ...)`, of each sample, for the rows of a batch that are copies of the samples, in turn."""
    if values.ndim and rows % len(values):
        raise TsAdaptError(
            f"the run began with {len(values)} samples and the network is called with {rows}; keep the batch, or call "
            "set_timesteps() for a new one"
        )
    return torch.cat([values] * (rows // len(values))) if values.ndim else values.expand(rows)


def _check_answer(raw: Tensor, x_t: Tensor) -> None:
    """TsAdaptError unless `raw` is of the shape of `x_t` `(B, C, ...)`, or has twice its channels."""
    found, expected = tuple(raw.shape), tuple(x_t.shape)
    if found != expected and (len(expected) < 2 or found != (expected[0], 2 * expected[1], *expected[2:])):
        raise TsAdaptError(
            f"the network has answered with shape {found} to a sample of shape {expected}; step() takes an answer of "
            "the sample's shape, or one with twice its channels, a learned variance"
        )


def _weight(first: Tensor, second: Tensor, raw: Tensor, eps: float) -> float | None:
    """w of raw = first + w (second - first), all computed with roundings of `eps`; None: it is no such thing."""
    along, guided = second - first, raw - first
    w = float((guided * along).sum() / along.square().sum().clamp_min(torch.finfo(raw.dtype).tiny))
    allowed = ON_LINE * guided.norm() + ROUNDING * eps * (1 + abs(w)) * first.norm()
    return w if bool((guided - w * along).norm() <= allowed) else None


def in_full(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
