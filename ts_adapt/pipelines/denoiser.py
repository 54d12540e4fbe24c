"""Any pipeline of diffusers as a denoiser: its own loop, run with gradients, is the solve.

    solve      type(pipe).__call__.__wrapped__(pipe, latents=x_T, num_inference_steps=N, ...)
               on a scheduler that follows a policy by a solver (`student`), left at its last step
    x0         the same for one step from x_t, left once the network's answer, guided, has become x0
    images     the same for one step in which no network is run, and whose end is x

`__wrapped__` is the call without the `no_grad` that diffusers puts around it. Conditions, guidance, masks, control
images and packed tokens are the pipeline's own business, so that what is learned is what `attach` samples with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.load import quiet
from ts_adapt.denoisers.network import ATTACHMENT, frozen, stacked, step_aware_parts, with_prediction
from ts_adapt.denoisers.scheduler_config import noise_of, scheduler_config
from ts_adapt.errors import TsAdaptError, raised
from ts_adapt.interfaces import (
    EMBEDDING,
    GUIDANCE,
    MODEL_TIMES,
    Advance,
    Around,
    Condition,
    Denoiser,
    Node,
    Nominal,
    Solver,
    StepAware,
    StepPolicy,
    TimeGrid,
)
from ts_adapt.numerics import as_node_times
from ts_adapt.pipelines.arguments import Arguments, as_bytes, samples_of
from ts_adapt.pipelines.draws import Kinds, OwnDraws, drawn_alike
from ts_adapt.pipelines.encoders import Encoded
from ts_adapt.pipelines.ending import Ending
from ts_adapt.pipelines.networks import By, Recorded, called
from ts_adapt.pipelines.start import Form, form_of
from ts_adapt.pipelines.student import Left, Prepared, StudentScheduler
from ts_adapt.policies import FollowGrid
from ts_adapt.sampling import condition_rows
from ts_adapt.schedulers.attach import attach, detach, network_of, networks_of
from ts_adapt.schedulers.hook import TimeHook, hooks_on
from ts_adapt.schedulers.plan import Plan, Source
from ts_adapt.schedules.file import other_scales

ENCODERS = ("text_encoder", "image_encoder")
"""What the names of components begin with whose answers are kept."""
ASKED_FOR_ONE = 2
"""How many steps a pipeline is asked for where one is run: some divide by half of them."""


class PipelineDenoiser(Denoiser):
    """x0, and whole solves, from `pipe`, a pipeline of diffusers that `attach` takes.

    call     arguments of its `__call__` that all samples share, such as `guidance_scale`, `height`, `negative_prompt`;
             one that takes pictures names a folder of them
    noise_schedule, prediction, scheduler_config    those of its scheduler
    shape    of a sample in the form in which the pipeline's loop has it: packed tokens, five dimensions for video
    alone    whether the pipeline takes one sample a call, as it may with pictures or films; of samples with scales of
             guidance of their own it does

    A condition holds what each sample has of its own (`arguments`). The pipeline itself stays as it is but for its
    networks, which are put in evaluation mode and frozen. `evaluations` counts steps: whatever a step of the pipeline
    calls its network for, guidance included, is one evaluation.

    Raises TsAdaptError for what `attach` refuses, for arguments that the pipeline does not take, and for one whose
    starting noise cannot be given.
    """

    network: nn.Module
    prediction: str
    guides = True
    """Where the pipeline does, which its first step shows (`schedulers.run`)."""

    def __init__(self, pipe: Any, call: Mapping[str, Any] | None = None) -> None:
        name = type(pipe).__name__
        if not hasattr(type(pipe).__call__, "__wrapped__"):
            raise TsAdaptError(f"the call of {name} cannot be differentiated: it has no __wrapped__ without no_grad")
        arguments = Arguments(pipe, call or {})
        if "mask_image" in arguments.takes or getattr(pipe.config, "expand_timesteps", False):
            raise TsAdaptError(f"{name} blends a known part in behind its last step, which a state does not hold")
        if "strength" in arguments.takes:
            raise TsAdaptError(f"{name} begins inside, from an image; schedules are learned from pure noise")
        self.arguments = arguments
        networks_of(pipe)  # which refuses what has no scheduler, or no network that is told the time
        self.scheduler_config = scheduler_config(pipe.scheduler)
        self.noise_schedule, self.prediction = noise_of(self.scheduler_config)
        self.evaluations = 0
        self.pipe = _private(pipe)
        with frozen(*_modules(pipe).values()):
            self._begin()

    def _begin(self) -> None:
        """Put the student on the pipeline, and run it once; TsAdaptError, with nothing left on it, where that fails."""
        self.network = network_of(self.pipe)
        told = networks_of(self.pipe).values()  # a ControlNet, or the expert for the rest of the times, among them
        self._networks = [self.network, *(module for module in told if module is not self.network)]
        self._encoders = [module for key, module in _modules(self.pipe).items() if key.startswith(ENCODERS)]
        self._encoded, self._recorded, self._ending = Encoded(), Recorded(), Ending(self.pipe)
        self._solver = build_solver("ddim", self.noise_schedule)
        self._draws = self._draws_freely = True
        self._kinds = Kinds()
        self._form: Form | None = None
        try:
            try:
                self._student, self._hook = self._attached()
                self.shape = self._probe()
            except TsAdaptError as error:
                self.loop_times_only = str(error)
                self._student, self._hook = self._attached()
                self.shape = self._probe()
        except BaseException:
            if hasattr(self.pipe, ATTACHMENT):
                detach(self.pipe)
            raise

    @property
    def step_aware(self) -> tuple[StepAware, ...]:
        return step_aware_parts(self.network)

    @property
    def parts(self) -> Mapping[str, nn.Module]:  # type: ignore[override]
        return {key: module for key, module in _modules(self.pipe).items() if module is not self.network}

    @property
    def numbered(self) -> str | None:  # type: ignore[override]
        pictures = self.arguments.numbered
        return f"streams by seed {pictures or ''}".strip() if self._draws else pictures

    @property
    def encode(self) -> Any:  # type: ignore[override]
        return (lambda prompts: {"prompt": as_bytes(prompts)}) if self.arguments.takes_prompts else None

    @property
    def guidance_scale(self) -> float | None:  # type: ignore[override]
        given = self.arguments.of_call("guidance_scale")
        return float(given) if isinstance(given, int | float) else None

    @property
    def other_scales(self) -> Mapping[str, float]:  # type: ignore[override]
        return other_scales({name: self.arguments.of_call(name) for name in self.arguments.takes})

    @property
    def null_condition(self) -> Condition | None:  # type: ignore[override]
        classes = getattr(getattr(self.network, "config", None), "num_embeds_ada_norm", None)
        return {"class_labels": classes} if "class_labels" in self.arguments.takes else None

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        model_time: Tensor | None = None,
        output_scale: Tensor | None = None,
        guidance_factor: Tensor | None = None,
        embedding: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        """x0 `(B, ...)` by one step of the pipeline; see `interfaces.Denoiser`."""
        t = as_node_times(t)
        if self.alone and len(x_t) > 1:
            own = None if embedding is None else embedding.expand(len(x_t), -1)
            told = {"t": t, "model_time": model_time, "output_scale": output_scale, "embedding": own, **condition}
            told["guidance_factor"] = guidance_factor
            return torch.cat([self(x_t[row], **condition_rows(told, row)) for row in _single(x_t)])
        found: list[Tensor] = []

        def keep(policy: StepPolicy, solver: Solver, x_t: Tensor, x0: Tensor, *_: Any) -> Any:
            self.evaluations += 1
            found.append(x0)
            raise Left

        others = [(GUIDANCE, guidance_factor), (EMBEDDING, embedding)]
        held = {field: value for field, value in others if value is not None}
        at = Node(0, 1, t, None if model_time is None else as_node_times(model_time), output_scale, others=held)
        self._run(x_t, condition, _At(at), self._solver, keep)
        return found[0]

    def loop(
        self, solver: Solver, policy: StepPolicy, x_T: Tensor, condition: Condition, advance: Advance, *,
        checkpoint: bool = False, around: Around | None = None,
    ) -> None:  # fmt: skip
        """See `interfaces.Loop`."""
        if not isinstance(policy, Nominal) or policy.nominal is None:
            raise TsAdaptError(
                f"a pipeline's loop wants its times before it has a sample; give {type(policy).__name__} `nominal`, "
                "the times that stand for its own"
            )

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.evaluations += 1
            return advance(*args, **kwargs)

        by: By | None = None
        if torch.is_grad_enabled() and (around is not None or checkpoint):
            by = partial(self._called, around, checkpoint)
        self._run(x_T, condition, policy, solver, counted, by=by)

    def timestep(self, time: Tensor, x: Tensor) -> Tensor:
        """What the network is told at `time` `()` or `(B,)`: `(B,)` float32 beside `x` `(B, ...)`."""
        told = self.noise_schedule.timestep(time) / self._hook.divisor + self._begins_at
        return told.to(device=x.device, dtype=torch.float32).expand(len(x))

    @property
    def _begins_at(self) -> float:
        """What the network is told at t = 0: 1 where it is told 1 - t / 1000, for which a divisor below 0 stands."""
        return 1.0 if self._hook.divisor < 0 else 0.0

    def shown(self, x: Tensor, condition: Condition) -> tuple[Tensor, Condition]:
        """What a policy is shown of `x`, without a run of the network; TsAdaptError where it is shown nothing."""
        if self.loop_times_only:
            raise TsAdaptError(self.loop_times_only)
        if self.alone and len(x) > 1:
            each = [self.shown(x[row], condition_rows(condition, row)) for row in _single(x)]
            told = {key: torch.cat([of[key] for _, of in each]) for key in each[0][1]}
            return torch.cat([seen for seen, _ in each]), told
        policy = _Shown(as_node_times(self.noise_schedule.t_max))
        with torch.no_grad():
            self._run(x, condition, policy, self._solver, _leave, by=self._recorded.silent)
        if policy.seen[0].numel() != x.numel():
            raise TsAdaptError(
                f"the network of {self.arguments.name} is given pictures along with the state, and predictors look at "
                "states; learn a grid that all samples share"
            )
        return policy.seen

    def decode(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """Images `(B, C, H, W)` of states, in [-1, 1] but for what a decoder makes beyond it; see `ending`.

        Raises TsAdaptError where each has a picture of its own, and the condition does not say which.
        """
        if self.arguments.folders and "number" not in (condition or {}):
            raise TsAdaptError(
                f"{self.arguments.name} is given a picture for each sample, of which it may make others; give decode() "
                "the condition of the states, with their `number`"
            )

        if self.alone and len(x) > 1:
            return torch.cat([self.decode(x[row], condition_rows(condition or {}, row)) for row in _single(x)])

        def run(x: Tensor) -> Any:
            given = condition_rows(condition or {}, slice(len(x)))

            def end(*_: Any) -> Any:
                return x, Node(1, 1, as_node_times(self.noise_schedule.t_min)), None, None

            return self._run(
                x.detach(), given, self._at_first, self._solver, end, by=self._recorded.silent, leave=False
            )

        return self._ending.pictures(x, run)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the pipeline's networks to a device, a precision, or both; returns the denoiser itself."""
        self.pipe.to(*(where for where in (device, dtype) if where is not None))
        self._encoded, self._recorded = Encoded(), Recorded()
        return self

    # -- runs ------------------------------------------------------------------------------------------------------

    def _run(
        self, x: Tensor | None, condition: Condition, policy: StepPolicy, solver: Solver, advance: Advance, *,
        by: By | None = None, leave: bool = True, draws: OwnDraws | None = None,
    ) -> Any:  # fmt: skip
        """One call of the pipeline that starts from `x`; None: from noise that it draws, for one sample.

        leave  the loop at its last step; else what the call returns is returned
        draws  what is told of what it draws
        """
        batch, takes = 1 if x is None else len(x), self.arguments.takes
        plan = self._plan(policy, batch)
        start = None if "latents" in takes else x
        asked = ASKED_FOR_ONE if isinstance(policy, _At) else plan.steps
        self._student.prepare(Prepared(plan, solver, advance, start, leave, asked))
        noise = x if x is None else x.clone() if self._form is None else self._form(x)  # some loops write into it
        ours = {"num_inference_steps": asked, "latents": noise, "output_type": "pt", "return_dict": False}
        given = {key: value for key, value in ours.items() if key in takes and value is not None}
        arguments = {**self.arguments.of(condition, batch), **given}
        call: Any = type(self.pipe).__call__
        around_networks = nullcontext() if by is None else called(self._networks, by)
        encoded = called(self._encoders, self._encoded.by)
        if draws is None and (self._draws_freely or not leave):
            draws = OwnDraws(samples_of(condition, batch), self._kinds)
        try:
            with quiet(), drawn_alike(), draws or nullcontext(), encoded, around_networks:
                made = call.__wrapped__(self.pipe, **arguments)
        except Left:
            return None
        except torch.OutOfMemoryError:
            raise
        except (
            TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError, ArithmeticError,
            ImportError
        ) as error:  # fmt: skip
            raise TsAdaptError(
                f"{self.arguments.name} cannot be run ({raised(error)}); check what `model.call` gives it"
            ) from error
        finally:
            self._student.forget()
            self._encoded.settle()
        if leave:
            raise TsAdaptError(f"{self.arguments.name} has ended its loop before its {plan.steps} steps were taken")
        return made

    def _plan(self, policy: Any, batch: int) -> Plan:
        told = not self.loop_times_only
        if not (told or _shared(policy)):
            raise TsAdaptError(self.loop_times_only)
        nominal = policy.nominal.detach() if told else policy.nominal
        return Plan(nominal.cpu(), lambda begin: policy, own_times=told, told=told, rows=batch, grid=_known(policy))

    def _called(
        self, around: Around | None, checkpoint: bool, network: nn.Module, forward: Any, arguments: dict[str, Any]
    ) -> Any:
        """A call of the network, made by `around`, and recomputed in the backward pass."""
        name = self._hook.names[self._hook.place]
        told = arguments.get(name)
        if type(network) is not type(self.network) or not isinstance(told, Tensor):  # a ControlNet
            return recompute(forward, use_reentrant=False, **arguments) if checkpoint else forward(**arguments)
        form: list[Any] = []
        offsets = next(hook.offset_hook for hook in hooks_on(network) if hook.schedule is self._student)
        adding = nullcontext if offsets is None else partial(offsets.again, offsets.now)

        def evaluate(told: Tensor) -> Tensor:
            with adding():  # in the backward pass too
                answer = forward(**{**arguments, name: told})
            first = answer if isinstance(answer, Tensor) else answer[0]
            form[:] = [answer]
            return first

        def call(told: Tensor) -> Tensor:
            if around is None:
                return evaluate(told)
            if self.loop_times_only or told.ndim != 1:
                return around(evaluate, told, None)
            begin = self._begins_at
            return around(lambda t: evaluate(t + begin), told - begin, self._hook.divisor)

        first = recompute(call, told, use_reentrant=False) if checkpoint else call(told)
        return with_prediction(form[0], first)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def _at_first(self) -> _At:
        """A single step at the first of all times."""
        return _At(Node(0, 1, as_node_times(self.noise_schedule.t_max)))

    def _attached(self) -> tuple[StudentScheduler, TimeHook]:
        """The student on the pipeline, in place of one before, and its hook on the network."""
        student = StudentScheduler.from_grid("uniform", "ddim", self.scheduler_config)
        if not self.loop_times_only:
            plan = Plan.of_policy(self._at_first, torch.zeros(2))
            student.source = Source(plans={1: replace(plan, inside=True)})
        attach(self.pipe, student)
        own = self.pipe.scheduler
        return own, next(hook for hook in hooks_on(self.network) if hook.schedule is own)

    def _probe(self) -> tuple[int, ...]:
        """The shape of a sample, by runs of one step; TsAdaptError unless noise that is given is the noise it has."""
        seen: list[Tensor] = []

        def keep(policy: StepPolicy, solver: Solver, x_t: Tensor, x0: Tensor, *_: Any) -> Any:
            seen.append(x_t)
            raise Left

        def look(network: nn.Module, forward: Any, arguments: dict[str, Any]) -> Any:
            if network is self.network:
                seen.append(next(iter(arguments.values())))
            return self._recorded.silent(network, forward, arguments)

        name, at = self.arguments.name, self._at_first
        with torch.inference_mode(False), torch.no_grad():
            draws = OwnDraws([(0, 0)])
            self._run(None, {}, at, self._solver, keep, by=self._recorded.listen, draws=draws)
            first, by_one = seen.pop(), draws.shapes
            shape, device = tuple(first.shape[1:]), first.device
            drawn = [tuple(one[1:]) for one in draws.shapes if one.numel() == first[0].numel() and len(one) > 1]
            noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(device)

            def begun(given: Tensor) -> Tensor:
                self._run(given.to(device), {}, at, self._solver, keep, by=self._recorded.silent)
                return seen.pop()

            reason: TsAdaptError | None = None
            for generators, count, packed in product((True, False), (2, 1), (False, True)):
                if packed and (not drawn or drawn[-1] == shape):
                    continue
                self.arguments.generators = generators
                given, draws, self.alone, self._form = noise[:count], OwnDraws([(0, 0)] * count), count == 1, None
                seen.clear()
                try:
                    self._form = form_of(drawn[-1], begun) if packed else None
                    self._run(given, {}, at, self._solver, keep, by=look, draws=draws)
                    break
                except TsAdaptError as error:
                    reason = reason or error
            else:
                raise TsAdaptError(f"{name} takes no starting noise of shape {shape}: {reason}") from reason
        beside = 0 if "latents" in self.arguments.takes else given.numel()
        self._kinds = Kinds.of(by_one, None if self.alone else draws.shapes)
        self._draws, self._draws_freely = sum(one.numel() for one in draws.shapes) > beside, draws.free
        met = [seen[-1]]
        if "latents" not in self.arguments.takes:
            met = [part[:, : given.shape[1]] for part in seen[0].split(len(given))]
        if not all(torch.equal(x, given.to(x)) for x in met):
            raise TsAdaptError(f"{name} does not begin with the noise that it is given; no sample can be given its own")
        shown = stacked(seen[0])
        if not self.alone and all(torch.equal(row, shown[0]) for row in shown):
            raise TsAdaptError(f"the network of {name} is shown the same of different states; nothing can be learned")
        return shape


