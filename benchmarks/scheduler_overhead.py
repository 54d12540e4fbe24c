"""What our scheduler costs beside the network: a step of it against diffusers', and the predictors' share of a run.

    python benchmarks/scheduler_overhead.py [--steps 5] [--batch 64] [--rounds 100]

Seconds are CPU seconds of this process, over rounds in which the candidates take turns, so that other work on the
machine falls on all of them alike. A step is timed as timeit does it, by the quickest round: what others take longer is
not the step's own; the medians are printed beside it. The last line is JSON:

    step_ratio        seconds a step outside the network, ours / diffusers': the largest ratio over the solvers that
                      both have; set_timesteps is outside the clock
    one_shot_share    share of a run of the model `fashion-ddpm` that a one-shot predictor takes
    recursive_share   the same for a recursive one
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import ts_adapt  # isort: skip
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from ts_adapt import LearnedScheduler, OneShot, Recursive, attach, build_grid, zoo

PAIRS: dict[str, Callable[[Any], Any]] = {
    "dpmpp-2m": lambda config: DPMSolverMultistepScheduler.from_config(config, solver_order=2),
    "dpmpp-3m": lambda config: DPMSolverMultistepScheduler.from_config(config, solver_order=3),
    "unipc-2": lambda config: UniPCMultistepScheduler.from_config(config, solver_order=2),
    "unipc-3": lambda config: UniPCMultistepScheduler.from_config(config, solver_order=3),
}
"""Our solver -> diffusers' of the same order."""


class Still(nn.Module):
    """In the network's place: always the same answer, at once."""

    def __init__(self, network: nn.Module, answer: Tensor) -> None:
        super().__init__()
        self.config, self.answer = network.config, answer

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.answer


def seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def loop(pipe: Any, scheduler: Any, x: Tensor, steps: int) -> Callable[[], None]:
    """The steps of a run; its times are settled before."""
    scheduler.set_timesteps(steps)

    def run() -> None:
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(pipe.unet(state, t), t, state, return_dict=False)[0]

    return run


def step_ratios(pipe: Any, batch: int, steps: int, rounds: int) -> dict[str, float]:
    x = torch.randn(batch, *shape_of(pipe), generator=torch.Generator().manual_seed(0))
    still, config = Still(pipe.unet, torch.randn_like(x)), pipe.scheduler.config
    pipe = DDPMPipeline(still, pipe.scheduler)
    measured: dict[str, list[float]] = {}
    pairs = {name: (LearnedScheduler.from_grid("uniform", name, config), make(config)) for name, make in PAIRS.items()}
    for _ in range(rounds + 1):
        for name, (ours, theirs) in pairs.items():
            for who, scheduler in (("ours", attach(pipe, ours).scheduler), ("diffusers", theirs)):
                measured.setdefault(f"{name} {who}", []).append(seconds(loop(pipe, scheduler, x, steps)) / steps)
            ts_adapt.detach(pipe)
    quickest = {name: min(values[1:]) for name, values in measured.items()}
    for name, values in measured.items():
        median = statistics.median(values[1:])
        print(f"{name:24s} {1e6 * quickest[name]:8.1f} us a step, median {1e6 * median:8.1f}")
    return {name: quickest[f"{name} ours"] / quickest[f"{name} diffusers"] for name in PAIRS}


def shape_of(pipe: Any) -> tuple[int, int, int]:
    config = pipe.unet.config
    return config.in_channels, config.sample_size, config.sample_size


def predictor_shares(pipe: Any, batch: int, steps: int, rounds: int) -> dict[str, float]:
    """Time spent in the predictor of a run / time of the run, by the predictor's kind."""
    config = pipe.scheduler.config
    noise_schedule = LearnedScheduler.from_config(config).noise_schedule
    times = build_grid("karras", noise_schedule, steps).times
    spent: dict[str, float] = {}
    shares: dict[str, list[float]] = {}
    for kind in (OneShot, Recursive):
        predictor = kind(noise_schedule, times, shape_of(pipe), width=16).eval()
        clocked(predictor, spent)
        schedule = LearnedScheduler.from_predictors(predictor, "unipc-3", config)
        for turn in range(max(3, rounds // 20) + 1):
            attach(pipe, schedule)
            spent.clear()
            total = seconds(lambda: pipe(batch, num_inference_steps=steps, output_type="pt"))
            if turn:
                shares.setdefault(kind.kind, []).append(spent["predictor"] / total)
            ts_adapt.detach(pipe)
    return {kind: statistics.median(values) for kind, values in shares.items()}


def clocked(predictor: nn.Module, spent: dict[str, float]) -> None:
    """Add up the seconds of the predictor's calls in `spent`."""
    forward = predictor.forward

    def timed(*args: Any, **options: Any) -> Any:
        begun = time.process_time()
        try:
            return forward(*args, **options)
        finally:
            spent["predictor"] = spent.get("predictor", 0.0) + time.process_time() - begun

    predictor.forward = timed


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    pipe = DDPMPipeline.from_pretrained(zoo.paths()["fashion-ddpm"])
    pipe.set_progress_bar_config(disable=True)
    ratios = step_ratios(pipe, options.batch, options.steps, options.rounds)
    for name, ratio in ratios.items():
        print(f"{name:24s} {ratio:8.3f} of diffusers'")
    shares = predictor_shares(pipe, options.batch, options.steps, options.rounds)
    print(
        json.dumps(
            {
                "step_ratio": round(max(ratios.values()), 4),
                "one_shot_share": round(shares["one-shot"], 5),
                "recursive_share": round(shares["recursive"], 5),
            }
        )
    )


if __name__ == "__main__":
    main()
