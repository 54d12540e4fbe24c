"""Two lines put a learned schedule into a pipeline of diffusers, one takes it out again.

    attach(pipe, schedule)      pipe.scheduler = a copy of the schedule; a pre-hook on the network tells it each
                                sample's time, ahead of all others that listen for it there
    detach(pipe)                the former scheduler, the very object; no hook is left

What a pipeline cannot do is refused when attaching, with the reason. A schedule whose times all samples share needs
nothing but a network and a noise schedule that agrees. One that gives each image its own times, or the network other
times than the loop's, needs a pipeline in which the hook reaches all who are told the time.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ts_adapt.denoisers.scheduler_config import differences, noise_of, scheduler_config
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.schedulers.hook import TimeHook, argument_names
from ts_adapt.schedulers.scheduler import LearnedScheduler

NETWORKS = ("unet", "transformer")
_MARK = "_ts_adapt_attachment"


@dataclass(frozen=True)
class Attachment:
    """What `detach` puts back."""

    scheduler: Any
    handle: RemovableHandle


def attach(pipe: Any, schedule: LearnedScheduler, *, strict: bool = True) -> Any:
    """Let `pipe` sample on a copy of `schedule`, and return the pipeline. A schedule attached before is replaced.

    strict  refuse a schedule learned for another prediction type or beta table than the pipeline's. False: keep its
            times, and take the pipeline's prediction type and betas

    The schedule itself stays as it is, for other pipelines too; `pipe.scheduler` is the copy that runs. A fixed family
    of grids made without a config takes over the pipeline's. A pipeline that is saved with a schedule attached loads
    with it as its scheduler, but without the hook: attach(pipe, pipe.scheduler). DDIMPipeline turns any scheduler it is
    built with into DDIM's; load the schedule by itself for that one.

    Raises TsAdaptError, and leaves the pipeline as it was, for what cannot be supported.
    """
    if not isinstance(schedule, LearnedScheduler):
        raise TsAdaptError(
            f"a LearnedScheduler is attached; got {type(schedule).__name__}: load one with "
            "LearnedScheduler.from_pretrained"
        )
    network = network_of(pipe)
    _refuse_what_the_pipeline_cannot(pipe, network, schedule)
    attached = getattr(pipe, _MARK, None)
    former = attached.scheduler if attached is not None else pipe.scheduler
    if isinstance(former, LearnedScheduler) and former.known_noise is None:
        raise TsAdaptError(
            f"the scheduler that {type(pipe).__name__} was built with knows no noise schedule; build the pipeline with "
            "one that has betas, or make that one by from_grid(..., config=...)"
        )
    config = scheduler_config(former)
    theirs = noise_of(config)
    found = [] if schedule.known_noise is None else differences(schedule.known_noise, theirs)
    if found and strict:
        raise TsAdaptError(
            f"the schedule was learned for another model than this pipeline's; they differ in {' and '.join(found)}: "
            "take a schedule learned for this one, or strict=False to keep the times"
        )
    own = schedule.copy_for(config if found or schedule.known_noise is None else None)
    if attached is not None:
        detach(pipe)
    hook = TimeHook(pipe, own, network)
    handle = network.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    pipe.scheduler = own
    setattr(pipe, _MARK, Attachment(former, handle))
    return pipe


def detach(pipe: Any) -> Any:
    """Put back the scheduler that `pipe` had before `attach`, remove the hook, and return the pipeline.

    Raises TsAdaptError if nothing is attached.
    """
    attached = getattr(pipe, _MARK, None)
    if attached is None:
        raise TsAdaptError(f"no schedule is attached to this {type(pipe).__name__}; there is nothing to detach")
    attached.handle.remove()
    pipe.scheduler = attached.scheduler
    delattr(pipe, _MARK)
    return pipe


def network_of(pipe: Any) -> nn.Module:
    """The one network of `pipe` that denoises."""
    name = type(pipe).__name__
    networks = [found for key in NETWORKS if isinstance(found := getattr(pipe, key, None), nn.Module)]
    if not networks or getattr(getattr(pipe, "scheduler", None), "config", None) is None:
        raise TsAdaptError(
            f"{name} has no unet or transformer with a scheduler; attach works on pipelines of diffusers that have both"
        )
    if len(networks) > 1:
        raise TsAdaptError(f"{name} has a unet and a transformer, and which one is sampled with cannot be told")
    if "timestep" not in argument_names(networks[0]):
        raise TsAdaptError(f"the network of {name} is not told a `timestep`, so no other time can be told it")
    return networks[0]


def _refuse_what_the_pipeline_cannot(pipe: Any, network: nn.Module, schedule: LearnedScheduler) -> None:
    name, source = type(pipe).__name__, schedule.source
    arguments = inspect.signature(type(pipe).__call__).parameters
    if "strength" in arguments and not source.inside:
        raise TsAdaptError(
            f"{name} starts from a noised image, and this schedule is found from pure noise; attach a static or a "
            "recursive one"
        )
    if not source.told:
        return
    others = [
        key
        for key, module in getattr(pipe, "components", {}).items()
        if isinstance(module, nn.Module) and module is not network and "timestep" in argument_names(module)
    ]
    if others:
        raise TsAdaptError(
            f"{name} tells the time to {', '.join(others)} as well, before the network that would know each image's; "
            "attach a schedule whose times all images share, without model times"
        )
    if source.own_times and "mask_image" in arguments:
        raise TsAdaptError(
            f"{name} blends the known part of the image in at the loop's times, not at each image's; attach a schedule "
            "whose times all images share"
        )
    channels = getattr(getattr(network, "config", None), "in_channels", None)
    patches = 4 if {"img_ids", "img_shapes"} & set(argument_names(network)) else 1
    for steps, predictor in source.predictors.items():
        learned = predictor.options["shape"][0]
        if channels is not None and learned % (channels // patches):  # of a film it sees the channels of every frame
            raise TsAdaptError(
                f"the predictor for {steps} steps looks at {learned} channels, the network of {name} at "
                f"{channels // patches}; learn one for this pipeline"
            )