class _At:
    """The policy of a single step at `node`."""

    def __init__(self, node: Node) -> None:
        self.node = node

    @property
    def nominal(self) -> Tensor:
        t = self.node.t.mean() if self.node.t.ndim else self.node.t
        return torch.stack([t, t.detach()])

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        return self.node, None

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        return Node(1, 1, node.t), None


class _Shown(_At):
    """The policy that leaves with what it is shown."""

    seen: tuple[Tensor, Condition]

    def __init__(self, t: Tensor) -> None:
        super().__init__(Node(0, 1, t))

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        self.seen = x_T, condition
        raise Left


def _single(x: Tensor) -> list[slice]:
    """Each row of `x`."""
    return [slice(i, i + 1) for i in range(len(x))]


def _shared(policy: Any) -> bool:
    """Whether all samples share the times of `policy`, and the network is told no others."""
    if isinstance(policy, _At):
        return policy.node.t.ndim == 0 and policy.node.model_time is None
    shared = isinstance(policy, FollowGrid) and policy.grid.own_rows is None
    return shared and not {MODEL_TIMES, EMBEDDING} & policy.grid.held.keys()


def _known(policy: Any) -> TimeGrid | None:
    """The times of `policy`, where it has them before it has seen a sample: EDM's networks are shown states by them."""
    if type(policy) is _At:
        return TimeGrid(torch.stack([policy.node.t, policy.node.t], -1))
    return policy.grid if isinstance(policy, FollowGrid) else None


def _leave(*_: Any, **__: Any) -> Any:
    raise Left


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {key: module for key, module in pipe.components.items() if isinstance(module, nn.Module)}


def _private(pipe: Any) -> Any:
    """A copy of `pipe` with the same networks, on which a scheduler can be put."""
    if hasattr(pipe, ATTACHMENT):
        raise TsAdaptError("a schedule is attached to this pipeline; detach it, to learn one")
    own = copy.copy(pipe)
    own.set_progress_bar_config(disable=True)
    return own
