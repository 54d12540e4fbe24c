"""What cachers save and what they change, on the embedded model.

python benchmarks/cacher_cost.py [--samples 64] [--nfe 10 20] [--rounds 3] [--guidance 3]

For each NFE and cacher: MFLOP and milliseconds an image, and the mean paired distance (features, l2) to the solve
without a cacher from the same noises. Milliseconds are those of the processor, the median over rounds in which the
candidates take turns, so that other work on the machine counts little. With a guidance scale the model is the one with
classes, guided.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import ts_adapt
from ts_adapt.cachers import DeepCache, TGate, attached
from ts_adapt.evaluation.cost import count_flops

CACHERS: dict[str, Callable[[int], list[Any]]] = {
    "none": lambda nfe: [],
    "deepcache 2": lambda nfe: [DeepCache(2)],
    "deepcache 3": lambda nfe: [DeepCache(3)],
    "deepcache 3 quadratic": lambda nfe: [DeepCache(3, refresh="quadratic")],
    "deepcache 2 branch 2": lambda nfe: [DeepCache(2, branch=2)],
    "deepcache 3 branch 2": lambda nfe: [DeepCache(3, branch=2)],
    "tgate half": lambda nfe: [TGate(nfe // 2)],
    "tgate half, self 2": lambda nfe: [TGate(nfe // 2, self_attention_interval=2)],
    "tgate half, self 2, deepcache 2": lambda nfe: [TGate(nfe // 2, self_attention_interval=2), DeepCache(2)],
}


@torch.inference_mode()
def table(samples: int, nfe: int, guidance: float, rounds: int) -> None:
    model = "fashion-ddpm" if guidance == 1 else "fashion-ddpm-class"
    denoiser = ts_adapt.load(model)
    sampler = denoiser if guidance == 1 else ts_adapt.Guided(denoiser, guidance)
    solver, grid = (
        ts_adapt.build_solver("unipc-3", denoiser.noise_schedule),
        ts_adapt.build_grid("karras", denoiser.noise_schedule, nfe),
    )
    x_T = ts_adapt.initial_noise(0, range(samples), denoiser.shape)
    distances = [ts_adapt.build_distance(name) for name in ("features", "l2")]

    def solve(count: int) -> torch.Tensor:
        condition = {} if guidance == 1 else {"class_labels": torch.arange(count) % 10}
        return ts_adapt.integrate(sampler, solver, grid, x_T[:count], condition=condition).x

    taken: dict[str, list[float]] = {name: [] for name in CACHERS}
    found: dict[str, torch.Tensor] = {}
    flops: dict[str, int] = {}
    for _ in range(rounds):
        for name, made in CACHERS.items():
            with attached(denoiser.network, *made(nfe)):
                flops[name] = count_flops(lambda: solve(1))
                began = time.process_time()
                found[name] = solve(samples)
                taken[name].append((time.process_time() - began) / samples)
    print(f"{model}, guidance {guidance:g}, NFE {nfe}, {samples} samples, UniPC-3 on karras")
    for name, x in found.items():
        features, l2 = (float(distance(x, found["none"]).mean()) for distance in distances)
        print(
            f"  {name:32s} {flops[name] / 1e6:8.1f} MFLOP {1e3 * statistics.median(taken[name]):7.2f} ms "
            f"  features {features:.4f}  l2 {l2:.4f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--nfe", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=1.0)
    options = parser.parse_args()
    for nfe in options.nfe:
        table(options.samples, nfe, options.guidance, options.rounds)


if __name__ == "__main__":
    main()
