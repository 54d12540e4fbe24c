"""What a network is told: a forward pre-hook that gives each row of a pipeline's call its own time.

    rows    of the network's batch: the samples, twice under classifier-free guidance: [x, x]
    tau     (rows,) from the run, float32; tau / 1000 or 1 - tau / 1000 where the pipeline tells its timestep so

A call is one of the loop's if its timestep is the loop's next one, or before the first step any of it, as such or in
one of these forms, to the precision of the call; any other use of the network is left alone, and so is a loop whose
times are all that there is to tell. Where there is a timestep for each token (videos of which some frames are known),
all of a sample's are scaled alike. Pipelines may share a network, in one thread or in several: a call belongs to the
run that its thread began last. Cachers and the like on the network are told the run's step before each of its calls,
what the schedule adds to the network's embedding of the time is added in them, and the run hears what the network
answers. The first call that is added to is made twice, as the embedding is looked for; ControlNets are not added to.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.cachers.cacher import Cacher
from ts_adapt.cachers.loops import several_calls
from ts_adapt.denoisers.network import TIMES, argument_names, stacked, step_aware_parts, time_argument
from ts_adapt.denoisers.time_embedding import OffsetHook, time_embedding
from ts_adapt.errors import TsAdaptWarning
from ts_adapt.grids.space import no_embedding
from ts_adapt.interfaces import StepAware
from ts_adapt.schedulers.run import Run, Shown
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedulers.view import view_of
from ts_adapt.schedules.file import scale_remark

DIVISORS = (1, 1000, -1000)
"""How pipelines tell it: t, t / 1000, 1 - t / 1000."""
COPIES = (2, 3)
"""How often a guided network sees each sample: without and with its condition, and once more if perturbed."""
CONDITIONS = ("class_labels", "encoder_hidden_states", "pooled_projections")
"""The arguments of a network that a predictor may look at."""


class TimeHook:
    """The pre-hook of the network of `pipe`, for as long as its scheduler is `schedule`.

    denoises  whether it is that of the network that denoises: a ControlNet is told times alone
    divisor   what the pipeline has divided its timestep by in the call before
    offset_hook  what adds to the network's embedding of the time; None: no call had anything to add yet
    """

    def __init__(self, pipe: Any, schedule: LearnedScheduler, network: nn.Module, denoises: bool = True) -> None:
        self.pipe, self.schedule, self.denoises = pipe, schedule, denoises
        self.names = argument_names(network)
        self.name = time_argument(network) or TIMES[0]
        self.place = self.names.index(self.name)
        self.casts = _casts_by_time(network)
        config = getattr(network, "config", None)
        self.null_class, self.channels = (getattr(config, key, None) for key in ("num_embeds_ada_norm", "in_channels"))
        self.divisor = 1
        self.offset_hook: OffsetHook | None = None
        self._begun: tuple[int, int, int] | None = None
        self._told: tuple[int, int] | None = None
        self._asking: Run | None = None

    @property
    def run(self) -> Run | None:
        """The run of the pipeline, if this thread began it."""
        run = self.schedule.run
        own = self.pipe.scheduler is self.schedule and run is not None and run.thread == threading.get_ident()
        return run if own else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # in a graph it would be traced anew at every step
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, parts = self.run, step_aware_parts(module)
        if self.offset_hook is not None:
            self.offset_hook.give(None)  # until the call is known to be one of the run's
        if run is not None:
            self._asking = None
        for part in [] if run is None else run.told():
            part.at(None)  # until the call is known to be one of the run's
        timestep = args[self.place] if self.place < len(args) else kwargs.get(self.name)
        if run is None or run.finished or timestep is None:
            return None
        run.network = module
        self._compare_guidance(run)
        if not (run.plan.told or parts) or run is not last_run(module):
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        x = stacked(given[self.names[0]])
        found = run.find(timestep, x, DIVISORS)
        if found is None or (found[0] != run.place and not run.plan.inside):
            return None
        run.begin_at(found[0])
        self.divisor = found[1]
        if not run.plan.told:
            if parts:
                self._tell_step(parts, run, x, given)
            return None
        if run.node is None:
            shown = self._shown(x, given)
            run.start(shown, self._copies(run, shown) if run.plan.own_times else 1)
        self._asking = run
        tau = self._as_told(run.tell(x.shape[0]).to(x.device), timestep, found[1])
        if self.place < len(args):
            args = (*args[: self.place], tau, *args[self.place + 1 :])
        else:
            kwargs = {**kwargs, self.name: tau}
        if self.denoises and (offset := run.offset(x.shape[0])) is not None:
            self._add(module, args, kwargs, offset.to(x.device), x.shape[0])
        if parts:
            self._tell_step(parts, run, x, given)
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def listen(self, module: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        """After a call: tell the run that it was of what the network has answered."""
        if self.offset_hook is not None:
            self.offset_hook.check_met()
            self.offset_hook.give(None)
        if self._asking is not None and self._asking is self.run:
            self._asking.hear(answer)

    def remove(self) -> None:
        """Leave nothing inside the network."""
        if self.offset_hook is not None:
            self.offset_hook.remove()
            self.offset_hook = None

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor, rows: int) -> None:
        """In the call that follows, with these arguments, on `rows` rows, add `value` to the embedding of the time."""
        if self.offset_hook is None or not self.offset_hook.embedding.is_of(module):
            self.remove()
            found = time_embedding(module, lambda: module.forward(*args, **kwargs))
            if found is None:
                raise no_embedding()
            self.offset_hook = OffsetHook(found)
        self.offset_hook.give(value, rows)

    def _compare_guidance(self, run: Run) -> None:
        """Warn, once in a run, where the pipeline guides by another scale than the schedule holds for."""
        then, run.learned_under = run.learned_under, None
        if then is None:
            return
        if said := scale_remark("guidance_scale", then, getattr(self.pipe, "guidance_scale", None)):
            warnings.warn(said, TsAdaptWarning, stacklevel=2)

    def _as_told(self, tau: Tensor, timestep: Any, divisor: int) -> Tensor:
        """`tau` in the form and the shape of the pipeline's own `timestep`, and its precision if all goes by that."""
        tau = tau / divisor if divisor > 0 else 1 + tau / divisor
        if not isinstance(timestep, Tensor):
            return tau
        if timestep.ndim > 1:
            tau = timestep / timestep.max() * tau.reshape(-1, *[1] * (timestep.ndim - 1))
        return tau.to(timestep.dtype) if self.casts else tau

    def _shown(self, x: Tensor, given: dict[str, Any]) -> Shown:
        rows = x.shape[0]
        condition = {
            name: value
            for name in CONDITIONS
            if isinstance(value := given.get(name), Tensor) and value.ndim and value.shape[0] == rows
        }
        scale = getattr(self.pipe, "guidance_scale", None)
        if isinstance(scale, int | float):
            condition["guidance_scale"] = torch.full((rows,), float(scale), dtype=torch.float64)
        x = x if self.run is None else self.run.unshown(x)
        shown, labels = Shown(x, condition, view_of(x, given, self.channels)), condition.get("class_labels")
        if self.null_class is None or labels is None or not shown.has_copies(2):
            return shown
        return replace(shown, by_class=bool((labels.chunk(2)[1] == self.null_class).all()))

    def _copies(self, run: Run, shown: Shown) -> int:
        """How often each sample is in the batch, by all that can be known before the first step."""
        rows = shown.x.shape[0]
        if run.plan.rows is not None and rows % run.plan.rows == 0:
            return rows // run.plan.rows
        if not shown.by_class and getattr(self.pipe, "do_classifier_free_guidance", None) is False:
            return 1
        return next((copies for copies in COPIES if shown.has_copies(copies)), 1)

    def _tell_step(self, parts: tuple[StepAware, ...], run: Run, x: Tensor, given: dict[str, Any]) -> None:
        """Tell `parts` where the run is; they begin anew should the first step have shown another batch.

        Raises TsAdaptError for a second call in a step that a cacher takes for one.
        """
        before, self._told = self._told, (run.number, run.done)
        if self._told == before and any(isinstance(part, Cacher) and part.once_a_step for part in parts):
            raise several_calls(self.pipe)
        batch = run.batch or x.shape[0] // self._copies(run, self._shown(x, given))
        if self._begun != (run.number, run.begin, batch):
            self._begun = run.number, run.begin, batch
            for part in parts:
                part.begin(run.steps, batch)
            run.step_aware = [(part, part.runs) for part in parts]
        for part in parts:
            part.at(run.done)


def last_run(network: nn.Module) -> Run | None:
    """Of the runs of all pipelines attached to `network`, the one that this thread began last."""
    runs = (run for hook in hooks_on(network) if (run := hook.run) is not None)
    return max(runs, key=lambda run: run.number, default=None)


def hooks_on(network: nn.Module) -> list[TimeHook]:
    """Those of all pipelines attached to `network`."""
    return [hook for hook in network._forward_pre_hooks.values() if isinstance(hook, TimeHook)]


def _casts_by_time(network: nn.Module) -> bool:
    """Whether the network computes in the precision of its timestep, as HunyuanDiT does."""
    forward: Any = type(getattr(network, "_orig_mod", network)).forward  # type: ignore[attr-defined]
    try:
        return f"{time_argument(network)}.dtype" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False
