"""Peak memory of gradient search as the steps grow: with checkpointing, and without.

    python benchmarks/search_memory.py [--batch 16] [--steps 5 20] [--device cuda]

One iteration of a per-sample search, that is the solve and the gradient of its distance in the logits of every sample:

    network   bytes alive at the worst moment of what was made in calls of the network, recomputation included: its
              activations, those that wait for the backward pass too
    all       bytes of all tensors at their worst moment: the solver's states, the distance's maps, gradients as well

On the CPU every tensor is followed from its birth to its death; on CUDA the allocator's peak is what there is, and
stands for both. The last line is JSON, each number the peak at the last of `--steps` over that at the first:

    growth         of the network, with checkpointing
    growth_all     of all, with checkpointing
    without        of the network, without checkpointing
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from workload import grid_of, last_line, objective_on, samples_of  # isort: skip  (first: it loads ts_adapt)
import torch

from ts_adapt import Batch, Objective, TimeGrid
from ts_adapt.evaluation.cost import Allocations, peak_memory
from ts_adapt.grids.parametric import logits_to_times, times_to_logits


class NetworkAllocations(Allocations):
    """Follows what is made in calls of the network only."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def peak_of_network(network: Any, work: Callable[[], Any]) -> int:
    """Bytes alive at the worst moment of `work` of what calls of `network` made."""
    with NetworkAllocations() as allocations:

        def tell(inside: bool) -> None:
            allocations.inside = inside

        # always_call: a recomputation is left by an exception as soon as all that is needed is there
        hooks = [
            network.register_forward_pre_hook(lambda *_: tell(True)),
            network.register_forward_hook(lambda *_: tell(False), always_call=True),
        ]
        try:
            work()
        finally:
            for hook in hooks:
                hook.remove()
    return allocations.peak


def iteration(objective: Objective, batch: Batch, static: TimeGrid) -> Callable[[], Any]:
    start = times_to_logits(static.times.to(batch.x_T.device), objective.denoiser.noise_schedule).expand(len(batch), -1)

    def work() -> None:
        logits = start.clone().requires_grad_()
        distance = objective(TimeGrid(logits_to_times(logits, objective.denoiser.noise_schedule)), batch)
        torch.autograd.grad(distance.sum(), logits)

    return work


def peaks(objective: Objective, batch: Batch, steps: int, device: str) -> tuple[int, int]:
    """Bytes of the network's activations, and of everything."""
    work = iteration(objective, batch, grid_of(objective, steps))
    work()
    everything = peak_memory(work, device)
    return peak_of_network(objective.denoiser.network, work) if device == "cpu" else everything, everything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs=2, default=[5, 20])
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    plain = objective_on(asked.device)
    batch = samples_of(plain, asked.batch, teacher_nfe=5)
    growth: dict[bool, tuple[float, float]] = {}
    for checkpoint in (True, False):
        objective = replace(plain, checkpoint=checkpoint)
        few, many = (peaks(objective, batch, steps, asked.device) for steps in asked.steps)
        growth[checkpoint] = many[0] / few[0], many[1] / few[1]
        for name, place in (("network", 0), ("all", 1)):
            at = (
                f"{few[place] / 2**20:8.2f} MiB at N = {asked.steps[0]}, {many[place] / 2**20:8.2f} at {asked.steps[1]}"
            )
            label = f"{'with' if checkpoint else 'without':7s} checkpointing, {name:7s}"
            print(f"{label}: {at}: x {growth[checkpoint][place]:.3f}", flush=True)
    last_line(growth=growth[True][0], growth_all=growth[True][1], without=growth[False][0])


if __name__ == "__main__":
    main()
