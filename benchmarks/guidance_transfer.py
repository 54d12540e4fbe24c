"""What a schedule that was learned under one guidance scale is worth under others, on the embedded text-to-image model.

Mean and median paired distance (features) to the teacher under each scale, of fixed grids and of the zoo's schedules,
which were learned under 4. Prompts are among those of training, noises are others.

    python benchmarks/guidance_transfer.py [--scales 1.5 2.5 4 6 8] [--nfe 3 5] [--samples 48]

The last line is one JSON object: {scale: {NFE: {schedule: {"mean": ..., "median": ...}}}}.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from workload import last_line  # isort: skip  (first: it loads ts_adapt)
import torch

import ts_adapt
from ts_adapt import Guided, TimeGrid, build_distance, build_grid, build_solver, integrate, zoo
from ts_adapt.interfaces import StepPolicy
from ts_adapt.schedulers.scheduler import LearnedScheduler

MODEL, SOLVER, SEED = "emoji-sd", "unipc-3", 7
PROMPTS = Path(__file__).resolve().parents[1] / "configs" / "emoji" / "prompts.txt"
LEARNED = {"static+shift+history+guidance": "emoji-sd-unipc-3", "recursive": "emoji-sd-unipc-3-recursive"}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2.5, 4.0, 6.0, 8.0])
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--samples", type=int, default=48)
    options = parser.parse_args()
    denoiser = ts_adapt.load(MODEL)
    noise_schedule, solver = denoiser.noise_schedule, build_solver(SOLVER, denoiser.noise_schedule)
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[-options.samples :]
    condition, x_T = denoiser.encode(prompts), ts_adapt.initial_noise(SEED, range(len(prompts)), denoiser.shape)
    distance = build_distance("features", shape=(3, 64, 64))
    teacher = build_grid("log_snr", noise_schedule, 30)
    found: dict[float, dict[int, dict[str, dict[str, float]]]] = {}
    for scale in options.scales:
        guided = Guided(denoiser, scale)

        def images(schedule: TimeGrid | StepPolicy, guided: Guided = guided) -> torch.Tensor:
            return guided.decode(integrate(guided, solver, schedule, x_T, condition=condition).x, condition)

        expected = images(teacher)
        for nfe in options.nfe:
            schedules: dict[str, TimeGrid | StepPolicy] = {
                name: build_grid(name, noise_schedule, nfe, rescale=True) for name in ("quadratic", "ays-svd")
            }
            for name, of_zoo in LEARNED.items():
                scheduler = LearnedScheduler.from_pretrained(zoo.schedules()[of_zoo])
                plan = scheduler.source.plan(nfe, noise_schedule)
                schedules[name] = plan.grid or plan.predictor.policy(nfe)
            for name, schedule in schedules.items():
                apart = distance(images(schedule), expected)
                figures = {"mean": float(apart.mean()), "median": float(apart.median())}
                found.setdefault(scale, {}).setdefault(nfe, {})[name] = figures
                said = ", ".join(f"{what} {figure:.4f}" for what, figure in figures.items())
                print(f"guidance {scale:g}, NFE {nfe}, {name}: {said}", flush=True)
    last_line(**{f"{scale:g}": figures for scale, figures in found.items()})


if __name__ == "__main__":
    main()
