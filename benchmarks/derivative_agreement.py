"""How the derivatives in time agree with differences of the distance, network by network, and what each costs.

Cosine and error (|gradient - differences| / |differences|) of `search.derivative.compare`, for the embedded models as
they are, in bfloat16, with weights of 4 bits, and guided. `way taken` is what a search would follow. Then the seconds
of a gradient of the mean distance by each way, in turns, as a share of the exact one's.

    python benchmarks/derivative_agreement.py

The last line is one JSON object: {"cosine": {network: {NFE: {way: cosine}}}, "cost": {way: share}}.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from workload import in_turns, last_line, samples_of  # isort: skip  (first: it loads ts_adapt)
import torch

import ts_adapt
from ts_adapt import Batch, Objective, TimeGrid, integrate
from ts_adapt.assembly import build_quantizer
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.interfaces import DERIVATIVES, Denoiser
from ts_adapt.quantizers.quantization import quantize
from ts_adapt.search.derivative import SAMPLES, compare

PLAIN = "fashion-ddpm-plain"


def of_four_bits() -> Denoiser:
    denoiser, quantizing = ts_adapt.load(PLAIN), build_quantizer("hqq4")
    assert quantizing is not None
    quantize(denoiser.network, quantizing.method, layers=quantizing.layers)
    return denoiser


def guided(scale: float) -> Denoiser:
    return Guided(ts_adapt.load("fashion-ddpm-class"), scale)


NETWORKS: dict[str, Callable[[], Denoiser]] = {
    "fashion-ddpm": partial(ts_adapt.load, "fashion-ddpm"),
    PLAIN: partial(ts_adapt.load, PLAIN),
    f"{PLAIN}, bfloat16": partial(ts_adapt.load, PLAIN, dtype=torch.bfloat16),
    f"{PLAIN}, hqq4": of_four_bits,
    "fashion-ddpm-class, guidance 2.5": partial(guided, 2.5),
}


def samples(objective: Objective, teacher: Objective) -> Batch:
    if not hasattr(objective.denoiser, "unconditional"):
        return samples_of(teacher, SAMPLES)
    batch = samples_of(replace(teacher, denoiser=ts_adapt.load("fashion-ddpm")), SAMPLES)
    condition = {"class_labels": torch.arange(SAMPLES) % 10}
    fine = ts_adapt.build_grid("log_snr", objective.denoiser.noise_schedule, 30)
    with torch.no_grad():
        target = integrate(objective.denoiser, teacher.solver, fine, batch.x_T, condition=condition).x
    return Batch(batch.index, batch.x_T, target, condition)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--rounds", type=int, default=5, help="of the gradients that are timed; 0: none")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    options = parser.parse_args()
    cosine: dict[str, Any] = {}
    for name in options.networks:
        denoiser = NETWORKS[name]()
        distance = ts_adapt.build_distance("features")
        objective = Objective(denoiser, ts_adapt.build_solver(options.solver, denoiser.noise_schedule), distance)
        teacher = replace(objective, solver=ts_adapt.build_solver("unipc-3", denoiser.noise_schedule))
        batch, cosine[name] = samples(objective, teacher), {}
        for nfe in options.nfe:
            found = compare(objective, nfe, batch)
            cosine[name][nfe] = found.cosine
            each = "   ".join(f"{way} {found.cosine[way]:5.2f} ({found.error[way]:5.2f})" for way in found.cosine)
            print(f"{name:34} NFE {nfe:2}   {each}   {found.best} taken", flush=True)
    cost = costs(options) if options.rounds else {}
    last_line(version=ts_adapt.__version__, cosine=cosine, cost=cost)


def costs(options: argparse.Namespace) -> dict[str, float]:
    denoiser = ts_adapt.load(PLAIN)
    objective = Objective(
        denoiser, ts_adapt.build_solver(options.solver, denoiser.noise_schedule), ts_adapt.build_distance("features")
    )
    batch = samples_of(replace(objective, solver=ts_adapt.build_solver("unipc-3", denoiser.noise_schedule)), SAMPLES)
    times = ts_adapt.build_grid("log_snr", denoiser.noise_schedule, 5).times.requires_grad_()

    def gradient(taken: Objective) -> None:
        torch.autograd.grad(taken(TimeGrid(times), batch).sum(), times)

    taken = in_turns({way: partial(gradient, objective.differentiated(way)) for way in DERIVATIVES}, options.rounds)
    cost = {
        way: statistics.median(ours / exact for ours, exact in zip(taken[way], taken["exact"], strict=True))
        for way in DERIVATIVES
    }
    for way, share in cost.items():
        print(f"seconds of a gradient by {way:7} {share:.3f} of exact")
    return cost


if __name__ == "__main__":
    main()
