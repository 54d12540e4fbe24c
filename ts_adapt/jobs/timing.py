"""How long a unit of each job takes here: a batch of it is done, on the first training noises, and timed.

    teach       a few steps of the teacher's solver, without a gradient
    search      the distances along a fixed grid, and their gradient
    train       the distances along an untrained predictor, and an update of it: its gradient, optimizer and average
    evaluate    a fixed grid as `evaluate` samples, decodes and looks at it; its cost, its scores

    seconds = plain P + gradient G + results R      of `Work`; P, G of an evaluation of one sample, R of what is made

A few samples are timed, and a whole batch unless by these it takes long: of few it may be the calls that take time.
All of it is of the first of the config's solvers, with the least of its `nfe`, on the teacher's own network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ts_adapt.assembly import steps_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.comparison import score
from ts_adapt.evaluation.cost import seconds
from ts_adapt.evaluation.metrics import FeatureStatistics
from ts_adapt.evaluation.quality import Reference, quality_of
from ts_adapt.evaluation.records import Entry, kept_run
from ts_adapt.evaluation.sample import RunError, join_parts, missing_parts, sample_part
from ts_adapt.interfaces import TimeGrid
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.train import new_predictor
from ts_adapt.plots import plot_schedules
from ts_adapt.predictors.losses import TOGETHER, end_to_end
from ts_adapt.predictors.phases import averaged, optimizer_of
from ts_adapt.sampling import integrate, noise_for
from ts_adapt.search.objective import AUTO, Batch, Objective
from ts_adapt.search.work import Pace
from ts_adapt.storage.layout import ALL

FEW = 4
"""Samples that are timed."""
LONG = 3.0
"""Seconds of a whole batch, above which it is not timed itself."""
SLOWER = 3.0
"""How much longer an evaluation with a gradient takes, where there is none to be measured."""
SCORED = 2048
"""Samples that are scored, at most; of more it takes as much longer as there are more pairs of them."""


class Timing:
    """The paces of an experiment's jobs, each measured when it is first asked for."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.solver, self.nfe = session.config.solvers[0], min(session.config.nfe)
        self.steps = steps_of(session.solver(self.solver), self.nfe)
        self._training: dict[str, Pace] = {}

    @cached_property
    def teach(self) -> Pace:
        """Of the teacher's solver."""
        options, solver = self.session.config.teacher, self.session.solver(self.session.config.teacher.solver)
        nfe = min(self.nfe * solver.evaluations_per_step, options.nfe)
        times = self.session.teacher_grid(nfe).times

        @torch.no_grad()
        def solve(batch: Batch) -> None:
            noise = noise_for(options.seed, batch.index, batch.x_T) if solver.needs_noise else None
            integrate(self.session.denoiser, solver, times, batch.x_T, condition=batch.condition, step_noise=noise)

        return Pace(self._each(solve, options.batch_size) / nfe, 0.0)

    @cached_property
    def search(self) -> Pace:
        """Of a grid that all samples share."""
        config, grid = self.session.config, self._grid
        objective = self._objective

        def differentiate(batch: Batch) -> None:
            objective(TimeGrid(grid.times.clone().requires_grad_()), batch).sum().backward()

        return self._pace(
            lambda batch: objective.measure(grid, batch), min(config.static_validating, TOGETHER),
            differentiate, min(config.static.batch_size, config.static_samples), self._figure,
        )  # fmt: skip

    def train(self, name: str) -> Pace:
        """Of the predictor `name`."""
        kind = name.removesuffix(ALL)
        if kind not in self._training:
            with torch.random.fork_rng():
                self._training[kind] = self._train(kind)
        return self._training[kind]

    def _train(self, kind: str) -> Pace:
        session, options = self.session, self.session.config.train
        solver, objective = session.solver(self.solver), self._objective
        corrections = session.corrections_of(kind)
        predictor = new_predictor(session, kind, [self._grid], solver.order, corrections)
        optimizer, average = optimizer_of(predictor, options), averaged(predictor, options)

        def update(batch: Batch) -> None:
            optimizer.zero_grad()
            end_to_end(predictor, {self.steps: objective}, batch)(self.steps, torch.arange(len(batch))).backward()
            optimizer.step()
            average.update_parameters(predictor)

        return self._pace(
            lambda batch: objective.measure(predictor.policy(self.steps), batch), min(options.validating, TOGETHER),
            update, min(options.batch_size, options.samples - options.validating), 2 * self._figure,
        )  # fmt: skip

    @cached_property
    def evaluate(self) -> Pace:
        """Of a run; where it fails, which `evaluate` will say, that of distances without a gradient."""
        try:
            return self._evaluate()
        except RunError:
            return Pace(self.search.plain, 0.0, self._figure)

    def _evaluate(self) -> Pace:
        session, options = self.session, self.session.config.evaluate
        extractor, objective = session.extractor(), replace(self._objective, checkpoint=False)
        with tempfile.TemporaryDirectory() as name:
            folder, made = Path(name), iter(range(1000))

            def entry(count: int) -> Entry:
                number = str(next(made))
                return Entry(self.solver, self.nfe, number, "fixed", self._grid, number, count)

            def sample(batch: Batch) -> Entry:
                one = entry(len(batch))
                for rows in missing_parts(one, folder, options.batch_size):
                    sample_part(one, objective, batch, extractor, folder, rows, batch_size=options.batch_size)
                return one

            each = self._each(sample, min(options.batch_size, options.samples)) / self.nfe
            few = self._noises(2)
            sampled = iter([sample(few), sample(few)])  # libraries are loaded with the first
            kept = []

            def join() -> None:
                kept.append(next(sampled))
                join_parts(kept[-1], objective, few, folder, batch_size=options.batch_size)

            cost = seconds(join, session.config.model.device, repeats=1)
            run = kept_run(kept[-1], folder)
        if run is None:
            raise TsAdaptError(f"the run that was timed in {folder} is not there any more; run the same command again")
        scored = min(options.samples, SCORED)
        looks = torch.randn(scored, run.features.shape[1], generator=torch.Generator().manual_seed(0))
        run = replace(run, features=looks, distance=looks[:, 0].abs(), further={})
        reference = Reference(FeatureStatistics.of(looks), looks, True)

        def rate() -> None:
            quality = quality_of({"features": run.features}, scored, reference)
            score(kept[-1], run, scored, reference.statistics, looks, "", 0, run, quality)

        rated = (options.samples / scored) ** 2 * seconds(rate, repeats=1)
        return Pace(each, 0.0, cost + rated + self._figure)

    @cached_property
    def _figure(self) -> float:
        """Seconds of drawing one."""

        def draw() -> None:
            grids = {name: grid.times for name, grid in self.session.starts(self.steps).items()}
            plot_schedules(grids, self.session.noise_schedule, self.solver).savefig(BytesIO())

        return seconds(draw, repeats=1)

    @cached_property
    def _grid(self) -> TimeGrid:
        return next(iter(self.session.starts(self.steps).values()))

    @cached_property
    def _objective(self) -> Objective:
        objective, way = self.session.objective(self.session.solver(self.solver)), self.session.config.derivative
        return objective if way == AUTO else objective.differentiated(way)

    def _noises(self, count: int) -> Batch:
        index, x_T, condition = self.session.training_noises(count)
        return Batch(torch.tensor(index), x_T, x_T, condition)

    def _each(self, run: Callable[[Batch], object], whole: int) -> float:
        """Seconds of `run` a sample, of FEW or of a `whole` batch."""

        def timed(count: int, repeats: int) -> float:
            batch = self._noises(count)
            return seconds(lambda: run(batch), self.session.config.model.device, repeats) / count

        few = min(FEW, whole)
        each = timed(few, 1)
        return each if few == whole or each * whole > LONG else timed(whole, 1)

    def _pace(
        self, measure: Callable[[Batch], Tensor], measured: int, learn: Callable[[Batch], None], learned: int,
        result: float,
    ) -> Pace:  # fmt: skip
        """Of what `measure` and `learn` do with batches of so many samples; SLOWER where there is no gradient."""
        plain = self._each(measure, measured) / self.nfe
        try:
            return Pace(plain, self._each(learn, learned) / self.nfe, result)
        except torch.OutOfMemoryError:
            raise
        except (TsAdaptError, RuntimeError):  # this denoiser has no gradient
            return Pace(plain, SLOWER * plain, result)
