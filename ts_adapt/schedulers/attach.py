"""Two lines put a learned schedule into a pipeline of diffusers, one takes it out again.

    attach(pipe, schedule)      pipe.scheduler = a copy of the schedule; a pre-hook on the network tells it each
                                sample's time, ahead of all others that listen for it there, and a hook hears it
    detach(pipe)                the former scheduler, the very object; no hook is left

What a pipeline cannot do is refused when attaching, with the reason. A schedule whose times all samples share needs
nothing but a network and a noise schedule that agrees. One that gives each image its own times, or the network other
times than the loop's, needs a pipeline in which the hook reaches all who are told the time.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.hooks import RemovableHandle

from ts_adapt.denoisers.network import ATTACHMENT, argument_names, time_argument
from ts_adapt.denoisers.scheduler_config import EDM, REPLACED, differences, noise_of, scheduler_config
from ts_adapt.errors import TsAdaptError
from ts_adapt.schedulers.asked import asked_of_scheduler
from ts_adapt.schedulers.hook import TimeHook
from ts_adapt.schedulers.plan import LISTS
from ts_adapt.schedulers.scheduler import LearnedScheduler

NETWORKS = ("unet", "transformer")
OWN = {"timesteps", "num_inference_steps", "config"}
"""What a scheduler has of itself, and not of its class."""
FOLDED = {"UNet3DConditionModel", "I2VGenXLUNet"}
"""Networks of films whose pipelines step every frame as a sample of its own."""


@dataclass(frozen=True)
class Attachment:
    """What `detach` puts back: the scheduler of the pipelines, which are it and those inside it, and the hooks.

    own      the scheduler that is in place of that one
    handles  of the hooks on the networks
    """

    scheduler: Any
    own: LearnedScheduler
    pipes: tuple[Any, ...]
    hooks: tuple[TimeHook, ...]
    handles: tuple[RemovableHandle, ...]


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
    networks = networks_of(pipe)
    attached = getattr(pipe, ATTACHMENT, None)
    former = attached.scheduler if attached is not None else pipe.scheduler
    pipes = (pipe, *(inner for inner in vars(pipe).values() if _is_pipeline_of(inner, pipe.scheduler)))
    for one in pipes:
        _refuse_what_the_pipeline_cannot(one, schedule, former)
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
    arguments = inspect.signature(type(pipe).__call__).parameters
    own.lists = tuple(name for name in LISTS if name in arguments)
    own.continues = "denoising_start" in arguments
    own.register_to_config(**{key: config[key] for key in REPLACED & config.keys() - own.config.keys()})
    if attached is not None:
        detach(pipe)
    denoises = type(network_of(pipe))  # a ControlNet does not
    hooks = [(network, TimeHook(pipe, own, network, type(network) is denoises)) for network in networks.values()]
    handles = [network.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for network, hook in hooks]
    handles += [network.register_forward_hook(hook.listen) for network, hook in hooks if hook.denoises]
    for one in pipes:
        one.scheduler = own
    setattr(pipe, ATTACHMENT, Attachment(former, own, pipes, tuple(hook for _, hook in hooks), tuple(handles)))
    return pipe


def detach(pipe: Any) -> Any:
    """Put back the scheduler that `pipe` had before `attach`, remove the hooks, and return the pipeline.

    Raises TsAdaptError if nothing is attached.
    """
    attached = getattr(pipe, ATTACHMENT, None)
    if attached is None:
        raise TsAdaptError(f"no schedule is attached to this {type(pipe).__name__}; there is nothing to detach")
    for hook in (*attached.hooks, *attached.handles):
        hook.remove()
    attached.own.end()
    for one in attached.pipes:
        one.scheduler = attached.scheduler
    delattr(pipe, ATTACHMENT)
    return pipe


def network_of(pipe: Any) -> nn.Module:
    """The network of `pipe` that denoises; of two over time, the first; TsAdaptError where there is none."""
    networks = networks_of(pipe)
    return next((networks[key] for key in NETWORKS if key in networks), next(iter(networks.values())))


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """All networks of `pipe` that are told the time, by name; TsAdaptError for what has none, or no scheduler."""
    parts = getattr(pipe, "components", None) or vars(pipe)
    networks = {key: part for key, part in parts.items() if isinstance(part, nn.Module) and time_argument(part)}
    if not networks or getattr(getattr(pipe, "scheduler", None), "config", None) is None:
        raise TsAdaptError(
            f"{type(pipe).__name__} has no network that is told a timestep, with a scheduler; attach works on "
            "pipelines of diffusers that have both"
        )
    return networks


def _is_pipeline_of(inner: Any, scheduler: Any) -> bool:
    return isinstance(inner, DiffusionPipeline) and getattr(inner, "scheduler", None) is scheduler


def _refuse_what_the_pipeline_cannot(pipe: Any, schedule: LearnedScheduler, former: Any) -> None:
    kind: type = type(pipe)
    name, source, asked = kind.__name__, schedule.source, asked_of_scheduler(kind)
    arguments = inspect.signature(type(pipe).__call__).parameters
    lacking = {key for key in asked.attributes if hasattr(former, key) and not hasattr(LearnedScheduler, key)} - OWN
    lacking |= {
        f"{method}({key}=...)" for method, key in asked.arguments if _takes(former, method, key)
        and not _takes(LearnedScheduler, method, key)
    }  # fmt: skip
    if lacking:
        raise TsAdaptError(
            f"{name} asks its scheduler for {', '.join(sorted(lacking))}, which has no meaning for times that are not "
            "those of training; use it with a scheduler of diffusers"
        )
    shows_them_as_they_are = asked.attributes and "scale_model_input" not in asked.attributes
    if shows_them_as_they_are and scheduler_config(former)["_class_name"] in EDM:
        raise TsAdaptError(
            f"{name} shows its network the states as they are, and {type(former).__name__} is for networks that see "
            "them in the unit of their variance; give the pipeline another scheduler"
        )
    if hasattr(pipe, "add_noise"):
        raise TsAdaptError(
            f"{name} noises images by a table of its own, which holds timesteps of training alone; use it with a "
            "scheduler of diffusers"
        )
    if "strength" in arguments and not source.inside:
        raise TsAdaptError(
            f"{name} starts from a noised image, and this schedule is found from pure noise; attach a static or a "
            "recursive one"
        )
    if source.own_times and (asked.copied or "sigmas" in asked.attributes):
        how = "runs copies of its scheduler" if asked.copied else "reads the sigmas of its scheduler"
        raise TsAdaptError(f"{name} {how}, which all images share; attach a schedule whose times all images share")
    folded = FOLDED & {type(network).__name__ for network in networks_of(pipe).values()}
    if source.own_times and folded:
        raise TsAdaptError(
            f"{name} steps frame by frame where its {', '.join(sorted(folded))} sees films; attach a schedule whose "
            "times all images share"
        )
    if source.own_times and "mask_image" in arguments:
        raise TsAdaptError(
            f"{name} blends the known part of the image in at the loop's times, not at each image's; attach a schedule "
            "whose times all images share"
        )
    network = network_of(pipe)
    channels = getattr(getattr(network, "config", None), "in_channels", None)
    patches = 4 if {"img_ids", "img_shapes"} & set(argument_names(network)) else 1
    for steps, predictor in source.predictors.items():
        learned = predictor.options["shape"][0]
        if channels is not None and learned % (channels // patches):  # of a film it sees the channels of every frame
            raise TsAdaptError(
                f"the predictor for {steps} steps looks at {learned} channels, the network of {name} at "
                f"{channels // patches}; learn one for this pipeline"
            )


def _takes(scheduler: Any, method: str, argument: str) -> bool:
    return hasattr(scheduler, method) and argument in inspect.signature(getattr(scheduler, method)).parameters
