"""How much of sampling and of per-sample search is spent inside the network, forward and backward.

    python benchmarks/network_share.py [--batch 64] [--nfe 3 5 7 10] [--iterations 2] [--rounds 3] [--device cuda]
                                       [--channels-last] [--bf16] [--compile]

A mark at the network's inputs and one at its output part the time of the whole work: forward, the network has it from
its inputs to its output; backward, from the gradient of its output until those of all its inputs, state and times, are
there. So numerator and denominator are of the same run. (Timed alone on the same inputs, the network would meet other
caches and another heap, and the quotient of two runs may exceed 1.) On one thread the clock is the processor's, which
other work on the machine does not touch, on more the wall's; on CUDA the marks are events in the stream, between which
the device may wait for the host, in the network and outside alike.

Neither decoding nor writing of files is in the clock: the model has no decoder. The distance's network is no part of
the network: it is clocked by itself, and shown; its cost is that of one solve, so that it weighs most at few steps.
With options, the changed network takes turns with the plain one. The last line is JSON, of medians over rounds, and
about the changed network where there is one:

    sampling   share of `integrate`, without gradient, of the time of all NFEs together
    search     share of `search_per_sample`, without restarts, likewise
    least      the share of the search at the NFE where it is least
    speedup    seconds of the plain network / of the changed one: of the sampling, of the search
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from workload import grid_of, last_line, objective_on, samples_of, timed  # isort: skip  (first: it loads ts_adapt)
import torch
from clock import Clock, ClockedDistance

from ts_adapt import Batch, Objective, TimeGrid, integrate, search_per_sample
from ts_adapt.search.per_sample import PerSampleOptions


class Measured:
    """An objective with its network and its distance on clocks of their own."""

    def __init__(self, objective: Objective, device: str) -> None:
        self.device = device
        self.clocks = {"network": Clock(device), "distance": Clock(device)}
        denoiser: Any = objective.denoiser
        denoiser.call = self.clocks["network"].on(denoiser.call, 1, 2)
        distance = ClockedDistance(objective.distance, self.clocks["distance"])
        self.objective = Objective(denoiser, objective.solver, distance)

    def run(self, work: Callable[[Objective], Any]) -> dict[str, float]:
        """Seconds of `work` in all, and on each clock."""
        _, total = timed(lambda: work(self.objective), self.device)
        return {"all": total, **{name: clock.spent() for name, clock in self.clocks.items()}}


def changed(asked: argparse.Namespace) -> Objective:
    """The objective with its network as the options want it."""
    objective = objective_on(asked.device, torch.bfloat16 if asked.bf16 else None)
    denoiser: Any = objective.denoiser
    if asked.channels_last:
        denoiser.network.to(memory_format=torch.channels_last)
    if asked.compile:
        denoiser.network = torch.compile(denoiser.network)
    return objective


def works(batch: Batch, grid: TimeGrid, iterations: int) -> dict[str, Callable[[Objective], Any]]:
    """What is measured, by name."""
    options = PerSampleOptions(iterations=iterations, random_starts=0)

    @torch.no_grad()
    def sampling(objective: Objective) -> None:
        integrate(objective.denoiser, objective.solver, grid, batch.x_T)

    return {
        "sampling": sampling,
        "search": lambda objective: search_per_sample(objective.differentiated("exact"), batch, grid, options),
    }


def in_turns(
    work: Callable[[Objective], Any], networks: dict[str, Measured], rounds: int
) -> dict[str, dict[str, float]]:
    """For each network the medians of the seconds of `work`, behind a round that warms up."""
    turns = [{label: network.run(work) for label, network in networks.items()} for _ in range(rounds + 1)][1:]
    return {
        label: {part: statistics.median(turn[label][part] for turn in turns) for part in turns[0][label]}
        for label in networks
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 5, 7, 10])
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    for name in ("--channels-last", "--bf16", "--compile"):
        parser.add_argument(name, action="store_true")
    asked = parser.parse_args()
    plain = objective_on(asked.device)
    batch = samples_of(plain, asked.batch)
    networks = {"plain": Measured(plain, asked.device)}
    if asked.channels_last or asked.bf16 or asked.compile:
        networks["changed"] = Measured(changed(asked), asked.device)
    spent: dict[tuple[str, str], list[dict[str, float]]] = {}
    for nfe in asked.nfe:
        for name, work in works(batch, grid_of(plain, nfe), asked.iterations).items():
            for label, parts in in_turns(work, networks, asked.rounds).items():
                spent.setdefault((name, label), []).append(parts)
                network, distance = (parts[clock] / parts["all"] for clock in ("network", "distance"))
                print(
                    f"NFE {nfe:2d} {name:8s} {label:8s} {1e3 * parts['all'] / len(batch):8.2f} ms a sample; "
                    f"network {network:.4f}, distance {distance:.4f}, the rest {1 - network - distance:.4f}",
                    flush=True,
                )
    total = {key: {part: sum(parts[part] for parts in rows) for part in rows[0]} for key, rows in spent.items()}
    judged = list(networks)[-1]
    shares = {name: total[name, judged]["network"] / total[name, judged]["all"] for name in ("sampling", "search")}
    shares["least"] = min(parts["network"] / parts["all"] for parts in spent["search", judged])
    speedup = {name: total[name, "plain"]["all"] / total[name, judged]["all"] for name in ("sampling", "search")}
    last_line(**shares, **({"speedup": speedup} if len(networks) > 1 else {}))


if __name__ == "__main__":
    main()
