"""The objects of one experiment, built of its config when they are first needed: network, solvers, grids, teacher."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ts_adapt import distributed, dual_encoders, pruning, zoo
from ts_adapt.assembly import NONE, StudentOptions, build_distance, build_solver, steps_of
from ts_adapt.config import Config
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.distances import LOOKS
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import INCEPTION_WIDTH, Extractor, make_extractor, read_image, taken_shape
from ts_adapt.evaluation.moments import are_moments, read_moments
from ts_adapt.grids.corrections import OF_MODEL_TIME, CorrectionName, corrected
from ts_adapt.grids.published import PUBLISHED
from ts_adapt.grids.space import no_embedding
from ts_adapt.interfaces import (
    EMBEDDING,
    GUIDANCE,
    RESIDUAL,
    START,
    Denoiser,
    Distance,
    NoiseSchedule,
    Solver,
    TimeGrid,
)
from ts_adapt.pictures import picture_files
from ts_adapt.pipelines.load import build_denoiser, guided_by_samples
from ts_adapt.predictors.phases import PREDICTED
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.prompts import read_prompts
from ts_adapt.remedies import command
from ts_adapt.sampling import embedding_of, initial_noise, is_guided, noise_scale
from ts_adapt.schedules.name import grid_names
from ts_adapt.schedules.resolve import build_grid
from ts_adapt.search.adversarial import check_pictures
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.static_options import BY_SAMPLE
from ts_adapt.solvers.coefficients import check_end
from ts_adapt.teacher.generate import (
    ConditionSource,
    Numbers,
    Prompts,
    Scales,
    Together,
    class_labels_for,
    teacher_config,
)
from ts_adapt.teacher.store import TEST_START, TRAIN_START, TeacherStore, condition_of, indices_of

FEW_PIXELS = 3 * 32 * 32
IN_COLOUR = (1, 3)
"""Channels of the images that Inception takes."""
SPLITS = {"train": TRAIN_START, "test": TEST_START}


class Experiment:
    """What `config` stands for; `progress`: whether jobs show bars."""

    def __init__(self, config: Config, *, progress: bool = True) -> None:
        self.config, self.progress = config, progress
        self.workspace = config.workspace
        self._batches: dict[str, tuple[TeacherStore, Batch]] = {}
        self._said: set[str] = set()

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model, guided where the config says so; TsAdaptError for one that cannot be had, or not be guided."""
        config, denoiser = self.config, build_denoiser(self.config.model)
        if config.guidance == 1.0:
            return denoiser
        scales = config.guidance if isinstance(config.guidance, list) else None
        if denoiser.loop is not None and scales is not None:
            return guided_by_samples(denoiser, scales[0])
        if denoiser.loop is not None:
            raise TsAdaptError(
                f"option guidance is {config.guidance}, but the pipeline of {config.model.name!r} guides by itself; "
                "leave guidance at 1, and give the scale as its call takes it, model.call: {guidance_scale: ...}"
            )
        if not denoiser.null_condition:
            raise TsAdaptError(
                f"option guidance is {config.guidance}, but the model {config.model.name!r} has no unconditional "
                "part to guide by; leave guidance at 1, or choose a conditional model"
            )
        return Guided(denoiser, None if isinstance(config.guidance, list) else config.guidance)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return self.denoiser.noise_schedule

    def of_student(self, student: StudentOptions) -> Self:
        """The same experiment, whose schedules are those learned for this network."""
        return self.changed(student=student)

    def changed(self, **options: Any) -> Self:
        """The same experiment with other options, on which neither its model nor its teacher depends."""
        _ = self.denoiser  # which both have
        other = copy.copy(self)
        other.config = replace(self.config, **options)
        other.workspace = other.config.workspace
        return other

    @cached_property
    def guides(self) -> bool:
        """Whether the guidance of a step can be changed; a pipeline that guides by itself makes one step to show it.

        TsAdaptError where that step cannot be made, for whatever reason.
        """
        if not self.denoiser.guides or self.denoiser.loop is None:
            return self.denoiser.guides
        _, x_T, condition = self.training_noises(1)
        return is_guided(self.denoiser, x_T, condition)

    @cached_property
    def embedding_width(self) -> int:
        """The width of the network's embedding of the time, which one sample shows; 0: none is found."""
        _, x_T, condition = self.training_noises(1)
        with torch.no_grad():
            found = embedding_of(self.denoiser, x_T, condition)
        return 0 if found is None else found.width

    def check_told(self, what: str) -> None:
        """TsAdaptError where the network cannot be told the times that `what` takes."""
        if reason := self.denoiser.loop_times_only.partition(";")[0]:
            raise TsAdaptError(
                f"{what} changes what the network is told of the time, and that of {self.config.model.name!r} can be "
                f"told the times of the pipeline's loop alone ({reason}); leave it out"
            )

    def check_static(self, corrections: Collection[str]) -> None:
        """TsAdaptError where the network cannot be told the times of a static search with `corrections`, and where its
        method cannot have what is to be minimised beside the distance."""
        self.config.static.check_beside()
        method = self.config.static.method
        taking = [f"the correction {name}" for name in OF_MODEL_TIME if name in corrections]
        for what in [*taking, *([f"static.method {method}"] if method in BY_SAMPLE else [])]:
            self.check_told(what)

    @property
    def static_corrections(self) -> list[CorrectionName]:
        """What the shared grid learns beside the times."""
        options, told = self.config.static, not self.denoiser.loop_times_only
        unsaid = options.corrections is None
        return options.corrected(unsaid and self.guides, unsaid and told and self.embedding_width > 0, told)

    @property
    def static_name(self) -> str:
        """What the shared grid is called that the options of `static` lead to: static, with +CORRECTION behind it."""
        return corrected("static", self.static_corrections)

    @property
    def predicted_corrections(self) -> list[str]:
        """What predictors of any kind learn beside the times."""
        wanted = self.config.train.corrections
        if wanted is not None:
            return wanted
        through = self.config.train.loss != "labels"  # whose grids have none
        embeds = through and not self.denoiser.loop_times_only and self.embedding_width > 0
        return [*PREDICTED, *([GUIDANCE.name] if self.guides else []), *([EMBEDDING.name] if embeds else [])]

    def corrections_of(self, kind: str) -> list[str]:
        """What predictors of `kind` learn beside the times: by default their changes too, where states are pictures."""
        corrections, train = self.predicted_corrections, self.config.train
        if train.corrections is not None or train.loss == "labels" or self.seen_shape != self.shape:
            return corrections
        return [*corrections, (RESIDUAL if PREDICTORS[kind].every_step else START).name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample, without the batch."""
        return self.denoiser.shape

    @cached_property
    def seen_shape(self) -> tuple[int, ...]:
        """Of what a predictor sees of a sample, (C, H, W); TsAdaptError where it sees none."""
        x, _ = self.denoiser.shown(torch.zeros(1, *self.shape, device=self.config.model.device), {})
        return tuple(x.shape[1:])

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """Of an image, (C, H, W): what a sample is decoded to."""
        denoiser = self.denoiser  # made outside of the block, or its weights could not be learned through
        with torch.inference_mode():
            x = torch.zeros(1, *self.shape, device=self.config.model.device)
            return tuple(denoiser.decode(x, {"number": torch.zeros(1, dtype=torch.long)}).shape[1:])

    @property
    def of_zoo(self) -> bool:
        """Whether the model is one of the zoo's, whose data the zoo's networks and statistics are of."""
        return self.config.model.name in zoo.MODELS

    @cached_property
    def distance(self) -> str:
        """What is minimised: the config's, else the embedded features for the models that they were made for."""
        return self.config.distance or ("features" if self.of_zoo else "l2")

    @cached_property
    def features(self) -> str:
        """What Frechet distances are of: the config's, else the embedded network's, pixels', or Inception's."""
        shape, wanted = self.image_shape, self.config.evaluate.features
        small = torch.Size(shape).numel() <= FEW_PIXELS or len(shape) != 3 or shape[0] not in IN_COLOUR
        return wanted or ("zoo" if self.of_zoo else "pixels" if small else "inception")

    def check(self, *, scores: bool = False, caption: float = 0.0) -> None:
        """TsAdaptError for what a later job of the config would refuse; says once what is taken by default.

        scores   whether the job ends in scores: the networks that give them are fetched where they are not here
        caption  what weight it gives to prompts: with none, the network that reads them is not asked for

        Names are known by then (`Config.validate`): here is what depends on the model.
        """
        config, shape = self.config, self.image_shape
        own, predicted = config.static.corrections or (), config.train.corrections or ()
        learned = {*own, *config.per_sample.corrections, *predicted}
        if GUIDANCE.name in learned and not self.guides:
            raise TsAdaptError(
                f"guidance is among the corrections to learn, and nothing guides the model {config.model.name!r} by "
                "none + w (condition - none); set option guidance, or in a pipeline the scale that its call takes, "
                "above 1, or leave it out of them"
            )
        if EMBEDDING.name in learned and not self.embedding_width:
            raise no_embedding()
        if isinstance(config.guidance, list) and self.denoiser.loop is not None and "scales" not in self._said:
            self._check_scales(*config.guidance)
            self._said.add("scales")
        image = torch.zeros(1, *shape, device=config.model.device)
        with torch.no_grad():
            build_distance(self.distance, config.model.device, shape)(image, image)
        if (config.static.distribution or config.train.distribution) and LOOKS[self.distance] == self.features:
            raise TsAdaptError(
                f"option evaluate.features is {self.features}, and so are the features of distance {self.distance}, in "
                "which a distribution is matched: who is learned by may not judge; give --evaluate.features inception, "
                "or another distance"
            )
        if config.static.adversarial or config.train.adversarial:
            check_pictures(shape)
        if caption:
            self.reader.pictures(image)
        width = INCEPTION_WIDTH  # of what may be for another machine to fetch
        if self.features != "inception":
            width = self.extractor()(image).shape[-1]
        self._check_reference(width)
        for path in {config.student.pruned, *(config.pruned if scores else ())} - {NONE}:
            pruning.read(path, self.denoiser.network)
        for split in SPLITS:
            if config.teacher.prompts_of(split) is not None:
                self.condition_source(split)
        if config.evaluate.clip is not None and config.teacher.prompts_of("test") is None:
            raise TsAdaptError("evaluate.clip scores images by their prompts; give teacher.prompts, or leave it out")
        for solver in config.solvers:
            for nfe in config.nfe:
                for name, grid in self.fixed_grids(self.steps(solver, nfe)).items():
                    check_end(self.solver(solver), grid.times[-1], f"the grid {name}")
        for split in SPLITS:
            fine = self.teacher_grid(config.teacher.nfe_of(split))
            check_end(self.solver(config.teacher.solver), fine.times[-1], "the teacher's grid")
        if scores and "networks" not in self._said:
            distributed.first(self._check_networks)
            self._said.add("networks")
        taken = []
        if config.distance is None and self.distance != "features":
            taken.append(f"distance: {self.distance} (lpips is nearer to what people see, and needs its weights)")
        if config.evaluate.features is None and self.features != "zoo":
            taken.append(f"evaluate.features: {self.features}")
        if taken and "defaults" not in self._said and distributed.rank() == 0:
            print(f"ts-adapt: for images of {shape} by default {', '.join(taken)}", file=sys.stderr)
        self._said.add("defaults")

    def _check_scales(self, low: float, high: float) -> None:
        """TsAdaptError where the pipeline's first step is the same under both scales of guidance."""
        _, x_T, condition = self.training_noises(1)
        t = torch.tensor(self.noise_schedule.t_max, dtype=torch.float64)
        with torch.no_grad():
            first, last = (self.denoiser(x_T, t, **{**condition, "guidance_scale": end}) for end in (low, high))
        if torch.equal(first, last):
            raise TsAdaptError(
                f"option guidance is a range, and the pipeline of {self.config.model.name!r} makes the same of "
                f"guidance_scale {low:g} and {high:g}; leave guidance at 1, and give one scale as its call has it, in "
                "model.call"
            )

    def _check_networks(self) -> None:
        """Build what scores images once, which fetches weights, and read a real image; TsAdaptError where they are not
        to be had."""
        self.extractor()
        reference = self.config.evaluate.reference
        if reference is not None and Path(reference).is_dir():
            read_image(picture_files(reference)[0], taken_shape(self.features, self.image_shape))
        if self.config.evaluate.clip is not None:
            from ts_adapt.evaluation.clip import clip_scorer

            clip_scorer(self.config.evaluate.clip, self.config.model.device)

    def _check_reference(self, width: int) -> None:
        """TsAdaptError unless the reference is a folder, or moments of features of `width` numbers."""
        reference = self.config.evaluate.reference
        if reference is not None and are_moments(reference):
            kept = len(read_moments(reference)[0].mean)
            if kept != width:
                raise TsAdaptError(
                    f"evaluate.reference {reference} is of {kept} features, evaluate.features {self.features} are "
                    f"{width}; give moments of these, or the evaluate.features that it was made of"
                )
        elif reference is not None and not Path(reference).is_dir():
            raise TsAdaptError(f"evaluate.reference is {reference}, which is no folder; give one of real images")

    def condition_source(self, split: str = "train") -> ConditionSource | None:
        """Where the teacher's conditions come from."""
        return self.conditions(self.config.teacher.label, split)

    def conditions(
        self, label: int | None, split: str = "train", texts: Sequence[str] = (), scale: float | None = None
    ) -> ConditionSource | None:
        """Where conditions come from: `texts` or the prompts' file, class labels (one for all, or drawn), numbers of
        pictures, scales of guidance: `scale`, or drawn from the config's range.

        Raises TsAdaptError for a scale of what nothing guides, and a pipeline's, which its call has.
        """
        prompts, denoiser, sources = self.config.teacher.prompts_of(split), self.denoiser, list[ConditionSource]()
        if texts or prompts is not None:
            if denoiser.encode is None:
                of_test = split == "test" and self.config.teacher.test_prompts is not None
                own = "teacher.test_prompts" if of_test else "teacher.prompts"
                given = "--prompt and --prompts" if texts else own
                raise TsAdaptError(f"the model {self.config.model.name!r} takes no prompts; leave {given} out")
            encode = denoiser.encode
            sources.append(Prompts(texts or read_prompts(str(prompts)), encode))
        elif denoiser.encode is not None:
            raise TsAdaptError(
                f"the model {self.config.model.name!r} is told what to make; give teacher.prompts, a file, or to "
                "`sample` --prompt TEXT"
            )
        else:
            labels = class_labels_for(denoiser, label)
            sources += [labels] if labels is not None else []
        sources += [Numbers(denoiser.numbered)] if denoiser.numbered is not None else []
        guided = self.config.guidance
        if scale is not None:
            if guided == 1.0:
                raise TsAdaptError(
                    f"--scale is {scale:g}, but nothing guides {self.config.model.name!r} here; give option guidance "
                    "too, for a whole pipeline guidance_scale in model.call, or leave --scale out"
                )
            if denoiser.loop is not None:
                guided_by_samples(denoiser, scale)
            sources.append(Scales(scale, scale))
        elif isinstance(guided, list):
            sources.append(Scales(*guided))
        return Together(sources) if len(sources) > 1 else next(iter(sources), None)

    def teacher_grid(self, nfe: int | None = None) -> TimeGrid:
        """The fine grid of the config's teacher; `nfe`: another number of evaluations than its own."""
        options = self.config.teacher
        return build_grid(options.grid, self.noise_schedule, steps_of(self.solver(options.solver), nfe or options.nfe))

    def teacher_config(self, split: str) -> dict[str, Any]:
        """Everything that the teacher's samples of `split` depend on; another config's teacher is refused by it."""
        options, model = self.config.teacher, self.config.model
        return teacher_config(
            self.denoiser, options.solver, self.teacher_grid(options.nfe_of(split)),
            model=model.name, seed=options.seed, first=SPLITS[split], shape=self.shape,
            shard_size=options.shard_size, batch_size=options.batch_size, condition=self.condition_source(split),
            trajectory=options.trajectory, dtype=model.dtype, guidance=self.config.guidance,
            **{name: getattr(model, name) for name in ("call", "quantization_config") if getattr(model, name)},
        )  # fmt: skip

    def solver(self, name: str) -> Solver:
        return build_solver(name, self.noise_schedule)

    def steps(self, solver: str, nfe: int) -> int:
        """Of a solve by `solver` with `nfe` evaluations."""
        return steps_of(self.solver(solver), nfe)

    def compared_by(self) -> Distance:
        """The distance, its network on the model's device."""
        by_network = self.distance == "features"
        return build_distance(self.distance, self.config.model.device, self.image_shape if by_network else ())

    def objective(self, solver: Solver) -> Objective:
        config = self.config
        return Objective(
            self.denoiser, solver, self.compared_by(), config.checkpointing, config.teacher.seed,
            config.derivative, config.derivative_width,
        )  # fmt: skip

    @cached_property
    def reader(self) -> dual_encoders.DualEncoder:
        """The network that tells how well images show their prompts; TsAdaptError where it is not to be had."""
        return dual_encoders.load(self.config.caption, self.config.model.device, "caption")

    def extractor(self) -> Extractor:
        """The features that the config compares images in."""
        options, device = self.config.evaluate, self.config.model.device
        return make_extractor(self.features, shape=self.image_shape, device=device, inception=options.inception)

    def about(self, solver: str) -> dict[str, Any]:
        """What a schedule file says of the model and of the solver."""
        model, prediction = self.config.model.name, self.denoiser.prediction
        return {"order": self.solver(solver).order, "model": model, "prediction": prediction}

    @property
    def guidance_scale(self) -> float | list[float] | None:
        """What samples are guided by, [a, b] each by its own; 1: by nothing, though they could be; None: it is not
        known, or nothing can."""
        if isinstance(self.config.guidance, list):
            return self.config.guidance
        found, could = self.denoiser.guidance_scale, self.denoiser.loop is None and self.denoiser.null_condition
        return 1.0 if found is None and could else found

    @property
    def guided_by(self) -> dict[str, Any]:
        """What a schedule keeps of what guides samples: `guidance_scale`, and other scales where there are some."""
        others = dict(self.denoiser.other_scales)
        return {"guidance_scale": self.guidance_scale, **({"other_scales": others} if others else {})}

    @property
    def shape_that_counts(self) -> list[int] | None:
        """That of a sample, where the pipeline's own scheduler shifts its times by the size of what is made."""
        shifts = (self.denoiser.scheduler_config or {}).get("use_dynamic_shifting")
        return list(self.shape) if shifts else None

    def fixed_grids(self, steps: int) -> dict[str, TimeGrid]:
        """The fixed grids that the config compares; else every one that fits the model, equal ones under one name."""
        wanted = self.config.evaluate.grids
        if wanted is None:
            return self.starts(steps)
        return {
            name: build_grid(name, self.noise_schedule, steps, rescale=self.config.rescale_published) for name in wanted
        }

    def starts(self, steps: int) -> dict[str, TimeGrid]:
        """Every fixed grid that fits the model, equal ones under one name: where a search may start."""
        grids: dict[str, TimeGrid] = {}
        for name in grid_names():
            try:
                grid = build_grid(name, self.noise_schedule, steps, rescale=self.config.rescale_published)
            except TsAdaptError:
                if name not in PUBLISHED:
                    raise
                continue
            if not any(torch.equal(grid.times, other.times) for other in grids.values()):
                grids[name] = grid
        return grids

    def teacher(self, split: str, count: int | None = None) -> tuple[TeacherStore, Batch]:
        """The teacher's store and the first `count` samples of `split`, on the model's device."""
        if count is not None and count < 1:
            raise TsAdaptError(f"{count} {split} samples are wanted; give at least 1")
        if split not in self._batches:
            store = TeacherStore.open(self.workspace.teacher(split), self.teacher_config(split))
            whole = range(len(store.indices))  # from the first sample on: one that is damaged is named, not left out
            data = store.load(indices_of(SPLITS[split], whole), self.config.model.device)
            batch = Batch(data["index"].cpu(), data["x_T"], data["target"], condition_of(data))
            self._batches[split] = store, batch
        store, batch = self._batches[split]
        if count is None:
            return store, batch
        if len(batch) < count:
            planned = getattr(self.config.teacher, f"{split}_samples")
            more = [f"--teacher.{split}_samples", count] if planned < count else []
            raise TsAdaptError(
                f"{count} {split} samples are wanted, {store.folder} has {len(batch)}; make them with "
                f"{command('teach', '--split', split, *more)}"
            )
        return store, batch.rows(slice(0, count))

    def training_noises(self, count: int) -> tuple[list[int], Tensor, dict[str, Any]]:
        """The first `count` training samples before they are solved: indices, x_T `(count, ...)`, condition; on the
        model's device."""
        seed, device, source = self.config.teacher.seed, self.config.model.device, self.condition_source()
        index = indices_of(TRAIN_START, range(count))
        drawn = source.draw(seed, index) if source is not None else {}
        x_T: Tensor = initial_noise(seed, index, self.shape) * noise_scale(self.noise_schedule)
        return index, x_T.to(device), condition_of({name: value.to(device) for name, value in drawn.items()})
