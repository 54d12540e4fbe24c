"""What the benchmarks have in common: few-step solves of the embedded model, a clock, and their last line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import ts_adapt  # isort: skip
import torch
from torch import Tensor

from ts_adapt import Batch, Objective, TimeGrid, integrate
from ts_adapt.cli import parse
from ts_adapt.config import Config
from ts_adapt.evaluation.comparison import share_of_wins
from ts_adapt.evaluation.metrics import ratio, ratio_interval
from ts_adapt.evaluation.tables import percent
from ts_adapt.interfaces import Solver
from ts_adapt.jobs.session import Session
from ts_adapt.teacher.store import TEST_START

MODEL, SOLVER = "fashion-ddpm", "unipc-3"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Experiment:
    """What a config's jobs have learned for one solver and NFE: the start of a benchmark that trains on."""

    config: Config
    session: Session
    solver: Solver
    objective: Objective
    place: tuple[str, int]
    """The solver's name and the NFE."""

    @cached_property
    def static(self) -> TimeGrid:
        """The static grid; TsAdaptError where it has not been searched."""
        return self.session.static(*self.place).grid

    @staticmethod
    def parser(description: str | None) -> argparse.ArgumentParser:
        """Of a benchmark that goes on from a config's teacher and static grid."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--config", default="configs/fashion.yml")
        parser.add_argument("--data_root", help="where the config's jobs left their files, if not where it says")
        parser.add_argument("--solver", default=SOLVER)
        parser.add_argument("--nfe", type=int, default=5)
        return parser

    @classmethod
    def of(cls, options: argparse.Namespace, more: Sequence[str] = ()) -> Experiment:
        """`more`: options of the config, as commands take them."""
        place = ["--data_root", options.data_root] if options.data_root else []
        config = parse(["train", "--config", options.config, *place, *more]).config
        session = Session(config, progress=False)
        solver = session.solver(options.solver)
        return cls(config, session, solver, session.objective(solver), (options.solver, options.nfe))

    def unseen(self, count: int) -> tuple[Batch, Batch]:
        """Training samples: those that validate predictors, and `count` behind all learned from or validated on."""
        config, known = self.config, self.config.train.samples
        begin = max(known, config.static_samples + config.static_validating)
        _, batch = self.session.teacher("train", begin + count)
        return batch.rows(slice(known - config.train.validating, known)), batch.rows(slice(begin, None))

    def mean_distance(self, batch: Batch) -> float:
        """Along the static grid: what is to be beaten."""
        return float(self.objective.measure(self.static, batch).mean())


def compared(
    title: str, distances: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, float | list[float]]]:
    """Print and return mean and median of the distances `(n,)` of each schedule, and how far the first of each pair is
    from the second on the same samples: by mean, with its 95 % interval, by median, and the share that is nearer."""
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, each in distances.items():
        found[name] = {"mean": float(each.mean()), "median": float(each.median())}
        print(f"{title}, {name}: mean {each.mean():.5f}, median {each.median():.5f}")
    for name, against in pairs:
        one, other = distances[name], distances[against]
        mean, interval, median = ratio(one, other), ratio_interval(one, other), _of_medians(one, other)
        nearer = share_of_wins(one, other)
        found[f"{name} / {against}"] = {"mean": mean, "interval": [*interval], "median": median, "nearer": nearer}
        print(
            f"{title}, {name} beside {against}: mean {percent(mean)} ({' to '.join(map(percent, interval))}), median "
            f"{percent(median)}, nearer on {100 * nearer:.0f} % of {len(one)}",
            flush=True,
        )
    return found


def _of_medians(one: Tensor, other: Tensor) -> float:
    return ratio([float(one.median())], [float(other.median())])


def objective_on(device: str = "cpu", dtype: torch.dtype | None = None) -> Objective:
    """The distance, in features, of UniPC-3 on the embedded model, its network in `dtype`, to its teacher."""
    denoiser = ts_adapt.load(MODEL, device=device, dtype=dtype)
    return Objective(
        denoiser, ts_adapt.build_solver(SOLVER, denoiser.noise_schedule), ts_adapt.build_distance("features", device)
    )


@torch.no_grad()
def samples_of(objective: Objective, count: int, teacher_nfe: int = 30, batch_size: int = 64) -> Batch:
    """The first `count` test noises, and where a teacher of `teacher_nfe` evaluations takes them."""
    denoiser = objective.denoiser
    index = range(TEST_START, TEST_START + count)
    x_T = ts_adapt.initial_noise(0, index, denoiser.shape).to(next(denoiser.network.parameters()).device)
    fine = ts_adapt.build_grid("log_snr", denoiser.noise_schedule, teacher_nfe)
    target = [integrate(denoiser, objective.solver, fine, part).x for part in x_T.split(batch_size)]
    return Batch(torch.tensor(index), x_T, torch.cat(target), {})


def grid_of(objective: Objective, nfe: int) -> TimeGrid:
    """The zoo's learned static grid where it has one for `nfe`, else a fixed one."""
    learned = ts_adapt.LearnedScheduler.from_pretrained(ts_adapt.zoo.schedules()[f"{MODEL}-{SOLVER}"]).source.grids
    return learned[nfe] if nfe in learned else ts_adapt.build_grid("karras", objective.denoiser.noise_schedule, nfe)


def timed(work: Callable[[], Result], device: str = "cpu") -> tuple[Result, float]:
    """What `work` returns, and the seconds that it takes.

    Those of the processor on one thread of the CPU, so that other work on the machine counts little; with more threads,
    whose waiting would count too, and on CUDA, those of the wall.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if device != "cpu" else _nothing
    wait()
    begun = clock()
    result = work()
    wait()
    return result, clock() - begun


def _nothing() -> None:
    pass


def in_turns(candidates: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """The seconds of each candidate, by name, in `rounds` rounds in which all take turns, behind one that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, work in candidates.items():
            _, spent = timed(work, device)
            if turn:
                taken[name].append(spent)
    return taken


def last_line(**numbers: Any) -> None:
    """Print the numbers as one line of JSON, rounded to four places."""
    print(json.dumps(_rounded(numbers)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value
