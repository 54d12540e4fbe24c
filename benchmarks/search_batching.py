"""Per-sample search, whole batches against one sample at a time: seconds a sample and iteration.

    OMP_NUM_THREADS=1 python benchmarks/search_batching.py [--batch 64] [--nfe 5] [--iterations 20] [--alone 4]
    OMP_NUM_THREADS=2 python benchmarks/search_batching.py                                [--rounds 3] [--device cuda]

    batched   `search_per_sample` of a batch, without restarts; the two forward solves more that it takes, for the
              distance of the start and that of the last grid, are in the clock
    alone     the search of ALD3, sample after sample: RMSprop (lr 5e-3, momentum .9) on N + 1 logits, ones at the start
              -> softmax -> cumsum -> min-max to the range of log-SNR; gradient clipped to norm 1; best grid kept

Both with the same model, solver (UniPC-3), distance, and iterations; `--alone` samples stand for all of them on the
second side. The two sides take turns. The two commands answer two questions:

    one thread    what is a batch worth on the same core? Each side has one, and a process for each core makes both as
                  many times as fast: the ratio is that of a machine whose cores are kept busy by processes. The seconds
                  are those of the processor, which other work on the machine does not touch
    two threads   what is it worth on two cores, used as ALD3 uses them? Each side is one process that has both cores. A
                  batch of one is too little work for two threads, which then wait for each other; a batch of 64 is not.
                  The seconds are those of the wall: run it while the two cores have nothing else to do

The last line is JSON:

    ratio   seconds a sample alone / batched: the median over rounds
"""

from __future__ import annotations

import argparse
import statistics

from workload import grid_of, in_turns, last_line, objective_on, samples_of  # isort: skip  (first: it loads ts_adapt)
import torch
from torch import Tensor

from ts_adapt import Batch, Objective, TimeGrid, search_per_sample
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.numerics import finite_log_snr_range
from ts_adapt.search.per_sample import PerSampleOptions


def times_of(logits: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """Times `(N+1,)` of N + 1 logits, as ALD3 and LD3 have them."""
    first, last = finite_log_snr_range(noise_schedule)
    rising = torch.softmax(logits, -1).cumsum(-1)
    share = (rising - rising[0]) / (rising[-1] - rising[0])
    return noise_schedule.time(first + (last - first) * share).clamp(noise_schedule.t_min, noise_schedule.t_max)


def search_alone(objective: Objective, batch: Batch, steps: int, iterations: int) -> tuple[Tensor, float]:
    """The best grid and its distance, for a batch of one sample."""
    logits = torch.ones(steps + 1, dtype=torch.float64, device=batch.x_T.device, requires_grad=True)
    optimizer = torch.optim.RMSprop([logits], lr=5e-3, momentum=0.9)
    best, best_times = float("inf"), torch.empty(0)
    for _ in range(iterations):
        optimizer.zero_grad()
        times = times_of(logits, objective.denoiser.noise_schedule)
        distance = objective(TimeGrid(times), batch).sum()
        distance.backward()
        torch.nn.utils.clip_grad_norm_([logits], 1.0)
        optimizer.step()
        if float(distance.detach()) < best:
            best, best_times = float(distance.detach()), times.detach()
    return best_times, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--alone", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    objective = objective_on(asked.device)
    batch, static = samples_of(objective, asked.batch), grid_of(objective, asked.nfe)
    few = batch.rows(slice(0, asked.alone)).split(1)
    options = PerSampleOptions(iterations=asked.iterations, random_starts=0)
    taken = in_turns(
        {
            "batched": lambda: search_per_sample(objective, batch, static, options),
            "alone": lambda: [search_alone(objective, one, asked.nfe, asked.iterations) for one in few],
        },
        asked.rounds,
        asked.device,
    )
    each = {
        name: [spent / samples / asked.iterations for spent in taken[name]]
        for name, samples in (("batched", len(batch)), ("alone", len(few)))
    }
    for name, values in each.items():
        print(f"{name:8s} {1e3 * statistics.median(values):8.2f} ms a sample and iteration")
    ratios = [alone / batched for alone, batched in zip(each["alone"], each["batched"], strict=True)]
    print(f"ratios of the rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; {torch.get_num_threads()} thread(s)")
    last_line(ratio=statistics.median(ratios))


if __name__ == "__main__":
    main()
