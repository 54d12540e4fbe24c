"""sample --pipeline: images of any pipeline of diffusers, along any schedule.

    attach(pipe, schedule)
    pipe(num_inference_steps=N, generator=[g_0, g_1, ...], prompt=..., class_labels=..., image=..., mask_image=...)

g_i is the generator of (seed, i), so that an image does not depend on the batch that it is made in, and is for a model
without prompts that of `sample` without a pipeline. What its call is given beside
that is the config's `model.call`; everything else is left to the pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ts_adapt import pruning
from ts_adapt.assembly import NONE, StudentOptions, build_cachers, build_quantizer, device_and_dtype, prepare
from ts_adapt.cachers import attached
from ts_adapt.config import Config
from ts_adapt.denoisers.load import image_to_image, load_pipeline, repaints, starts_from_image
from ts_adapt.denoisers.scheduler_config import noise_of, scheduler_config
from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.jobs.diffusers_schedules import find_scheduler, make_scheduler
from ts_adapt.jobs.sample import check_folder, write_images
from ts_adapt.pictures import read_picture
from ts_adapt.pipelines.arguments import Arguments, check_scales
from ts_adapt.pipelines.ending import side_by_side
from ts_adapt.prompts import given_prompts, prompts_of
from ts_adapt.sampling import generator_for
from ts_adapt.schedulers.attach import attach, network_of
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.resolve import FILE, Shelf, resolve
from ts_adapt.teacher.generate import ClassLabels

HAND_ON_GENERATORS = ("DDPMPipeline", "DDIMPipeline")
"""Pipelines whose loop gives the scheduler the generator; of the others, those with `prepare_extra_step_kwargs` do."""


@dataclass(frozen=True)
class Request:
    """What is wanted of a pipeline; None where nothing was said.

    pipeline            a folder, a hub id, or a model of the zoo
    schedule            a name, as `schedules.resolve` has them, but none of a workspace
    solver, steps       of a fixed grid, else the schedule's own; None: the first of the config, or of the schedule
    prompt, prompts     texts, and a file of them; image i has the text i modulo their number
    negative, guidance  the negative prompt of all, the scale of guidance; None: the pipeline's own
    init_image, strength   a file to start from, and how far from it; None: from noise, and the pipeline's own
    mask                a file of the same size: what is white in it is painted anew, the rest kept; None: all is new
    label               a class for all; None: drawn for each, as `sample` draws it
    count, seed, batch  how many images, of which noises, how many at a time; None: `evaluate.batch_size`
    out                 the folder; None: under `log_root`
    """

    pipeline: str
    schedule: str
    solver: str | None = None
    steps: int | None = None
    prompt: Sequence[str] | None = None
    prompts: str | None = None
    negative: str | None = None
    guidance: float | None = None
    init_image: str | None = None
    strength: float | None = None
    mask: str | None = None
    label: int | None = None
    count: int = 16
    seed: int = 1
    batch: int | None = None
    out: str | None = None


def sample_pipeline(config: Config, request: Request, *, progress: bool = True) -> Path:
    """The images of `request` as PNG files and one grid of the first of them; returns the folder.

    Of the config the options of the model and of the student, and what the request leaves open are taken. Raises
    TsAdaptError for a request that the pipeline or the schedule cannot meet.
    """
    image = None if request.init_image is None else read_picture(request.init_image)
    mask = None if request.mask is None else _read_mask(request.mask, image)
    device, dtype = device_and_dtype(config.model)
    if config.model.prediction is not None:
        raise TsAdaptError(
            f"model.prediction is {config.model.prediction!r}, but a pipeline says by itself what it predicts; leave "
            "it out"
        )
    pipe = load_pipeline(request.pipeline, device, dtype, config.model.quantization_config, config.model.weights)
    prepare(network_of(pipe), config.model)
    pipe = pipe if image is None else image_to_image(pipe, masked=mask is not None)
    arguments = _arguments(pipe, request, image, mask, config.model.call)
    found = resolve(request.schedule, _OfPipeline(pipe, config))
    name, steps, others = found.choose(request.solver, request.steps, config, unlearned=True)
    taken = found.learned if found.kind == FILE and found.learned else [steps]  # of which the scheduler makes others
    schedule = attach(pipe, make_scheduler(found, name, taken, scheduler_config(pipe.scheduler))).scheduler
    schedule.set_timesteps(steps)
    pipe.set_progress_bar_config(disable=True)
    _refuse_noise_without_generators(pipe, schedule)
    of = Path(request.pipeline).absolute().name
    about = found.called if of == config.name else f"{of}-{found.called}"
    folder = Path(request.out) if request.out else config.workspace.samples(about, name, steps)
    check_folder(folder, request.count)

    def make(index: range) -> Tensor:
        generators = [generator_for(request.seed, i) for i in index]
        return _call(pipe, len(index), num_inference_steps=steps, generator=generators, **arguments(index))

    with _cheaper(pipe, config.student):
        write_images(folder, make, request.count, request.batch or config.evaluate.batch_size, progress=progress)
    evaluations = schedule.run.done if schedule.run is not None else steps
    student = f" with {config.student.name}" if config.student.name else ""
    made = f"{request.count} images of {request.pipeline}{student} along {request.schedule}, {name}, NFE {evaluations}"
    print(f"{made}{others}: {folder}")
    return folder


@contextmanager
def _cheaper(pipe: Any, student: StudentOptions) -> Iterator[None]:
    """`pipe` with its network made `student`; TsAdaptError for a quantizer that is calibrated or trained."""
    quantizing, network = build_quantizer(student.quantizer), network_of(pipe)
    with ExitStack() as stack:
        if student.pruned != NONE:
            stack.enter_context(pruning.pruned(network, *pruning.read(student.pruned, network)))
        if quantizing is not None:
            from ts_adapt.quantizers.quantization import quantize, restore

            if quantizing.needs_calls or quantizing.method.needs_training:
                raise TsAdaptError(
                    f"{student.quantizer} is made from samples of the model, which are an experiment's; name the model "
                    "with --model.name in place of --pipeline, or take a quantizer such as hqq4"
                )
            quantize(network, quantizing.method, layers=quantizing.layers)
            stack.callback(restore, network)
        stack.enter_context(attached(pipe, *build_cachers(student.cacher)))
        yield


def _call(pipe: Any, count: int, **arguments: Any) -> Tensor:
    """`count` images `(n, C, H, W)` in [0, 1] of `pipe`, of films the frames side by side.

    What it raises is a TsAdaptError, unless memory is short.
    """
    name = type(pipe).__name__
    try:
        made = pipe(output_type="pt", **arguments)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise TsAdaptError(
            f"{name} cannot make these images ({one_line(error)}); check what it is given, and model.device and "
            "model.dtype"
        ) from error
    images = getattr(made, "images", getattr(made, "frames", None))
    if not hasattr(images, "shape"):
        raise TsAdaptError(f"{name} gives {', '.join(made)}, not images as numbers, and no files can be written of it")
    pictures = side_by_side(images if isinstance(images, Tensor) else torch.from_numpy(images).movedim(-1, -3))
    if len(pictures) != count:
        raise TsAdaptError(f"{name} has made {len(pictures)} images where {count} were asked for; give --batch 1")
    if not bool(torch.isfinite(pictures).all()):
        raise TsAdaptError(f"{name} has made images with NaN in them; choose another model.dtype, such as float32")
    return pictures.float().clamp(0, 1)


def _read_mask(path: str, image: Image.Image | None) -> Image.Image:
    """The mask in grey; TsAdaptError unless it is of the size of the image that there is."""
    if image is None:
        raise TsAdaptError("--mask says what of an image is painted anew; give that along with it, --init-image FILE")
    mask = read_picture(path, "L")
    if mask.size != image.size:
        found, wanted = ("x".join(map(str, each.size)) for each in (mask, image))
        raise TsAdaptError(f"the mask {path} is {found}, the image {wanted}; give a mask of the image's size")
    return mask


def _arguments(
    pipe: Any, request: Request, image: Image.Image | None, mask: Image.Image | None, call: Mapping[str, Any] | None
) -> Callable[[range], dict[str, Any]]:
    """What `pipe` is given for the images of a batch, by their numbers: what the request says, before what `call` does;
    TsAdaptError for what it does not take."""
    name, takes = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    called = Arguments(pipe, call or {})
    labels = _labels(pipe, request.label, takes)
    texts = given_prompts(request.prompt, request.prompts)
    for flag, given, what, argument in (
        ("--prompt and --prompts", texts or None, "prompt", "prompt"),
        ("--negative", request.negative, "negative prompt", "negative_prompt"),
        ("--guidance", request.guidance, "scale of guidance", "guidance_scale"),
        ("--label", request.label, "class label", "class_labels"),
    ):
        if given is not None and argument not in takes:
            raise TsAdaptError(f"{name} takes no {what}; leave {flag} out")
    check_scales(pipe, {"guidance_scale": request.guidance})
    if "prompt" in takes and not texts:
        raise TsAdaptError(f"{name} makes images of prompts; give --prompt TEXT, or --prompts FILE")
    if mask is None and repaints(pipe):
        raise TsAdaptError(f"{name} paints anew what a mask says; give --init-image FILE and --mask FILE")
    if image is None and "image" not in called.folders and starts_from_image(pipe):
        raise TsAdaptError(f"{name} starts from an image; give --init-image FILE")
    strength = request.strength
    if strength is not None and (image is None or not 0 < strength <= 1):
        raise TsAdaptError(f"strength is {strength}; give a number above 0, at most 1, along with --init-image FILE")
    shared = {"guidance_scale": request.guidance, "strength": strength}
    if mask is not None and {"height", "width"} <= takes.keys():  # of the image, as without a mask
        shared["height"], shared["width"] = pipe.image_processor.get_default_height_width(image)

    def arguments(index: range) -> dict[str, Any]:
        own = {
            "prompt": prompts_of(texts, index) if texts else None,
            "negative_prompt": None if request.negative is None else [request.negative] * len(index),
            "class_labels": labels.draw(request.seed, index)["class_labels"].tolist() if labels else None,
            "batch_size": len(index) if "batch_size" in takes else None,
            "image": None if image is None else [image] * len(index),
            "mask_image": None if mask is None else [mask] * len(index),
        }
        given = {key: value for key, value in {**shared, **own}.items() if value is not None}
        return {**called.alike(len(index), listed=True), **called.pictures(index), **given}

    return arguments


def _labels(pipe: Any, label: int | None, takes: Any) -> ClassLabels | None:
    """Where the classes come from, for a pipeline that wants some."""
    config: Any = network_of(pipe).config
    if "class_labels" in takes:
        return ClassLabels(int(config.num_embeds_ada_norm), label)
    if getattr(config, "num_class_embeds", None) and "prompt" not in takes:
        raise TsAdaptError(
            f"the network of {type(pipe).__name__} wants a class, which this pipeline does not give it; sample it "
            "without --pipeline, with --model.name in its place"
        )
    return None


@dataclass
class _OfPipeline(Shelf):
    """Names for `pipe` are looked up without a workspace."""

    pipe: Any
    config: Config
    scheduler = find_scheduler

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return noise_of(scheduler_config(self.pipe.scheduler))[0]


def _refuse_noise_without_generators(pipe: Any, schedule: LearnedScheduler) -> None:
    name = type(pipe).__name__
    if schedule.run is None or not schedule.run.solver.needs_noise:
        return
    if name not in HAND_ON_GENERATORS and not hasattr(pipe, "prepare_extra_step_kwargs"):
        raise TsAdaptError(
            f"{schedule.config['solver']} draws noise at every step, and {name} gives schedulers no generator for it; "
            "choose another solver"
        )
